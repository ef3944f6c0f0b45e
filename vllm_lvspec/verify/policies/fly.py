"""FLy (arXiv 2511.22972): a miss passes where the target is undecided and what follows is right.

As vLLM 0.33 does it (`rejection_sample_method: "fly"`): the entropy of the target's three likeliest tokens, not
normalised, must reach a threshold, and the next W drafted tokens must all be the target's choices; a miss with fewer
drafted tokens behind it never passes. There are no guards and no floor on probabilities. What is drafted behind an end
token counts, as it does there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_lvspec.verify.policies.policy import Evidence, Policy

if TYPE_CHECKING:
    from vllm_lvspec.config import LVSpecConfig

_TOP = 3


def entropy_of_top(logits: torch.Tensor, count: int = _TOP) -> torch.Tensor:
    """-sum p log p over the `count` likeliest tokens of each row, p not normalised: `[rows]`, nats."""
    best = logits.topk(min(count, logits.shape[-1]), dim=-1).values
    logprobs = best - logits.logsumexp(-1, keepdim=True)
    return -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(-1)


def _deferred(evidence: Evidence, config: LVSpecConfig) -> torch.Tensor:
    num_drafted = len(evidence.exact)
    index = torch.arange(num_drafted, device=evidence.exact.device)
    ends = evidence.starts.long()[1:][evidence.requests]
    # Number of misses before each token, so that a window is right where none is added.
    misses = torch.nn.functional.pad((~evidence.exact).long().cumsum(0), (1, 0))
    until = index + 1 + config.fly_window
    window_right = (misses[until.clamp(max=num_drafted)] == misses[index + 1]) & (until <= ends)
    passes = window_right & (entropy_of_top(evidence.logits) >= config.fly_entropy)
    return torch.where(passes, 0.0, float("nan"))


FLY = Policy(score=_deferred, num_fillers=lambda relaxation, k: k, is_guarded=False, reads_past_end=True)
