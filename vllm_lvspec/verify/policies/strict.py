"""Every drafted token must be the target's choice: lossless."""

from vllm_lvspec.verify.policies.policy import Policy

STRICT = Policy()
