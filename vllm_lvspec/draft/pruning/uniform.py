"""Tokens evenly spread over time and space (the setting of LVSpec, arXiv 2604.05650, section on drafting)."""

import math

import torch

from vllm_lvspec.draft.pruning import VideoView, budget

_GOLDEN = (math.sqrt(5) - 1) / 2


def keep_uniform(view: VideoView, ratio: float) -> torch.Tensor:
    """Sorted indices `[num_kept]`, int64, of the tokens that stay.

    Each moment gets its even share, and within a moment the kept tokens are evenly spaced. The phase moves on by the
    golden ratio from one moment to the next, so that over time every place is looked at, and no column twice running.
    Tokens without a place (a line-end marker) are kept when at least one in two tokens is.
    """
    grid = view.grid
    per_moment = grid.height * grid.width
    total = budget(grid.num_tokens, ratio)
    extra = torch.arange(grid.num_placed, grid.num_tokens)
    extra = extra if 2 * total >= grid.num_tokens else extra[:0]
    total = max(total - len(extra), 1)
    moments = torch.arange(grid.time)
    ends = (moments + 1) * total // grid.time
    counts = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.long))
    kept = []
    for moment, count in enumerate(counts.tolist()):
        if count:
            phase = (moment + 1) * _GOLDEN % 1.0
            places = ((torch.arange(count, dtype=torch.float64) + phase) * per_moment / count).floor().long()
            kept.append(moment * per_moment + places.clamp_(max=per_moment - 1))
    return torch.cat([*kept, extra])
