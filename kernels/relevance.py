"""How much each drafted token has to do with what is seen: LVSpec's visual relevance over a paged feature cache.

LVSpec (arXiv 2604.05650), A_s: the mean of the N largest cosines between the state of drafted token s and those of its
request's visual tokens. N largest and not all, so that background patches don't dilute it.

In two parts, because ranks may hold a share of the visual tokens each: `top_cosines` finds the largest of a share, and
`mean_of_top` joins shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _package  # noqa: F401

MAX_TOP_N = 128

# Shares of a request's visual tokens, each a program's: few of them fill a GPU only where there are many requests.
FEW_SPLITS, MANY_SPLITS = 16, 128
FULL_GPU = 256  # programs


@dataclass(frozen=True)
class VisualPages:
    """Where the features of each request's visual tokens lie.

    `features [num_blocks, block_size, num_heads, head_size]` in float32, float16 or bfloat16, of any strides but for
    the last, which is 1 (a feature is all of a token's heads; states have one); `block_table [num_requests,
    max_blocks]` int32; `positions [num_visual]` int32: places of each request's visual tokens in its sequence, one
    request after another; `starts [num_requests + 1]` int32: where each request's begin in `positions`. `num_shares`:
    ranks that have as many tokens of each request.
    """

    features: torch.Tensor
    block_table: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    num_shares: int = 1


@triton.jit(do_not_specialize=["num_queries"])
def _top_cosines_kernel(
    tops_ptr,  # [num_splits, num_queries, TOP]
    queries_ptr,
    queries_stride,
    query_starts_ptr,
    features_ptr,
    features_block_stride,
    features_slot_stride,
    features_head_stride,
    block_table_ptr,
    block_table_stride,
    visual_positions_ptr,
    visual_starts_ptr,
    num_queries,
    width,
    head_size,
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
        # Summed up once behind the loop: a sum over threads in every turn would have all wait for each other.
        query_squares = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        feature_squares = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
        for d in range(0, width, BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            is_column = column < width
            query = tl.load(query_rows + column[None, :], mask=is_query[:, None] & is_column[None, :], other=0.0)
            place = (column // head_size).to(tl.int64) * features_head_stride + column % head_size
            feature = tl.load(feature_rows + place[:, None], mask=is_visual[None, :] & is_column[:, None], other=0.0)
            if INTERPRETED:  # the interpreter's `dot` multiplies bfloat16's bits
                query, feature = query.to(tl.float32), feature.to(tl.float32)
            dot = tl.dot(query, feature, dot, input_precision="ieee")
            query, feature = query.to(tl.float32), feature.to(tl.float32)
            query_squares += query * query
            feature_squares += feature * feature
        query_norm, feature_norm = tl.sqrt(tl.sum(query_squares, axis=1)), tl.sqrt(tl.sum(feature_squares, axis=0))
        norms = query_norm[:, None] * feature_norm[None, :]
        cosine = tl.where(norms == 0, 0.0, dot / tl.where(norms == 0, 1.0, norms))
        cosine = tl.where(is_visual[None, :], cosine, float("-inf"))
        is_bad |= tl.max((cosine != cosine).to(tl.int32), axis=1)
        cosine = tl.where(cosine != cosine, float("-inf"), cosine)
        # Of two falling lists, the larger of the i-th and the i-th from the end are the top of both.
        best = tl.topk(cosine, TOP)
        top = tl.bitonic_merge(tl.maximum(top, tl.flip(best, 1)), descending=True)
    top = tl.where(is_bad[:, None] > 0, float("nan"), top)
    rank = tl.arange(0, TOP)
    out = tops_ptr + (split * num_queries + query_idx).to(tl.int64)[:, None] * TOP + rank[None, :]
    tl.store(out, top, mask=is_query[:, None])


@triton.jit(do_not_specialize=["num_queries", "num_splits", "top_n"])
def _mean_of_top_kernel(
    relevance_ptr,
    tops_ptr,
    num_queries,
    num_splits,
    top_n,
    NUM_SPLITS: tl.constexpr,
    TOP: tl.constexpr,
):
    """relevance[q] = mean of the top_n largest finite of tops[:, q, :]; NaN where there is none, or any is NaN"""
    query = tl.program_id(0)
    place = tl.arange(0, NUM_SPLITS * TOP)
    rows = (place // TOP) * num_queries + query
    is_there = place // TOP < num_splits
    values = tl.load(tops_ptr + rows.to(tl.int64) * TOP + place % TOP, mask=is_there, other=float("-inf"))
    is_bad = tl.max((values != values).to(tl.int32), axis=0)
    best = tl.topk(tl.where(values != values, float("-inf"), values)[None, :], TOP)
    counts = (tl.arange(0, TOP)[None, :] < top_n) & (best > float("-inf"))
    num = tl.sum(counts.to(tl.float32))
    mean = tl.sum(tl.where(counts, best, 0.0)) / tl.maximum(num, 1.0)
    tl.store(relevance_ptr + query, tl.where((num == 0) | (is_bad > 0), float("nan"), mean))


def top_cosines_reference(
    queries: torch.Tensor, query_starts: torch.Tensor, pages: VisualPages, top_n: int
) -> torch.Tensor:
    """The same as `top_cosines` in PyTorch, a request at a time: `[1, num_queries, top_n]`."""
    tops = torch.full((1, len(queries), top_n), float("-inf"), device=queries.device)
    starts, visuals = query_starts.tolist(), pages.starts.tolist()
    block_size = pages.features.shape[1]
    for r in range(len(starts) - 1):
        rows, seen = slice(starts[r], starts[r + 1]), slice(visuals[r], visuals[r + 1])
        if rows.start == rows.stop or seen.start == seen.stop:
            continue
        positions = pages.positions[seen]
        blocks, slots = pages.block_table[r][positions // block_size].long(), positions % block_size
        if pages.features.is_contiguous():  # rows of one matrix, which are gathered several times as fast
            keys = pages.features.view(-1, queries.shape[1]).index_select(0, blocks * block_size + slots)
        else:
            keys = pages.features[blocks, slots].flatten(1)
        values, keys = queries[rows].float(), keys.float()
        norms = torch.linalg.vector_norm(values, dim=1, keepdim=True) * torch.linalg.vector_norm(keys, dim=1)
        cosines = (values @ keys.T / norms).masked_fill_(norms == 0, 0.0)
        count = min(top_n, len(positions))
        # `topk` says nothing of how it orders what is no number.
        largest = cosines.masked_fill(cosines.isnan(), float("-inf")).topk(count, dim=1).values
        tops[0, rows, :count] = largest.masked_fill_(cosines.isnan().any(1, keepdim=True), float("nan"))
    return tops


def mean_of_top_reference(tops: torch.Tensor, top_n: int) -> torch.Tensor:
    """The same as `mean_of_top` in PyTorch."""
    values = tops.transpose(0, 1).flatten(1)
    bad = values.isnan().any(1)
    best = values.masked_fill(bad[:, None], float("-inf")).topk(min(top_n, values.shape[1]), dim=1).values
    counts = best > float("-inf")
    num = counts.sum(1)
    mean = best.masked_fill(~counts, 0.0).sum(1) / num
    return mean.masked_fill_(bad | (num == 0), float("nan"))


def top_cosines(
    queries: torch.Tensor, query_starts: torch.Tensor, pages: VisualPages, top_n: int, max_queries: int
) -> torch.Tensor:
    """The largest cosines of every query with its request's visual features: `[num_splits, num_queries, >= top_n]`.

    `queries [num_queries, num_heads * head_size]`, last dimension contiguous; `query_starts [num_requests + 1]` int32,
    cumulated; `max_queries`: at least the largest number of queries of a request. float32, in no order between splits;
    -inf where there are fewer visual tokens, NaN throughout for a query with a cosine that is not a number. Raises
    ValueError where shapes don't fit.
    """
    num_requests = len(pages.block_table)
    width = pages.features.shape[2] * pages.features.shape[3]
    if queries.shape[-1] != width or {len(query_starts), len(pages.starts)} != {num_requests + 1}:
        raise ValueError(
            f"shapes differ: queries {tuple(queries.shape)}, features {tuple(pages.features.shape)}, block_table "
            f"{tuple(pages.block_table.shape)}, query_starts {len(query_starts)}, starts {len(pages.starts)}"
        )
    if not 1 <= top_n <= MAX_TOP_N:
        raise ValueError(f"top_n={top_n}: must be from 1 to {MAX_TOP_N}")
    if queries.is_cuda:
        return launch_top_cosines(queries, query_starts, pages, top_n, max_queries)
    return top_cosines_reference(queries, query_starts, pages, top_n)


def mean_of_top(tops: torch.Tensor, top_n: int) -> torch.Tensor:
    """Mean of the `top_n` largest of `tops [num_splits, num_queries, size]`, or of all there are: `[num_queries]`.

    float32; NaN for a query without any, and where any is NaN.
    """
    return launch_mean_of_top(tops, top_n) if tops.is_cuda else mean_of_top_reference(tops, top_n)


def launch_top_cosines(
    queries: torch.Tensor,
    query_starts: torch.Tensor,
    pages: VisualPages,
    top_n: int,
    max_queries: int,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Launch the kernel with `num_splits` (a power of two) shares of each request's visual tokens, or a good number."""
    num_queries, width = queries.shape
    features, table = pages.features, pages.block_table
    top = max(2, triton.next_power_of_2(top_n))
    block_q = 16 if max_queries <= 16 else 32
    num_tiles = len(table) * triton.cdiv(max_queries, block_q)
    if num_splits is None:
        num_splits = FEW_SPLITS if num_tiles * FEW_SPLITS >= FULL_GPU else MANY_SPLITS
        # What all ranks find goes to each of them, and together they have as many tokens as one would have.
        num_splits = max(1, num_splits // triton.next_power_of_2(pages.num_shares))
    tops = torch.full((num_splits, num_queries, top), float("-inf"), dtype=torch.float32, device=queries.device)
    if not num_queries:
        return tops
    grid = len(table), triton.cdiv(max_queries, block_q), num_splits
    _top_cosines_kernel[grid](
        tops,
        queries,
        queries.stride(0),
        query_starts,
        features,
        features.stride(0),
        features.stride(1),
        features.stride(2),
        table,
        table.stride(0),
        pages.positions,
        pages.starts,
        num_queries,
        width,
        features.shape[3],
        features.shape[1],
        TOP=top,
        BLOCK_Q=block_q,
        BLOCK_V=max(64, top),
        BLOCK_D=64,
        INTERPRETED=not queries.is_cuda,
        num_stages=4,
    )
    return tops


def launch_mean_of_top(tops: torch.Tensor, top_n: int) -> torch.Tensor:
    """Launch the kernel; `tops` in `[num_splits, num_queries, size]` with a size that is a power of two."""
    num_splits, num_queries, size = tops.shape
    result = torch.empty(num_queries, dtype=torch.float32, device=tops.device)
    if num_queries:
        # Where ranks' shares were joined their number may be any.
        padded = triton.next_power_of_2(num_splits)
        _mean_of_top_kernel[(num_queries,)](result, tops, num_queries, num_splits, top_n, NUM_SPLITS=padded, TOP=size)
    return result
