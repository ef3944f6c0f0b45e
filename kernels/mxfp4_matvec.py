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
# what is more is infinite.
_SHRUNK_BY = tl.constexpr(2.0**18)
_HALVES = """mov.b32 x{i}, 0;
@p ld.global.nc.b32 x{i}, [$16+{at}];
shl.b32 t, x{i}, 16;
and.b32 u, x{i}, 0xFFFF0000;
mul.f32 t, t, 0f3D800000;
mul.f32 u, u, 0f3D800000;
cvt.rn.f16x2.f32 x{i}, u, t;
"""
_DECODE = """shl.b32 t, {word}, 4;
shl.b32 u, {word}, 1;
and.b32 u, u, 0x0E0E0E0E;
lop3.b32 t, t, 0x80808080, u, 0xEA;
and.b32 w2, t, 0xFF00FF00;
shl.b32 t, t, 8;
and.b32 w0, t, 0xFF00FF00;
shr.u32 u, {word}, 3;
and.b32 u, u, 0x0E0E0E0E;
lop3.b32 t, {word}, 0x80808080, u, 0xEA;
and.b32 w3, t, 0xFF00FF00;
shl.b32 t, t, 8;
and.b32 w1, t, 0xFF00FF00;
"""
_MULTIPLY = (
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{{c0, c1, c2, c3}}, {{w0, w2, w1, w3}}, {{x{first}, x{second}}}, {{c0, c1, c2, c3}};\n"
)
_SCALE = """{shift} s, ${scales}, {by};
and.b32 s, s, 0x7F800000;
mul.f32 ${to}, c{sum}, s;
"""
_SCALE_SHIFTS = (("shl.b32", 23), ("shl.b32", 15), ("shl.b32", 7), ("shr.u32", 1))  # by byte, to a float32's exponent


def _products() -> str:
    """Outputs $0 to $3: of columns n of each word, $4 to $7: of columns n + 8, in threads 0, 4, 8 and so on; inputs $8
    to $15: words of either tile, $16: of the vector ($17 to $19 are the same), $20 and $21: scales."""
    asm = ".reg .b32 t, u, s, x<4>, w<4>;\n.reg .f32 c<4>;\n.reg .pred p;\nsetp.ne.s64 p, $16, 0;\n"
    asm += "".join(_HALVES.format(i=i, at=16 * i) for i in range(4))
    for word in range(4):
        asm += "".join(f"mov.b32 c{i}, 0;\n" for i in range(4))
        for tile in range(2):
            asm += _DECODE.format(word=f"${8 + 4 * tile + word}")
            asm += _MULTIPLY.format(first=2 * tile, second=2 * tile + 1)
        for half in range(2):
            shift, by = _SCALE_SHIFTS[word % 2 + 2 * half]
            asm += _SCALE.format(shift=shift, by=by, scales=20 + word // 2, to=4 * half + word, sum=2 * half)
    return "{\n" + asm + "}"


_PRODUCTS = tl.constexpr(_products())
# An output must not share a register with an input that is read later.
_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8 + ["l"] * 4 + ["r"] * 2))


