"""Inputs of the next drafting step, made on the device from those of the last one.

Between two drafting steps only a few integers per request change. Making them on the host would mean a copy and a
synchronisation per drafted token; this is one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _package  # noqa: F401


# Strides and sizes change with the batch, and are not worth another compilation.
@triton.jit(do_not_specialize=["positions_stride", "block_table_stride", "num_rows", "num_dims"])
def _advance_decode_kernel(
    positions_ptr,
    positions_stride,
    seq_lens_ptr,
    slots_ptr,
    block_table_ptr,
    block_table_stride,
    num_rows,
    num_dims,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place, for every row r with n = seq_lens[r] entries in the cache:

    positions[:, r] += 1;  seq_lens[r] = n + 1;  slots[r] = block_table[r, n // PAGE_SIZE] * PAGE_SIZE + n % PAGE_SIZE
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    entries = tl.load(seq_lens_ptr + rows, mask=mask, other=0)
    table = block_table_ptr + rows.to(tl.int64) * block_table_stride
    pages = tl.load(table + entries // PAGE_SIZE, mask=mask, other=0).to(tl.int64)
    tl.store(slots_ptr + rows, pages * PAGE_SIZE + entries % PAGE_SIZE, mask=mask)
    tl.store(seq_lens_ptr + rows, entries + 1, mask=mask)
    for dim in range(num_dims):
        place = positions_ptr + dim * positions_stride + rows
        tl.store(place, tl.load(place, mask=mask, other=0) + 1, mask=mask)


def advance_decode_reference(
    positions: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor, block_table: torch.Tensor, page_size: int
) -> None:
    """The same in PyTorch."""
    entries = seq_lens.long()
    pages = block_table.gather(1, (entries // page_size).unsqueeze(1)).squeeze(1).long()
    slots.copy_(pages * page_size + entries % page_size)
    seq_lens.add_(1)
    positions.add_(1)


def advance_decode(
    positions: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor, block_table: torch.Tensor, page_size: int
) -> None:
    """Move a decode batch on by one token, in place.

    `positions [dims, num_rows]` int64, `seq_lens [num_rows]` int32 (entries in the cache, the last token included),
    `slots [num_rows]` int64, `block_table [num_rows, max_pages]` int32. Every row must have the page that its next
    token falls into. Raises ValueError where shapes don't fit.
    """
    num_rows = len(seq_lens)
    if positions.shape[1:] != (num_rows,) or slots.shape != (num_rows,) or len(block_table) != num_rows:
        raise ValueError(
            f"rows differ: positions {tuple(positions.shape)}, seq_lens {tuple(seq_lens.shape)}, slots "
            f"{tuple(slots.shape)}, block_table {tuple(block_table.shape)}"
        )
    if not positions.is_cuda:
        advance_decode_reference(positions, seq_lens, slots, block_table, page_size)
        return
    launch_advance_decode(positions, seq_lens, slots, block_table, page_size)


def launch_advance_decode(
    positions: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor, block_table: torch.Tensor, page_size: int
) -> None:
    """Launch the Triton kernel; rows must be contiguous (`stride(-1) == 1`)."""
    block = 128
    _advance_decode_kernel[(triton.cdiv(len(seq_lens), block),)](
        positions,
        positions.stride(0),
        seq_lens,
        slots,
        block_table,
        block_table.stride(0),
        len(seq_lens),
        len(positions),
        PAGE_SIZE=page_size,
        BLOCK=block,
    )
