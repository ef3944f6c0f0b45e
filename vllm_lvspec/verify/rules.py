"""What each request allows, as the acceptance kernel takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_lvspec.config import LVSpecConfig
from vllm_lvspec.device import upload
from vllm_lvspec.kernels.acceptance import SPECIAL, Rules
from vllm_lvspec.verify.guards import KINDS
from vllm_lvspec.verify.policies import POLICIES


@dataclass(frozen=True)
class RequestRules:
    """One request's policy and end tokens.

    `stop_ids`: its own end tokens; `ends`: whether the model's end tokens end it (not under `ignore_eos`).
    """

    policy: str = "strict"
    relaxation: float = 0.0
    stop_ids: tuple[int, ...] = ()
    ends: bool = True

    @property
    def is_strict(self) -> bool:
        """Whether nothing but the target's choices is ever emitted."""
        return not POLICIES[self.policy].is_loose(self.relaxation)

    @property
    def uses_relevance(self) -> bool:
        return POLICIES[self.policy].uses_relevance

    def as_strict(self) -> RequestRules:
        """The same request where nothing may be loose."""
        return RequestRules("strict", 0.0, self.stop_ids, self.ends)


def batch_rules(requests: Sequence[RequestRules], config: LVSpecConfig, kinds: torch.Tensor, max_drafted: int) -> Rules:
    """`Rules` of a batch, on the device of `kinds`; chains may have up to `max_drafted` tokens.

    Nobody shifts, and nothing is loose, where a request is strict or its relaxation is 0.
    """
    guards = SPECIAL
    for name in config.guards:
        guards |= KINDS[name]
    num_stops = max(len(r.stop_ids) for r in requests)
    policies = [POLICIES[r.policy] for r in requests]
    fillers = [
        [0 if r.is_strict else policy.num_fillers(r.relaxation, k) for k in range(max_drafted + 1)]
        for r, policy in zip(requests, policies, strict=True)
    ]
    threshold = float("inf") if config.anchor_threshold is None else config.anchor_threshold

    may_shift = [p.has_relaxation and not r.is_strict for r, p in zip(requests, policies, strict=True)]
    columns = {
        "num_fillers": np.array(fillers, np.int32),
        "thresholds": np.array([threshold if p.uses_relevance else np.inf for p in policies], np.float32),
        "probability_floors": np.array([config.probability_floor * p.is_guarded for p in policies], np.float32),
        "windows": np.array([config.shift_window * may for may in may_shift], np.int32),
        "guards": np.array([guards if p.is_guarded else SPECIAL for p in policies], np.int32),
        "stop_ids": np.array([[*r.stop_ids, *[-1] * (num_stops - len(r.stop_ids))] for r in requests], np.int32),
        "ends": np.array([r.ends for r in requests], bool),
    }
    there = dict(zip(columns, upload(list(columns.values()), kinds.device), strict=True))
    return Rules(**there, kinds=kinds, back_only=config.shift_direction == "back")
