"""What the drafter is told of a running request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vllm_lvspec.draft.pruning import VisualGrid


@dataclass(frozen=True)
class VisualItem:
    """One image or video in a prompt.

    `rows`: indices among the prompt's tokens that its embeddings replace, ascending, int64 `[num_embeddings]`.
    `payload` is what `DraftModel.encode` needs, or None where vLLM has stripped it; `seed` follows from the identifier.
    """

    identifier: str
    is_video: bool
    grid: VisualGrid
    rows: np.ndarray
    payload: Any
    seed: int = 0


@dataclass(slots=True)  # one is made for each request and step
class DraftRequest:
    """One running request: `token_ids [num_tokens]` are its prompt and all that was emitted, the newest token last.

    `num_verified`: tokens of its last draft that were verified in this step. `ends`: tokens behind which drafting stops
    where drafted tokens can be seen as they come; `is_done`: whether this step has emitted the answer's end.
    `target_slots`: from places of tokens in the sequence (int64) to their slots in the target's KV cache, for models
    that copy; all but the newest token are there. `salt`: its prompt is not read in pages of others that have another.
    """

    req_id: str
    token_ids: np.ndarray
    num_prompt_tokens: int
    items: Sequence[VisualItem]
    prompt: Any  # what `DraftModel.prompt_positions` needs
    max_draft_tokens: int  # what is left of the request's length behind another token of the target's own
    num_verified: int = 0
    ends: frozenset[int] = frozenset()
    is_done: bool = False
    target_slots: Callable[[np.ndarray], np.ndarray] | None = None
    salt: str | None = None

    @property
    def goes_on(self) -> bool:
        """Whether it is part of the next step."""
        return not self.is_done and self.max_draft_tokens >= 0


class Candidate(NamedTuple):
    """A request that could be drafted for: its place among the step's, and how many tokens at most."""

    place: int
    request: DraftRequest
    length: int
