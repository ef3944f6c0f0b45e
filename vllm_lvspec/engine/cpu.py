"""The worker and runner for CPUs.

Nothing that runs on a GPU may import this: vLLM's CPU worker replaces CUDA's streams, events and copies in its process.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_lvspec.engine.cpu_kernels import replace_cpu_kernels
from vllm_lvspec.engine.runner import LVSpecGPUModelRunner
from vllm_lvspec.engine.worker import LVSpecWorker


class LVSpecCPUWorker(LVSpecWorker, CPUWorker):
    def init_device(self) -> None:
        super().init_device()
        replace_cpu_kernels()
        # vLLM builds its runner inside `init_device`; nothing has been loaded into it yet.
        self.model_runner = LVSpecCPUModelRunner(self.vllm_config, torch.device("cpu"))

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        self._warm_up()
        return result


class LVSpecCPUModelRunner(LVSpecGPUModelRunner, CPUModelRunner):
    """V1 runner for CPUs."""

    _discarded_generators: dict[int, torch.Tensor]

    def sample_tokens(self, grammar_output: Any) -> Any:
        # A seeded request that is still being prefilled samples a token that is thrown away; vLLM then turns its
        # generator back with `get_offset`, which generators for CPUs don't have. The whole state does it, too.
        self._discarded_generators = self._states_of_discarded_generators()
        return super().sample_tokens(grammar_output)

    def _states_of_discarded_generators(self) -> dict[int, torch.Tensor]:
        if self.execute_model_state is None or not self.input_batch.generators:
            return {}
        discarded = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        generators = self.input_batch.generators
        return {i: generators[i].get_state() for i in discarded if i in generators}

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        held = {i: generators.pop(i) for i in self._discarded_generators}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            for i, generator in held.items():
                generator.set_state(self._discarded_generators[i])
                generators[i] = generator
