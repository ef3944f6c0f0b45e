"""vLLM's workers with a runner of ours."""

from __future__ import annotations

import torch
from vllm.utils.mem_constants import GiB_bytes
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from vllm_lvspec.config import LVSpecConfigError
from vllm_lvspec.engine.cpu_kernels import register_cpu_kernels
from vllm_lvspec.engine.runner import LVSpecCPUModelRunner, LVSpecGPUModelRunner


class LVSpecWorker(Worker):
    """Counters for whoever asks through `collective_rpc`."""

    def lvspec_stats(self) -> dict[str, int]:
        """What this rank's drafter has done, and what its caches hold."""
        return self.model_runner.drafter.stats()


class LVSpecCPUWorker(LVSpecWorker, CPUWorker):
    def init_device(self) -> None:
        super().init_device()
        register_cpu_kernels()
        # vLLM builds its runner inside `init_device`; nothing has been loaded into it yet.
        self.model_runner = LVSpecCPUModelRunner(self.vllm_config, torch.device("cpu"))


class LVSpecGPUWorker(LVSpecWorker):
    def _make_model_runner(self) -> LVSpecGPUModelRunner:
        return LVSpecGPUModelRunner(self.vllm_config, self.device)

    def determine_available_memory(self) -> int:
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            # vLLM takes a fixed size as it is; the drafter's weights and cache are there already.
            free = torch.accelerator.get_memory_info()[0]
            if available > free:
                raise LVSpecConfigError(
                    f"kv_cache_memory_bytes={available}: only {free} bytes ({free / GiB_bytes:.2f} GiB) are free "
                    "beside target and drafter; lower it or draft_cache_gib"
                )
        return available
