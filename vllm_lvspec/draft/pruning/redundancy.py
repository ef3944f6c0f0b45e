"""Tokens that say something new, from the video alone (after HIPPO, arXiv 2601.08273, and FastVID)."""

import torch
import torch.nn.functional as F

from vllm_lvspec.draft.pruning import VideoView, best_and_spread, budget, num_best


def keep_novel(view: VideoView, ratio: float) -> torch.Tensor:
    """Sorted indices `[num_kept]`, int64.

    A token says the more, the less its embedding is like that of the same place a moment before (temporal novelty) and
    like the mean of its moment (spatial complexity). Tokens without a place are among the rest.
    """
    assert view.embeddings is not None
    grid = view.grid
    frames = F.normalize(view.embeddings[: grid.num_placed].float(), dim=1).view(
        grid.time, -1, view.embeddings.shape[1]
    )
    novelty = torch.zeros(frames.shape[:2], device=frames.device)
    novelty[1:] = 1 - (frames[1:] * frames[:-1]).sum(-1)
    complexity = 1 - (frames * F.normalize(frames.mean(1, keepdim=True), dim=-1)).sum(-1)
    scores = F.pad((novelty + complexity).flatten(), (0, grid.num_extra), value=-1.0)
    count = budget(grid.num_tokens, ratio)
    return best_and_spread(scores, min(num_best(count), grid.num_placed), count)
