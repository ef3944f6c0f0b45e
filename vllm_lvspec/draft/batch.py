"""Inputs of the drafter's forwards, and their way to the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 16  # bytes: kernels are compiled anew for addresses that are no multiples of it


@dataclass
class DraftBatch:
    """Inputs of one forward over `num_rows` requests.

    `token_ids [num_tokens]` int64, `positions [dims, num_tokens]` int64, `slots [num_tokens]` int64, `query_starts
    [num_rows + 1]` int32, `seq_lens [num_rows]` int32 (both also on the host), `block_table [num_rows, max_pages]`
    int32. `visual_mask [num_tokens]` (bool, on the host) marks the tokens that `visual` (rows in order) replaces; None
    where there is none.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_starts: torch.Tensor
    query_starts_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    max_seq_len: int
    visual_mask: torch.Tensor | None = None
    visual: list[torch.Tensor] = field(default_factory=list)

    def rows(self, rows: np.ndarray) -> DraftBatch:
        """Requests `rows` (ascending) of a batch with one token each."""
        return DraftBatch(
            token_ids=take_rows(self.token_ids, rows),
            positions=take_rows(self.positions, rows, dim=1),
            slots=take_rows(self.slots, rows),
            query_starts=self.query_starts[: len(rows) + 1],
            query_starts_cpu=self.query_starts_cpu[: len(rows) + 1],
            seq_lens=take_rows(self.seq_lens, rows),
            seq_lens_cpu=take_rows(self.seq_lens_cpu, rows),
            block_table=take_rows(self.block_table, rows),
            max_query_len=1,
            max_seq_len=self.max_seq_len,
        )


def take_rows(values: torch.Tensor, rows: np.ndarray, dim: int = 0) -> torch.Tensor:
    """`rows` (ascending) of `values`; a view where they are the first ones."""
    if rows[-1] == len(rows) - 1:
        return values.narrow(dim, 0, len(rows))
    return values.index_select(dim, torch.from_numpy(rows).to(values.device))


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
        """Between two marks; both must have come, which whoever has read a later result knows."""
        if self._device.type != "cuda":
            return end - begin
        return begin.elapsed_time(end) / 1000

    def wait(self) -> None:
        """Until the device has done everything."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
