"""What kernels of a drafted token have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import _package  # noqa: F401


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x / sqrt(mean of x^2 + eps), times `weight [width]`, contiguous."""

    weight: torch.Tensor
    eps: float


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
