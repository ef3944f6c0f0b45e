"""vLLM's V1 model runner with a Video-LLM drafter."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.distributed import get_tp_group
from vllm.forward_context import BatchDescriptor
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_lvspec.device import upload
from vllm_lvspec.draft.costs import further_context
from vllm_lvspec.engine.counts import counts_of
from vllm_lvspec.engine.dispatcher import DecodeDispatcher, tokens_each
from vllm_lvspec.engine.draft_model import VLLMDraftModel
from vllm_lvspec.engine.memory import verify_rows
from vllm_lvspec.engine.placeholders import num_drafted, padded, without_padding
from vllm_lvspec.engine.proposer import LVSpecProposer
from vllm_lvspec.engine.sampler import LVSpecRejectionSampler
from vllm_lvspec.engine.scheduler import with_changes
from vllm_lvspec.engine.scoring import PromptScores
from vllm_lvspec.engine.verification import Verification
from vllm_lvspec.observe.metrics import Changes


@dataclass
class StepTimes:
    """Seconds over steps in which nothing was prefilled: forward with verification, and drafting.

    `verify_seconds` are part of the first: what verification does beyond vLLM's own test. On a GPU they are the host's.
    `requests` are those of all these steps, `drafted_tokens` their drafts.
    """

    steps: int = 0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    requests: int = 0
    drafted_tokens: int = 0


def only_decodes(scheduler_output: SchedulerOutput) -> bool:
    """Whether nothing is prefilled in this step."""
    drafted = scheduler_output.scheduled_spec_decode_tokens
    scheduled = scheduler_output.num_scheduled_tokens
    if not drafted:
        return scheduler_output.total_num_scheduled_tokens == len(scheduled)
    return all(count == 1 + len(drafted.get(req_id, ())) for req_id, count in scheduled.items())


class LVSpecGPUModelRunner(GPUModelRunner):
    """V1 runner whose drafter sees each step, and forgets requests when vLLM does."""

    drafter: LVSpecProposer
    uniform_decode_query_len: int
    execute_model_state: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        has_parts = self.drafter.config.draft_length == "adaptive"
        self.cudagraph_dispatcher = DecodeDispatcher(self.vllm_config, has_parts=has_parts)
        self.step_times = StepTimes()
        self._changes = Changes()
        self._step_started: float | None = None
        self._is_measuring = self._measures_pieces = False
        self._undrafted: SpecDecodeMetadata | None = None  # of the last batch where nobody had a draft
        self._drafting: Callable[[], list[list[int]]] | None = None  # of the step whose drafts are not taken yet
        self._drafts_begun = 0.0
        self._counts_drafts = False  # whether the time that they take is one of `step_times`
        # When the step before had its tokens, unless the engine may have waited since.
        self._last_emitted: float | None = None
        self.verification = Verification(self)
        self.rejection_sampler = LVSpecRejectionSampler(
            self.sampler, self.speculative_config, self.device, self.verification
        )
        self.scores = PromptScores(self, self.verification)
        self.drafter.connect(self.encoder_cache, lambda req_id: self.scores.of(req_id))

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # vLLM asks this of the whole batch; the drafter limits each request by itself, so that one request near its
        # limit does not cost the others their drafts.
        return common_attn_metadata is not None

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().reload_weights(*args, **kwargs)
        finally:
            self.drafter.forget_prompts()

    def _on_request_state_removed(self, req_id: str, req_state: CachedRequestState | None) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self.drafter.release(req_id, req_state)
        self.verification.release(req_id)
        self.scores.release(req_id)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        for request in scheduler_output.scheduled_new_reqs:  # a session that goes on has been here before
            self.drafter.placeholders.forget(request.req_id)
        for req_id in scheduler_output.preempted_req_ids or ():
            self.drafter.release(req_id)
            self.verification.preempt(req_id)
            self.scores.release(req_id)
        return super()._update_states(scheduler_output)

    def _calc_spec_decode_metadata(
        self, num_draft_tokens: np.ndarray, cu_num_scheduled_tokens: np.ndarray
    ) -> SpecDecodeMetadata:
        num_requests = len(num_draft_tokens)
        if num_draft_tokens.any():
            # Rows of padding have no logits, so that neither the sampler nor anybody behind it knows of them.
            lists = self.input_batch.spec_token_ids[:num_requests]
            drafted = np.fromiter(map(num_drafted, lists), np.int32, num_requests)
            for tokens, count in zip(lists, drafted.tolist(), strict=True):
                del tokens[count:]
            cu_num_scheduled_tokens = cu_num_scheduled_tokens - (num_draft_tokens - drafted)
            if drafted.any():
                return super()._calc_spec_decode_metadata(drafted, cu_num_scheduled_tokens)
        # vLLM makes it in every step of an engine that speculates; of a batch where nobody has a draft it is known.
        if self._undrafted is None or len(self._undrafted.num_draft_tokens) != num_requests:
            each = torch.arange(num_requests + 1, dtype=torch.int32, device=self.device)
            self._undrafted = SpecDecodeMetadata(
                draft_token_ids=each[:0],
                num_draft_tokens=[0] * num_requests,
                cu_num_draft_tokens=torch.zeros_like(each[:-1]),
                cu_num_sampled_tokens=each[1:],
                target_logits_indices=each[:0],
                bonus_logits_indices=each[:-1],
                logits_indices=each[:-1],
            )
        if cu_num_scheduled_tokens[-1] == num_requests and not num_draft_tokens.any():  # one token of each
            return self._undrafted
        (logits_indices,) = upload([cu_num_scheduled_tokens - 1], self.device)
        return replace(self._undrafted, logits_indices=logits_indices)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        if self._drafting is None:
            return None
        self._draft_token_ids = self._drafting()
        self._drafting = None
        # Of no draft at all the scheduler need not hear: it has forgotten those that it has scheduled.
        return super().take_draft_token_ids() if any(self._draft_token_ids) else None

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None) -> SamplerOutput:
        # In a batch where nobody has a draft, vLLM still sends all requests through its rejection sampler, which then
        # masks an empty tensor, does needless work, and dies of `top_k` without `top_p` where no GPU kernel masks it.
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            spec_decode_metadata = None
        if spec_decode_metadata is not None:
            self.rejection_sampler.batch = self.verification.batch(spec_decode_metadata)
            if self._looks_at_drafts(self.input_batch.sampling_metadata):
                self.drafter.finish()
                self.drafter.placeholders.fill_lists(self.input_batch.req_ids, self.input_batch.spec_token_ids)
        return super()._sample(logits, spec_decode_metadata)

    def _looks_at_drafts(self, sampling_metadata: SamplingMetadata) -> bool:
        """Whether sampling wants drafted tokens on the host: bad words and the like do, penalties don't."""
        if not sampling_metadata.output_token_ids:
            return False
        holder = sampling_metadata.thinking_budget_state_holder
        is_thinking = holder is not None and holder.has_tracked_requests()
        words = bool(sampling_metadata.bad_words_token_ids)
        return words or is_thinking or self.input_batch.logitsprocs_need_output_token_ids

    def _prepare_input_ids(
        self,
        scheduler_output: SchedulerOutput,
        num_reqs: int,
        total_num_scheduled_tokens: int,
        cu_num_tokens: np.ndarray,
    ) -> None:
        super()._prepare_input_ids(scheduler_output, num_reqs, total_num_scheduled_tokens, cu_num_tokens)
        if drafted := scheduler_output.scheduled_spec_decode_tokens:
            self.drafter.placeholders.fill_inputs(
                self.input_ids.gpu, self.input_batch.req_ids, drafted, cu_num_tokens[:num_reqs]
            )

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        self.verification.begin_forward(kwargs.get("inputs_embeds"))
        self.scores.begin_forward()
        result = super()._model_forward(*args, **kwargs)
        self.scores.end_forward()
        return result

    def sample_tokens(self, grammar_output: Any) -> Any:
        self.verification.spans.clear()
        if (state := self.execute_model_state) is not None:
            # What has a row of logits is also what grammars are told.
            state = state._replace(scheduler_output=without_padding(state.scheduler_output))
            self.execute_model_state = state
            self.verification.begin_step(state.scheduler_output, state.hidden_states, state.aux_hidden_states)
            self.scores.add_similarity()
        return self._with_counts(super().sample_tokens(grammar_output))

    def _with_counts(self, output: Any) -> Any:
        """The end of a step, where it is one, with what has been counted since the last."""
        if not isinstance(output, ModelRunnerOutput) or not get_tp_group().is_first_rank:
            return output  # the scheduler hears the first rank only
        return with_changes(output, self._changes.since_last(counts_of(self)))

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._bookkeeping_sync(*args, **kwargs)
        self.verification.count(result[3])  # the tokens that are emitted, by request
        return result

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        self._drafting = None
        self._step_started = time.perf_counter() if only_decodes(scheduler_output) else None
        if not scheduler_output.total_num_scheduled_tokens:
            self._finish_drafts()
        if not scheduler_output.total_num_scheduled_tokens or scheduler_output.scheduled_new_reqs:
            self._last_emitted = None  # the engine may wait for requests, or has waited
        self.scores.begin_step(scheduler_output)
        try:
            # A step without tokens ends here: requests that have ended are forgotten in it.
            return self._with_counts(super().execute_model(scheduler_output, *args, **kwargs))
        finally:
            self.scores.begin_step(None)

    def propose_draft_token_ids(
        self, scheduler_output: SchedulerOutput, sampled_token_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Drafts are made when the scheduler asks for them. By then the step's tokens, a prompt's first one among them,
        # are on their way to the clients and need not wait for the drafter, which may have the prompt to read.
        self._note_times(scheduler_output)
        sampled = [list(tokens) for tokens in sampled_token_ids]  # the scheduler cuts its own where answers end
        self._drafting = functools.partial(self._draft, scheduler_output, sampled, *args, **kwargs)
        return []

    def _note_times(self, scheduler_output: SchedulerOutput) -> None:
        """Of a step whose tokens are on the host, so that the device has nothing left to do."""
        now = time.perf_counter()
        seconds = self._finish_drafts()
        if self._step_started is not None:
            self.step_times.steps += 1
            # What was done while the device was drafting took no time.
            begun = max(self._step_started, self._drafts_begun + seconds)
            self.step_times.target_seconds += now - begun
            self.step_times.verify_seconds += self.verification.seconds_since(begun)
            if self._last_emitted is not None:
                context = int(self.input_batch.num_tokens_no_spec[: self.input_batch.num_reqs].sum())
                num_requests = len(scheduler_output.num_scheduled_tokens)
                num_rows = scheduler_output.total_num_scheduled_tokens
                in_pieces = not self._was_one_graph(scheduler_output)
                self.drafter.note_step(now - self._last_emitted - seconds, num_requests, num_rows, context, in_pieces)
        self._last_emitted = now

    def _was_one_graph(self, step: SchedulerOutput) -> bool:
        num_requests, num_rows = len(step.num_scheduled_tokens), step.total_num_scheduled_tokens
        most = max(step.num_scheduled_tokens.values())
        return most * num_requests == num_rows and self.cudagraph_dispatcher.has_graph(num_requests, most)

    def _finish_drafts(self) -> float:
        """Seconds that the last ones took."""
        self.drafter.finish()
        if self._counts_drafts:
            self.step_times.draft_seconds += self.drafter.draft_seconds
            self._counts_drafts = False
        return self.drafter.draft_seconds

    @torch.inference_mode()
    def _draft(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Drafted tokens of each request of the step that was run last, or placeholders."""
        self._drafts_begun = time.perf_counter()
        self.drafter.begin_step(
            scheduler_output,
            self.input_batch.req_ids,
            self.requests,
            self.input_batch.block_table[0],
            # A grammar has to see what it is asked to allow.
            may_run_ahead=not scheduler_output.has_structured_output_requests,
        )
        drafts = super().propose_draft_token_ids(scheduler_output, *args, **kwargs)
        if self._step_started is not None:
            self._counts_drafts = True
            self.step_times.requests += len(drafts)
            self.step_times.drafted_tokens += sum(len(draft) for draft in drafts)
        if scheduler_output.has_structured_output_requests:  # the scheduler asks grammars whether they allow a draft
            return drafts
        return self._in_one_graph(drafts)

    def _in_one_graph(self, drafts: list[list[int]]) -> list[list[int]]:
        """`drafts` of a batch, padded where that has the target's step launched as one graph, and in less time.

        What falls out of the graphs is launched in pieces, two a layer, or without any.
        """
        lengths = [len(draft) for draft in drafts if draft]
        num_requests, chain, has_graph = len(lengths), 1 + self.num_spec_tokens, self.cudagraph_dispatcher.has_graph
        if not lengths or not has_graph(num_requests, chain):
            return drafts
        if len(set(lengths)) == 1 and has_graph(num_requests, 1 + lengths[0]):
            return drafts
        assert self.drafter.drafter is not None
        if (costs := self.drafter.drafter.payoff.costs) is not None:
            context = int(self.input_batch.num_tokens_no_spec[: len(drafts)].sum())
            rows = num_requests + sum(lengths), num_requests * chain
            further = [further_context(num_requests, num_rows, context) for num_rows in rows]
            in_pieces = costs.of_pieces(rows[0], context, further[0])
            if costs.of_verification(rows[1], context, further[1]) > in_pieces:
                return drafts
        return padded(drafts, chain - 1)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        # vLLM's LLaVA-OneVision returns a shape that its own runner refuses, and dies of, when videos of different
        # lengths are encoded together; one at a time they are fine.
        if self.model_config.hf_config.model_type == "llava_onevision":
            self.requires_sequential_video_encoding = True
        self.verification.prepare_model()

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        if not is_profiling:
            self.verification.allocate(self.kv_cache_config)
            self.scores.allocate(self.kv_cache_config)

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        with self.drafter.reserved():
            super().profile_run(*args, **kwargs)
            self.drafter.profile()
            if self.device.type != "cpu":  # where nobody looks at the peak
                self._profile_encoder()
                self._profile_verification()

    def _profile_encoder(self) -> None:
        """Have the drafter encode the largest item, where each rank does by itself what vLLM has seen shared in the
        target's encoder."""
        assert self.drafter.drafter is not None
        model = self.drafter.drafter.model
        assert isinstance(model, VLLMDraftModel)
        if model.encodes_whole_items and self.mm_budget is not None:
            modality = self.mm_budget.get_modality_with_max_tokens()
            model.encode_inputs(self._get_mm_dummy_batch(modality, 1))

    def _profile_verification(self) -> None:
        """Verify as many drafted tokens as a step may have: vLLM has had one of each request."""
        assert self.drafter.drafter is not None
        config, rows = self.model_config, self.drafter.drafter.payoff.most_rows
        # Hidden states, and those of a layer, are there until a step has sampled.
        shape = 2, self.max_num_tokens, config.get_hidden_size()
        beside = torch.empty(shape, dtype=config.dtype, device=self.device)
        length, vocab_size = self.num_spec_tokens, config.get_vocab_size()
        verify_rows(self.rejection_sampler, rows, length, vocab_size, config.head_dtype, self.device)
        self._sync_device()
        del beside

    @contextmanager
    def _decodes_of(self, tokens: int) -> Iterator[None]:
        """Take batches of so many tokens of each request for decodes; vLLM knows one such number, `1 + K`."""
        before = self.uniform_decode_query_len
        self.uniform_decode_query_len = self.cudagraph_dispatcher.uniform_decode_query_len = tokens
        try:
            yield
        finally:
            self.uniform_decode_query_len = self.cudagraph_dispatcher.uniform_decode_query_len = before

    def _determine_batch_execution_and_padding(
        self, *args: Any, num_reqs: int, max_num_scheduled_tokens: int, **kwargs: Any
    ) -> Any:
        # The rest of a prompt may be as long as a decode.
        is_step = "force_uniform_decode" not in kwargs
        reads_items = is_step and self._reads_items()
        if self._measures_pieces or reads_items or (is_step and self.scores.must_look()):
            kwargs["force_uniform_decode"] = False
        if reads_items and self.compilation_config.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL:
            kwargs["force_eager"] = True  # there, all graphs are full
        with self._decodes_of(self.cudagraph_dispatcher.decodes_like(num_reqs, max_num_scheduled_tokens)):
            return super()._determine_batch_execution_and_padding(
                *args, num_reqs=num_reqs, max_num_scheduled_tokens=max_num_scheduled_tokens, **kwargs
            )

    def _reads_items(self) -> bool:
        """Whether some prompt's images or videos are still to be read, or the last of them in this step.

        Models may put more than embeddings of them into the forward, and take it back behind it, which no graph
        repeats: Qwen3-VL's layers would go on adding it to whatever comes next.
        """
        batch = self.input_batch
        computed = batch.num_computed_tokens_cpu[: batch.num_reqs]
        reading = np.flatnonzero(computed < batch.num_prompt_tokens[: batch.num_reqs]).tolist()
        return any(
            item.mm_position.offset + item.mm_position.length > computed[row]
            for row in reading
            for item in self.requests[batch.req_ids[row]].mm_features
        )

    def _warmup_and_capture(self, desc: BatchDescriptor, *args: Any, **kwargs: Any) -> None:
        with self._decodes_of(tokens_each(desc) or self.uniform_decode_query_len):
            super()._warmup_and_capture(desc, *args, **kwargs)

    def capture_model(self) -> int:
        """The target's CUDA graphs, then the drafter's; bytes that both take."""
        used = super().capture_model()
        return used + self.drafter.record_graphs()

    def warm_up(self) -> None:
        """Compile what vLLM's own warm-up does not run."""
        self.verification.warm_up()
        self.scores.warm_up()
        self.drafter.warm_up()

    def measure_costs(self) -> None:
        """Time forwards of target and drafter, so that the drafter knows what another token costs."""
        if self.drafter.config.draft_length == "adaptive" or self.drafter.config.only_if_faster:
            has_graph = self.cudagraph_dispatcher.has_graph
            self.drafter.measure_costs(self._target_seconds, self._batches_measured(), has_graph)

    def _batches_measured(self) -> list[tuple[int, int]]:
        """Requests and tokens of each: as many single ones as there may be, then whole chains, which have graphs."""
        most, chain = self.scheduler_config.max_num_seqs, 1 + self.num_spec_tokens
        requests = {most, *(1 << i for i in range(most.bit_length()))}
        batches = [(num, 1) for num in requests] + [(num, chain) for num in requests if num * chain > most]
        assert self.drafter.drafter is not None
        budget = self.drafter.drafter.payoff.most_rows
        return sorted((batch for batch in batches if math.prod(batch) <= budget), key=math.prod)

    @contextmanager
    def _blocks_apart(self, num_requests: int, context: int) -> Iterator[None]:
        """Dummy requests read blocks of their own: one that all read would come from the device's caches.

        The device must have read the tables before it ends.
        """
        tables = self.input_batch.block_table.block_tables
        for table in tables:
            columns = -(-context // table.block_size)
            blocks = np.arange(num_requests * columns).reshape(num_requests, columns) % self.kv_cache_config.num_blocks
            table.block_table.np[:num_requests, :columns] = blocks
        try:
            yield
        finally:
            for table in tables:
                table.block_table.np[:num_requests] = 0

    def _target_seconds(self, num_requests: int, rows_each: int, context: int, in_pieces: bool = False) -> float:
        """`in_pieces`: without the graph that there is for such a step."""
        num_rows, context = num_requests * rows_each, max(context, rows_each)
        self._is_measuring, self._measures_pieces = True, in_pieces
        try:
            with self._decodes_of(rows_each), self._blocks_apart(num_requests, context):
                self._sync_device()
                started = time.perf_counter()
                hidden, _ = self._dummy_run(
                    num_rows,
                    force_attention=True,
                    uniform_decode=True,
                    profile_seq_lens=context,
                    skip_eplb=True,
                )
                self.model.compute_logits(hidden[:num_rows])
                self._sync_device()
                return time.perf_counter() - started
        finally:
            self._is_measuring = self._measures_pieces = False

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_measuring:
            kwargs["for_cudagraph_capture"] = False  # for which some backends take contexts for as short as can be
        return super()._build_attention_metadata(*args, **kwargs)
