"""How far to draft in a step: as long as another drafted token is worth its cost.

A drafted token pays where the chance that it will be accepted, over what it costs the drafter and the target, is above
what a step yields on average. Chances come from the drafter's own confidence and from what became of earlier drafts.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np

from vllm_lvspec.draft.costs import Load, StepCosts


class DraftPlan:
    """One step's drafting for a batch: who drafts another token.

    `rates [num_requests]`: each request's mean chance that a drafted token is accepted. `target_context`,
    `draft_context [num_requests]`: tokens in the target's and the drafter's cache. `num_others`: requests of the step
    that have no drafts, with `others_context` tokens in the target's cache. `most_rows`: that the step has room for.
    """

    def __init__(
        self,
        costs: StepCosts,
        rates: np.ndarray,
        target_context: np.ndarray,
        draft_context: np.ndarray,
        max_length: int,
        num_others: int = 0,
        others_context: float = 0.0,
        most_rows: int = sys.maxsize,
    ):
        self.costs = costs
        self.rates = rates
        self.target_context = target_context
        self.draft_context = draft_context
        self.survival = np.ones(len(rates))  # the chance that all that was drafted so far will be accepted
        self.rows = len(rates) + num_others
        self.most_rows = most_rows
        self.max_length = max_length
        self.tokens = float(self.rows)  # expected from this step; each request gets one of the target's own
        own = float(target_context.sum())
        self.load = Load(self.rows, len(rates), own + others_context, own, float(draft_context.sum()))
        self._drafted = 0.0  # seconds
        self._further = 0.0  # tokens of context that drafted tokens read
        self._verified = float(costs.of_target(self.rows, self.load.target_context))

    @property
    def cost(self) -> float:
        """Seconds that this step takes."""
        return self._drafted + self._verified

    # What a forward costs by its number of rows: it is asked for every token, if any is drafted.
    @functools.cached_property
    def _draft(self) -> np.ndarray:
        return self.costs.of_draft(np.arange(len(self.rates) + 1))

    @functools.cached_property
    def _target(self) -> tuple[np.ndarray, tuple[np.ndarray, float] | None]:
        """With all contexts, and its bounds."""
        rows = np.arange(self.load.num_requests + len(self.rates) * self.max_length + 1)
        bounds = self.costs.bounds(self.load, rows, self.max_length)
        return self.costs.of_target(rows, self.load.target_context), bounds

    def _verification(self, rows: int | slice, further: float | np.ndarray) -> Any:
        target, bounds = self._target
        seconds = target[rows] + self.costs.target_per_row_context * further
        if bounds is None:
            return seconds
        least, most = bounds
        return np.minimum(np.maximum(seconds, least[rows]), most)

    def take(self, requests: np.ndarray, chances: np.ndarray) -> None:
        """Count one drafted token, accepted with `chances`, for each of `requests` (indices)."""
        self.survival[requests] *= chances
        self.tokens += float(self.survival[requests].sum())
        drafting = self._draft[len(requests)] + self.costs.draft_per_context * self.draft_context[requests].sum()
        is_first = self.rows == self.load.num_requests
        self._drafted += self.costs.first * drafting if is_first else drafting
        self._further += self.target_context[requests].sum()
        self.rows += len(requests)
        self._verified = self._verification(self.rows, self._further)

    def going_on(self, requests: np.ndarray) -> np.ndarray:
        """Those of `requests` (indices, in their order) for whom another token raises the step's tokens a second."""
        gains = self.survival[requests] * self.rates[requests]
        num = min(len(requests), self.most_rows - self.rows)
        if num < 1:
            return requests[:0]
        order = np.argsort(-gains, kind="stable")[:num]
        ordered = requests[order]
        tokens = self.tokens + gains[order].cumsum()
        drafting = self._draft[1 : num + 1] + self.costs.draft_per_context * self.draft_context[ordered].cumsum()
        further = self._further + self.target_context[ordered].cumsum()
        verifying = self._verification(slice(self.rows + 1, self.rows + num + 1), further)
        rates = tokens / (self._drafted + drafting + verifying)
        best = int(rates.argmax())
        chosen = best + 1 if rates[best] > self.tokens / self.cost else 0
        return requests if chosen == len(requests) else requests[np.sort(order[:chosen])]
