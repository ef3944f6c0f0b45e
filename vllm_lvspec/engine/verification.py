"""What the verifier needs of the runner's batch: rules and visual tokens of each request, features, states."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import EagleModelMixin
from vllm.sampling_params import SamplingParams
from vllm.tokenizers.registry import get_tokenizer
from vllm.transformers_utils.config import try_get_generation_config
from vllm.utils.mem_constants import GiB_bytes
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_lvspec.config import LVSpecConfigError
from vllm_lvspec.device import upload
from vllm_lvspec.draft.pruning import STRATEGIES
from vllm_lvspec.engine.arguments import lvspec_config
from vllm_lvspec.engine.proposer import PIXELS, embedded_rows
from vllm_lvspec.engine.requests import RequestError, end_ids, request_rules
from vllm_lvspec.engine.trace import RequestTrace, Traces, described
from vllm_lvspec.kernels.acceptance import END, EXACT, LOOSE, SHIFT, TARGET
from vllm_lvspec.kernels.relevance import VisualPages
from vllm_lvspec.verify.features import FeatureCache, Layout, Projection, num_shares, tag_of
from vllm_lvspec.verify.guards import guard_words, token_kinds
from vllm_lvspec.verify.matches import FEATURES_AT_ONCE
from vllm_lvspec.verify.policies import POLICIES
from vllm_lvspec.verify.rules import RequestRules
from vllm_lvspec.verify.sources import AnchorSource
from vllm_lvspec.verify.verifier import Choices, Verifier

logger = init_logger("vllm.lvspec")

REASONS = {"exact": EXACT, "loose": LOOSE, "shift": SHIFT, "target": TARGET}
NAMES = {reason: name for name, reason in REASONS.items()}
NUM_FINISHED = 1024  # requests whose counts are kept after their end


@dataclass
class _Request:
    """What is known of a request while it runs; `rules` follow from `params`.

    `positions`, `tags [num_visual]`: places of its visual tokens in the prompt, ascending, and of which items they are;
    `own`: this rank's share of the places, as the kernel counts them; `is_known`: whether all features are in the
    cache, None where nobody has looked.
    """

    rules: RequestRules
    params: SamplingParams | None
    num_items: int
    positions: np.ndarray
    tags: np.ndarray
    own: torch.Tensor
    is_known: bool | None = None
    reasons: np.ndarray = field(default_factory=lambda: np.zeros(TARGET + 1, dtype=np.int64))
    num_alone: int = 0  # tokens of the target's own in steps where nobody had drafts, which `reasons` lacks

    def counts(self) -> list[int]:
        """Tokens by reason, in the order of `REASONS`."""
        counts = self.reasons[1:].tolist()
        counts[TARGET - 1] += self.num_alone
        return counts


@dataclass(frozen=True)
class Batch:
    """A step's requests in the batch's order, for the sampler."""

    rules: Sequence[RequestRules]
    queries: torch.Tensor | None  # [num_drafted, width], None where nobody's policy asks for relevance
    pages: VisualPages | None
    visuals: Sequence[int]  # `pages.starts`, on the host
    places: torch.Tensor  # [num_drafted]


def _timed(method: Callable[..., Any]) -> Callable[..., Any]:
    """Note when a call began and when it ended."""

    @functools.wraps(method)
    def wrapper(self: Verification, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.spans.append((started, time.perf_counter()))

    return wrapper


class Verification:
    """Owns the feature cache, the verifier and the counts of one rank. `runner` is vLLM's model runner.

    `spans`: its own work in this step, from when to when by the host's clock.
    """

    def __init__(self, runner: Any):
        self.runner = runner
        vllm_config: VllmConfig = runner.vllm_config
        self.vllm_config = vllm_config
        self.config = lvspec_config(vllm_config)
        self.source = AnchorSource.parse(self.config.anchor_source)
        self.features: FeatureCache | None = None
        self.project: Projection | None = None
        self.spans: list[tuple[float, float]] = []
        self.reasons = np.zeros(TARGET + 1, dtype=np.int64)
        self.counts = {"loose_chains": 0, "strict_chains": 0, "missing_features": 0}
        self.verified = {"anchor": 0, "filler": 0, "strict": 0}  # drafted tokens
        self.accepted_lengths = [0] * (self.config.num_speculative_tokens + 1)  # chains, by how many were accepted
        self.relaxation = self.config.relaxation if POLICIES[self.config.policy].has_relaxation else 0.0
        self.finished: deque[tuple[str, list[int]]] = deque(maxlen=NUM_FINISHED)
        self._requests: dict[str, _Request] = {}
        self._states: torch.Tensor | None = None
        self._embeddings: torch.Tensor | None = None
        self._values: torch.Tensor | None = None  # of vLLM's cache, where these are compared
        # Of the last batch: its requests, where their visual tokens stand, where each request's begin, and on the host.
        self._visual: tuple[tuple, torch.Tensor, torch.Tensor, Sequence[int]] | None = None
        self._reasons: torch.Tensor | None = None  # of the step's tokens, on the host
        self.traces: Traces | None = None
        self._rules: Sequence[RequestRules] = ()  # by which the batch's drafts are verified
        self._num_drafted: Sequence[int] = ()  # of the batch's requests; nothing where nobody has a draft
        model = vllm_config.model_config
        tokenizer = get_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code)
        words = guard_words(self.config.guard_languages, self.config.guard_words)
        kinds = token_kinds(tokenizer, model.get_vocab_size(), self._end_ids(tokenizer), words)
        self.verifier = Verifier(self.config, kinds.to(runner.device))
        if self.config.trace:
            is_end = functools.partial(_ends_chain, (kinds.numpy() & END) != 0)
            keeps = get_tp_group().is_first_rank  # whom the server asks
            self.traces = Traces(self.config.trace, keeps, is_end, self.config.anchor_threshold)

    @functools.cached_property
    def uses_features(self) -> bool:
        """Whether any request may be verified by relevance, or any video be pruned by similarity."""
        by_similarity = STRATEGIES[self.config.pruning].looks_at == "similarity"
        return POLICIES[self.config.policy].uses_relevance or by_similarity

    def _end_ids(self, tokenizer: Any) -> set[int]:
        model = self.vllm_config.model_config
        generation = try_get_generation_config(model.model, model.trust_remote_code, model.revision)
        ends = getattr(generation, "eos_token_id", None)
        named = (ends, tokenizer.eos_token_id, getattr(model.hf_text_config, "eos_token_id", None))
        return {i for ids in named for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}

    # Features -----------------------------------------------------------------------------------------------------

    def prepare_model(self) -> None:
        """Have the target give the states of an inner layer, where these are compared."""
        if self.source.kind != "layer" or not self.uses_features:
            return
        model = self.runner.get_model()
        language = model.get_language_model()
        decoder = getattr(language, "model", language)
        depth = self.vllm_config.model_config.get_total_num_hidden_layers()
        layer = self.source.layer or 0
        if not isinstance(decoder, EagleModelMixin) or not 0 < layer <= depth:
            raise LVSpecConfigError(
                f"anchor_source={self.config.anchor_source!r}: {type(decoder).__name__} has {depth} layers and "
                f"{'gives' if isinstance(decoder, EagleModelMixin) else 'does not give'} their states; must be hidden"
                + (f" or layer:I with I from 1 to {depth}" if isinstance(decoder, EagleModelMixin) else "")
            )
        decoder._set_aux_hidden_state_layers((layer,))
        self.runner.use_aux_hidden_state_outputs = True

    def _width(self) -> int:
        model = self.vllm_config.model_config
        if self.source.kind == "embedding":
            return self.runner.inputs_embeds_size
        return model.get_hidden_size()

    def _stores_features(self) -> bool:
        return self.uses_features and self.source.kind != "value"

    def _layout(self, num_blocks: int, block_size: int) -> Layout:
        group = get_tp_group()
        shares = num_shares(block_size, group.world_size) if self._stores_features() else 1
        width = self.config.anchor_projection or self._width()
        return Layout(num_blocks, block_size, width, group.rank_in_group if shares > 1 else 0, shares)

    def share_of_memory(self, specs: Mapping[str, KVCacheSpec]) -> float:
        """What part of the memory for KV cache and features is the features'."""
        if not self._stores_features() or not specs:
            return 0.0
        block_size = next(iter(specs.values())).block_size
        features = self._layout(1, block_size).bytes_per_block(self.vllm_config.model_config.dtype)
        return features / (features + sum(spec.page_size_bytes for spec in specs.values()))

    def allocate(self, kv_cache_config: KVCacheConfig) -> None:
        """Make the feature cache beside vLLM's KV cache, with its blocks."""
        self._visual = self.features = None
        if not self.uses_features:
            return
        groups = kv_cache_config.kv_cache_groups
        spec = groups[0].kv_cache_spec
        if len(groups) > 1 or not isinstance(spec, FullAttentionSpec):
            by_policy = POLICIES[self.config.policy].uses_relevance
            asks = f"policy={self.config.policy!r}" if by_policy else f"pruning={self.config.pruning!r}"
            raise LVSpecConfigError(
                f"{asks}: the target's layers have different kinds of KV cache, or none of the whole video; must be "
                f"{'strict' if by_policy else 'uniform'!r}"
            )
        model = self.vllm_config.model_config
        layout = self._layout(kv_cache_config.num_blocks, spec.block_size)
        stored = self._stores_features()
        self.features = FeatureCache(layout, model.dtype if stored else None, self.runner.device)
        if stored:
            if self.config.anchor_projection is not None:
                self.project = Projection(self._width(), layout.width, model.dtype, self.runner.device)
            logger.info_once(
                "lvspec: features of visual tokens take %.3f GiB per rank: %d blocks of %d tokens, %d wide.",
                self.features.num_bytes / GiB_bytes,
                layout.num_blocks,
                layout.slots_per_block,
                layout.width,
            )
        else:
            self._values = self._last_values(groups[0].layer_names[-1], spec)
        if layout.num_shares > 1:
            group = get_tp_group()
            self.verifier.gather = lambda tops: group.all_gather(tops, dim=0)

    @property
    def _num_shares(self) -> int:
        return 1 if self.features is None else self.features.layout.num_shares

    def warm_up(self) -> None:
        """Compile the kernels that verify loosely, so that no request waits for that."""
        policy = POLICIES[self.config.policy]
        if policy.score is None:
            return
        pages = None
        if policy.uses_relevance:
            stored = self._stored()
            each = torch.tensor([0, 1], dtype=torch.int32, device=stored.device)
            table = self.runner.input_batch.block_table[0].get_device_tensor(1)
            pages = VisualPages(stored, table, each[:1], each, self._num_shares)
        self.verifier.warm_up(pages)

    def _last_values(self, layer_name: str, spec: FullAttentionSpec) -> torch.Tensor:
        """The last layer's values as `[num_blocks, block_size, num_kv_heads, head_size]`, without a copy."""
        layer = self.vllm_config.compilation_config.static_forward_context[layer_name]
        cache = layer.kv_cache
        name = self.runner.attn_groups[0][0].backend.get_name()
        num_blocks, heads, size, content = cache.shape
        if size != spec.block_size or content != 2 * spec.head_size or cache.dtype.itemsize < 2:
            raise LVSpecConfigError(
                f"anchor_source={self.config.anchor_source!r}: values can't be read from this KV cache (kernel blocks "
                f"of {size} tokens in blocks of {spec.block_size}, {cache.dtype}); must be hidden"
            )
        # Keys of all slots, then values of all slots; kernels for other instruction sets may pack them.
        if name == "CPU_ATTN" and layer.isa in ("vec", "vec16"):
            cache = cache.view(num_blocks, heads, 2 * size, -1)[:, :, size:]
        elif name == "FLASH_ATTN":
            cache = cache[..., spec.head_size :]
        else:
            raise LVSpecConfigError(
                f"anchor_source={self.config.anchor_source!r}: how {name} keeps values is not known; must be hidden"
            )
        return cache.transpose(1, 2)

    # A step -------------------------------------------------------------------------------------------------------

    def begin_forward(self, inputs_embeds: torch.Tensor | None) -> None:
        """Keep what goes into the first layer, where it is compared: kernels may add to it in place."""
        if self.uses_features and self.source.kind == "embedding" and inputs_embeds is not None:
            self._embeddings = inputs_embeds.clone()

    @_timed
    def begin_step(self, scheduler_output: Any, hidden: torch.Tensor, inner: list[torch.Tensor] | None) -> None:
        """Store the features of the visual tokens that this step has computed."""
        self._reasons = None
        self._num_drafted = ()
        self._states = None
        if self.traces is not None:
            self.traces.begin_step()
        if not self.uses_features:
            return
        num_tokens = scheduler_output.total_num_scheduled_tokens
        if self.source.kind == "layer":
            assert inner is not None
            self._states = inner[0][:num_tokens]
        elif self.source.kind == "embedding":
            assert self._embeddings is not None
            self._states = self._embeddings[:num_tokens]
        else:
            self._states = hidden[:num_tokens]
        self._store(scheduler_output)

    def _store(self, scheduler_output: Any) -> None:
        assert self.features is not None
        batch = self.runner.input_batch
        num = batch.num_reqs
        if (batch.num_computed_tokens_cpu[:num] >= batch.num_prompt_tokens[:num]).all():
            return
        table = batch.block_table[0].get_numpy_array()
        layout = self.features.layout
        rows, blocks, slots, first = [], [], [], 0
        for i, req_id in enumerate(batch.req_ids):
            state = self.runner.requests[req_id]
            begin, first_row = state.num_computed_tokens, first
            count = scheduler_output.num_scheduled_tokens[req_id]
            first += count
            request = self._request(state)
            if not len(request.positions) or begin > request.positions[-1]:
                continue
            here = slice(*np.searchsorted(request.positions, (begin, begin + count)))
            positions = request.positions[here]
            self.features.note(table[i], positions, request.tags[here])
            request.is_known = None
            positions = positions[layout.own(positions)]
            rows.append(positions - begin + first_row)
            block_places, slot_places = np.divmod(layout.places(positions), layout.slots_per_block)
            blocks.append(table[i, block_places])
            slots.append(slot_places)
        if not rows or not self._stores_features():
            return
        assert self._states is not None
        device = self._states.device
        places = [np.concatenate(x).astype(np.int64) for x in (rows, blocks, slots)]
        row_idx, block_idx, slot_idx = upload(places, device)
        if len(row_idx):
            self.features.write(self._projected(self._states[row_idx]), block_idx, slot_idx)

    def _projected(self, states: torch.Tensor) -> torch.Tensor:
        return states if self.project is None else self.project(states)

    def _request(self, state: CachedRequestState) -> _Request:
        request = self._requests.get(state.req_id)
        is_same = request is not None and request.params is state.sampling_params
        if request is not None and is_same and request.num_items == len(state.mm_features):
            return request
        positions, tags = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for item in state.mm_features:
            if item.modality in PIXELS:
                positions.append(embedded_rows(item))
                tags.append(np.full(len(positions[-1]), tag_of(item.identifier)))
        places, items = np.concatenate(positions), np.concatenate(tags)
        order = np.argsort(places, kind="stable")
        places, items = places[order], items[order]
        own = places
        if self.features is not None:
            layout = self.features.layout
            own = layout.places(places[layout.own(places)])
        (there,) = upload([own.astype(np.int32)], self.runner.device)
        new = _Request(self._rules_of(state), state.sampling_params, len(state.mm_features), places, items, there)
        if request is not None:  # a streaming session has gone on with a longer prompt, or asks for something else
            new.reasons, new.num_alone = request.reasons, request.num_alone
            self._visual = None
        self._requests[state.req_id] = new
        return new

    def _rules_of(self, state: CachedRequestState) -> RequestRules:
        if state.sampling_params is None:
            return RequestRules()
        try:
            return request_rules(state.sampling_params, self.config)
        except RequestError as error:
            # The front end refuses such requests; whoever comes by another way is no reason for an engine to die.
            logger.warning_once("lvspec: %s; the request is verified strictly.", str(error))
            return RequestRules()

    def _rules_now(self, row: int, req_id: str) -> RequestRules:
        """The request's rules; strict ones where it sees nothing, or where features are missing."""
        state = self.runner.requests[req_id]
        request = self._request(state)
        if request.rules.is_strict:
            return request.rules
        if not len(request.positions):
            return request.rules.as_strict()
        if not request.rules.uses_relevance:
            return request.rules
        if request.is_known is None:
            assert self.features is not None
            table = self.runner.input_batch.block_table[0].get_numpy_array()
            request.is_known = self.features.holds(table[row], request.positions, request.tags)
            self.counts["missing_features"] += not request.is_known
        return request.rules if request.is_known else request.rules.as_strict()

    @_timed
    def batch(self, metadata: SpecDecodeMetadata) -> Batch | None:
        """What the sampler needs, or None where all drafts are verified strictly."""
        req_ids = self.runner.input_batch.req_ids
        drafted = metadata.num_draft_tokens
        # Of a request without drafts nothing is verified.
        rules = [
            self._rules_now(i, req_id) if count else RequestRules()
            for i, (req_id, count) in enumerate(zip(req_ids, drafted, strict=True))
        ]
        loose = [bool(n) and not r.is_strict for r, n in zip(rules, drafted, strict=True)]
        self.counts["loose_chains"] += sum(loose)
        self.counts["strict_chains"] += sum(bool(n) for n in drafted) - sum(loose)
        self._count_verified(rules, drafted, loose)
        if self.traces is not None:
            self._rules = rules
            self.traces.note_drafts(metadata.draft_token_ids, drafted)
        if not any(loose):
            return None
        rows = metadata.logits_indices[metadata.target_logits_indices].long()
        places = self.runner.positions[rows] + 1
        asking = [is_loose and r.uses_relevance for r, is_loose in zip(rules, loose, strict=True)]
        if not any(asking):
            return Batch(rules, None, None, (), places)
        pages, visuals = self._pages_of(req_ids, asking)
        return Batch(rules, self._states_of(rows + self.source.reads), pages, visuals, places)

    def _states_of(self, rows: torch.Tensor) -> torch.Tensor:
        """States `[num_rows, width]` that are compared, of these rows (int64) of the step's batch."""
        if self.source.kind != "value":
            assert self._states is not None
            # Some models add up their layers in float32.
            return self._projected(self._states[rows]).to(self._stored().dtype)
        slots = self.runner.input_batch.block_table[0].slot_mapping.gpu[rows]
        values = self._stored()
        size = values.shape[1]
        return values[slots // size, slots % size].flatten(1)

    def _stored(self) -> torch.Tensor:
        """What is compared with: features of our own, or vLLM's values."""
        assert self.features is not None
        stored = self._values if self.features.features is None else self.features.features
        assert stored is not None
        return stored

    # Prompts ------------------------------------------------------------------------------------------------------

    def visual_positions(self, state: CachedRequestState) -> np.ndarray:
        """Places of the request's visual tokens in its prompt, ascending: int64 `[num_visual]`."""
        return self._request(state).positions

    def similarity(self, state: CachedRequestState, row: int, begin: int, end: int) -> torch.Tensor | None:
        """Cosines of each of the request's visual tokens with rows `begin` to `end` of the step's batch, summed up.

        `[num_visual]` float32, 0 for those whose features another rank holds; None where features are missing. `row`:
        of the request in the batch.
        """
        assert self.features is not None
        layout, positions = self.features.layout, self._request(state).positions
        table = self.runner.input_batch.block_table[0].get_numpy_array()[row]
        if not self.features.holds(table, positions, self._request(state).tags):
            return None
        stored = self._stored()
        own = np.flatnonzero(layout.own(positions))
        block_places, slot_places = np.divmod(layout.places(positions[own]), layout.slots_per_block)
        places = [x.astype(np.int64) for x in (own, table[block_places], slot_places)]
        rows, blocks, slots = upload(places, stored.device)
        queries = self._states_of(torch.arange(begin, end, device=stored.device)).float()
        query = F.normalize(queries, dim=1).sum(0)
        result = torch.zeros(len(positions), device=stored.device)
        for first in range(0, len(rows), FEATURES_AT_ONCE):
            part = slice(first, first + FEATURES_AT_ONCE)
            features = F.normalize(stored[blocks[part], slots[part]].flatten(1).float(), dim=1)
            result[rows[part]] = features @ query
        return result

    # Relevance ----------------------------------------------------------------------------------------------------

    def _pages_of(self, req_ids: Sequence[str], asking: Sequence[bool]) -> tuple[VisualPages, Sequence[int]]:
        """And where each request's visual tokens begin, on the host.

        Positions change only with the batch, block tables with every block: those are the runner's own.
        """
        key = tuple(req_id if asks else "" for req_id, asks in zip(req_ids, asking, strict=True))
        stored = self._stored()
        if self._visual is None or self._visual[0] != key:
            nothing = torch.zeros(0, dtype=torch.int32, device=stored.device)
            own = [self._requests[req_id].own if req_id else nothing for req_id in key]
            visuals = np.cumsum([0, *map(len, own)], dtype=np.int32)
            (starts,) = upload([visuals], stored.device)
            self._visual = key, torch.cat(own), starts, visuals.tolist()
        _, positions, starts, begins = self._visual
        table = self.runner.input_batch.block_table[0].get_device_tensor(len(req_ids))
        return VisualPages(stored, table, positions, starts, self._num_shares), begins

    @_timed
    def accept(self, choices: Choices, batch: Batch, max_drafted: int) -> torch.Tensor:
        """Tokens that are emitted: `[num_requests, max_drafted + 1]` int32, -1 behind the last."""
        relevance = None
        if batch.queries is not None and batch.pages is not None:
            relevance = self.verifier.relevance(batch.queries, choices.starts, batch.pages, max_drafted)
        accepted = self.verifier.verify(choices, batch.rules, max_drafted, relevance)
        # There with the tokens, for which vLLM waits.
        self._reasons = accepted.reasons.to("cpu", non_blocking=True)
        if self.traces is not None:
            own = [self._own(req_id) for req_id in self.runner.input_batch.req_ids]
            gather = self.verifier.gather
            self.traces.note_choices(choices, relevance, batch.queries, batch.pages, batch.visuals, own, gather)
        return accepted.token_ids

    # Counting -----------------------------------------------------------------------------------------------------

    def seconds_since(self, moment: float) -> float:
        """Of its work in this step."""
        return sum(max(0.0, end - max(begin, moment)) for begin, end in self.spans)

    @_timed
    def count(self, emitted: Sequence[list[int]]) -> None:
        """Count the reasons of a step's tokens, but for those that the scheduler cuts off at an end or a length."""
        reasons = None if self._reasons is None else self._reasons.numpy()
        for i, (num_drafted, tokens) in enumerate(zip(self._num_drafted, emitted, strict=False)):
            if num_drafted and tokens:
                is_last_own = reasons is None or reasons[i, len(tokens) - 1] == TARGET
                self.accepted_lengths[len(tokens) - is_last_own] += 1
        max_model_len = self.vllm_config.model_config.max_model_len
        num_alone = 0
        for i, (req_id, tokens) in enumerate(zip(self.runner.input_batch.req_ids, emitted, strict=False)):
            if (
                self.traces is None
                and reasons is None
                and len(tokens) == 1
                and (known := self._requests.get(req_id)) is not None
            ):
                known.num_alone += 1  # in every step of every request where nothing is drafted, and never cut off
                num_alone += 1
                continue
            state = self.runner.requests.get(req_id)
            if not tokens or state is None or state.sampling_params is None:
                continue
            request = self._request(state)
            before = len(state.output_token_ids) - len(tokens)
            length = min(state.sampling_params.max_tokens or max_model_len, max_model_len - state.num_prompt_tokens)
            kept = min(_until_end(tokens, state.sampling_params), length - before)
            if reasons is None:
                found = np.full(len(tokens), EXACT)
                found[-1] = TARGET
            else:
                found = reasons[i, : len(tokens)]
            if self.traces is not None and self.traces.keeps and kept > 0:
                self._trace(i, state, tokens[:kept], found[:kept])
            counted = np.bincount(found[: max(kept, 0)], minlength=TARGET + 1)
            request.reasons += counted
            self.reasons += counted
        self.reasons[TARGET] += num_alone

    def _count_verified(self, rules: Sequence[RequestRules], drafted: Sequence[int], loose: Sequence[bool]) -> None:
        self._num_drafted = drafted
        relaxations = []
        for request, num, is_loose in zip(rules, drafted, loose, strict=True):
            if is_loose:
                policy = POLICIES[request.policy]
                num_fillers = policy.num_fillers(request.relaxation, num)
                self.verified["filler"] += num_fillers
                self.verified["anchor"] += num - num_fillers
                relaxations.append(request.relaxation if policy.has_relaxation else 0.0)
            else:
                self.verified["strict"] += num
        if relaxations:
            self.relaxation = sum(relaxations) / len(relaxations)

    def _own(self, req_id: str) -> np.ndarray:
        """Which of a request's visual tokens have their features on this rank; none where it has never had a draft."""
        request = self._requests.get(req_id)
        if request is None or self.features is None:
            return np.zeros(0, np.int64)
        return np.flatnonzero(self.features.layout.own(request.positions))

    def _trace(self, row: int, state: CachedRequestState, tokens: list[int], reasons: np.ndarray) -> None:
        assert self.traces is not None
        request = self._request(state)
        drafter = self.runner.drafter
        trace = self.traces.request(
            state.req_id,
            lambda: RequestTrace(
                state.req_id,
                request.rules.policy,
                request.rules.relaxation,
                [described(item) for item in drafter.items_of(state)],
            ),
        )
        if trace.kept is None and (kept := drafter.kept_of(state.req_id)) is not None:
            trace.kept = np.flatnonzero(np.isin(request.positions, kept)).tolist()
        rules = self._rules[row] if len(self._num_drafted) else RequestRules()
        names = [NAMES[reason] for reason in reasons]
        self.traces.add(trace, row, rules, tokens, names)

    def preempt(self, req_id: str) -> None:
        """The request's blocks are gone, and with them what is known of its features."""
        if (request := self._requests.get(req_id)) is not None:
            request.is_known = None

    def release(self, req_id: str) -> None:
        """Forget a request, but for its counts."""
        if (request := self._requests.pop(req_id, None)) is not None:
            self.finished.append((req_id, request.counts()))
            if self.traces is not None:
                self.traces.finish(req_id)
            self._visual = None

    def tokens_by_reason(self) -> dict[str, int]:
        return {name: int(self.reasons[reason]) for name, reason in REASONS.items()}

    def stats(self) -> dict[str, Any]:
        """Tokens by reason, requests' steps by how they were verified, and the stream's relevance."""
        return {
            **{f"tokens_{name}": count for name, count in self.tokens_by_reason().items()},
            **{f"verified_{kind}": count for kind, count in self.verified.items()},
            **self.counts,
            "accepted_lengths": list(self.accepted_lengths),
            "relaxation": self.relaxation,
            "relevance_counts": self.verifier.relevance_counts.tolist(),
            "feature_bytes": 0 if self.features is None else self.features.num_bytes,
        }

    def request_reasons(self) -> dict[str, dict[str, int]]:
        """Tokens by reason of each running request, and of the last finished ones."""
        counts = dict(self.finished)
        counts |= {req_id: request.counts() for req_id, request in self._requests.items()}
        return {req_id: dict(zip(REASONS, row, strict=True)) for req_id, row in counts.items()}


def _ends_chain(is_end: np.ndarray, token: int, rules: RequestRules) -> bool:
    """Whether a drafted token ends its chain; `is_end [vocab_size]`: the model's own end tokens."""
    return token in rules.stop_ids or (rules.ends and token < len(is_end) and bool(is_end[token]))


def _until_end(tokens: list[int], params: SamplingParams) -> int:
    """How many of `tokens` there are up to the first that ends the request."""
    ends = end_ids(params)
    if ends.isdisjoint(tokens):
        return len(tokens)
    return next(i for i, token in enumerate(tokens) if token in ends) + 1
