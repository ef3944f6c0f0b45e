"""Tokens at random: what any strategy must beat."""

import torch

from vllm_lvspec.draft.pruning import VideoView, budget


def keep_random(view: VideoView, ratio: float) -> torch.Tensor:
    """Sorted indices `[num_kept]`, int64, drawn without replacement; the same whenever the video is seen."""
    generator = torch.Generator().manual_seed(view.seed)
    count = view.grid.num_tokens
    return torch.randperm(count, generator=generator)[: budget(count, ratio)].sort().values
