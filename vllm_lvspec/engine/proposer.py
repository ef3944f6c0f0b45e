"""The proposer that vLLM builds for `custom_class`: turns the runner's batch into the drafter's requests."""

from __future__ import annotations

import functools
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.utils.mem_constants import GiB_bytes
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_lvspec.config import SELF, LVSpecConfigError
from vllm_lvspec.draft.costs import StepCosts, further_context, smooth_costs
from vllm_lvspec.draft.drafter import Drafter
from vllm_lvspec.draft.drafts import Drafts
from vllm_lvspec.draft.pruning import STRATEGIES, VisualGrid
from vllm_lvspec.draft.request import DraftRequest, VisualItem
from vllm_lvspec.engine.arguments import lvspec_config
from vllm_lvspec.engine.draft_model import PromptView, SelfDraftModel, VLLMDraftModel
from vllm_lvspec.engine.memory import device_memory, most_rows, waiting_bytes
from vllm_lvspec.engine.placeholders import Placeholders
from vllm_lvspec.engine.ranks import least_of_ranks
from vllm_lvspec.engine.requests import end_ids, salt_of
from vllm_lvspec.verify.policies import POLICIES

logger = init_logger("vllm.lvspec")

FEW_PROMPTS = 4
NUM_MEASURED = 6  # times that a forward is timed
SEVERAL = 32  # requests whose keys are read together to see what that takes
CONTEXT_MEASURED = 4096  # tokens in the cache, at most, for what they cost
SLOW_ENOUGH = 2.0  # seconds of a forward behind which more rows are not measured
NUM_GRIDS = 4096  # of videos that were seen
LEAST_ROOM = 3  # tokens of an answer with a draft: the first, a drafted one, and the target's own
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(slots=True)
class _Known:
    """What stays the same of a request; `max_length`: of prompt and answer; `ends`: tokens that end it."""

    num_prompt_tokens: int
    items: list[VisualItem]
    prompt: PromptView
    max_length: int
    ends: frozenset[int]
    salt: str | None


@dataclass
class _Started:
    """Drafts, and since when, by the device's clock.

    `foretold`: seconds that their first tokens should take, and all further ones; `num_prompts` had to be read.
    """

    drafts: Drafts
    begin: Any
    foretold: tuple[float, float]
    num_prompts: int


