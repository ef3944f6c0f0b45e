"""SwiGLU of a few rows, each by as many programs as it takes.

vLLM's kernel has one block of threads for a row: 8 us on an H200 for a drafted token's single one of 18,944 values, 28
times a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _package  # noqa: F401

MOST_ROWS = 32  # of more, a block a row keeps a GPU busy
_BLOCK = 1024


@triton.jit(do_not_specialize=["x_stride"])
def _silu_and_mul_kernel(x_ptr, x_stride, out_ptr, width, BLOCK: tl.constexpr):
    """out[r, i] = silu(x[r, i]) x[r, width + i]"""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + width + columns, mask=mask, other=0).to(tl.float32)
    silu = gate / (1 + tl.exp(-gate))
    # Rounded before it is multiplied, too, as PyTorch does.
    product = silu.to(out_ptr.dtype.element_ty).to(tl.float32) * up
    tl.store(out_ptr + row * width + columns, product.to(out_ptr.dtype.element_ty), mask=mask)


def silu_and_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """The same in PyTorch."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """`x [num_rows, 2 * width]`, contiguous in its last dimension, to `[num_rows, width]`."""
    return launch_silu_and_mul(x) if x.is_cuda else silu_and_mul_reference(x)


def launch_silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Launch the Triton kernel."""
    num_rows, width = len(x), x.shape[1] // 2
    out = x.new_empty((num_rows, width))
    _silu_and_mul_kernel[(triton.cdiv(width, _BLOCK), num_rows)](x, x.stride(0), out, width, BLOCK=_BLOCK)
    return out
