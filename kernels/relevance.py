"""How much each drafted token has to do with what is seen: LVSpec's visual relevance over a paged feature cache.

LVSpec (arXiv 2604.05650), A_s: the mean of the N largest cosines between the state of drafted token s and those of its
request's visual tokens. N largest and not all, so that background patches don't dilute it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import _package  # noqa: F401

MAX_TOP_N = 128


@triton.jit
def _partial_relevance_kernel(
    tops_ptr,  # [num_splits, num_queries, TOP]
    queries_ptr,
    queries_stride,
    query_starts_ptr,
    features_ptr,
    features_block_stride,
    features_slot_stride,
    block_table_ptr,
    block_table_stride,
    visual_positions_ptr,
    visual_starts_ptr,
    num_queries,
    width,
    block_size,
    TOP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Per request, tile of its queries and share of its visual tokens: tops[split, q] = top(cos(query q, feature v))

    in falling order, -inf where there are fewer, NaN throughout where any cosine is NaN. No cosine is stored.
    """
    request, split, num_splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    first_query = tl.load(query_starts_ptr + request) + tl.program_id(1) * BLOCK_Q
    last_query = tl.load(query_starts_ptr + request + 1)
    if first_query >= last_query:
        return
    query_idx = first_query + tl.arange(0, BLOCK_Q)
    is_query = query_idx < last_query
    query_rows = queries_ptr + query_idx.to(tl.int64)[:, None] * queries_stride
    first_visual = tl.load(visual_starts_ptr + request)
    num_visual = tl.load(visual_starts_ptr + request + 1) - first_visual
    share = tl.cdiv(tl.cdiv(num_visual, num_splits), BLOCK_V) * BLOCK_V
    begin = split * share
    stop = tl.minimum(begin + share, num_visual)
    table = block_table_ptr + request.to(tl.int64) * block_table_stride

    top = tl.full([BLOCK_Q, TOP], float("-inf"), tl.float32)
    is_bad = tl.zeros([BLOCK_Q], tl.int32)
    for tile in range(begin, stop, BLOCK_V):
        visual_idx = tile + tl.arange(0, BLOCK_V)
        is_visual = visual_idx < stop
        position = tl.load(visual_positions_ptr + first_visual + visual_idx, mask=is_visual, other=0)
        block = tl.load(table + position // block_size, mask=is_visual, other=0).to(tl.int64)
        slot = (position % block_size).to(tl.int64)
        feature_rows = features_ptr + (block * features_block_stride + slot * features_slot_stride)[None, :]
        dot = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
        query_norm = tl.zeros([BLOCK_Q], tl.float32)
        feature_norm = tl.zeros([BLOCK_V], tl.float32)
        for d in range(0, width, BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            is_column = column < width
            query = tl.load(query_rows + column[None, :], mask=is_query[:, None] & is_column[None, :], other=0.0)
            feature = tl.load(feature_rows + column[:, None], mask=is_visual[None, :] & is_column[:, None], other=0.0)
            if INTERPRETED:  # the interpreter's `dot` multiplies bfloat16's bits
                query, feature = query.to(tl.float32), feature.to(tl.float32)
            dot = tl.dot(query, feature, dot, input_precision="ieee")
            query, feature = query.to(tl.float32), feature.to(tl.float32)
            query_norm += tl.sum(query * query, axis=1)
            feature_norm += tl.sum(feature * feature, axis=0)
        norms = tl.sqrt(query_norm)[:, None] * tl.sqrt(feature_norm)[None, :]
        cosine = tl.where(norms == 0, 0.0, dot / tl.where(norms == 0, 1.0, norms))
        cosine = tl.where(is_visual[None, :], cosine, float("-inf"))
        is_bad |= tl.max((cosine != cosine).to(tl.int32), axis=1)
        cosine = tl.where(cosine != cosine, float("-inf"), cosine)
        # Of two falling lists, the larger of the i-th and the i-th from the end are the top of both.
        best = tl.topk(cosine, TOP)
        top = tl.bitonic_merge(tl.maximum(top, tl.flip(best)), descending=True)
    top = tl.where(is_bad[:, None] > 0, float("nan"), top)
    rank = tl.arange(0, TOP)
    out = tops_ptr + (split * num_queries + query_idx).to(tl.int64)[:, None] * TOP + rank[None, :]
    tl.store(out, top, mask=is_query[:, None])


@triton.jit
def _merge_relevance_kernel(
    relevance_ptr,
    tops_ptr,
    num_queries,
    top_n,
    NUM_SPLITS: tl.constexpr,
    TOP: tl.constexpr,
):
    """relevance[q] = mean of the top_n largest finite of tops[:, q, :]; NaN where there is none, or any is NaN"""
    query = tl.program_id(0)
    place = tl.arange(0, NUM_SPLITS * TOP)
    rows = (place // TOP) * num_queries + query
    values = tl.load(tops_ptr + rows.to(tl.int64) * TOP + place % TOP)
    is_bad = tl.max((values != values).to(tl.int32), axis=0)
    best = tl.topk(tl.where(values != values, float("-inf"), values)[None, :], TOP)
    counts = (tl.arange(0, TOP)[None, :] < top_n) & (best > float("-inf"))
    num = tl.sum(counts.to(tl.float32))
    mean = tl.sum(tl.where(counts, best, 0.0)) / tl.maximum(num, 1.0)
    tl.store(relevance_ptr + query, tl.where((num == 0) | (is_bad > 0), float("nan"), mean))


def relevance_reference(
    queries: torch.Tensor,
    query_starts: torch.Tensor,
    features: torch.Tensor,
    block_table: torch.Tensor,
    visual_positions: torch.Tensor,
    visual_starts: torch.Tensor,
    top_n: int,
) -> torch.Tensor:
    """The same in PyTorch, a request's queries at a time."""
    relevance = torch.full((len(queries),), float("nan"), device=queries.device)
    starts, visuals = query_starts.tolist(), visual_starts.tolist()
    for r in range(len(starts) - 1):
        rows, seen = slice(starts[r], starts[r + 1]), slice(visuals[r], visuals[r + 1])
        if rows.start == rows.stop or seen.start == seen.stop:
            continue
        positions = visual_positions[seen].long()
        blocks = block_table[r].long()[positions // features.shape[1]]
        keys = F.normalize(features[blocks, positions % features.shape[1]].float(), dim=-1)
        cosines = F.normalize(queries[rows].float(), dim=-1) @ keys.T
        largest = cosines.topk(min(top_n, len(positions)), dim=1).values.mean(1)
        relevance[rows] = largest.masked_fill(cosines.isnan().any(1), float("nan"))
    return relevance


def relevance(
    queries: torch.Tensor,
    query_starts: torch.Tensor,
    features: torch.Tensor,
    block_table: torch.Tensor,
    visual_positions: torch.Tensor,
    visual_starts: torch.Tensor,
    top_n: int,
    max_queries: int,
) -> torch.Tensor:
    """Mean of the `top_n` largest cosines of every query with its request's visual features: `[num_queries]`, float32.

    `queries [num_queries, width]` and `features [num_blocks, block_size, width]` in float32, float16 or bfloat16, last
    dimensions contiguous; `query_starts`, `visual_starts [num_requests + 1]` int32, cumulated; `block_table
    [num_requests, max_blocks]` int32; `visual_positions [num_visual]` int32: places of each request's visual tokens in
    its sequence; `max_queries`: at least the largest number of queries of a request. NaN for a query whose request has
    no visual token, and where a state is not a number. Raises ValueError where shapes don't fit.
    """
    num_requests = len(block_table)
    if queries.shape[-1] != features.shape[-1] or {len(query_starts), len(visual_starts)} != {num_requests + 1}:
        raise ValueError(
            f"shapes differ: queries {tuple(queries.shape)}, features {tuple(features.shape)}, block_table "
            f"{tuple(block_table.shape)}, query_starts {len(query_starts)}, visual_starts {len(visual_starts)}"
        )
    if not 1 <= top_n <= MAX_TOP_N:
        raise ValueError(f"top_n={top_n}: must be from 1 to {MAX_TOP_N}")
    arguments = queries, query_starts, features, block_table, visual_positions, visual_starts, top_n
    return launch_relevance(*arguments, max_queries) if queries.is_cuda else relevance_reference(*arguments)


def launch_relevance(
    queries: torch.Tensor,
    query_starts: torch.Tensor,
    features: torch.Tensor,
    block_table: torch.Tensor,
    visual_positions: torch.Tensor,
    visual_starts: torch.Tensor,
    top_n: int,
    max_queries: int,
    num_splits: int = 16,
) -> torch.Tensor:
    """Launch the kernels: `num_splits` (a power of two) shares of a request's visual tokens, and their merge."""
    num_queries, width = queries.shape
    num_requests = len(block_table)
    result = torch.full((num_queries,), float("nan"), dtype=torch.float32, device=queries.device)
    if not num_queries:
        return result
    top = max(2, triton.next_power_of_2(top_n))
    tops = torch.full((num_splits, num_queries, top), float("-inf"), dtype=torch.float32, device=queries.device)
    block_q = 16 if max_queries <= 16 else 32
    grid = num_requests, triton.cdiv(max_queries, block_q), num_splits
    _partial_relevance_kernel[grid](
        tops,
        queries,
        queries.stride(0),
        query_starts,
        features,
        features.stride(0),
        features.stride(1),
        block_table,
        block_table.stride(0),
        visual_positions,
        visual_starts,
        num_queries,
        width,
        features.shape[1],
        TOP=top,
        BLOCK_Q=block_q,
        BLOCK_V=max(64, top),
        BLOCK_D=64,
        INTERPRETED=not queries.is_cuda,
    )
    _merge_relevance_kernel[(num_queries,)](result, tops, num_queries, top_n, NUM_SPLITS=num_splits, TOP=top)
    return result
