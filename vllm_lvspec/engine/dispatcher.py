"""CUDA graphs of the target for decodes without drafts or with shorter ones, beside those for whole chains.

vLLM has full graphs of batches in which every request has as many tokens: one where it does not speculate, `1 + K`
where it does. A step for which nobody has a draft (text alone, resting under load, the end of an answer) would then run
piecewise, over a batch padded to a multiple of `1 + K`, and cost more than it does without this package. So would one
whose draft ends before K tokens, which of adaptive drafts most do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

SIZES = (1, 2, 4, *range(8, 65, 8), *range(96, 257, 32))  # requests of one token each


def tokens_each(batch: BatchDescriptor) -> int | None:
    """Of each request of the graph `batch`; None where they may differ."""
    return batch.num_tokens // batch.num_reqs if batch.uniform and batch.num_reqs else None


class DecodeDispatcher(CudagraphDispatcher):
    """Has full graphs of one token a request, too, where vLLM has them of `1 + K`.

    With `has_parts` also of all numbers between, for a single request: several rarely have drafts of the same length.
    They are meant where `uniform_decode_query_len`, which vLLM sets once, is that number. There is no LoRA under
    lvspec.
    """

    def __init__(self, vllm_config: VllmConfig, *, has_parts: bool = False):
        super().__init__(vllm_config)
        self._has_parts = has_parts
        self._sizes: dict[int, Sequence[int]] = {}  # numbers of requests, ascending, by tokens of each

    def initialize_cudagraph_keys(self, cudagraph_mode: CUDAGraphMode, uniform_decode_query_len: int = 1) -> None:
        super().initialize_cudagraph_keys(cudagraph_mode, uniform_decode_query_len)
        self._sizes = {}
        if cudagraph_mode.decode_mode() == CUDAGraphMode.FULL and cudagraph_mode.separate_routine():
            largest = self.compilation_config.max_cudagraph_capture_size
            most = min(self.vllm_config.scheduler_config.max_num_seqs, largest)
            self._sizes[1] = sorted({min(size, most) for size in SIZES})
            if self._has_parts:
                self._sizes |= dict.fromkeys(range(2, min(uniform_decode_query_len, largest + 1)), (1,))
        for tokens, sizes in self._sizes.items():
            for size in sizes:
                self.add_cudagraph_key(CUDAGraphMode.FULL, BatchDescriptor(tokens * size, size, uniform=True))

    def decodes_like(self, num_requests: int, max_tokens: int) -> int:
        """How many tokens of each request make a decode of a batch of so many, of which none has more than
        `max_tokens`."""
        sizes = self._sizes.get(max_tokens)
        return max_tokens if sizes and num_requests <= sizes[-1] else self.uniform_decode_query_len

    def has_graph(self, num_requests: int, tokens: int) -> bool:
        """Whether decodes of so many tokens of each of so many requests are launched as one graph, and others not."""
        if not self._sizes:
            return False
        if (sizes := self._sizes.get(tokens)) is not None:
            return num_requests <= sizes[-1]
        if tokens != self.uniform_decode_query_len:
            return False
        return super().dispatch(num_requests * tokens, uniform_decode=True)[0] == CUDAGraphMode.FULL

    def dispatch(
        self,
        num_tokens: int,
        uniform_decode: bool = False,
        has_lora: bool = False,
        num_active_loras: int = 0,
        valid_modes: AbstractSet[CUDAGraphMode] | None = None,
        invalid_modes: AbstractSet[CUDAGraphMode] | None = None,
    ) -> tuple[CUDAGraphMode, BatchDescriptor]:
        tokens = self.uniform_decode_query_len
        if uniform_decode and (sizes := self._sizes.get(tokens)) is not None:
            allowed = (valid_modes or CUDAGraphMode.valid_runtime_modes()) - (invalid_modes or set())
            place = bisect_left(sizes, num_tokens // tokens)
            if CUDAGraphMode.FULL in allowed and self.keys_initialized and place < len(sizes):
                return CUDAGraphMode.FULL, BatchDescriptor(tokens * sizes[place], sizes[place], uniform=True)
            uniform_decode = False  # what else there is, is of chains
        return super().dispatch(num_tokens, uniform_decode, has_lora, num_active_loras, valid_modes, invalid_modes)
