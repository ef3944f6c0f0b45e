"""How inputs get to the device."""

import time

import numpy as np
import pytest
import torch

from vllm_lvspec.draft.batch import Clock, DraftBatch, take_rows, upload

CPU = torch.device("cpu")


def test_arrays_arrive_as_they_are():
    arrays = [
        np.arange(5, dtype=np.int32),
        np.arange(12, dtype=np.int64).reshape(3, 4),
        np.zeros((0, 3), dtype=np.int64),
        np.arange(24, dtype=np.int32).reshape(4, 6)[:, ::2],
        np.tile(np.array([7, 9]), (3, 1)),
    ]
    found = upload(arrays, CPU)
    for there, array in zip(found, arrays, strict=True):
        assert there.dtype == torch.from_numpy(array[:0]).dtype
        assert there.is_contiguous() and there.shape == array.shape
        assert np.array_equal(there.numpy(), array)
    assert len({x.untyped_storage().data_ptr() for x in found}) == 1


def test_every_array_begins_where_kernels_expect_it():
    found = upload([np.arange(n, dtype=np.int32) for n in range(1, 9)], CPU)
    assert all(x.storage_offset() * x.element_size() % 16 == 0 for x in found)


def test_what_is_written_there_changes_nothing_else():
    source = np.arange(4)
    one, two = upload([source, source], CPU)
    one += 10
    assert source.tolist() == two.tolist() == [0, 1, 2, 3]


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


def test_a_clock_of_cpus_is_the_hosts():
    clock = Clock(CPU)
    begin = clock.mark()
    time.sleep(0.01)
    end = clock.mark()
    clock.wait()
    assert 0.01 <= clock.seconds(begin, end) < 1
