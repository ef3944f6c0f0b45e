"""What goes to a device, and its time."""

import time

import numpy as np
import torch

from vllm_lvspec.device import Clock, upload

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


def test_a_clock_of_cpus_is_the_hosts():
    clock = Clock(CPU)
    begin = clock.mark()
    time.sleep(0.01)
    end = clock.mark()
    clock.wait(end)
    assert 0.01 <= clock.seconds(begin, end) < 1
