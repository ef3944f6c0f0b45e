"""What tensor-parallel ranks tell each other, and models of which each has the whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.distributed import get_tp_group, get_world_group, parallel_state
from vllm.distributed.parallel_state import GroupCoordinator, init_model_parallel_group


def least_of_ranks(value: int) -> int:
    group = get_tp_group()
    if group.world_size == 1:
        return value
    least = torch.tensor(value, dtype=torch.int64)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return int(least)


def from_first_rank(values: torch.Tensor) -> torch.Tensor:
    """`values`, contiguous and on the device, with those of the first rank in them on all ranks."""
    group = get_tp_group()
    # By what vLLM talks with already, where it does: the group's own way has PyTorch open another one, for which no
    # memory is planned.
    communicator = getattr(group.device_communicator, "pynccl_comm", None)
    if communicator is not None and not communicator.disabled:
        communicator.broadcast(values, 0)
        return values
    return group.broadcast(values, src=0)


def group_of_one() -> GroupCoordinator:
    """This rank without others. All ranks make theirs at the same time."""
    ranks = [[rank] for rank in range(torch.distributed.get_world_size())]
    backend = torch.distributed.get_backend(get_tp_group().device_group)
    return init_model_parallel_group(ranks, get_world_group().local_rank, backend, group_name="lvspec_whole")


@contextmanager
def instead_of_ranks(group: GroupCoordinator) -> Iterator[None]:
    """vLLM's layers take `group` for all tensor-parallel ranks, when they are built, filled and run.

    vLLM asks one variable for them and has no other way to tell a model of its own ranks.
    """
    ranks = parallel_state._TP
    parallel_state._TP = group
    try:
        yield
    finally:
        parallel_state._TP = ranks
