"""Attention of a request's next token, from what is projected to what goes into the output projection, in one kernel.

By itself vLLM takes four to six for it: norms of queries and keys, rotary embedding, writing keys and values, attention
by splits, joining these. A single token's few thousand numbers leave each idle most of its time: on an H200 they took
19 us in each layer of a 7B drafter with 1,300 tokens, where to read these takes one. Here each program takes a part of
the context for a few query heads that share keys and values, and whoever is last of those of the same heads joins what
all have found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _package  # noqa: F401
from .shared import Norm, Shrunk, Workspace, shrunk

LEAST_SIZE = 32  # of a head
_BLOCK_BYTES = 128  # of tokens at once, times bytes of a number: 32 KiB of keys and values with heads of 128
_MEMBERS = 4  # query heads of a program, at most: whoever is last has as many to join
_BLOCK_G = 16  # the fewest that tensor cores multiply
_MOST_JOINED = 8192  # numbers that a program has at once
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _turned(ptr, norm_ptr, cos, sin, eps, HALF: tl.constexpr, HAS_NORM: tl.constexpr, dtype: tl.constexpr):
    """Both halves of heads `[..., 2 * HALF]` at `ptr [..., HALF]`, normalised where they are, and turned."""
    first = tl.load(ptr).to(tl.float32)
    second = tl.load(ptr + HALF).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, 1)
        factor = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        place = tl.arange(0, HALF)[None, :]
        # Rounded wherever vLLM's kernels leave it in memory: else drafter and prompt would see other keys.
        first = (first * factor * tl.load(norm_ptr + place).to(tl.float32)).to(dtype).to(tl.float32)
        second = (second * factor * tl.load(norm_ptr + HALF + place).to(tl.float32)).to(dtype).to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _join(
    sums_ptr,
    bests_ptr,
    out_ptr,
    num_members,
    num_splits,
    MEMBERS: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    MOST: tl.constexpr,
):
    """Of a program's heads, what all splits have found. A number's splits lie side by side: a few threads have all."""
    NUM: tl.constexpr = min(MEMBERS, max(1, MOST // (SIZE * SPLITS)))
    split = tl.arange(0, SPLITS)[None, None, :]
    place = tl.arange(0, SIZE)[None, :, None]
    is_split = split < num_splits
    for first in tl.static_range(0, MEMBERS, NUM):
        member = first + tl.arange(0, NUM)
        known = tl.minimum(member, num_members - 1)[:, None, None]
        # Not from a cache that may hold what was there before; and also what no split has written, so that several
        # numbers come at once.
        best_ptr = bests_ptr + known * (2 * SPLITS) + split
        best = tl.where(is_split, tl.load(best_ptr, cache_modifier=".cg"), float("-inf"))
        total = tl.where(is_split, tl.load(best_ptr + SPLITS, cache_modifier=".cg"), 0.0)
        sums = tl.load(sums_ptr + (known * SIZE + place) * SPLITS + split, cache_modifier=".cg")
        weights = tl.exp2(best - tl.max(best, 2, keep_dims=True))
        weights /= tl.sum(total * weights, 2, keep_dims=True)
        joined = tl.sum(tl.where(is_split, sums, 0.0) * weights, 2)
        out = out_ptr + member[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        tl.store(out, shrunk(joined), mask=member[:, None] < num_members)


@triton.jit
def _keys_and_values(
    cache_ptr,
    block_table_ptr,
    first,
    num_before,
    page_stride,
    token_stride,
    PAGE_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Both halves of each, of a block of tokens."""
    token = first + tl.arange(0, BLOCK_K)
    is_token = token < num_before
    page = tl.load(block_table_ptr + token // PAGE_SIZE, mask=is_token, other=0)
    place = page.to(tl.int64) * page_stride + token % PAGE_SIZE * token_stride
    place = cache_ptr + place[:, None] + tl.arange(0, HALF)[None, :]
    mask = is_token[:, None]
    k1, k2 = tl.load(place, mask=mask, other=0), tl.load(place + HALF, mask=mask, other=0)
    v1, v2 = tl.load(place + 2 * HALF, mask=mask, other=0), tl.load(place + 3 * HALF, mask=mask, other=0)
    return k1, k2, v1, v2


@triton.jit(
    do_not_specialize=["num_splits", "block_table_stride"],
    # Parts of larger tensors, or not: the kernel is the same.
    do_not_specialize_on_alignment=["positions_ptr", "block_table_ptr", "seq_lens_ptr", "slots_ptr"],
)
def _decode_attention_kernel(
    qkv_ptr,  # [num_rows, (group + 2) * num_kv_heads * 2 * HALF]
    out_ptr,  # [num_rows, group * num_kv_heads * 2 * HALF] float16
    positions_ptr,
    cos_sin_ptr,
    cos_sin_stride,
    query_norm_ptr,
    key_norm_ptr,
    eps,
    cache_ptr,
    page_stride,
    head_stride,
    token_stride,
    block_table_ptr,
    block_table_stride,
    seq_lens_ptr,
    slots_ptr,
    parts_ptr,  # [num_rows, group * num_kv_heads, 2 * HALF, SPLITS] float32, then [.., 2, SPLITS]
    arrived_ptr,  # [num_rows, programs of a split] int32: 0, and 0 again in the end
    num_splits,
    scale,
    GROUP: tl.constexpr,  # query heads for each of the keys'
    MEMBERS: tl.constexpr,  # of these, of a program
    HALF: tl.constexpr,  # of a head
    PAGE_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    MOST_JOINED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """out[r, h] = sum over t of softmax(scale turned(q[r, h]) k[t]) v[t]"""
    SHARES: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    row, share, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1) // SHARES
    head, first_member = share // SHARES, share % SHARES * MEMBERS
    num_members = tl.minimum(GROUP - first_member, MEMBERS)
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    seq_len = tl.load(seq_lens_ptr + row)
    slot = tl.load(slots_ptr + row)
    half = tl.arange(0, HALF)[None, :]
    turn = cos_sin_ptr + tl.load(positions_ptr + row) * cos_sin_stride + half
    cos = tl.load(turn).to(tl.float32)
    sin = tl.load(turn + HALF).to(tl.float32)
    num_before = seq_len - 1
    length = tl.cdiv(tl.cdiv(num_before, BLOCK_K), num_splits) * BLOCK_K
    begin = split * length
    end = tl.minimum(begin + length, num_before)
    cache_ptr += head * head_stride
    block_table_ptr += row * block_table_stride
    # Of earlier tokens, which were written before the last kernel that overlaps with none.
    k1, k2, v1, v2 = _keys_and_values(
        cache_ptr, block_table_ptr, begin, end, page_stride, token_stride, PAGE_SIZE, HALF, BLOCK_K
    )
    qkv_ptr += row.to(tl.int64) * ((GROUP + 2) * num_heads * 2 * HALF)
    member = tl.arange(0, BLOCK_G)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    # Those behind a program's are its last one again, and left out in the end.
    query = head * GROUP + first_member + tl.minimum(member, num_members - 1)[:, None]
    q1, q2 = _turned(
        qkv_ptr + query * (2 * HALF) + half, query_norm_ptr, cos, sin, eps, HALF, HAS_NORM, qkv_ptr.dtype.element_ty
    )
    # The interpreter's `dot` multiplies bfloat16's bits.
    multiplied: tl.constexpr = tl.float32 if INTERPRETED else dtype
    best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    sum1 = tl.zeros((BLOCK_G, HALF), tl.float32)
    sum2 = tl.zeros((BLOCK_G, HALF), tl.float32)
    if split == 0:
        # The token itself, which the others leave out: its keys and values may not be in the cache yet.
        own = qkv_ptr + (GROUP * num_heads + head) * (2 * HALF) + half
        k1_own, k2_own = _turned(own, key_norm_ptr, cos, sin, eps, HALF, HAS_NORM, dtype)
        own += num_heads * 2 * HALF
        v1_own, v2_own = tl.load(own), tl.load(own + HALF)
        best = tl.sum(q1.to(tl.float32) * k1_own.to(tl.float32) + q2.to(tl.float32) * k2_own.to(tl.float32), 1)
        best *= scale * _LOG2_E
        total += 1
        sum1 += v1_own.to(tl.float32)
        sum2 += v2_own.to(tl.float32)
        if slot >= 0 and first_member == 0:
            place = cache_ptr + slot // PAGE_SIZE * page_stride + slot % PAGE_SIZE * token_stride + half
            tl.store(place, k1_own)
            tl.store(place + HALF, k2_own)
            tl.store(place + 2 * HALF, v1_own.to(dtype))
            tl.store(place + 3 * HALF, v2_own.to(dtype))
    for first in range(begin, end, BLOCK_K):
        is_token = first + tl.arange(0, BLOCK_K) < end
        scores = tl.dot(q1.to(multiplied), tl.trans(k1.to(multiplied)), input_precision="ieee")
        scores = tl.dot(q2.to(multiplied), tl.trans(k2.to(multiplied)), scores, input_precision="ieee")
        scores = tl.where(is_token[None, :], scores * (scale * _LOG2_E), float("-inf"))
        # The first token of a loop is one that there is, so that this is a number.
        higher = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrunk_by = tl.exp2(best - higher)
        total = total * shrunk_by + tl.sum(weights, 1)
        weights = weights.to(dtype).to(multiplied)
        sum1 = tl.dot(weights, v1.to(multiplied), sum1 * shrunk_by[:, None], input_precision="ieee")
        sum2 = tl.dot(weights, v2.to(multiplied), sum2 * shrunk_by[:, None], input_precision="ieee")
        best = higher
        k1, k2, v1, v2 = _keys_and_values(
            cache_ptr, block_table_ptr, first + BLOCK_K, end, page_stride, token_stride, PAGE_SIZE, HALF, BLOCK_K
        )
    num_queries = GROUP * num_heads
    query = row.to(tl.int64) * num_queries + head * GROUP + first_member
    sums_ptr = parts_ptr + query * (2 * HALF * SPLITS)
    bests_ptr = parts_ptr + (tl.num_programs(0).to(tl.int64) * num_queries * HALF + query) * (2 * SPLITS)
    is_member = member < num_members
    place = sums_ptr + (member[:, None] * (2 * HALF) + half) * SPLITS + split
    tl.store(place, sum1, mask=is_member[:, None])
    tl.store(place + HALF * SPLITS, sum2, mask=is_member[:, None])
    tl.store(bests_ptr + member * (2 * SPLITS) + split, best, mask=is_member)
    tl.store(bests_ptr + member * (2 * SPLITS) + SPLITS + split, total, mask=is_member)
    tl.debug_barrier()
    arrived_ptr += row * tl.num_programs(1) + share
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == num_splits - 1:
        out_ptr += query * (2 * HALF)
        _join(sums_ptr, bests_ptr, out_ptr, num_members, num_splits, MEMBERS, 2 * HALF, SPLITS, MOST_JOINED)
        tl.store(arrived_ptr, 0)


@dataclass(frozen=True)
class Heads:
    """A layer's attention heads: `num_queries` of them, a multiple of the `num_keys` that have keys and values, of
    `size` numbers each, a power of two from 32 on. `scale`: of the scores. `query_norm`, `key_norm`: of each head, with
    the same eps; both or none."""

    num_queries: int
    num_keys: int
    size: int
    scale: float
    query_norm: Norm | None = None
    key_norm: Norm | None = None


@dataclass(frozen=True)
class Rows:
    """Requests, each with one token more than its cache has.

    `positions [num_rows]` int64, for the rotary embedding; `slots [num_rows]` int64, where keys and values go (-1:
    nowhere); `seq_lens [num_rows]` int32, with the token; `block_table [num_rows, max_pages]` int32.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


def decode_attention_reference(
    qkv: torch.Tensor, heads: Heads, cos_sin: torch.Tensor, cache: torch.Tensor, rows: Rows
) -> torch.Tensor:
    """The same in PyTorch."""
    size, page_size = heads.size, cache.shape[2]
    q, k, v = qkv.view(len(qkv), -1, size).split([heads.num_queries, heads.num_keys, heads.num_keys], dim=1)
    cos, sin = (part[:, None].float() for part in cos_sin[rows.positions].chunk(2, dim=-1))

    def turned(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        if norm is not None:
            x = torch.nn.functional.rms_norm(x.float(), (size,), norm.weight.float(), norm.eps).to(x.dtype)
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    q, k = turned(q, heads.query_norm), turned(k, heads.key_norm)
    out = torch.empty_like(q)
    for row, (slot, seq_len) in enumerate(zip(rows.slots.tolist(), rows.seq_lens.tolist(), strict=True)):
        content = torch.cat([k[row], v[row]], dim=-1).to(cache.dtype)
        if slot >= 0:
            cache[slot // page_size, :, slot % page_size] = content
        place = torch.arange(seq_len - 1, device=cache.device)
        before = cache[rows.block_table[row, place // page_size].long(), :, place % page_size]
        keys, values = torch.cat([before, content[None]]).float().split(size, dim=-1)  # [token, head, size]
        keys, values = (x.repeat_interleave(heads.num_queries // heads.num_keys, 1) for x in (keys, values))
        scores = torch.einsum("hd,thd->ht", q[row].float(), keys) * heads.scale
        out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), values).to(out.dtype)
    return out.flatten(1)


def launch_decode_attention(
    qkv: torch.Tensor,
    heads: Heads,
    cos_sin: torch.Tensor,
    cache: torch.Tensor,
    rows: Rows,
    workspace: Workspace,
    num_splits: int = 16,
    overlaps: bool = False,
) -> Shrunk:
    """Attention of rows `qkv [num_rows, (num_queries + 2 num_keys) size]` by the Triton kernel: what it gives, shrunk,
    `[num_rows, num_queries size]`; keys, turned, and values go into the cache.

    `cos_sin [max_position, size]`: cosines, then sines, of the turns (Su et al., RoFormer, arXiv 2104.09864) of pairs
    of numbers half a head apart. `cache [num_pages, num_keys, page_size, 2 size]`: keys, then values, contiguous in the
    last dimension. `num_splits`: parts of the context. `overlaps`: programs start while kernels before still run
    (programmatic dependent launch, sm_90 and later); all but `qkv` must have been written before the last kernel that
    was launched without, for it is read at once. Raises ValueError for heads of another size.
    """
    size, group = heads.size, heads.num_queries // heads.num_keys
    if size < LEAST_SIZE or size & (size - 1):
        raise ValueError(f"heads of {size}: must be a power of two, {LEAST_SIZE} or more")
    members = min(_MEMBERS, triton.next_power_of_2(group))
    num_programs = heads.num_keys * triton.cdiv(group, members)
    splits = triton.next_power_of_2(num_splits)
    workspace.reserve(len(qkv) * heads.num_queries * (size + 2) * splits, len(qkv) * num_programs)
    qkv = qkv.contiguous()
    out = torch.empty((len(qkv), heads.num_queries * size), dtype=torch.float16, device=qkv.device)
    norm = heads.query_norm
    _decode_attention_kernel[(len(qkv), num_programs, num_splits)](
        qkv,
        out,
        rows.positions,
        cos_sin,
        cos_sin.stride(0),
        qkv if norm is None else norm.weight,
        qkv if heads.key_norm is None else heads.key_norm.weight,
        0.0 if norm is None else norm.eps,
        cache,
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        rows.block_table,
        rows.block_table.stride(0),
        rows.seq_lens,
        rows.slots,
        workspace.parts,
        workspace.arrived,
        num_splits,
        heads.scale,
        GROUP=group,
        MEMBERS=members,
        HALF=size // 2,
        PAGE_SIZE=cache.shape[2],
        HAS_NORM=norm is not None,
        BLOCK_G=_BLOCK_G,
        BLOCK_K=_BLOCK_BYTES // cache.dtype.itemsize,
        SPLITS=splits,
        MOST_JOINED=_MOST_JOINED,
        INTERPRETED=not qkv.is_cuda,
        OVERLAPS=overlaps,
        num_warps=4,
        **({"launch_pdl": True} if overlaps else {}),
    )
    return Shrunk(out)
