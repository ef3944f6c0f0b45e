"""Inputs of the drafter's forwards."""

import numpy as np
import pytest
import torch

from vllm_lvspec.draft.batch import DraftBatch, take_rows


@pytest.mark.parametrize("rows", [[0], [0, 1, 2], [1, 3], [0, 2]])
def test_rows_of_a_batch(rows):
    batch = DraftBatch(
        token_ids=torch.arange(4),
        positions=torch.arange(8).view(2, 4),
        slots=torch.arange(4) + 20,
        query_starts=torch.arange(5),
        query_starts_cpu=torch.arange(5),
        seq_lens=torch.arange(4) + 5,
        seq_lens_cpu=torch.arange(4) + 5,
        block_table=torch.arange(12).view(4, 3),
        max_query_len=1,
        max_seq_len=8,
    )
    part = batch.rows(np.array(rows))
    assert part.token_ids.tolist() == rows
    assert part.positions.tolist() == [rows, [row + 4 for row in rows]]
    assert part.slots.tolist() == [row + 20 for row in rows]
    assert part.seq_lens.tolist() == part.seq_lens_cpu.tolist() == [row + 5 for row in rows]
    assert part.block_table[:, 0].tolist() == [3 * row for row in rows]
    assert part.query_starts.tolist() == part.query_starts_cpu.tolist() == list(range(len(rows) + 1))
    is_view = take_rows(batch.slots, np.array(rows)).data_ptr() == batch.slots.data_ptr()
    assert is_view == (rows == list(range(len(rows))))
