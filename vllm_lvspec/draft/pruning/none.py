"""The drafter sees every token."""

import torch

from vllm_lvspec.draft.pruning import VideoView


def keep_all(view: VideoView, ratio: float) -> torch.Tensor:
    """All indices `[num_tokens]`, int64; `ratio` does not matter."""
    return torch.arange(view.grid.num_tokens)
