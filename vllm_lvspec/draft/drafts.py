"""What has been drafted in a step, at which the device may still be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_lvspec.draft.learned import RequestHistory


@dataclass(frozen=True)
class Drafted:
    """A request that is drafted for: which of the step's, how many tokens it has, what is learned of it, and the tokens
    that end it."""

    request: int
    num_tokens: int
    history: RequestHistory
    ends: frozenset[int]


@dataclass
class Drafts:
    """Of the requests of one step, in their order.

    `lengths`: tokens of each; `tokens`: themselves, once the drafts are finished. Row n of `token_ids [most_tokens,
    num_drafted]` (int64, on the device) holds token n of those of `drafted` that `members[n]` names, from the left;
    `on_host`: the same, on the way to the host. Both are None where nothing is drafted.
    """

    lengths: list[int]
    tokens: list[list[int]] = field(default_factory=list)
    drafted: list[Drafted] = field(default_factory=list)
    token_ids: torch.Tensor | None = None
    on_host: torch.Tensor | None = None
    members: list[np.ndarray] = field(default_factory=list)
    reads_prompts: bool = False
    # Marks of the device's clock: the start, when first tokens were known, and when all were there.
    begin: Any = None
    caught_up: Any = None
    end: Any = None

    def columns(self) -> dict[int, int]:
        """In which column of `token_ids` a request's draft is, where each is in one, as in drafts of known length."""
        assert all(members[-1] == len(members) - 1 for members in self.members)
        return {drafted.request: column for column, drafted in enumerate(self.drafted)}
