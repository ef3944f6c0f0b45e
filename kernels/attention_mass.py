"""How much the queries of a prompt attend to each visual token, over a paged cache of keys.

SpecVLM (arXiv 2508.16201) prunes the drafter's video by the target's attention from the text behind it, averaged over
heads and layers. For queries q, heads h and the keys j that q sees, those at its own place and before:

    mass[v] = sum over q and h of softmax_j(scale * queries[q, h] . keys[j, h // group])[v]

A sum and no mean, so that the chunks of a prompt add up. The attention itself is never stored: one pass finds what each
softmax is divided by, in parts, a small one joins the parts, and a third goes over the visual tokens alone.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import _package  # noqa: F401

MAX_QUERIES = 128
_MAX_QUERIES = tl.constexpr(MAX_QUERIES)


@triton.jit
def _last_position(query_positions_ptr, num_queries):
    """The place of the last key that any query sees"""
    query = tl.arange(0, _MAX_QUERIES)
    return tl.max(tl.load(query_positions_ptr + query, mask=query < num_queries, other=-1), axis=0)


# Tables begin wherever a request's row does.
@triton.jit(do_not_specialize=["num_queries"], do_not_specialize_on_alignment=["block_table_ptr"])
def _log_sums_kernel(
    log_sums_ptr,  # [num_splits, num_kv_heads, num_queries * group]
    queries_ptr,
    queries_stride,
    queries_head_stride,
    query_positions_ptr,
    keys_ptr,
    keys_block_stride,
    keys_head_stride,
    keys_slot_stride,
    block_table_ptr,
    num_queries,
    group,
    head_size,
    block_size,
    scale,  # times log2(e): powers of two are what a GPU computes
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Per head of the keys, tile of rows (a query in one of the head's `group` heads) and share of the keys:

    log_sums[split, head, r] = log2(sum over the keys j of the share that r sees of 2^(scale * r . j))
    """
    kv_head, split, num_splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    num_rows = num_queries * group
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = row < num_rows
    column = tl.arange(0, BLOCK_D)
    is_column = column < head_size
    head = kv_head * group + row % group
    query_rows = queries_ptr + (row // group).to(tl.int64) * queries_stride + head.to(tl.int64) * queries_head_stride
    query = tl.load(query_rows[:, None] + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
    query_position = tl.load(query_positions_ptr + row // group, mask=is_row, other=-1)
    if INTERPRETED:  # the interpreter's `dot` multiplies bfloat16's bits
        query = query.to(tl.float32)

    num_keys = _last_position(query_positions_ptr, num_queries) + 1
    share = tl.cdiv(tl.cdiv(num_keys, num_splits), BLOCK_K) * BLOCK_K
    begin = split * share
    stop = tl.minimum(begin + share, num_keys)
    keys = keys_ptr + kv_head.to(tl.int64) * keys_head_stride
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for tile in range(begin, stop, BLOCK_K):
        position = tile + tl.arange(0, BLOCK_K)
        is_key = position < stop
        block = tl.load(block_table_ptr + position // block_size, mask=is_key, other=0).to(tl.int64)
        key_rows = keys + block * keys_block_stride + (position % block_size).to(tl.int64) * keys_slot_stride
        key = tl.load(key_rows[None, :] + column[:, None], mask=is_key[None, :] & is_column[:, None], other=0.0)
        if INTERPRETED:
            key = key.to(tl.float32)
        score = tl.dot(query, key, input_precision="ieee") * scale
        is_seen = is_key[None, :] & (position[None, :] <= query_position[:, None])
        score = tl.where(is_seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        # A row that has seen none yet has no largest to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(score - base[:, None]), axis=1)
        top = higher
    log_sum = tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total)))
    out = log_sums_ptr + (split * tl.num_programs(0) + kv_head) * num_rows + row
    tl.store(out, log_sum, mask=is_row)


@triton.jit(do_not_specialize=["count"])
def _join_log_sums_kernel(joined_ptr, log_sums_ptr, count, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """joined[i] = log2(sum over splits s of 2^log_sums[s, i])"""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_there = place < count
    split = tl.arange(0, NUM_SPLITS)
    # Every query sees the first key, so that no row is without a number.
    log_sum = tl.load(log_sums_ptr + split[:, None] * count + place[None, :], mask=is_there[None, :], other=0.0)
    top = tl.max(log_sum, axis=0)
    total = tl.sum(tl.exp2(log_sum - top[None, :]), axis=0)
    tl.store(joined_ptr + place, top + tl.log2(total), mask=is_there)


@triton.jit(do_not_specialize=["num_queries", "num_visual"], do_not_specialize_on_alignment=["block_table_ptr"])
def _attention_mass_kernel(
    masses_ptr,  # [num_kv_heads, num_visual]
    log_sums_ptr,  # [num_kv_heads, num_queries * group]
    queries_ptr,
    queries_stride,
    queries_head_stride,
    query_positions_ptr,
    keys_ptr,
    keys_block_stride,
    keys_head_stride,
    keys_slot_stride,
    block_table_ptr,
    visual_positions_ptr,
    num_queries,
    num_visual,
    group,
    head_size,
    block_size,
    scale,  # times log2(e)
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Per tile of visual tokens and head of the keys:

    masses[head, v] = sum over the head's rows r that see v of 2^(scale * r . v - log_sums[head, r])
    """
    kv_head = tl.program_id(1)
    num_rows = num_queries * group
    column = tl.arange(0, BLOCK_D)
    is_column = column < head_size
    visual = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_visual = visual < num_visual
    position = tl.load(visual_positions_ptr + visual, mask=is_visual, other=0)
    # Behind the last query there may be no blocks yet.
    is_key = is_visual & (position <= _last_position(query_positions_ptr, num_queries))
    block = tl.load(block_table_ptr + position // block_size, mask=is_key, other=0).to(tl.int64)
    place = (position % block_size).to(tl.int64)
    key_rows = keys_ptr + kv_head.to(tl.int64) * keys_head_stride + block * keys_block_stride + place * keys_slot_stride
    key = tl.load(key_rows[None, :] + column[:, None], mask=is_key[None, :] & is_column[:, None], other=0.0)
    if INTERPRETED:  # the interpreter's `dot` multiplies bfloat16's bits
        key = key.to(tl.float32)

    mass = tl.zeros([BLOCK_V], tl.float32)
    for tile in range(0, num_rows, BLOCK_R):
        row = tile + tl.arange(0, BLOCK_R)
        is_row = row < num_rows
        head = (kv_head * group + row % group).to(tl.int64)
        query_rows = queries_ptr + (row // group).to(tl.int64) * queries_stride + head * queries_head_stride
        query = tl.load(query_rows[:, None] + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
        query_position = tl.load(query_positions_ptr + row // group, mask=is_row, other=-1)
        log_sum = tl.load(log_sums_ptr + kv_head * num_rows + row, mask=is_row, other=0.0)
        if INTERPRETED:
            query = query.to(tl.float32)
        score = tl.dot(query, key, input_precision="ieee") * scale
        is_seen = is_key[None, :] & (position[None, :] <= query_position[:, None])
        mass += tl.sum(tl.exp2(tl.where(is_seen, score - log_sum[:, None], float("-inf"))), axis=0)
    tl.store(masses_ptr + kv_head.to(tl.int64) * num_visual + visual, mass, mask=is_visual)


def _check(queries: torch.Tensor, query_positions: torch.Tensor, keys: torch.Tensor, name: str) -> None:
    """`keys` have their heads second and a head's size last, in a cache and in order of places alike."""
    num_queries, num_heads, head_size = queries.shape
    if query_positions.shape != (num_queries,) or keys.shape[-1] != head_size or num_heads % keys.shape[1]:
        raise ValueError(
            f"shapes differ: queries {tuple(queries.shape)}, query_positions {tuple(query_positions.shape)}, {name} "
            f"{tuple(keys.shape)}"
        )


def gather_keys(key_cache: torch.Tensor, block_table: torch.Tensor, num_keys: int) -> torch.Tensor:
    """A request's keys in order of places: `[num_keys, num_kv_heads, head_size]`, of the cache's dtype."""
    blocks = block_table[: -(-num_keys // key_cache.shape[2])].long()
    return key_cache[blocks].transpose(1, 2).flatten(0, 1)[:num_keys]


def attention_mass_reference(
    queries: torch.Tensor,
    query_positions: torch.Tensor,
    keys: torch.Tensor,
    visual_positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The same as `attention_mass` in PyTorch, a head of the keys at a time, for any number of queries.

    `keys [num_keys, num_kv_heads, head_size]`: those at places 0 to at least the last query's. Raises ValueError where
    shapes don't fit.
    """
    _check(queries, query_positions, keys, "keys")
    num_keys, num_kv_heads = keys.shape[:2]
    is_hidden = torch.arange(num_keys, device=keys.device) > query_positions[:, None]
    # One more than there are keys: a visual token behind them has no mass.
    mass = torch.zeros(num_keys + 1, dtype=torch.float32, device=keys.device)
    for head, rows in enumerate(queries.chunk(num_kv_heads, dim=1)):
        scores = rows.float() @ keys[:, head].float().T * scale
        mass[:-1] += scores.masked_fill_(is_hidden[:, None], float("-inf")).softmax(-1).sum((0, 1))
    return mass[visual_positions.clamp(max=num_keys).long()]


def attention_mass(
    queries: torch.Tensor,
    query_positions: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    visual_positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """How much one request's `queries` attend to each of its visual tokens: `[num_visual]` float32.

    `queries [num_queries, num_heads, head_size]`, at most `MAX_QUERIES`, and `key_cache [num_blocks, num_kv_heads,
    block_size, head_size]`, both in one of float32, float16 and bfloat16 and of any strides but for the last, which is
    1; `query_positions [num_queries]` int32, from 0: places of the queries in the sequence, which see the keys up to
    their own; `block_table [max_blocks]` int32; `visual_positions [num_visual]` int32; `scale`: of the dot products.
    Summed over queries and heads; 0 for a visual token behind all queries. The same inputs give the same bits. Raises
    ValueError where shapes, strides or dtypes don't fit.
    """
    _check(queries, query_positions, key_cache, "key_cache")
    if len(queries) > MAX_QUERIES:
        raise ValueError(f"{len(queries)} queries: at most {MAX_QUERIES} at a time, of which the sums are to be added")
    if queries.dtype != key_cache.dtype:
        raise ValueError(f"dtypes differ: queries {queries.dtype}, key_cache {key_cache.dtype}")
    if queries.stride(-1) != 1 or key_cache.stride(-1) != 1:
        raise ValueError(f"last stride must be 1: queries {queries.stride()}, key_cache {key_cache.stride()}")
    if queries.is_cuda:
        return launch_attention_mass(queries, query_positions, key_cache, block_table, visual_positions, scale)
    keys = gather_keys(key_cache, block_table, int(query_positions.max()) + 1 if len(queries) else 0)
    return attention_mass_reference(queries, query_positions, keys, visual_positions, scale)


def launch_attention_mass(
    queries: torch.Tensor,
    query_positions: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    visual_positions: torch.Tensor,
    scale: float,
    num_splits: int = 32,
) -> torch.Tensor:
    """Launch the kernels with `num_splits` (a power of two) shares of the keys; integer tensors must be contiguous."""
    num_queries, num_heads, head_size = queries.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    num_visual, group, device = len(visual_positions), num_heads // key_cache.shape[1], queries.device
    if not num_queries or not num_visual:
        return torch.zeros(num_visual, dtype=torch.float32, device=device)
    num_rows = num_queries * group
    log_sums = torch.empty((num_splits, num_kv_heads, num_rows), dtype=torch.float32, device=device)
    joined = torch.empty((num_kv_heads, num_rows), dtype=torch.float32, device=device)
    masses = torch.empty((num_kv_heads, num_visual), dtype=torch.float32, device=device)
    # A tile of queries and one of keys, whole heads wide, must fit into shared memory together.
    tile = 32 if queries.element_size() == 4 else 64
    block_r = 16 if num_rows <= 16 else tile
    batch = (
        queries,
        queries.stride(0),
        queries.stride(1),
        query_positions,
        key_cache,
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_table,
    )
    block_d = max(16, triton.next_power_of_2(head_size))
    interpreted = not queries.is_cuda
    _log_sums_kernel[num_kv_heads, triton.cdiv(num_rows, block_r), num_splits](
        log_sums,
        *batch,
        num_queries,
        group,
        head_size,
        block_size,
        scale * math.log2(math.e),
        BLOCK_R=block_r,
        BLOCK_K=tile,
        BLOCK_D=block_d,
        INTERPRETED=interpreted,
    )
    _join_log_sums_kernel[(triton.cdiv(joined.numel(), 32),)](
        joined, log_sums, joined.numel(), NUM_SPLITS=num_splits, BLOCK=32
    )
    _attention_mass_kernel[triton.cdiv(num_visual, tile), num_kv_heads](
        masses,
        joined,
        *batch,
        visual_positions,
        num_queries,
        num_visual,
        group,
        head_size,
        block_size,
        scale * math.log2(math.e),
        BLOCK_R=block_r,
        BLOCK_V=tile,
        BLOCK_D=block_d,
        INTERPRETED=interpreted,
    )
    return masses.sum(0)
