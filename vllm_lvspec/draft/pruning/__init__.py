"""Which tokens of a video the drafter sees.

A strategy is a function `(VisualGrid, ratio) -> indices`. To add one, write a file with the function and add a line
to `STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class VisualGrid:
    """Visual tokens of one video: `time x height x width` of them in that order, then `num_extra` without a place."""

    time: int
    height: int
    width: int
    num_extra: int = 0

    @property
    def num_tokens(self) -> int:
        return self.time * self.height * self.width + self.num_extra


Strategy = Callable[[VisualGrid, float], torch.Tensor]

from vllm_lvspec.draft.pruning.none import keep_all  # noqa: E402
from vllm_lvspec.draft.pruning.uniform import keep_uniform  # noqa: E402

STRATEGIES: dict[str, Strategy] = {
    "none": keep_all,
    "uniform": keep_uniform,
}
