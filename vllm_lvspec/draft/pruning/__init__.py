"""Which tokens of a video the drafter sees.

A strategy says what it looks at and picks indices from it. To add one, write a file with the function and add a line to
`STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class VisualGrid:
    """Visual tokens of one video: `time x height x width` of them in that order, then `num_extra` without a place."""

    time: int
    height: int
    width: int
    num_extra: int = 0

    @property
    def num_placed(self) -> int:
        return self.time * self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.num_placed + self.num_extra


@dataclass(frozen=True)
class VideoView:
    """What may be known of one video when the drafter's view of it is chosen.

    `seed` follows from the video; `embeddings [num_tokens, width]` are those of the drafter's encoder; `scores
    [num_tokens]` float32 are the target's, larger where the prompt's text has more to do with a token. The last two are
    there where the strategy asks for them.
    """

    grid: VisualGrid
    seed: int = 0
    embeddings: torch.Tensor | None = None
    scores: torch.Tensor | None = None


@dataclass(frozen=True)
class Strategy:
    """`keep(view, ratio)`: sorted indices, int64 on the host, of the tokens that stay where a share `ratio` goes.

    `looks_at`: what it chooses by. Attention and similarity are the target's view of this request, so that two requests
    may see other parts of the same video; where they can't be had, tokens are chosen by `uniform`.
    """

    keep: Callable[[VideoView, float], torch.Tensor]
    looks_at: Literal["grid", "embeddings", "attention", "similarity"] = "grid"

    @property
    def asks_target(self) -> bool:
        return self.looks_at in ("attention", "similarity")


def budget(num_tokens: int, ratio: float) -> int:
    """How many of `num_tokens` stay where a share `ratio` goes; at least one."""
    return max(1, round((1 - ratio) * num_tokens))


# Of what stays, the share that strategies with scores choose by them; the rest is spread evenly. More is worse:
# drafters need to see not only what matters, but also when and where nothing does (docs/drafting.md has figures).
BEST_SHARE = 0.25


def num_best(count: int) -> int:
    """How many of `count` tokens are chosen by scores."""
    return round(BEST_SHARE * count)


def best_and_spread(scores: torch.Tensor, best: int, count: int) -> torch.Tensor:
    """Sorted indices of the `best` highest of `scores [num_tokens]`, and of others, evenly spread, `count` in all.

    Ties go to the earlier token.
    """
    order = torch.argsort(scores.cpu(), descending=True, stable=True)
    chosen, rest = order[:best], order[best:].sort().values
    num_spread = count - len(chosen)
    places = (torch.arange(num_spread, dtype=torch.float64) + 0.5) * len(rest) / max(num_spread, 1)
    return torch.cat([chosen, rest[places.long()]]).sort().values


from vllm_lvspec.draft.pruning.attention import keep_attended  # noqa: E402
from vllm_lvspec.draft.pruning.none import keep_all  # noqa: E402
from vllm_lvspec.draft.pruning.random import keep_random  # noqa: E402
from vllm_lvspec.draft.pruning.redundancy import keep_novel  # noqa: E402
from vllm_lvspec.draft.pruning.similarity import keep_similar  # noqa: E402
from vllm_lvspec.draft.pruning.uniform import keep_uniform  # noqa: E402

STRATEGIES: dict[str, Strategy] = {
    "none": Strategy(keep_all),
    "uniform": Strategy(keep_uniform),
    "random": Strategy(keep_random),
    "attention": Strategy(keep_attended, looks_at="attention"),
    "similarity": Strategy(keep_similar, looks_at="similarity"),
    "redundancy": Strategy(keep_novel, looks_at="embeddings"),
}
