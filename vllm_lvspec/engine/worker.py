"""vLLM's worker for GPUs with a runner of ours."""

from __future__ import annotations

import gc
from typing import Any

import torch
from vllm.utils.mem_constants import GiB_bytes
from vllm.v1.worker.gpu_worker import Worker

from vllm_lvspec.config import LVSpecConfigError
from vllm_lvspec.engine.profile import StepProfile
from vllm_lvspec.engine.runner import LVSpecGPUModelRunner


class LVSpecWorker(Worker):
    """Counters for whoever asks through `collective_rpc`, and room for the features beside vLLM's KV cache."""

    def init_device(self) -> None:
        # Requests are checked where they come in; a runner that finds the checker's name refuses to speculate.
        self.model_config.logits_processors = None
        super().init_device()

    def determine_available_memory(self) -> int:
        is_fixed = self.cache_config.kv_cache_memory_bytes  # asked before: a start-up plan of vLLM's sets it, too
        available = super().determine_available_memory()
        return available if is_fixed else int(available * (1 - self._share_of_features()))

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Compile the kernels that vLLM does not know of, and measure what steps cost."""
        self.model_runner.warm_up()
        self.model_runner.measure_costs()

    def _share_of_features(self) -> float:
        return self.model_runner.verification.share_of_memory(self.get_kv_cache_spec())

    def lvspec_stats(self) -> dict[str, Any]:
        """What this rank's drafter and verifier have done, and what their caches hold."""
        return {**self.model_runner.drafter.stats(), **self.model_runner.verification.stats()}

    def lvspec_reasons(self) -> dict[str, dict[str, int]]:
        """Tokens by reason, by request: those that run, and the last that have finished."""
        return self.model_runner.verification.request_reasons()

    def lvspec_trace(self, request_id: str) -> list[dict[str, Any]] | None:
        """`RequestTrace` of each choice of a request, by the client's name for it; only the first rank has any."""
        traces = self.model_runner.verification.traces
        return None if traces is None else traces.of(request_id)

    def lvspec_step_times(self) -> dict[str, float]:
        """`StepTimes` of this rank; over all steps the drafter's seconds for prompts, and the target's for scores."""
        runner = self.model_runner
        return {
            **vars(runner.step_times),
            "prefill_seconds": runner.drafter.drafter.prefill_seconds,
            "scoring_seconds": runner.scores.seconds,
        }

    def lvspec_start_profile(self) -> None:
        """Look at the clock between the parts of steps from now on."""
        self.step_profile = StepProfile(self.model_runner)
        self.step_profile.start()

    def lvspec_stop_profile(self) -> dict[str, Any]:
        """`StepProfile` of this rank since the start, by kind of step."""
        profile = self.step_profile
        profile.stop()
        return {kind: {"steps": num, "seconds": dict(profile.seconds[kind])} for kind, num in profile.num_steps.items()}


class LVSpecGPUWorker(LVSpecWorker):
    def _make_model_runner(self) -> LVSpecGPUModelRunner:
        return LVSpecGPUModelRunner(self.vllm_config, self.device)

    def _maybe_activate_jit_monitor(self) -> None:
        # From here on vLLM takes what is compiled for an accident, and may be told not to bear with any.
        self._warm_up()
        super()._maybe_activate_jit_monitor()

    def determine_available_memory(self) -> int:
        if not self.cache_config.kv_cache_memory_bytes:
            return super().determine_available_memory()
        # vLLM takes a fixed size as it is. The drafter's weights and cache are there already, and its activations and
        # the room for its embeddings are part of the profile run.
        torch.cuda.reset_peak_memory_stats(self.device)
        available = super().determine_available_memory()
        transient = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        share = self._share_of_features()
        features = int(available * share / (1 - share))
        if available + features + transient > free:
            raise LVSpecConfigError(
                f"kv_cache_memory_bytes={self.cache_config.kv_cache_memory_bytes}: {free / GiB_bytes:.2f} GiB are free "
                f"beside target and drafter, of which a step needs {transient / GiB_bytes:.2f} and features of visual "
                f"tokens {features / GiB_bytes:.2f}; lower it or draft_cache_gib"
            )
        return available
