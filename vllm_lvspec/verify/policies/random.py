"""As many fillers as LVSpec has, chosen blindly: what relevance is worth is what it gains over this. For benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_lvspec.verify.policies.policy import Evidence, Policy, share_of_chain

if TYPE_CHECKING:
    from vllm_lvspec.config import LVSpecConfig


def _blind(evidence: Evidence, config: LVSpecConfig) -> torch.Tensor:
    """A hash of the token's place in its sequence: the same in every run, and on every rank."""
    mixed = (evidence.places + 1) * 0x9E3779B1 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77 % 2**32
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE3D % 2**32
    return (mixed % 2**24).float() / 2**24


RANDOM = Policy(score=_blind, num_fillers=share_of_chain, has_relaxation=True)
