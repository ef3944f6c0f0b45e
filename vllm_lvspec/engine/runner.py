"""vLLM's V1 model runners with a Video-LLM drafter."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_lvspec.engine.proposer import LVSpecProposer


class LVSpecGPUModelRunner(GPUModelRunner):
    """V1 runner whose drafter sees each step, and forgets requests when vLLM does."""

    drafter: LVSpecProposer

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # vLLM asks this of the whole batch; the drafter limits each request by itself, so that one request near its
        # limit does not cost the others their drafts.
        return common_attn_metadata is not None

    def _on_request_state_removed(self, req_id: str, req_state: CachedRequestState | None) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self.drafter.release(req_id)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        for req_id in scheduler_output.preempted_req_ids or ():
            self.drafter.release(req_id)
        return super()._update_states(scheduler_output)

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None) -> SamplerOutput:
        # In a batch where nobody has a draft, vLLM still sends all requests through its rejection sampler, which then
        # masks an empty tensor, does needless work, and dies of `top_k` without `top_p` where no GPU kernel masks it.
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            spec_decode_metadata = None
        return super()._sample(logits, spec_decode_metadata)

    def propose_draft_token_ids(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        self.drafter.begin_step(scheduler_output, self.input_batch.req_ids, self.requests)
        return super().propose_draft_token_ids(scheduler_output, *args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        # vLLM's LLaVA-OneVision returns a shape that its own runner refuses, and dies of, when videos of different
        # lengths are encoded together; one at a time they are fine.
        if self.model_config.hf_config.model_type == "llava_onevision":
            self.requires_sequential_video_encoding = True

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        super().profile_run(*args, **kwargs)
        self.drafter.profile()


class LVSpecCPUModelRunner(LVSpecGPUModelRunner, CPUModelRunner):
    """The same for CPUs."""

    _discarded_generators: dict[int, torch.Tensor]

    def sample_tokens(self, grammar_output: Any) -> Any:
        # A seeded request that is still being prefilled samples a token that is thrown away; vLLM then turns its
        # generator back with `get_offset`, which generators for CPUs don't have. The whole state does it, too.
        self._discarded_generators = self._states_of_discarded_generators()
        return super().sample_tokens(grammar_output)

    def _states_of_discarded_generators(self) -> dict[int, torch.Tensor]:
        if self.execute_model_state is None:
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