class LVSpecProposer:
    """Drafts with a second Video-LLM that sees a pruned video."""

    def __init__(self, vllm_config: VllmConfig):
        self.vllm_config = vllm_config
        self.config = lvspec_config(vllm_config)
        self._copies = False  # whether the drafter takes keys and values from the target's cache
        self._reads_past_end = POLICIES[self.config.policy].reads_past_end
        self.drafter: Drafter | None = None
        self._step: tuple[SchedulerOutput, Sequence[str], Mapping[str, CachedRequestState]] | None = None
        self._known: dict[str, _Known] = {}
        self._grids: OrderedDict[str, VisualGrid] = OrderedDict()
        self.block_table: BlockTable | None = None
        self.placeholders = Placeholders()
        self.draft_seconds = 0.0  # that the last step's drafts took, once they are finished
        self.ran_ahead = False  # the host, of the device that drafted last
        self._may_run_ahead = False
        self._started: _Started | None = None  # and not finished
        # Prompts that the drafter had read, and seconds that it had taken for them, when their price was last taken.
        self._prompts_read: tuple[float, float] | None = None

    def connect(
        self, encoder_cache: Mapping[str, torch.Tensor], scores: Callable[[str], Sequence[torch.Tensor | None]]
    ) -> None:
        """What the runner has, before a model is loaded: the target's visual embeddings, and its scores by request."""
        self._encoder_cache = encoder_cache
        self._scores = scores

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Build the drafter and its cache; called before vLLM sizes its own cache."""
        self._check_ranks()
        device = next(target_model.parameters()).device
        if self.config.model == SELF:
            model: VLLMDraftModel = SelfDraftModel(
                self.vllm_config, self.config, device, target_model, self._encoder_cache
            )
        else:
            model = VLLMDraftModel(self.vllm_config, self.config, device)
        self._copies = model.copies
        logger.info_once(
            "lvspec: drafter loaded: %.3f GiB of weights, KV cache of %.3f GiB = %d tokens, visual embeddings up to "
            "%.2f GiB (per rank).",
            model.num_weight_bytes / GiB_bytes,
            model.cache_bytes / GiB_bytes,
            model.pool.num_pages * model.pool.page_size,
            self.config.embedding_cache_gib,
        )
        self.drafter = Drafter(
            model,
            STRATEGIES[self.config.pruning],
            self.config.pruning_ratio,
            int(self.config.embedding_cache_gib * GiB_bytes),
            self._scores,
            finds_prefixes=bool(self.vllm_config.cache_config.enable_prefix_caching),
            is_adaptive=self.config.draft_length == "adaptive",
            only_if_faster=self.config.only_if_faster,
            least_length=POLICIES[self.config.policy].least_length(
                self.config.relaxation, self.config.num_speculative_tokens
            ),
            most_rows=least_of_ranks(most_rows(self.vllm_config, device_memory(get_tp_group().world_size)[0])),
        )

    def _check_ranks(self) -> None:
        """Raise LVSpecConfigError where the first rank was told something else: each of several nodes reads its own
        arguments, and finds drafters beside its own folders."""
        ours = self.config.model_dump()
        ours["model"] = SELF if self.config.model == SELF else "another model"  # whose folder may lie elsewhere
        theirs = get_tp_group().broadcast_object(ours, src=0)
        for key, value in ours.items():
            if value != theirs[key]:
                raise LVSpecConfigError(
                    f"{key}={value!r}: the first rank has {theirs[key]!r}; must be the same on all nodes"
                )

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Hold the room that visual embeddings will take while vLLM profiles its memory."""
        assert self.drafter is not None
        model = self.drafter.model
        assert isinstance(model, VLLMDraftModel)
        room = None
        if model.device.type == "cuda":
            num_tokens = 0 if model.copies else model.pool.num_pages * model.pool.page_size
            num_bytes = self.drafter.embeddings.max_bytes + waiting_bytes(model.vllm_config.model_config, num_tokens)
            room = torch.empty(num_bytes, dtype=torch.uint8, device=model.device)
        yield
        del room

    def profile(self) -> None:
        """Run the largest forward of the drafter once."""
        assert self.drafter is not None
        self.drafter.model.profile()

    def warm_up(self) -> None:
        """Compile what only requests run, so that none waits for that."""
        assert self.drafter is not None
        model = self.drafter.model
        assert isinstance(model, VLLMDraftModel)
        model.warm_up()

    def record_graphs(self) -> int:
        """Have the drafter's decode steps launched as CUDA graphs, where that can be; bytes that these take."""
        assert self.drafter is not None
        model = self.drafter.model
        assert isinstance(model, VLLMDraftModel)
        before, _ = torch.cuda.mem_get_info(model.device)
        model.record_graphs()
        after, _ = torch.cuda.mem_get_info(model.device)
        return max(0, before - after)

    def measure_costs(
        self,
        target_seconds: Callable[..., float],
        batches: Sequence[tuple[int, int]],
        has_graph: Callable[[int, int], bool],
    ) -> None:
        """Time forwards over `batches`, requests and tokens of each, by ascending tokens in all.

        All ranks then go by the first rank's clock.

        `target_seconds(num_requests, rows_each, context, in_pieces=False)`: what the target takes for so many tokens of
        each of so many requests, which have so many in their cache; there are one or `1 + K` tokens of each.
        `in_pieces`: without the graph that there is for these where it `has_graph(num_requests, rows_each)`.
        """
        assert self.drafter is not None
        model = self.drafter.model
        assert isinstance(model, VLLMDraftModel)
        most = self.vllm_config.scheduler_config.max_num_seqs
        chain = 1 + self.config.num_speculative_tokens
        context = min(CONTEXT_MEASURED, model.longest_context)
        draft_seconds = functools.partial(model.decode_seconds, with_probs=self.drafter.payoff.is_adaptive)
        rows: list[int] = []
        target: list[float] = []
        pieces: list[float] = []
        draft: list[float] = []
        for num_requests, each in batches:
            rows.append(num_requests * each)
            target.append(_fastest(target_seconds, num_requests, each, 1))
            graph = has_graph(num_requests, each)
            pieces.append(_fastest(target_seconds, num_requests, each, 1, True) if graph else target[-1])
            # More rows than requests are none that it ever decodes.
            draft.append(_fastest(draft_seconds, min(rows[-1], most), 1))
            if get_tp_group().broadcast_object(target[-1] > SLOW_ENOUGH, src=0):
                break
        pieces = np.maximum(target, pieces).tolist()
        target, draft = smooth_costs(rows, target), smooth_costs(rows, draft)
        # One request's keys are read too fast to be told from nothing.
        several = max(1, min(most, rows[-1] // chain, SEVERAL))
        target_context = _per_context(target_seconds, several, 1, context=context) / several
        chain_context = _per_context(target_seconds, several, chain, context=context) / several
        guessing = model.chain_tokens(1, min(chain - 1, model.max_model_len - 1)) or 1
        per_guess = _fastest(draft_seconds, 1, 1, guessing) / _fastest(draft_seconds, 1, 1) - 1
        costs = StepCosts(
            rows,
            target,
            draft,
            target_per_context=target_context,
            draft_per_context=_per_context(draft_seconds, several, context=context) / several,
            target_per_row_context=max(0.0, chain_context - target_context) / (chain - 1),
            per_guess=max(0.0, per_guess) / max(1, guessing - 1),
            pieces=smooth_costs(rows, pieces) if any(has_graph(*batch) for batch in batches) else None,
        )
        self.drafter.payoff.costs = get_tp_group().broadcast_object(costs, src=0)
        logger.info_once(
            "lvspec: a drafted token costs the drafter %.3f of a step of the target; %d rows cost the target %.2f "
            "times one, and those of a draft %.2f times one where they read a context of %d tokens.",
            draft[0] / target[0],
            rows[-1],
            target[-1] / target[0],
            (costs.of_target(chain) + chain_context * context) / (target[0] + target_context * context),
            context,
        )

    def note_step(self, seconds: float, num_requests: int, num_rows: int, context: int, in_pieces: bool) -> None:
        """A step with nothing to prefill took `seconds` without its drafting, since the step before had its tokens."""
        assert self.drafter is not None
        if self.drafter.payoff.costs is None:
            return
        # What is done while the drafter runs takes no time.
        part = "verification" if self.ran_ahead else "target"
        costs = self.drafter.payoff.costs
        price = costs.of_pieces if in_pieces else costs.of_verification
        foretold = price(num_rows, context, further_context(num_requests, num_rows, context))
        foretold *= self.drafter.payoff.corrections.factor(part, num_requests)
        self._correct(part, num_requests, seconds, float(foretold))

    def _correct(self, part: str, num_requests: int, seconds: float, foretold: float) -> None:
        """All ranks note the same steps, and go by the first one's clock."""
        assert self.drafter is not None
        corrections = self.drafter.payoff.corrections
        if (factor := corrections.note(part, num_requests, seconds, foretold)) is not None:
            corrections.correct(part, num_requests, get_tp_group().broadcast_object(factor, src=0))

    def _note_prompts(self) -> None:
        """Take the price of the drafter's prompts: of the 2nd to 4th, then anew whenever twice as many were read."""
        assert self.drafter is not None
        costs, num = self.drafter.payoff.costs, self.drafter.prompts_read
        if costs is None or not num:
            return
        if self._prompts_read is None:  # the first has paid for whatever is done once
            self._prompts_read = num, self.drafter.prefill_seconds
        before, seconds = self._prompts_read
        if num >= max(2 * before, FEW_PROMPTS):
            price = (self.drafter.prefill_seconds - seconds) / (num - before)
            self.drafter.payoff.costs = replace(costs, prompt=get_tp_group().broadcast_object(price, src=0))
            self._prompts_read = num, self.drafter.prefill_seconds

    def release(self, req_id: str, state: CachedRequestState | None = None) -> None:
        """Forget a request that was preempted, or has ended in `state`."""
        self._known.pop(req_id, None)
        self.placeholders.forget(req_id)
        if self.drafter is None:
            return
        num_emitted = None
        # Answers that had no room for a draft say nothing of how long others are.
        if state is not None and self._max_length(state) >= state.num_prompt_tokens + LEAST_ROOM:
            num_emitted = len(state.output_token_ids)
        self.drafter.release(req_id, num_emitted)

    def begin_step(
        self,
        scheduler_output: SchedulerOutput,
        req_ids: Sequence[str],
        requests: Mapping[str, CachedRequestState],
        block_table: BlockTable,
        may_run_ahead: bool,
    ) -> None:
        """What `propose`, whose arguments vLLM fixes, needs to know of this step.

        `may_run_ahead`: whether it may give placeholders for tokens at which the device still is.
        """
        self._step = (scheduler_output, req_ids, requests)
        self.block_table = block_table
        self._may_run_ahead = may_run_ahead

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafted tokens per request of the batch; empty for requests that are still being prefilled.

        What was started before must have been finished.
        """
        assert self.drafter is not None and self._step is not None and self._started is None
        scheduler_output, req_ids, states = self._step
        self._step = None
        self.draft_seconds, self.ran_ahead = 0.0, False
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        indices = [i for i, sampled in enumerate(sampled_token_ids) if sampled]
        verified = scheduler_output.scheduled_spec_decode_tokens
        if not verified and self.drafter.rests([req_ids[i] for i in indices]):
            return drafts
        begin = self.drafter.clock.mark()
        before, num_prompts = self._foretold(), self.drafter.counts["prefills"]
        lengths = num_tokens_no_spec[: len(sampled_token_ids)].tolist()
        batch = []
        for i in indices:
            token_ids, num_verified = token_ids_cpu[i, : lengths[i]], len(verified.get(req_ids[i], ()))
            batch.append(self._request(states[req_ids[i]], token_ids, sampled_token_ids[i], num_verified, i))
        num_prefilling = len(sampled_token_ids) - len(indices)
        started = self.drafter.start(batch, scheduler_output.num_spec_tokens_to_schedule, num_prefilling)
        first, further = (after - value for after, value in zip(self._foretold(), before, strict=True))
        num_prompts = self.drafter.counts["prefills"] - num_prompts
        self._started = _Started(started, begin, (first, further), num_prompts)
        if self._may_run_ahead and self.drafter.runs_ahead and any(started.lengths):
            self.ran_ahead = True
            tokens = self.placeholders.put([req_ids[i] for i in indices], started)
        else:
            self.finish()
            tokens = started.tokens
        for i, draft in zip(indices, tokens, strict=True):
            drafts[i] = draft
        return drafts

    def finish(self) -> None:
        """Wait for the drafts that were started last, and learn what they took."""
        if self._started is None:
            return
        started, self._started = self._started, None
        assert self.drafter is not None
        before = self.drafter.further_seconds
        self.drafter.finish(started.drafts)
        self._note_prompts()
        self.draft_seconds = self.drafter.clock.seconds(started.begin, started.drafts.end)
        further_seconds = self.drafter.further_seconds - before
        first, further = started.foretold
        if first and not started.num_prompts:
            num_drafted = sum(map(bool, started.drafts.lengths))
            self._correct("first", num_drafted, self.draft_seconds - further_seconds, first)
            if further:
                self._correct("draft", num_drafted, further_seconds, further)

    def _foretold(self) -> tuple[float, float]:
        """Seconds that first and further tokens should have taken since the start."""
        assert self.drafter is not None
        return self.drafter.foretold_first, self.drafter.foretold_further

    def _request(
        self, state: CachedRequestState, token_ids: np.ndarray, sampled: list[int], num_verified: int, row: int
    ) -> DraftRequest:
        assert state.prompt_token_ids is not None
        num_prompt_tokens = len(state.prompt_token_ids)
        known = self._known.get(state.req_id)
        if known is None or known.num_prompt_tokens != num_prompt_tokens:
            known = self._known[state.req_id] = self._know(state, num_prompt_tokens)
        return DraftRequest(
            req_id=state.req_id,
            token_ids=token_ids,
            num_prompt_tokens=num_prompt_tokens,
            items=known.items,
            prompt=known.prompt,
            max_draft_tokens=known.max_length - len(token_ids) - 1,  # the last one is the target's
            num_verified=num_verified,
            ends=frozenset() if self._reads_past_end else known.ends,
            is_done=not known.ends.isdisjoint(sampled),
            target_slots=functools.partial(self._target_slots, row) if self._copies else None,
            salt=known.salt,
        )

    def _know(self, state: CachedRequestState, num_prompt_tokens: int) -> _Known:
        assert state.prompt_token_ids is not None and state.sampling_params is not None
        return _Known(
            num_prompt_tokens,
            [self._visual_item(feature) for feature in state.mm_features],
            PromptView(state.prompt_token_ids, state.mm_features),
            self._max_length(state),
            end_ids(state.sampling_params),
            salt_of(state.sampling_params),
        )

    def _max_length(self, state: CachedRequestState) -> int:
        """Of prompt and answer."""
        max_model_len = self.vllm_config.model_config.max_model_len
        max_tokens = state.sampling_params.max_tokens if state.sampling_params is not None else None
        return min(state.num_prompt_tokens + (max_tokens or max_model_len), max_model_len)

    def _target_slots(self, row: int, places: np.ndarray) -> np.ndarray:
        """Slots of the target's KV cache that hold the tokens at `places` of the batch's request `row`."""
        assert self.block_table is not None
        size = self.block_table.block_size
        blocks = self.block_table.get_numpy_array()[row].astype(np.int64)
        return blocks[places // size] * size + places % size

    def _visual_item(self, feature: MultiModalFeatureSpec) -> VisualItem:
        """The drafter's view of one of vLLM's multimodal features; of stripped ones the grid is remembered."""
        item = visual_item(feature)
        if item.payload is not None:
            self._grids[item.identifier] = item.grid
            if len(self._grids) > NUM_GRIDS:
                self._grids.popitem(last=False)
        grid = self._grids.get(item.identifier, item.grid)
        return replace(item, grid=grid) if grid.num_tokens == len(item.rows) else item

    def items_of(self, state: CachedRequestState) -> list[VisualItem]:
        """What a request sees, in the prompt's order."""
        items = [self._visual_item(feature) for feature in state.mm_features if feature.modality in PIXELS]
        return sorted(items, key=lambda item: item.rows[0])

    def kept_of(self, req_id: str) -> list[int] | None:
        """Which places of a request's prompt the drafter sees; None where it has not read it."""
        assert self.drafter is not None
        sequence = self.drafter.sequences.get(req_id)
        return None if sequence is None else sequence.kept

    def forget_prompts(self) -> None:
        """With other weights what was read of them is another."""
        if self.drafter is not None and self.config.model == SELF:
            self.drafter.model.pool.forget_keys()
            self.drafter.embeddings.clear()

    def stats(self) -> dict[str, int]:
        """Counts since the start, and what the caches hold."""
        assert self.drafter is not None
        pool = self.drafter.model.pool
        return {
            **self.drafter.counts,
            "pages_total": pool.num_pages,
            "pages_free": pool.num_free,
            "sequences": len(self.drafter.sequences),
            "embedding_items": len(self.drafter.embeddings),
            "embedding_bytes": self.drafter.embeddings.num_bytes,
        }


def _fastest(seconds: Callable[..., float], *batch: int) -> float:
    """Of a few times, the least: whatever else the machine does only adds to it."""
    return min(seconds(*batch) for _ in range(NUM_MEASURED))


def _per_context(seconds: Callable[..., float], *batch: int, context: int) -> float:
    """How much more a forward takes for each token in the cache."""
    return max(0.0, _fastest(seconds, *batch, context) - _fastest(seconds, *batch, 1)) / context


def embedded_rows(feature: MultiModalFeatureSpec) -> np.ndarray:
    """Indices among the prompt's tokens that the item's embeddings replace, ascending, int64 `[num_embeddings]`."""
    place = feature.mm_position
    rows = np.arange(place.length)
    if place.is_embed is not None:
        rows = np.flatnonzero(place.is_embed.numpy())
    return rows + place.offset


def visual_item(feature: MultiModalFeatureSpec) -> VisualItem:
    """The drafter's view of one of vLLM's multimodal features."""
    rows = embedded_rows(feature)
    has_pixels = feature.data is not None and PIXELS.get(feature.modality) in feature.data
    return VisualItem(
        identifier=feature.identifier,
        is_video=feature.modality == "video",
        grid=_grid(feature, len(rows)),
        rows=rows,
        payload=feature if has_pixels else None,
        seed=zlib.crc32(feature.identifier.encode()),
    )


def _grid(feature: MultiModalFeatureSpec, num_tokens: int) -> VisualGrid:
    """Time, height and width of a video's tokens, from what the processor made of it.

    Qwen-VL says its patch grid, of which the model merges squares; LLaVA-OneVision pools every frame to a square and
    adds one line-end token to the video. Anything else is taken as a row of tokens.
    """
    data = feature.data or {}
    if (element := data.get("video_grid_thw")) is not None:
        time, height, width = (int(x) for x in element.data)
        merge = int((time * height * width / num_tokens) ** 0.5 + 0.5)
        if time * (height // merge) * (width // merge) == num_tokens:
            return VisualGrid(time, height // merge, width // merge)
    if (element := data.get("pixel_values_videos")) is not None and element.data is not None and element.data.ndim == 4:
        frames = len(element.data)
        side = int(((num_tokens - 1) / frames) ** 0.5)
        if frames * side * side + 1 == num_tokens:
            return VisualGrid(frames, side, side, num_extra=1)
    return VisualGrid(1, 1, num_tokens)
