"""Which visual tokens a drafted token's state is most like: for people who look, not for verification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vllm_lvspec.kernels.relevance import VisualPages

FEATURES_AT_ONCE = 4096  # a long video's are not copied all at once


def closest(
    queries: torch.Tensor, starts: Sequence[int], pages: VisualPages, visuals: Sequence[int], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest cosines of every query with its request's features, and with which of them.

    `queries` as for `top_cosines`; `starts`: its `query_starts`, and `visuals`: `pages.starts`, on the host, so that it
    need not wait. Cosines float32 and indices int64, counted among the request's positions, are both
    `[num_queries, count]`, on the device; -inf and -1 where there are fewer features.
    """
    cosines = torch.full((len(queries), count), float("-inf"), device=queries.device)
    indices = torch.full((len(queries), count), -1, dtype=torch.int64, device=queries.device)
    block_size = pages.features.shape[1]
    for r in range(len(starts) - 1):
        rows, positions = slice(starts[r], starts[r + 1]), pages.positions[visuals[r] : visuals[r + 1]].long()
        if rows.start == rows.stop or not len(positions):
            continue
        states = F.normalize(queries[rows].float(), dim=1)
        for first in range(0, len(positions), FEATURES_AT_ONCE):
            part = positions[first : first + FEATURES_AT_ONCE]
            features = pages.features[pages.block_table[r][part // block_size].long(), part % block_size]
            found = (states @ F.normalize(features.flatten(1).float(), dim=1).T).nan_to_num(float("-inf"))
            places = torch.arange(first, first + len(part), device=queries.device).expand(len(found), -1)
            best = torch.cat([cosines[rows], found], dim=1).topk(count, dim=1)
            cosines[rows] = best.values
            indices[rows] = torch.cat([indices[rows], places], dim=1).gather(1, best.indices)
    return cosines, indices
