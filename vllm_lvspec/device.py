"""A device that the host is ahead of: what goes there without waiting, and what time it is there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 16  # bytes: kernels are compiled anew for addresses that are no multiples of it


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """`arrays` on the device, by one copy that the host does not wait for.

    From memory that is not pinned, a copy waits until the device has done everything before it.
    """
    begins = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)]).tolist()
    host = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    buffer = host.numpy()
    for begin, array in zip(begins, arrays, strict=False):
        buffer[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    there = host.to(device, non_blocking=True)
    return [
        there[begin : begin + array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
        for begin, array in zip(begins, arrays, strict=False)
    ]


def pinned(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` on the host, from where it can be copied to the device without waiting."""
    there = torch.from_numpy(array)
    return there.pin_memory() if device.type == "cuda" else there


class Clock:
    """What time it is for a device that the host may be ahead of."""

    def __init__(self, device: torch.device):
        self._device = device

    def mark(self) -> Any:
        """The moment when the device has done what has been launched so far."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks, for the later of which somebody has waited."""
        if self._device.type != "cuda":
            return end - begin
        return begin.elapsed_time(end) / 1000

    def wait(self, mark: Any) -> None:
        """Until it has come."""
        if self._device.type == "cuda":
            mark.synchronize()
