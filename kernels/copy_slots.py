"""Keys and values of tokens from one set of paged caches into another, all layers in one launch.

A drafter that is the target itself (Sparse-to-Dense, arXiv 2505.19155) needs for the tokens of the video that it keeps,
and for text newly accepted, what the target's pages hold already. Copied and not computed again, they cost a few
megabytes' move instead of a forward pass; and layer by layer, launches alone would take longer than the moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _package  # noqa: F401

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by bytes of an element; what they mean doesn't matter


@dataclass(frozen=True)
class PagedCaches:
    """The caches of all layers, made with `of`.

    `caches`: a tensor a layer, `[num_blocks, num_kv_heads, block_size, content]`, all of one shape, dtype and strides,
    of which the last is 1; `pointers [num_layers]` int64, on the caches' device: where each begins; `alignment`: bytes,
    at most 16, of which each is a multiple.
    """

    caches: tuple[torch.Tensor, ...]
    pointers: torch.Tensor
    alignment: int

    @classmethod
    def of(cls, caches: Sequence[torch.Tensor]) -> PagedCaches:
        """Raises ValueError where caches differ, or are none that can be copied."""
        if not caches:
            raise ValueError("caches: there are none")
        first = caches[0]
        if first.dim() != 4 or first.stride(-1) != 1 or first.element_size() not in BITS:
            raise ValueError(
                f"a cache must have four dimensions, the last contiguous, and elements of 1, 2 or 4 bytes: shape "
                f"{tuple(first.shape)}, strides {first.stride()}, {first.dtype}"
            )
        for name, each in (
            ("shapes", [tuple(cache.shape) for cache in caches]),
            ("strides", [cache.stride() for cache in caches]),
            ("dtypes", [cache.dtype for cache in caches]),
            ("devices", [cache.device for cache in caches]),
        ):
            for layer, found in enumerate(each):
                if found != each[0]:
                    raise ValueError(f"{name} differ: {each[0]} in layer 0, {found} in layer {layer}")
        pointers = [cache.data_ptr() for cache in caches]
        table = torch.tensor(pointers, dtype=torch.int64, device=first.device)
        return cls(tuple(caches), table, math.gcd(16, *pointers))


@triton.jit(do_not_specialize=["num_tokens"])
def _copy_slots_kernel(
    sources_ptr,  # [num_layers], each the address of a cache
    source_block_stride,
    source_head_stride,
    source_slot_stride,
    destinations_ptr,
    destination_block_stride,
    destination_head_stride,
    destination_slot_stride,
    source_slots_ptr,
    destination_slots_ptr,
    num_tokens,
    num_heads,
    block_size,
    content,
    BYTES: tl.constexpr,  # of an element
    SOURCE_ALIGNMENT: tl.constexpr,
    DESTINATION_ALIGNMENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Per layer and tile of rows, a row being one head of a token t, where neither slot of t is below 0:

    destination[destination_slots[t], head] = source[source_slots[t], head]
    """
    layer = tl.program_id(1)
    if BYTES == 1:
        element = tl.pointer_type(tl.int8)
    elif BYTES == 2:
        element = tl.pointer_type(tl.int16)
    else:
        element = tl.pointer_type(tl.int32)
    # Of a pointer that is loaded nothing is known, and elements would be moved one by one.
    source = tl.multiple_of(tl.load(sources_ptr + layer).to(element), SOURCE_ALIGNMENT)
    destination = tl.multiple_of(tl.load(destinations_ptr + layer).to(element), DESTINATION_ALIGNMENT)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    token, head = row // num_heads, row % num_heads
    source_slot = tl.load(source_slots_ptr + token, mask=token < num_tokens, other=-1)
    destination_slot = tl.load(destination_slots_ptr + token, mask=token < num_tokens, other=-1)
    source_rows = (
        source_slot // block_size * source_block_stride
        + source_slot % block_size * source_slot_stride
        + head * source_head_stride
    )
    destination_rows = (
        destination_slot // block_size * destination_block_stride
        + destination_slot % block_size * destination_slot_stride
        + head * destination_head_stride
    )
    is_row = (source_slot >= 0) & (destination_slot >= 0)
    column = tl.arange(0, BLOCK_C)
    is_moved = is_row[:, None] & (column < content)[None, :]
    moved = tl.load(source + source_rows[:, None] + column[None, :], mask=is_moved)
    tl.store(destination + destination_rows[:, None] + column[None, :], moved, mask=is_moved)


def copy_slots_reference(
    sources: PagedCaches, destinations: PagedCaches, source_slots: torch.Tensor, destination_slots: torch.Tensor
) -> None:
    """The same as `copy_slots` in PyTorch, a layer at a time."""
    block_size = sources.caches[0].shape[2]
    is_moved = (source_slots >= 0) & (destination_slots >= 0)
    source_slots, destination_slots = source_slots[is_moved], destination_slots[is_moved]
    read = source_slots // block_size, slice(None), source_slots % block_size
    written = destination_slots // block_size, slice(None), destination_slots % block_size
    for source, destination in zip(sources.caches, destinations.caches, strict=True):
        bits = BITS[source.element_size()]
        destination.view(bits)[written] = source.view(bits)[read]


def copy_slots(
    sources: PagedCaches, destinations: PagedCaches, source_slots: torch.Tensor, destination_slots: torch.Tensor
) -> None:
    """Copy, in every layer, each token's content from its slot in `sources` to its slot in `destinations`.

    `source_slots`, `destination_slots [num_tokens]` int64: block * block_size + place in the block; a token with one
    below 0 is skipped. No slot may be written twice, nor written and read. Caches may differ in their number of blocks
    and in their strides. Raises ValueError where they differ in more.
    """
    ours, theirs = sources.caches[0], destinations.caches[0]
    if len(sources.caches) != len(destinations.caches) or ours.shape[1:] != theirs.shape[1:]:
        raise ValueError(
            f"shapes differ: sources {len(sources.caches)} x {tuple(ours.shape)}, destinations "
            f"{len(destinations.caches)} x {tuple(theirs.shape)}"
        )
    if ours.dtype != theirs.dtype:
        raise ValueError(f"dtypes differ: sources {ours.dtype}, destinations {theirs.dtype}")
    if source_slots.shape != destination_slots.shape or source_slots.dim() != 1:
        raise ValueError(
            f"shapes differ: source_slots {tuple(source_slots.shape)}, destination_slots "
            f"{tuple(destination_slots.shape)}"
        )
    copy = launch_copy_slots if ours.is_cuda else copy_slots_reference
    copy(sources, destinations, source_slots, destination_slots)


def launch_copy_slots(
    sources: PagedCaches, destinations: PagedCaches, source_slots: torch.Tensor, destination_slots: torch.Tensor
) -> None:
    """Launch the Triton kernel; slots must be contiguous."""
    num_tokens = len(source_slots)
    if not num_tokens:
        return
    source, destination = sources.caches[0], destinations.caches[0]
    _, num_heads, block_size, content = source.shape
    block_c = triton.next_power_of_2(content)
    block_r = max(1, 4096 // block_c)
    _copy_slots_kernel[triton.cdiv(num_tokens * num_heads, block_r), len(sources.caches)](
        sources.pointers,
        *source.stride()[:3],
        destinations.pointers,
        *destination.stride()[:3],
        source_slots,
        destination_slots,
        num_tokens,
        num_heads,
        block_size,
        content,
        BYTES=source.element_size(),
        SOURCE_ALIGNMENT=sources.alignment,
        DESTINATION_ALIGNMENT=destinations.alignment,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )
