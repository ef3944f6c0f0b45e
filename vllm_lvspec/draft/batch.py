"""Inputs of the drafter's forwards."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_lvspec.device import upload


@dataclass
class DraftBatch:
    """Inputs of one forward over `num_rows` requests.

    `token_ids [num_tokens]` int64, `positions [dims, num_tokens]` int64, `slots [num_tokens]` int64, `query_starts
    [num_rows + 1]` int32, `seq_lens [num_rows]` int32 (both also on the host), `block_table [num_rows, max_pages]`
    int32. `visual_mask [num_tokens]` (bool, on the host) marks the tokens that `visual` (rows in order) replaces; None
    where there is none. `asks_all`: for what comes behind every token, and not behind each request's last one alone.
    `is_text`: all dimensions of `positions` are the same.
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
    asks_all: bool = False
    is_text: bool = False

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
            is_text=self.is_text,
        )


def take_rows(values: torch.Tensor, rows: np.ndarray, dim: int = 0) -> torch.Tensor:
    """`rows` (ascending) of `values`; a view where they are the first ones."""
    if rows[-1] == len(rows) - 1:
        return values.narrow(dim, 0, len(rows))
    (there,) = upload([rows], values.device)
    return values.index_select(dim, there)
