"""Which drafted tokens must be the target's choice.

A policy gives every drafted token a score; the highest are anchors, which must be the target's choice, and a score that
is not a number makes an anchor whatever the others are. To add one, write a file with a `Policy` and add a line to
`POLICIES`.
"""

from vllm_lvspec.verify.policies.fly import FLY
from vllm_lvspec.verify.policies.lvspec import LVSPEC
from vllm_lvspec.verify.policies.policy import Evidence, Policy
from vllm_lvspec.verify.policies.random import RANDOM
from vllm_lvspec.verify.policies.strict import STRICT

__all__ = ["POLICIES", "Evidence", "Policy"]

POLICIES: dict[str, Policy] = {
    "strict": STRICT,
    "fly": FLY,
    "lvspec": LVSPEC,
    "random": RANDOM,
}
