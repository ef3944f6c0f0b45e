"""A vector times a matrix in MXFP4, as it lies in memory for vLLM's Marlin kernels.

What a drafted token costs is how fast the drafter's weights are read. Marlin's kernels are made for batches: of a
single row on an H200 they read a 7B drafter's at two fifths of the memory's rate, and no layer in less than 10 us. Here
a warp takes 64 columns and 256 rows, has all that it reads on the way at once, and whoever is last of those with the
same columns adds up what all have found.

MXFP4 (OCP Microscaling Formats 1.0): 32 values of a row of weights, e2m1 each, share a power of two (e8m0). A matrix is
`weight [K / 16, 2 N]` int32 and `scales [K / 32, N]` bytes. Of the tile of rows `16 i + [0, 16)` of K and columns
`64 j + [0, 64)` of N, word `128 j + 4 t + w` of row i holds, for r = t // 4 and k = 2 (t % 4), from its lowest bits on,

    (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8), and the same of k + 1;    n = 16 w + r

and bytes `64 j + 8 r + [0, 8)` of a row of scales those of columns 64 j + r + 8 [0, 2, 1, 3, 4, 6, 5, 7].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _package  # noqa: F401
from .shared import Norm, Shrunk, Workspace, shrunk

GROUP = 32  # values of a row that share a scale
TILE = 64  # columns of a warp
_GROUPS = 8  # of rows, likewise: of the sizes tried on an H200, up to 64 and 8 warps, the fastest or within 3 % of it
_BLOCK_S = 16

# What each warp does, in PTX. A thread has four words of each of two tiles of rows, 16 apart, their scales, and where
# its part of the vector begins, or 0; its words are what tensor cores want of it for 16 columns. That the compiler may
# not load the vector leaves it no choice but to lay out all else as weights are loaded, four words a thread. The bits
# of an e2m1 value are put where float16 has its sign, the lowest bits of its exponent and the highest one of its
# mantissa, which is 2^-14 times the value, whether normal or not; values of the vector, too, are taken smaller, by
# 2^-4, and float16 then has all that bfloat16 holds between 2^-10 and a million: of what is less it loses bits, and
# what is more is a million. A vector may be so already (`Shrunk`).
_SUMS_SMALLER_BY = tl.constexpr(2.0**18)
_LOAD = "mov.b32 x{i}, 0;\n@p ld.global.b32 x{i}, [$16+{at}];\n"
_HALVES = """shl.b32 t, x{i}, 16;
and.b32 u, x{i}, 0xFFFF0000;
mul.f32 t, t, 0f3D800000;
mul.f32 u, u, 0f3D800000;
"""
_JOIN = "cvt.rn.satfinite.f16x2.f32 x{i}, u, t;\n"
_DECODE = """shl.b32 t, {word}, 4;
shl.b32 u, {word}, 1;
and.b32 u, u, 0x0E0E0E0E;
lop3.b32 t, t, 0x80808080, u, 0xEA;
and.b32 w2, t, 0xFF00FF00;
prmt.b32 w0, t, 0, 0x2404;
shr.u32 u, {word}, 3;
and.b32 u, u, 0x0E0E0E0E;
lop3.b32 t, {word}, 0x80808080, u, 0xEA;
and.b32 w3, t, 0xFF00FF00;
prmt.b32 w1, t, 0, 0x2404;
"""
_MULTIPLY = (
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{{c0, c1, c2, c3}}, {{w0, w2, w1, w3}}, {{x{first}, x{second}}}, {{{sums}}};\n"
)
_SCALE = """{shift} s, ${scales}, {by};
and.b32 s, s, 0x7F800000;
mul.f32 ${to}, c{sum}, s;
"""
_SCALE_SHIFTS = (("shl.b32", 23), ("shl.b32", 15), ("shl.b32", 7), ("shr.u32", 1))  # by byte, to a float32's exponent


def _products(is_shrunk: bool) -> str:
    """Outputs $0 to $3: of columns n of each word, $4 to $7: of columns n + 8, in threads 0, 4, 8 and so on; inputs $8
    to $15: words of either tile, $16: of the vector ($17 to $19 are the same), and the last two: scales."""
    asm = ".reg .b32 t, u, s, x<4>, w<4>;\n.reg .f32 z, c<4>;\n.reg .pred p;\n"
    asm += "mov.f32 z, 0f00000000;\nsetp.ne.s64 p, $16, 0;\n"
    for i in range(4):
        asm += "".join(part.format(i=i, at=16 * i) for part in ((_LOAD,) if is_shrunk else (_LOAD, _HALVES, _JOIN)))
    for word in range(4):
        for tile, sums in enumerate(("z, z, z, z", "c0, c1, c2, c3")):
            asm += _DECODE.format(word=f"${8 + 4 * tile + word}")
            asm += _MULTIPLY.format(first=2 * tile, second=2 * tile + 1, sums=sums)
        for half in range(2):
            shift, by = _SCALE_SHIFTS[word % 2 + 2 * half]
            asm += _SCALE.format(shift=shift, by=by, scales=20 + word // 2, to=4 * half + word, sum=2 * half)
    return "{\n" + asm + "}"


_PRODUCTS = tl.constexpr(_products(is_shrunk=False))
_PRODUCTS_OF_SHRUNK = tl.constexpr(_products(is_shrunk=True))
# An output must not share a register with an input that is read later.
_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8 + ["l"] * 4 + ["r"] * 2))


@triton.jit
def _value(words, NIBBLE: tl.constexpr):
    """The e2m1 value in four bits of each word."""
    bits = words >> (4 * NIBBLE)
    # As the bits of a float32, which is 2^126 times as small.
    return (((bits & 8) << 28) | ((bits & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def _pairs(ptr, mask, IS_SHRUNK: tl.constexpr):
    """Two values each, the lower ones first."""
    values = tl.load(ptr, mask=mask, other=0)
    if IS_SHRUNK:
        low, high = values.to(tl.int16).to(tl.float16, bitcast=True), (values >> 16).to(tl.int16)
        return low.to(tl.float32) * 16, high.to(tl.float16, bitcast=True).to(tl.float32) * 16
    return (values << 16).to(tl.float32, bitcast=True), (values & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _sums(words, x_ptr, mask, FIRST: tl.constexpr, IS_SHRUNK: tl.constexpr):
    """Over what `words` hold of rows 0, 1, 8 and 9 behind `x_ptr`, from nibble `FIRST` on."""
    total = tl.zeros(words.shape, tl.float32)
    for pair in tl.static_range(2):
        low, high = _pairs(x_ptr + 4 * pair, mask, IS_SHRUNK)
        total += _value(words, FIRST + pair) * low + _value(words, FIRST + pair + 4) * high
    return total


@triton.jit
def _power(scales_ptr, word, mask):
    """Of two, the scale of each word's column."""
    scales = tl.load(scales_ptr, mask=mask, other=0).to(tl.int32) >> (8 * (word % 2))
    return ((scales & 255) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _total(parts_ptr, stride, num_splits, columns, BLOCK_S: tl.constexpr):
    """Of these columns' parts, over all splits."""
    total = tl.zeros(columns.shape, tl.float32)
    for begin in range(0, num_splits, BLOCK_S):
        splits = begin + tl.arange(0, BLOCK_S)[:, None]
        # Not from a cache that may hold what was there before.
        parts = tl.load(
            parts_ptr + splits * stride + columns[None, :], mask=splits < num_splits, other=0.0, cache_modifier=".cg"
        )
        total += tl.sum(parts, 0)
    return total


@triton.jit
def _sum_of(parts_ptr, num_parts, BLOCK: tl.constexpr):
    """Of so many numbers."""
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, num_parts, BLOCK):
        part = begin + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + part, mask=part < num_parts, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit(do_not_specialize=["num_groups", "num_splits", "num_loops", "num_squares"])
