"""What kernels of a drafted token have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _package  # noqa: F401


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x / sqrt(mean of x^2 + eps), times `weight [width]`, contiguous."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Shrunk:
    """Rows as products on tensor cores take them: `values [num_rows, width]` float16, a sixteenth of what they are, and
    what is more than float16 holds is the most that it does.

    `squares`: float32, for a single row whose RMSNorm is meant: the sum of its squares before the norm, in any number
    of parts. `values` are multiplied by the norm's weights then, and not divided yet.
    """

    values: torch.Tensor
    squares: torch.Tensor | None = None
    eps: float = 0.0

    def whole(self) -> torch.Tensor:
        """What they mean, float32."""
        whole = 16 * self.values.float()
        if self.squares is not None:
            whole = whole * torch.rsqrt(self.squares.sum() / whole.shape[-1] + self.eps)
        return whole


@triton.jit
def shrunk(values):
    """As in `Shrunk`. What is no number stays none."""
    values = tl.clamp(values * 0.0625, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return values.to(tl.float16)


class Workspace:
    """What programs of a kernel tell each other through, for all kernels on one device and stream: parts of what they
    compute, and how many of the same result's have been written."""

    def __init__(self, device: torch.device):
        self.device = device
        self.parts = torch.empty(0, device=device)
        self.arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def reserve(self, num_parts: int, num_results: int) -> None:
        """Have room for so many float32 numbers and results. CUDA graphs that were recorded before would read what is
        given back, so all is to be reserved before any is recorded."""
        if num_parts > len(self.parts):
            self.parts = torch.empty(num_parts, device=self.device)
        if num_results > len(self.arrived):
            self.arrived = torch.zeros(num_results, dtype=torch.int32, device=self.device)
