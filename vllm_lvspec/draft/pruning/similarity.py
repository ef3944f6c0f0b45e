"""Tokens whose states are most like those of the text (after ParallelVLM, arXiv 2603.19610)."""

import torch

from vllm_lvspec.draft.pruning import VideoView, best_and_spread, budget, num_best


def keep_similar(view: VideoView, ratio: float) -> torch.Tensor:
    """Sorted indices `[num_kept]`, int64. `view.scores`: mean cosine with the text behind the videos."""
    assert view.scores is not None
    count = budget(len(view.scores), ratio)
    return best_and_spread(view.scores, num_best(count), count)
