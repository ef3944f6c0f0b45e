"""CUDA graphs of the target for decodes without drafts, beside those for decodes with them.

vLLM has full graphs of batches in which every request has as many tokens: one where it does not speculate, `1 + K`
where it does. A step for which nobody has a draft (text alone, resting under load, the end of an answer) would then run
piecewise, over a batch padded to a multiple of `1 + K`, and cost more than it does without this package.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

SIZES = (1, 2, 4, *range(8, 65, 8), *range(96, 257, 32))  # requests of one token each


def is_single(batch: BatchDescriptor) -> bool:
    """Whether each request of the graph `batch` has one token."""
    return batch.uniform and batch.num_reqs == batch.num_tokens


class DecodeDispatcher(CudagraphDispatcher):
    """Has full graphs of one token a request, too, where vLLM has them of `1 + K`.

    They are meant where `uniform_decode_query_len`, which vLLM sets once, is 1. There is no LoRA under lvspec.
    """

    _singles: Sequence[int] = ()

    def initialize_cudagraph_keys(self, cudagraph_mode: CUDAGraphMode, uniform_decode_query_len: int = 1) -> None:
        super().initialize_cudagraph_keys(cudagraph_mode, uniform_decode_query_len)
        self._singles = ()
        if cudagraph_mode.decode_mode() == CUDAGraphMode.FULL and cudagraph_mode.separate_routine():
            most = min(
                self.vllm_config.scheduler_config.max_num_seqs, self.compilation_config.max_cudagraph_capture_size
            )
            self._singles = sorted({min(size, most) for size in SIZES})
        for size in self._singles:
            self.add_cudagraph_key(CUDAGraphMode.FULL, BatchDescriptor(size, size, uniform=True))

    def dispatch(
        self,
        num_tokens: int,
        uniform_decode: bool = False,
        has_lora: bool = False,
        num_active_loras: int = 0,
        valid_modes: AbstractSet[CUDAGraphMode] | None = None,
        invalid_modes: AbstractSet[CUDAGraphMode] | None = None,
    ) -> tuple[CUDAGraphMode, BatchDescriptor]:
        if uniform_decode and self.uniform_decode_query_len == 1:
            allowed = (valid_modes or CUDAGraphMode.valid_runtime_modes()) - (invalid_modes or set())
            place = bisect_left(self._singles, num_tokens)
            if CUDAGraphMode.FULL in allowed and self.keys_initialized and place < len(self._singles):
                size = self._singles[place]
                return CUDAGraphMode.FULL, BatchDescriptor(size, size, uniform=True)
            uniform_decode = False  # what else there is, is of chains
        return super().dispatch(num_tokens, uniform_decode, has_lora, num_active_loras, valid_modes, invalid_modes)
