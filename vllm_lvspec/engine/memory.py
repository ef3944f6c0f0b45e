"""What fits into a device."""

from __future__ import annotations

import psutil
import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.utils.cpu_resource_utils import get_cgroup_memory_limit, get_cgroup_memory_usage
from vllm.utils.mem_constants import GiB_bytes
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

DEFAULT_CACHE_GIB = 4.0
DEFAULT_CACHE_SHARE = 0.1  # of the device's memory
# Of the device's memory, what logits of drafts may take; and bytes at most for each one, with copies in float32 (the
# target's, what is made of them, and their probabilities or logarithms of these, of which clients get a few).
SHARE_OF_LOGITS = 0.05
BYTES_PER_LOGIT = 20
# And for each of a request's own, of which vLLM's profile run has `max_num_seqs`, with a drafted one each.
BYTES_PLANNED_BY_VLLM = 24


def default_cache_bytes(num_blocks: int, bytes_per_block: int, memory: int) -> int:
    """Size of the drafter's cache where none is set: `num_blocks`, as far as a device of `memory` bytes has room."""
    bound = min(DEFAULT_CACHE_GIB * GiB_bytes, DEFAULT_CACHE_SHARE * memory)
    return max(min(num_blocks * bytes_per_block, int(bound)), bytes_per_block)


def device_memory(num_ranks: int) -> tuple[int, int]:
    """Bytes of a rank's device, in all and free: of a GPU, or its share of the machine's or container's."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total, free
    memory, limit = psutil.virtual_memory(), get_cgroup_memory_limit()
    total, free = memory.total, memory.available
    if limit is not None and limit < total:  # as vLLM takes it
        total, free = limit, min(free, max(0, limit - (get_cgroup_memory_usage() or 0)))
    return total // num_ranks, free // num_ranks


def waiting_bytes(draft: ModelConfig, num_tokens: int) -> int:
    """Visual embeddings of prompts that the drafter reads in one step, at most: as many as its cache has tokens, beside
    those of the items that it keeps."""
    vision = getattr(draft.hf_config, "vision_config", None)
    levels = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())  # Qwen3-VL's, side by side
    return num_tokens * levels * draft.get_hidden_size() * draft.dtype.itemsize


def most_rows(target: VllmConfig, memory: int) -> int:
    """Rows of logits that a step may have on a device of `memory` bytes.

    All drafts of all requests, where these take no more than a small share of the memory; else as many rows as do, or
    as vLLM's own profile run has room for, but no fewer than one request's draft beside what all others emit.
    """
    num_requests, length = target.scheduler_config.max_num_seqs, target.num_speculative_tokens
    every = min(num_requests * (1 + length), target.scheduler_config.max_num_batched_tokens)
    affordable = SHARE_OF_LOGITS * memory / target.model_config.get_vocab_size()
    affordable = max(affordable, BYTES_PLANNED_BY_VLLM * num_requests) / BYTES_PER_LOGIT
    return min(every, max(int(affordable), num_requests + length))


def logits_bytes(target: VllmConfig, memory: int) -> int:
    """What logits of a step take at most on a device of `memory` bytes, as they are planned for."""
    rows = BYTES_PER_LOGIT * most_rows(target, memory), BYTES_PLANNED_BY_VLLM * target.scheduler_config.max_num_seqs
    return max(rows) * target.model_config.get_vocab_size()


def verify_rows(
    sampler: RejectionSampler, num_rows: int, length: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Verify drafts of `length`, of as many requests as have `num_rows` of logits.

    vLLM's profile run has one drafted token of each request, and all others then would not be planned for.
    """
    # Of log probabilities, without what else vLLM would compile for them here.
    beside = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=device)
    drafts = [[0] * length] * (num_rows // (1 + length))
    rest = num_rows - len(drafts) * (1 + length)
    drafts += [[0] * (rest - 1)] if rest > 1 else []
    num_requests = len(drafts)

    def each(value: float) -> torch.Tensor:
        return torch.full((num_requests,), value, device=device)

    sampling = SamplingMetadata(
        temperature=each(0.5),
        all_greedy=False,
        all_random=False,
        top_p=each(0.9),
        top_k=each(vocab_size - 1),
        generators={},
        max_num_logprobs=None,
        logprob_token_ids=None,
        no_penalties=False,
        prompt_token_ids=torch.zeros(num_requests, 1, dtype=torch.int64, device=device),
        frequency_penalties=each(0.1),
        presence_penalties=each(0.1),
        repetition_penalties=each(1.1),
        output_token_ids=[[0] for _ in drafts],
        spec_token_ids=drafts,
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    metadata = SpecDecodeMetadata.make_dummy(drafts, device)
    logits = torch.randn(sum(map(len, drafts)) + num_requests, vocab_size, dtype=dtype, device=device)
    sampler(metadata, None, logits, sampling)
    del beside
