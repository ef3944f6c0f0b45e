"""What fits into a device."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.utils.mem_constants import GiB_bytes

DEFAULT_CACHE_GIB = 4.0
DEFAULT_CACHE_SHARE = 0.1  # of the device's memory
ROWS_PLANNED_BY_VLLM = 2  # for each request: its profile run samples with one drafted token
# Of the device's memory, what logits of drafts may take; and bytes of each one with its copies in float32.
SHARE_OF_LOGITS = 0.05
BYTES_PER_LOGIT = 16


def least_of_ranks(value: int) -> int:
    group = get_tp_group()
    if group.world_size == 1:
        return value
    least = torch.tensor(value, dtype=torch.int64)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return int(least)


def default_cache_bytes(num_blocks: int, bytes_per_block: int, memory: int) -> int:
    """Size of the drafter's cache where none is set: `num_blocks`, as far as a device of `memory` bytes has room."""
    bound = min(DEFAULT_CACHE_GIB * GiB_bytes, DEFAULT_CACHE_SHARE * memory)
    return max(min(num_blocks * bytes_per_block, int(bound)), bytes_per_block)


def device_memory(device: torch.device) -> int:
    """Bytes that it has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total


def most_rows(target: VllmConfig, memory: int) -> int:
    """Rows of logits that a step may have on a device of `memory` bytes.

    All drafts of all requests, where these take no more than a small share of the memory; else as many rows as do, but
    no fewer than vLLM itself plans for, and one request's draft beside what all others emit.
    """
    num_requests, length = target.scheduler_config.max_num_seqs, target.num_speculative_tokens
    every = min(num_requests * (1 + length), target.scheduler_config.max_num_batched_tokens)
    affordable = int(SHARE_OF_LOGITS * memory / (BYTES_PER_LOGIT * target.model_config.get_vocab_size()))
    return min(every, max(affordable, ROWS_PLANNED_BY_VLLM * num_requests, num_requests + length))
