"""What a policy is, and what it may look at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_lvspec.config import LVSpecConfig


@dataclass(frozen=True)
class Evidence:
    """What is known of a step's drafted tokens, flat over requests as in vLLM.

    `logits [num_drafted, vocab_size]` float32: the target's, after processors, temperature, top-k and top-p;
    `exact [num_drafted]` bool: passes vLLM's own test; `relevance [num_drafted]` float32: A_s, NaN where none can be
    had; `starts [num_requests + 1]` int32: where each request's tokens begin; `places [num_drafted]` int64: where in
    its request's sequence a token would stand.
    """

    logits: torch.Tensor
    exact: torch.Tensor
    relevance: torch.Tensor
    starts: torch.Tensor
    places: torch.Tensor

    @property
    def requests(self) -> torch.Tensor:
        """Whose token each is: `[num_drafted]`, int64."""
        rows = torch.arange(len(self.exact), device=self.exact.device)
        return torch.searchsorted(self.starts[1:], rows, right=True)


@dataclass(frozen=True)
class Policy:
    """How fillers are told from anchors.

    `score(evidence, config) -> [num_drafted]` float32, or None: everything is an anchor. `num_fillers(relaxation, k)`:
    how many of k drafted tokens are fillers. `uses_relevance`: whether the score needs visual features.
    `has_relaxation`: whether relaxation decides how loose it is, and anchors may shift. `is_guarded`: whether guards
    and the floor on probabilities are for it. `reads_past_end`: whether what is drafted behind an end token counts.
    """

    score: Callable[[Evidence, LVSpecConfig], torch.Tensor] | None = None
    num_fillers: Callable[[float, int], int] = lambda relaxation, k: 0
    uses_relevance: bool = False
    has_relaxation: bool = False
    is_guarded: bool = True
    reads_past_end: bool = False

    def is_loose(self, relaxation: float) -> bool:
        """Whether anything but the target's choices may be emitted."""
        return self.score is not None and (relaxation > 0 or not self.has_relaxation)

    def least_length(self, relaxation: float, most: int) -> int:
        """The shortest chain of which almost as large a share are fillers as of one of `most`. Of one drafted token,
        lambda 0.9 makes no filler: shorter drafts are verified more strictly, and bring less than their probabilities
        promise."""
        share = self.num_fillers(relaxation, most) / most
        return next(k for k in range(1, most + 1) if self.num_fillers(relaxation, k) >= 0.9 * share * k)


def share_of_chain(relaxation: float, k: int) -> int:
    """LVSpec's lambda: the share of a chain of k that is fillers. Counted so that 0.7 of 10 are 7, not 6."""
    return math.floor(relaxation * k + 1e-9)