def _mxfp4_matvec_kernel(
    x_ptr,  # [K / 2] int32: two values each
    squares_ptr,  # [num_squares] float32
    weight_ptr,
    scales_ptr,  # [K / 32, N / 2] int16
    bias_ptr,
    added_ptr,
    norm_ptr,  # [N]
    out_ptr,
    shrunk_ptr,
    out_squares_ptr,  # [N / 64] float32
    parts_ptr,  # [num_splits, N] float32
    arrived_ptr,  # [N / 64] int32: 0, and 0 again in the end
    num_columns,
    num_groups,
    num_splits,
    num_loops,
    num_squares,
    eps,
    GROUPS: tl.constexpr,  # of a program, in each of its loops
    IS_WHOLE: tl.constexpr,  # whether the last loop has as many
    BLOCK_S: tl.constexpr,  # parts that are added up at once
    IS_SHRUNK: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_ADDED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_GATED: tl.constexpr,
    ASM: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """out[n] = sum over k of x[k] weight[k, n] + bias[n], and what else the launching functions say"""
    tile, split = tl.program_id(0), tl.program_id(1)
    num_tiles = tl.num_programs(0)
    word = tl.arange(0, 128)[:, None]
    thread = word // 4
    row_words = 2 * num_columns
    low_sums = tl.zeros((128,), tl.float32)
    high_sums = tl.zeros((128,), tl.float32)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    begin = split * num_loops * GROUPS
    for first in range(begin, tl.minimum(begin + num_loops * GROUPS, num_groups), GROUPS):
        group = first + tl.arange(0, GROUPS)[None, :]
        is_group = (group < num_groups) | IS_WHOLE
        place = group.to(tl.int64) * (2 * row_words) + (tile * 128 + word)
        a = tl.load(weight_ptr + place, mask=is_group, other=0)
        b = tl.load(weight_ptr + place + row_words, mask=is_group, other=0)
        scale_place = scales_ptr + group * (num_columns // 2) + tile * 32 + thread // 4 * 4
        if ASM:
            scale = tl.load(scale_place + word % 4, mask=is_group, other=0)
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()
        x_place = x_ptr + group * 16 + thread % 4
        if ASM:
            # Of the eight vectors that tensor cores take, there is one.
            x = tl.where(is_group & (thread < 4), x_place.to(tl.int64), 0)
            # None of it may be done before what is waited for, and of the vector the compiler can't tell.
            low, high = tl.inline_asm_elementwise(
                _PRODUCTS_OF_SHRUNK if IS_SHRUNK else _PRODUCTS,
                _CONSTRAINTS,
                [a, b, x, scale],
                (tl.float32, tl.float32),
                not OVERLAPS,
                4,
            )
        else:
            scale_place += word % 4 // 2 * 2
            low = _sums(a, x_place, is_group, 0, IS_SHRUNK) + _sums(b, x_place + 8, is_group, 0, IS_SHRUNK)
            low *= _power(scale_place, word, is_group)
            high = _sums(a, x_place, is_group, 2, IS_SHRUNK) + _sums(b, x_place + 8, is_group, 2, IS_SHRUNK)
            high *= _power(scale_place + 1, word, is_group)
        low_sums += tl.sum(low, 1)
        high_sums += tl.sum(high, 1)
    part = parts_ptr + split * num_columns + tile * 64
    if ASM:
        place = tl.arange(0, 128)
        has_sum = place % 16 < 4
        part += place % 4 * 16 + place // 16
        tl.store(part, low_sums * _SUMS_SMALLER_BY, mask=has_sum)
        tl.store(part + 8, high_sums * _SUMS_SMALLER_BY, mask=has_sum)
    else:
        part += tl.arange(0, 4)[None, :] * 16 + tl.arange(0, 8)[:, None]  # [r, w]
        tl.store(part, tl.sum(tl.reshape(low_sums, (8, 4, 4)), 1))
        tl.store(part + 8, tl.sum(tl.reshape(high_sums, (8, 4, 4)), 1))
    tl.debug_barrier()
    out_tile, wanted = tile, num_splits
    if IS_GATED:
        out_tile, wanted = tile % (num_tiles // 2), 2 * num_splits
    if tl.atomic_add(arrived_ptr + out_tile, 1, sem="acq_rel") == wanted - 1:
        columns = out_tile * 64 + tl.arange(0, 64)
        total = _total(parts_ptr, num_columns, num_splits, columns, BLOCK_S)
        if IS_GATED:
            up = _total(parts_ptr, num_columns, num_splits, num_columns // 2 + columns, BLOCK_S)
        if HAS_SQUARES:
            factor = tl.rsqrt(_sum_of(squares_ptr, num_squares, 64) / (32 * num_groups) + eps)
            total *= factor
            if IS_GATED:
                up *= factor
        if HAS_BIAS:
            total += tl.load(bias_ptr + columns).to(tl.float32)
        if IS_ADDED:
            total += tl.load(added_ptr + columns).to(tl.float32)
        if IS_GATED:
            tl.store(shrunk_ptr + columns, shrunk(total / (1 + tl.exp(-total)) * up))
        else:
            rounded = total.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + columns, rounded)
            if HAS_NORM:
                total = rounded.to(tl.float32)
                tl.store(out_squares_ptr + out_tile, tl.sum(total * total))
                tl.store(shrunk_ptr + columns, shrunk(total * tl.load(norm_ptr + columns).to(tl.float32)))
        tl.store(arrived_ptr + out_tile, 0)


@triton.jit
def _shrink_kernel(x_ptr, norm_ptr, shrunk_ptr, squares_ptr, width, BLOCK: tl.constexpr):
    """By one program."""
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column, mask=column < width, other=0).to(tl.float32)
    tl.store(squares_ptr, tl.sum(x * x))
    norm = tl.load(norm_ptr + column, mask=column < width, other=0).to(tl.float32)
    tl.store(shrunk_ptr + column, shrunk(x * norm), mask=column < width)


@dataclass(frozen=True)
class Matrix:
    """A matrix in MXFP4, as above; `bias [N]`, or None. All are contiguous."""

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """K and N."""
        return 16 * self.weight.shape[0], self.weight.shape[1] // 2


def unpacked(matrix: Matrix) -> torch.Tensor:
    """What the matrix means, `[K, N]` float32."""
    height, width = matrix.shape
    device = matrix.weight.device
    words = matrix.weight.view(height // 16, width // 64, 8, 4, 4, 1)  # [row of tiles, tile, r, k, w]
    bits = words >> (4 * torch.arange(8, device=device, dtype=torch.int32))
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=device)
    values = magnitudes[(bits & 7).long()] * (1 - 2 * (bits >> 3 & 1))
    values = values.view(height // 16, width // 64, 8, 4, 4, 2, 2, 2)  # ..., k + 1, n + 8, k + 8
    values = values.permute(0, 7, 3, 5, 1, 4, 6, 2).reshape(height, width)
    order = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7], device=device)
    stored = matrix.scales.view(torch.uint8).view(height // GROUP, width // 64, 8, 8)
    scales = torch.empty_like(stored)
    scales[..., order] = stored
    powers = torch.exp2(scales.transpose(-1, -2).reshape(height // GROUP, width).float() - 127)
    return values * powers.repeat_interleave(GROUP, 0)


def mxfp4_matvec_reference(
    x: torch.Tensor | Shrunk, matrix: Matrix, added: torch.Tensor | None = None, is_gated: bool = False
) -> torch.Tensor:
    """`launch_mxfp4_matvec` in PyTorch; `is_gated`: `launch_mxfp4_swiglu`, in bfloat16."""
    out = (x.whole() if isinstance(x, Shrunk) else x.float()) @ unpacked(matrix)
    if matrix.bias is not None:
        out = out + matrix.bias.float()
    if is_gated:
        gate, up = out.chunk(2, dim=-1)
        out = torch.nn.functional.silu(gate) * up
    if added is not None:
        out = out + added.float()
    return out.to(torch.bfloat16)


@dataclass(frozen=True)
class How:
    """`num_loops`: how often each program takes 256 rows, one after another. `overlaps`: programs start, and read
    weights, while the kernel before still runs (programmatic dependent launch, sm_90 and later). `asm`: whether by PTX
    of its own, for NVIDIA's GPUs from sm_80 on; None: where there is one."""

    num_loops: int = 1
    overlaps: bool = False
    asm: bool | None = None


_BY_DEFAULT = How()


def launch_mxfp4_matvec(
    x: torch.Tensor | Shrunk,
    matrix: Matrix,
    workspace: Workspace,
    how: How = _BY_DEFAULT,
    *,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """By the Triton kernel `x [1, K]`, bfloat16 or shrunk, times the matrix, plus `added [1, N]` bfloat16: `[1, N]`
    bfloat16. Raises ValueError for others."""
    out = torch.empty((1, matrix.shape[1]), dtype=torch.bfloat16, device=matrix.weight.device)
    _launch(x, matrix, workspace, how, added=added, out=out)
    return out


def launch_mxfp4_add_norm(
    x: torch.Tensor | Shrunk,
    matrix: Matrix,
    workspace: Workspace,
    how: How = _BY_DEFAULT,
    *,
    added: torch.Tensor,
    norm: Norm,
) -> tuple[torch.Tensor, Shrunk]:
    """What `launch_mxfp4_matvec` gives, and its norm for the product behind it. Raises ValueError likewise."""
    width, device = matrix.shape[1], matrix.weight.device
    out = torch.empty((1, width), dtype=torch.bfloat16, device=device)
    normed = Shrunk(torch.empty_like(out, dtype=torch.float16), torch.empty(width // TILE, device=device), norm.eps)
    _launch(x, matrix, workspace, how, added=added, out=out, norm=norm, result=normed)
    return out, normed


def launch_mxfp4_swiglu(
    x: torch.Tensor | Shrunk, matrix: Matrix, workspace: Workspace, how: How = _BY_DEFAULT
) -> Shrunk:
    """SiLU of the first half of `x` times the matrix, times the other half, `[1, N / 2]`. Raises ValueError for another
    `x`, for halves that are no whole number of tiles, and for a matrix with a bias."""
    width = matrix.shape[1]
    if width % (2 * TILE) or matrix.bias is not None:
        raise ValueError(f"a gated product of {width} columns: must be of a multiple of {2 * TILE}, without a bias")
    activated = Shrunk(torch.empty((1, width // 2), dtype=torch.float16, device=matrix.weight.device))
    _launch(x, matrix, workspace, how, result=activated, is_gated=True)
    return activated


def launch_shrink(x: torch.Tensor, norm: Norm) -> Shrunk:
    """The norm of `x [1, width]` bfloat16, for a product. Raises ValueError where these are others.

    That it waits for all kernels before it, and all kernels behind for it, is what overlapping ones rely on.
    """
    width = len(norm.weight)
    if x.dtype != torch.bfloat16 or x.shape != (1, width):
        raise ValueError(f"x {tuple(x.shape)} {x.dtype}: must be a row of {width} bfloat16")
    normed = Shrunk(torch.empty_like(x, dtype=torch.float16), torch.empty(1, device=x.device), norm.eps)
    _shrink_kernel[(1,)](
        x.contiguous(), norm.weight, normed.values, normed.squares, width, BLOCK=triton.next_power_of_2(width)
    )
    return normed


def _launch(
    x: torch.Tensor | Shrunk,
    matrix: Matrix,
    workspace: Workspace,
    how: How,
    added: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    norm: Norm | None = None,
    result: Shrunk | None = None,
    is_gated: bool = False,
) -> None:
    height, width = matrix.shape
    values, squares, eps = (x.values, x.squares, x.eps) if isinstance(x, Shrunk) else (x, None, 0.0)
    dtype = torch.float16 if isinstance(x, Shrunk) else torch.bfloat16
    if values.dtype != dtype or values.shape != (1, height):
        raise ValueError(f"x {tuple(values.shape)} {values.dtype}: must be a row of {height}, bfloat16 or shrunk")
    if added is not None and (added.dtype != torch.bfloat16 or added.shape != (1, width)):
        raise ValueError(f"added {tuple(added.shape)} {added.dtype}: must be a row of {width} bfloat16")
    num_groups = height // GROUP
    num_tiles = width // TILE
    num_splits = triton.cdiv(num_groups, _GROUPS * how.num_loops)
    workspace.reserve(num_splits * width, num_tiles)
    weight, is_cuda = matrix.weight, matrix.weight.is_cuda
    _mxfp4_matvec_kernel[(num_tiles, num_splits)](
        values.contiguous().view(torch.int32),
        workspace.parts if squares is None else squares,
        weight,
        matrix.scales.view(torch.int16),
        weight if matrix.bias is None else matrix.bias,
        weight if added is None else added.contiguous(),
        weight if norm is None else norm.weight,
        weight if out is None else out,
        weight if result is None else result.values,
        workspace.parts if result is None or result.squares is None else result.squares,
        workspace.parts,
        workspace.arrived,
        width,
        num_groups,
        num_splits,
        how.num_loops,
        0 if squares is None else len(squares),
        eps,
        GROUPS=_GROUPS,
        IS_WHOLE=num_groups % _GROUPS == 0,
        BLOCK_S=_BLOCK_S,
        IS_SHRUNK=isinstance(x, Shrunk),
        HAS_SQUARES=squares is not None,
        HAS_BIAS=matrix.bias is not None,
        IS_ADDED=added is not None,
        HAS_NORM=norm is not None,
        IS_GATED=is_gated,
        ASM=is_cuda and torch.version.hip is None if how.asm is None else how.asm,
        OVERLAPS=how.overlaps,
        num_warps=1,
        **({"launch_pdl": True} if how.overlaps else {}),
    )