@triton.jit
def _value(words, NIBBLE: tl.constexpr):
    """The e2m1 value in four bits of each word."""
    bits = words >> (4 * NIBBLE)
    # As the bits of a float32, which is 2^126 times as small.
    return (((bits & 8) << 28) | ((bits & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def _sums(words, x_ptr, mask, FIRST: tl.constexpr):
    """Over what `words` hold of rows 0, 1, 8 and 9 behind `x_ptr`, from nibble `FIRST` on."""
    total = tl.zeros(words.shape, tl.float32)
    for pair in tl.static_range(2):
        values = tl.load(x_ptr + 4 * pair, mask=mask, other=0)
        low = (values << 16).to(tl.float32, bitcast=True)
        high = (values & -65536).to(tl.float32, bitcast=True)
        total += _value(words, FIRST + pair) * low + _value(words, FIRST + pair + 4) * high
    return total


@triton.jit
def _power(scales_ptr, word, mask):
    """Of two, the scale of each word's column."""
    scales = tl.load(scales_ptr, mask=mask, other=0).to(tl.int32) >> (8 * (word % 2))
    return ((scales & 255) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_groups", "num_splits"])
def _mxfp4_matvec_kernel(
    x_ptr,  # [K / 2] int32: two bfloat16 values each
    weight_ptr,
    scales_ptr,  # [K / 32, N / 2] int16
    bias_ptr,
    out_ptr,
    parts_ptr,  # [num_splits, N] float32
    arrived_ptr,  # [N / 64] int32: 0, and 0 again in the end
    num_columns,
    num_groups,
    num_splits,
    GROUPS: tl.constexpr,  # of a program
    BLOCK_S: tl.constexpr,  # parts that are added up at once
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
):
    """out[n] = sum over k of x[k] weight[k, n] + bias[n]"""
    tile, split = tl.program_id(0), tl.program_id(1)
    word = tl.arange(0, 128)[:, None]
    thread = word // 4
    group = split * GROUPS + tl.arange(0, GROUPS)[None, :]
    is_group = group < num_groups
    row_words = 2 * num_columns
    place = group.to(tl.int64) * (2 * row_words) + (tile * 128 + word)
    a = tl.load(weight_ptr + place, mask=is_group, other=0)
    b = tl.load(weight_ptr + place + row_words, mask=is_group, other=0)
    scale_place = scales_ptr + group * (num_columns // 2) + tile * 32 + thread // 4 * 4
    x_place = x_ptr + group * 16 + thread % 4
    if ASM:
        scale = tl.load(scale_place + word % 4, mask=is_group, other=0)
        # Of the eight vectors that tensor cores take, there is one.
        x = tl.where(is_group & (thread < 4), x_place.to(tl.int64), 0)
        low, high = tl.inline_asm_elementwise(
            _PRODUCTS, _CONSTRAINTS, [a, b, x, scale], (tl.float32, tl.float32), True, 4
        )
        low, high = tl.sum(low, 1) * _SHRUNK_BY, tl.sum(high, 1) * _SHRUNK_BY
        place = tl.arange(0, 128)
        has_sum = place % 16 < 4
        part = parts_ptr + split * num_columns + tile * 64 + place % 4 * 16 + place // 16
        tl.store(part, low, mask=has_sum)
        tl.store(part + 8, high, mask=has_sum)
    else:
        scale_place += word % 4 // 2 * 2
        low = _sums(a, x_place, is_group, 0) + _sums(b, x_place + 8, is_group, 0)
        low = tl.sum(low * _power(scale_place, word, is_group), 1)
        high = _sums(a, x_place, is_group, 2) + _sums(b, x_place + 8, is_group, 2)
        high = tl.sum(high * _power(scale_place + 1, word, is_group), 1)
        column = tl.arange(0, 4)[None, :] * 16 + tl.arange(0, 8)[:, None]  # [r, w]
        part = parts_ptr + split * num_columns + tile * 64 + column
        tl.store(part, tl.sum(tl.reshape(low, (8, 4, 4)), 1))
        tl.store(part + 8, tl.sum(tl.reshape(high, (8, 4, 4)), 1))
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == num_splits - 1:
        columns = tile * 64 + tl.arange(0, 64)
        total = tl.zeros((64,), tl.float32)
        for begin in range(0, num_splits, BLOCK_S):
            splits = begin + tl.arange(0, BLOCK_S)[:, None]
            parts = parts_ptr + splits * num_columns + columns[None, :]
            # Not from a cache that may hold what was there before.
            total += tl.sum(tl.load(parts, mask=splits < num_splits, other=0.0, cache_modifier=".cg"), 0)
        if HAS_BIAS:
            total += tl.load(bias_ptr + columns).to(tl.float32)
        tl.store(out_ptr + columns, total.to(out_ptr.dtype.element_ty))
        tl.store(arrived_ptr + tile, 0)


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


def mxfp4_matvec_reference(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """The same in PyTorch."""
    out = x.float() @ unpacked(matrix)
    return (out if matrix.bias is None else out + matrix.bias.float()).to(x.dtype)


class Workspace:
    """What products on one device and stream share: sums of parts, and how many of a tile's have been written."""

    def __init__(self, device: torch.device):
        self.device = device
        self.parts = torch.empty(0, device=device)
        self.arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def reserve(self, num_parts: int, num_tiles: int) -> None:
        """Have room for so many float32 sums and tiles. CUDA graphs that were recorded before would read what is given
        back, so all is to be reserved before any is recorded."""
        if num_parts > len(self.parts):
            self.parts = torch.empty(num_parts, device=self.device)
        if num_tiles > len(self.arrived):
            self.arrived = torch.zeros(num_tiles, dtype=torch.int32, device=self.device)


def launch_mxfp4_matvec(x: torch.Tensor, matrix: Matrix, workspace: Workspace, asm: bool | None = None) -> torch.Tensor:
    """`x [1, K]` bfloat16 times the matrix, `[1, N]`, by the Triton kernel.

    `asm`: whether by PTX of its own, for NVIDIA's GPUs from sm_80 on; None: where there is one. Raises ValueError for
    another `x`.
    """
    height, width = matrix.shape
    if x.dtype != torch.bfloat16 or x.shape != (1, height):
        raise ValueError(f"x {tuple(x.shape)} {x.dtype}: must be a row of {height} bfloat16")
    num_groups = height // GROUP
    num_splits = triton.cdiv(num_groups, _GROUPS)
    workspace.reserve(num_splits * width, width // TILE)
    out = torch.empty((1, width), dtype=x.dtype, device=x.device)
    _mxfp4_matvec_kernel[(width // TILE, num_splits)](
        x.contiguous().view(torch.int32),
        matrix.weight,
        matrix.scales.view(torch.int16),
        out if matrix.bias is None else matrix.bias,
        out,
        workspace.parts,
        workspace.arrived,
        width,
        num_groups,
        num_splits,
        GROUPS=_GROUPS,
        BLOCK_S=_BLOCK_S,
        HAS_BIAS=matrix.bias is not None,
        ASM=x.is_cuda and torch.version.hip is None if asm is None else asm,
        num_warps=1,
    )
    return out
