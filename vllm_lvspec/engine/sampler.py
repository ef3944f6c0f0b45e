"""vLLM's rejection sampler with loose acceptance on top of its own test."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import (
    GREEDY_TEMPERATURE,
    RejectionSampler,
    apply_sampling_constraints,
    generate_uniform_probs,
    sample_recovered_tokens,
)
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_lvspec.engine.verification import Batch, Verification
from vllm_lvspec.verify.verifier import Choices


class LVSpecRejectionSampler(RejectionSampler):
    """Where every request of a batch is strict, vLLM's own sampler runs and nothing of this."""

    def __init__(self, sampler: Sampler, spec_config, device: torch.device, verification: Verification):
        super().__init__(sampler, spec_config, device)
        self.verification = verification
        self.batch: Batch | None = None  # of the step that is sampled; vLLM's profile run has none

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        batch, self.batch = self.batch, None
        if batch is None:
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        return self._loose(batch, metadata, draft_probs, logits, sampling_metadata)

    def _loose(
        self,
        batch: Batch,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        bonus = self.sampler(
            logits=logits[metadata.bonus_logits_indices],
            sampling_metadata=replace(sampling_metadata, max_num_logprobs=-1),
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits" if self.is_processed_logprobs_mode else "raw_logits",
        )
        raw = logits[metadata.target_logits_indices].to(torch.float32)
        processed = raw if self.is_processed_logprobs_mode else raw.clone()
        processed = self.apply_logits_processors(processed, sampling_metadata, metadata)
        processed = apply_sampling_constraints(processed, metadata.cu_num_draft_tokens, sampling_metadata)
        target_ids, exact = self._choices(metadata, draft_probs, processed, sampling_metadata)
        choices = Choices(
            draft_ids=metadata.draft_token_ids,
            target_ids=target_ids,
            bonus_ids=bonus.sampled_token_ids.flatten().int(),
            starts=F.pad(metadata.cu_num_draft_tokens, (1, 0)).int(),
            exact=exact,
            logits=processed,
            places=batch.places,
        )
        emitted = self.verification.accept(choices, batch, metadata.max_spec_len)
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            logprobs = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs,
                metadata,
                logits,
                processed if self.is_processed_logprobs_mode else raw,
                bonus.logprobs_tensors.logprobs,
                emitted,
            )
        return SamplerOutput(sampled_token_ids=emitted, logprobs_tensors=logprobs)

    def _choices(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's choice for every drafted token, and whether the token passes vLLM's test.

        Greedy: the argmax. Sampling: the drafted token where it passes the rejection test (arXiv 2211.17192), else the
        recovered one; drawn in the order in which vLLM draws, so that a strict request in a mixed batch gets what
        vLLM's sampler would have given it.
        """
        drafted = metadata.draft_token_ids.long()
        best = logits.argmax(dim=-1)
        if sampling_metadata.all_greedy:
            return best.int(), best == drafted
        uniform = generate_uniform_probs(
            len(drafted), metadata.num_draft_tokens, sampling_metadata.generators, logits.device
        )
        probs = logits.softmax(dim=-1, dtype=torch.float32)
        recovered = sample_recovered_tokens(
            metadata.max_spec_len,
            metadata.num_draft_tokens,
            metadata.cu_num_draft_tokens,
            metadata.draft_token_ids,
            draft_probs,
            probs,
            sampling_metadata,
            logits.device,
            self.use_fp64_gumbel,
        )
        places = drafted.clamp(min=0)[:, None]  # padding, never accepted
        share = probs.gather(1, places)[:, 0]
        if draft_probs is not None:
            drafting = draft_probs.gather(1, places)[:, 0]
            share = torch.where(drafting > 0, share / drafting, 0.0)
        passes = (share >= uniform) & (drafted >= 0)
        rows = torch.arange(len(drafted), device=logits.device)
        requests = torch.searchsorted(metadata.cu_num_draft_tokens, rows, right=True)
        is_greedy = (sampling_metadata.temperature == GREEDY_TEMPERATURE)[requests]
        exact = torch.where(is_greedy, best == drafted, passes)
        chosen = torch.where(is_greedy, best, torch.where(passes, drafted, recovered.long()))
        return chosen.int(), exact
