"""A matrix in MXFP4 as Marlin's kernels have it in memory, word by word, by vLLM's description of what these read."""

from __future__ import annotations

import torch

from vllm_lvspec.kernels.mxfp4_matvec import Matrix

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def random_matrix(
    height: int, width: int, seed: int, bias: bool = False, scales: tuple[int, int] = (118, 125)
) -> tuple[Matrix, torch.Tensor]:
    """One with random weights, and these, `[height, width]` float32; `scales`: exponents, 127 more than of two."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (height, width), generator=generator)
    exponents = torch.randint(*scales, (height // 32, width), generator=generator)
    signed = VALUES[codes & 7] * (1 - 2 * (codes >> 3))
    dense = signed * torch.exp2(exponents.float() - 127).repeat_interleave(32, 0)
    added = torch.randn(width, generator=generator).bfloat16() if bias else None
    return Matrix(_words(codes), stored_scales(exponents), added), dense


def _words(codes: torch.Tensor) -> torch.Tensor:
    height, width = codes.shape
    words = torch.zeros(height // 16, 2 * width, dtype=torch.int64)
    for tile in range(width // 64):
        for thread in range(32):
            for part in range(4):
                n, k = 64 * tile + 16 * part + thread // 4, 2 * (thread % 4)
                column = words[:, 128 * tile + 4 * thread + part]
                held = [(0, 0), (8, 0), (0, 8), (8, 8), (1, 0), (9, 0), (1, 8), (9, 8)]
                for nibble, (down, right) in enumerate(held):
                    column |= codes[k + down :: 16, n + right] << (4 * nibble)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def stored_scales(exponents: torch.Tensor) -> torch.Tensor:
    """Of `[K / 32, N]` exponents, 127 more than of two."""
    stored = torch.zeros_like(exponents, dtype=torch.uint8)
    for tile in range(exponents.shape[1] // 64):
        for row in range(8):
            for place, eighth in enumerate([0, 2, 1, 3, 4, 6, 5, 7]):
                stored[:, 64 * tile + 8 * row + place] = exponents[:, 64 * tile + row + 8 * eighth]
    return stored
