"""Tokens that the target's text attends to (SpecVLM, arXiv 2508.16201: verifier-guided pruning in two stages)."""

import torch

from vllm_lvspec.draft.pruning import VideoView, best_and_spread, budget, num_best

# Stage I takes tokens until they hold this share of the attention, or until it has its share of the budget: where
# attention is spread thin, as over most videos, the second comes first.
ATTENTION_SHARE = 0.5


def keep_attended(view: VideoView, ratio: float) -> torch.Tensor:
    """Sorted indices `[num_kept]`, int64.

    Stage I keeps the tokens of highest attention that together hold `ATTENTION_SHARE` of it, but not more than
    `num_best`; stage II fills up what is left of the budget with others, evenly spread over the video. `view.scores`:
    attention of the text behind the videos, averaged over queries, heads and layers.
    """
    assert view.scores is not None
    scores = view.scores.float().cpu()
    count = budget(len(scores), ratio)
    falling = scores.sort(descending=True).values.cumsum(0)
    holding = int((falling < ATTENTION_SHARE * falling[-1]).sum()) + 1
    return best_and_spread(scores, min(holding, num_best(count)), count)
