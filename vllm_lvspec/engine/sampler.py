"""vLLM's rejection sampler with loose acceptance on top of its own test."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from vllm.model_executor.layers.utils import apply_penalties
from vllm.utils.torch_utils import make_tensor_with_pad
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
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

from vllm_lvspec.device import upload
from vllm_lvspec.engine.verification import Batch, Verification
from vllm_lvspec.verify.verifier import Choices

PENALIZED_AT_ONCE = 64  # rows of logits


class _Emitted:
    """What a step's requests had said before it, for penalties; its drafts need not have come to the host.

    vLLM makes a list of all that was said for every drafted token, which takes the host longer than the rest of a step.
    """

    def __init__(self, drafts: SpecDecodeMetadata, sampling_metadata: SamplingMetadata):
        self.num_drafted = sum(drafts.num_draft_tokens)
        self.needs_lists = bool(sampling_metadata.bad_words_token_ids)  # of all that was said before a drafted token
        self._drafts = drafts
        self._sampling = sampling_metadata
        self._before: tuple[torch.Tensor, ...] | None = None

    def penalize(self, logits: torch.Tensor, first: int) -> None:
        """Apply penalties in place to `logits [num_rows, vocab_size]`: of drafted tokens, or, where `first` is their
        number, of the tokens behind all drafts.

        A few rows at a time: what vLLM counts for them takes several times the room of all logits.
        """
        sampling = self._sampling
        if self._before is None:
            self._before = self._upload(logits.shape[1], logits.device)
        outputs, requests, places, drafted = self._before
        assert sampling.prompt_token_ids is not None
        for begin in range(0, len(logits), PENALIZED_AT_ONCE):
            part = logits[begin : begin + PENALIZED_AT_ONCE]
            rows = slice(first + begin, first + begin + len(part))
            who = requests[rows]
            apply_penalties(
                part,
                sampling.prompt_token_ids[who],
                torch.cat([outputs[who], drafted[places[rows]]], dim=1),
                sampling.presence_penalties[who],
                sampling.frequency_penalties[who],
                sampling.repetition_penalties[who],
            )

    def _upload(self, vocab_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Tokens of each request, each row's request, places of the drafted tokens before it, and drafted tokens; all
        int64, with `vocab_size`, which penalties leave out, for none."""
        outputs = make_tensor_with_pad(self._sampling.output_token_ids, vocab_size, torch.int64, device="cpu").numpy()
        counts = np.array(self._drafts.num_draft_tokens)
        starts, every = counts.cumsum() - counts, np.arange(len(counts))
        requests = np.concatenate([every.repeat(counts), every])
        num_before = np.concatenate([np.arange(self.num_drafted) - starts.repeat(counts), counts])
        columns = np.arange(self._drafts.max_spec_len)
        places = np.where(columns < num_before[:, None], starts[requests][:, None] + columns, self.num_drafted)
        outputs[outputs < 0] = vocab_size
        there = upload([outputs, requests, places], device)
        drafted = F.pad(self._drafts.draft_token_ids.to(torch.int64), (0, 1), value=vocab_size)
        return *there, drafted.masked_fill_(drafted < 0, vocab_size)


class _OwnSampler(Sampler):
    """vLLM's sampler of the tokens behind drafts, where these need not have come to the host for penalties."""

    emitted: _Emitted | None = None

    def apply_penalties(  # type: ignore[override]  # vLLM's knows nothing of the step
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, output_token_ids: list[list[int]]
    ) -> torch.Tensor:
        if not sampling_metadata.no_penalties:
            assert self.emitted is not None
            self.emitted.penalize(logits, self.emitted.num_drafted)
        return logits


class LVSpecRejectionSampler(RejectionSampler):
    """vLLM's own choices where every request of a batch is strict; loose ones are made here.

    Either in less memory and time than vLLM takes, whose engines verify fewer tokens at once.
    """

    def __init__(self, sampler: Sampler, spec_config, device: torch.device, verification: Verification):
        own = _OwnSampler(sampler.logprobs_mode, sampler.use_fp64_gumbel)
        super().__init__(own, spec_config, device)
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
        self.sampler.emitted = _Emitted(metadata, sampling_metadata)
        try:
            if batch is None:
                return super().forward(metadata, draft_probs, logits, sampling_metadata)
            return self._loose(batch, metadata, draft_probs, logits, sampling_metadata)
        finally:
            self.sampler.emitted = None

    def _combine_outputs_with_spec_tokens(  # type: ignore[override]
        self, output_token_ids: list[list[int]], spec_token_ids: list[list[int]] | None = None
    ) -> list[list[int]]:
        if not self.sampler.emitted.needs_lists:
            return output_token_ids
        return super()._combine_outputs_with_spec_tokens(output_token_ids, spec_token_ids)

    def apply_penalties(  # type: ignore[override]
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        metadata: SpecDecodeMetadata,
        repeat_indices: torch.Tensor,
        output_token_ids: list[list[int]],
    ) -> torch.Tensor:
        if not sampling_metadata.no_penalties:
            self.sampler.emitted.penalize(logits, 0)
        return logits

    def _get_logprobs_tensors(
        self,
        max_num_logprobs: int,
        metadata: SpecDecodeMetadata,
        logits: torch.Tensor,
        target_logits: torch.Tensor,
        bonus_logits: torch.Tensor,
        sampled_token_ids: torch.Tensor,
    ) -> LogprobsTensors:
        """Of the rows that there are; vLLM makes as many for every request as the longest draft has.

        Ordered as `sampled_token_ids` `[num_requests, 1 + longest]`; nobody looks at what is in places without a row.
        """
        rows = torch.empty_like(logits, dtype=torch.float32)
        rows[metadata.target_logits_indices] = target_logits.to(torch.float32)
        rows[metadata.bonus_logits_indices] = bonus_logits.to(torch.float32)
        if not self.is_logits_logprobs_mode:
            rows = self.sampler.compute_logprobs(rows)
        indices = torch.arange(len(rows), device=rows.device)
        ends = metadata.cu_num_sampled_tokens.to(torch.int64)
        requests = torch.searchsorted(ends, indices, right=True)
        places = requests * sampled_token_ids.shape[1] + indices - F.pad(ends[:-1], (1, 0))[requests]
        token_ids = sampled_token_ids.flatten()[places].clamp(min=0)  # of a rejected one there is no token
        found = self.sampler.gather_logprobs(rows, max_num_logprobs, token_ids.to(torch.int64))
        columns = (found.logprob_token_ids, found.logprobs, found.selected_token_ranks)
        return LogprobsTensors(
            *(x.new_zeros(sampled_token_ids.numel(), *x.shape[1:]).index_copy_(0, places, x) for x in columns)
        )

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
