"""A second vision-language model in the worker, with a private paged KV cache.

It is built from a copy of vLLM's configuration, so its attention layers have a forward context of their own and vLLM
plans no KV cache for them.
"""

from __future__ import annotations

import copy
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_tp_group
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.forward_context import set_forward_context
from vllm.ir import enable_torch_wrap
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models.interfaces import supports_mrope
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.utils.mem_constants import GiB_bytes
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec
from vllm.v1.worker.utils import AttentionGroup, allocate_kv_cache, bind_kv_cache_to_layers, prepare_kernel_block_sizes

from vllm_lvspec.config import AUTO, LVSpecConfig, LVSpecConfigError
from vllm_lvspec.draft.batch import DraftBatch
from vllm_lvspec.draft.drafter import NextTokens
from vllm_lvspec.draft.pages import PagePool
from vllm_lvspec.engine.compatibility import (
    draft_model_config,
    draft_vllm_config,
    indivisible,
    settle_quantization,
    unfit_quantization,
)
from vllm_lvspec.engine.decode_graphs import (
    MOST_TOKENS,
    PLANS_ON_HOST,
    DecodeGraphs,
    forget_graphs,
    has_graphs,
    prepare_for_graphs,
)
from vllm_lvspec.engine.few_rows import give_few_rows
from vllm_lvspec.engine.kv_layout import KVLayout, UnknownLayoutError
from vllm_lvspec.engine.memory import default_cache_bytes, device_memory
from vllm_lvspec.engine.one_token import OneTokenStep, one_token_step, rows_of
from vllm_lvspec.engine.ranks import from_first_rank, group_of_one, instead_of_ranks, least_of_ranks
from vllm_lvspec.engine.rotary import give_text_rotary
from vllm_lvspec.kernels.advance_decode import advance_decode

logger = init_logger("vllm.lvspec")


@dataclass(frozen=True)
class PromptView:
    """What positions follow from: the prompt's tokens and its multimodal features."""

    token_ids: list[int]
    features: list[MultiModalFeatureSpec]


class VLLMDraftModel:
    """The drafter's model in vLLM's clothes; implements `vllm_lvspec.draft.drafter.DraftModel`."""

    copies = False
    model: Any
    graphs: DecodeGraphs | None = None  # of its decode steps
    one_token: OneTokenStep | None = None  # what those of a single text token go through instead of its own layers
    # Of a drafted token behind few and behind many others, by whose layers; None where there is no choice.
    token_seconds: dict[str, list[float]] | None = None
    _wants_graphs = False
    _has_text_rotary = False  # for positions of one dimension
    # Whether the backend's plan of a step is written where that of the one before may not have been copied from.
    _plans_on_host = False
    _planned: torch.cuda.Event | None = None
    # What its forwards run in: kernels of its own, where those that the worker has chosen are for a compiled target;
    # and this rank alone, where each has the whole of it.
    _kernels: Callable[[], AbstractContextManager[None]] = nullcontext
    _ranks: Callable[[], AbstractContextManager[None]] = nullcontext
    _group_of_one: GroupCoordinator

    def __init__(self, vllm_config: VllmConfig, config: LVSpecConfig, device: torch.device):
        settled, fits = settle_quantization(vllm_config.model_config, config), True
        if config.draft_tensor_parallel_size == 1 < get_tp_group().world_size:
            self._group_of_one = group_of_one()  # all ranks make it, whatever becomes of what each loads
        try:
            self._load(vllm_config, settled, device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever vLLM can't do with this model
            if config.draft_quantization != AUTO or settled.draft_quantization is None:
                raise
            fits = False
            method = settled.draft_quantization
            logger.warning("lvspec: draft_quantization='auto': not %s, because %r", method, error.__cause__ or error)
        if not least_of_ranks(int(fits)):
            # What there is of the first model, which hangs together, must make room for the second one.
            self.model = None
            gc.collect()
            self._load(vllm_config, config.model_copy(update={"draft_quantization": None}), device)
        model_config = self.vllm_config.model_config
        give_few_rows(self.model, model_config.dtype, device)
        self.uses_mrope = supports_mrope(self.model) and model_config.uses_mrope
        self._has_text_rotary = self.uses_mrope and give_text_rotary(self.model)
        self._allocate_cache(config)
        bind_kv_cache_to_layers(self.caches, self.vllm_config.compilation_config.static_forward_context)
        self.one_token = one_token_step(self)
        if not least_of_ranks(int(self.one_token is not None)):
            self.one_token = None

    def _load(self, vllm_config: VllmConfig, config: LVSpecConfig, device: torch.device) -> None:
        """Build the model. Raises LVSpecConfigError where it can't be quantised as it is to be."""
        model_config = draft_model_config(vllm_config.model_config, config)
        own = draft_vllm_config(vllm_config, model_config, config)
        self._prepare(own, vllm_config.model_config, config, device)
        if self.is_whole:
            num_ranks = get_tp_group().world_size
            shared = indivisible(model_config, num_ranks)
            why = "as was asked for" if shared is None else f"because {num_ranks} can't share {shared}"
            logger.info_once("lvspec: each rank has the whole drafter, %s.", why)
            self._ranks = functools.partial(instead_of_ranks, self._group_of_one)
        self._wants_graphs = has_graphs(vllm_config, device)
        if self.vllm_config.kernel_config.ir_op_priority != vllm_config.kernel_config.ir_op_priority:
            self._kernels = self._own_kernels
        try:
            with self._ranks():
                self.model = get_model(vllm_config=self.vllm_config)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
            if config.draft_quantization is None:
                raise
            # Whether a device has kernels for it, vLLM finds out when it quantises a layer.
            raise unfit_quantization(config, str(error)) from error
        quantised = getattr(self.vllm_config.quant_config, "quantized_layers", None)  # as they were loaded
        if quantised is not None and not quantised:
            raise LVSpecConfigError(
                f"draft_quantization={config.draft_quantization!r}: the drafter {config.model!r} has no layers under "
                "the name language_model that could be quantised as they are loaded; must be none, or the method of a "
                "checkpoint that is quantised already"
            )

    def _prepare(
        self, vllm_config: VllmConfig, target: ModelConfig, config: LVSpecConfig, device: torch.device
    ) -> None:
        self.device = device
        self.num_speculative_tokens = config.num_speculative_tokens
        self.vllm_config = vllm_config
        model_config = vllm_config.model_config
        self.max_model_len = model_config.max_model_len
        self.max_batch_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.vocab_size = model_config.get_vocab_size()
        self.shared_vocab_size = min(target.get_vocab_size(), self.vocab_size)
        self._pin_memory = device.type == "cuda"
        self.kept_for_others: list[torch.Tensor | None] = []  # what the target's graphs may read

    @contextmanager
    def _own_kernels(self) -> Iterator[None]:
        wrapped = self.vllm_config.compilation_config.ir_enable_torch_wrap
        with self.vllm_config.kernel_config.ir_op_priority.set_priority(), enable_torch_wrap(wrapped):
            yield

    @property
    def num_ranks(self) -> int:
        """Which share it."""
        return self.vllm_config.parallel_config.tensor_parallel_size

    @property
    def is_whole(self) -> bool:
        """On each of several ranks."""
        return self.num_ranks < get_tp_group().world_size

    @property
    def encodes_whole_items(self) -> bool:
        """Each of several ranks, by itself."""
        mode = self.vllm_config.model_config.get_multimodal_config().mm_encoder_tp_mode
        return self.is_whole or (self.num_ranks > 1 and mode == "data")

    @property
    def num_weight_bytes(self) -> int:
        """What its weights take beside the target's."""
        own = 0 if self.one_token is None else self.one_token.num_bytes
        return sum(p.nbytes for p in self.model.parameters()) + own

    # The cache ----------------------------------------------------------------------------------------------------

    @property
    def longest_context(self) -> int:
        """Tokens that a request can have in the cache before its next one."""
        return min(self.max_model_len, self.pool.num_pages * self.pool.page_size) - 1

    def _attention_layers(self) -> dict[str, Any]:
        context = self.vllm_config.compilation_config.static_forward_context
        return {name: layer for name, layer in context.items() if isinstance(layer, AttentionLayerBase)}

    def _allocate_cache(self, config: LVSpecConfig) -> None:
        layers = self._attention_layers()
        specs = {name: layer.get_kv_cache_spec(self.vllm_config) for name, layer in layers.items()}
        specs = {name: spec for name, spec in specs.items() if spec is not None}
        distinct = set(specs.values())
        if len(distinct) != 1 or not isinstance(spec := distinct.pop(), FullAttentionSpec):
            raise LVSpecConfigError(
                f"model={config.model!r}: the drafter's layers have different kinds of KV cache; must be a model whose "
                "layers all use full attention"
            )
        names = list(specs)
        backend = layers[names[0]].get_attn_backend()
        cache_config = self.vllm_config.cache_config
        layouts = [layout.name for layout in get_supported_kv_cache_layouts([backend])]
        resolve_kv_cache_layout(self.vllm_config, [layouts], [spec])
        num_bytes = self._cache_bytes(config, spec, len(names))
        kv_config = get_kv_cache_config_from_groups(self.vllm_config, [KVCacheGroupSpec(names, spec)], num_bytes)
        self.group = AttentionGroup(backend=backend, layer_names=names, kv_cache_spec=spec, kv_cache_group_id=0)
        kernel_sizes = prepare_kernel_block_sizes(kv_config, [[self.group]])
        self._wants_graphs = self._wants_graphs and prepare_for_graphs(self.vllm_config, backend, spec)
        self._plans_on_host = self.device.type == "cuda" and backend.get_name() in PLANS_ON_HOST
        self.group.create_metadata_builders(self.vllm_config, self.device, kernel_block_size=kernel_sizes[0])
        layout = cache_config.get_resolved_kv_cache_layout()
        self.caches = allocate_kv_cache(kv_config, self.device, layout, kernel_sizes)
        # Kernel blocks are the pages: block tables and slots then need no translation.
        pages_per_block = spec.block_size // kernel_sizes[0]
        self.pool = PagePool(kv_config.num_blocks * pages_per_block, kernel_sizes[0])
        self.cache_bytes = kv_config.kv_cache_tensors[0].size  # of the one allocation that all share

    def _cache_bytes(self, config: LVSpecConfig, spec: FullAttentionSpec, num_layers: int) -> int:
        """Size of the cache, the same on all ranks: whether a request fits must be decided alike everywhere."""
        bytes_per_block = spec.page_size_bytes * num_layers
        if config.draft_cache_gib is not None:
            wanted = int(config.draft_cache_gib * GiB_bytes)
            if wanted < bytes_per_block:
                raise LVSpecConfigError(
                    f"draft_cache_gib={config.draft_cache_gib}: one page of {spec.block_size} tokens needs "
                    f"{bytes_per_block / GiB_bytes:.3g} GiB; must be at least that"
                )
            return wanted
        num_requests = self.vllm_config.scheduler_config.max_num_seqs
        blocks_per_request = -(-self.max_model_len // spec.block_size)
        memory, _ = device_memory(get_tp_group().world_size)
        return least_of_ranks(default_cache_bytes(num_requests * blocks_per_request, bytes_per_block, memory))

    # What the drafter asks for ------------------------------------------------------------------------------------

    def prompt_positions(self, prompt: PromptView, num_prompt_tokens: int) -> tuple[torch.Tensor, int]:
        if not self.uses_mrope:
            return torch.arange(num_prompt_tokens).unsqueeze(0), 0
        positions, delta = self.model.get_mrope_input_positions(prompt.token_ids, prompt.features)
        return positions, int(delta)

    def encode(self, payload: MultiModalFeatureSpec) -> torch.Tensor:
        item = (payload.modality, payload.data)
        ((_, _, kwargs),) = group_and_batch_mm_kwargs([item], device=self.device, pin_memory=self._pin_memory)
        return self.encode_inputs(kwargs)

    def encode_inputs(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Visual embeddings `[num_embeddings, width]` of the one item of which these are the model's arguments."""
        with self._kernels(), self._ranks():
            (embeddings,) = self.model.embed_multimodal(**inputs)
        # vLLM's LLaVA-OneVision may give a video a leading dimension of one.
        return embeddings.flatten(0, -2)

    def forward(self, batch: DraftBatch, with_probs: bool = False) -> NextTokens:
        token_ids, probs = self._choose(batch, with_probs)
        # What is drafted, and how far, must be the same on all ranks, to the last bit. Ranks that share logits choose
        # alike, but not those of which each has its own.
        if self.is_whole:
            token_ids = from_first_rank(token_ids)
        return NextTokens(token_ids, None if probs is None else from_first_rank(probs))

    def _choose(self, batch: DraftBatch, with_probs: bool) -> NextTokens:
        """The next tokens by what this rank has computed."""
        found = None if self.graphs is None else self.graphs.run(batch)
        if found is None:
            found = self.run_far(batch, None if self.takes_own_layers(batch) else self.metadata(batch))
        if isinstance(found, NextTokens):  # which the next ones may overwrite
            assert found.probs is not None
            return NextTokens(found.token_ids.clone(), found.probs.clone() if with_probs else None)
        hidden = found
        if batch.max_query_len > 1 and not batch.asks_all:
            hidden = hidden[(batch.query_starts[1:] - 1).long()]
        if self._split_head is not None and not with_probs:
            logits_processor, head = self._split_head
            return NextTokens(logits_processor.get_top_tokens(head, hidden), None)
        with self._ranks():
            logits = self.model.compute_logits(hidden)[:, : self.shared_vocab_size]
        best, token_ids = logits.max(dim=-1)
        if not with_probs:
            return NextTokens(token_ids, None)
        return NextTokens(token_ids, (best.float() - logits.float().logsumexp(dim=-1)).exp())

    @functools.cached_property
    def _split_head(self) -> tuple[LogitsProcessor, VocabParallelEmbedding] | None:
        """What makes logits, where ranks share the vocabulary: each then tells the others its best token, and not its
        logits of all tokens. None where there is but one rank, or where the target does not know all tokens."""
        if self.num_ranks == 1 or self.shared_vocab_size < self.vocab_size:
            return None
        language_model = self.model.get_language_model()
        logits_processor = getattr(language_model, "logits_processor", None)
        head = getattr(language_model, "lm_head", None)
        if not isinstance(logits_processor, LogitsProcessor) or not isinstance(head, VocabParallelEmbedding):
            return None
        return logits_processor, head

    def metadata(self, batch: DraftBatch, is_recorded: bool = False) -> Any:
        """The attention backend's, for `batch`; `is_recorded`: to be read by a CUDA graph whenever it is replayed."""
        common = CommonAttentionMetadata(
            query_start_loc=batch.query_starts,
            query_start_loc_cpu=batch.query_starts_cpu,
            seq_lens=batch.seq_lens,
            num_reqs=len(batch.seq_lens),
            num_actual_tokens=len(batch.token_ids),
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
            block_table_tensor=batch.block_table,
            slot_mapping=batch.slots,
            seq_lens_cpu_upper_bound=batch.seq_lens_cpu,
        )
        builder = self.group.get_metadata_builder()
        if is_recorded:
            return builder.build_for_cudagraph_capture(common)
        if self._planned is not None:
            self._planned.synchronize()
        metadata = builder.build(0, common)
        if self._plans_on_host:
            self._planned = torch.cuda.Event()
            self._planned.record()
        return metadata

    @contextmanager
    def forward_context(self, batch: DraftBatch, metadata: Any) -> Iterator[None]:
        """What the model's layers run in."""
        names = self.group.layer_names
        context = set_forward_context(
            dict.fromkeys(names, metadata),
            self.vllm_config,
            num_tokens=len(batch.token_ids),
            slot_mapping=dict.fromkeys(names, batch.slots),
        )
        with context, self._kernels(), self._ranks():
            yield

    def takes_one_position(self, batch: DraftBatch) -> bool:
        """Of each token, whatever dimensions positions have."""
        return not self.uses_mrope or (self._has_text_rotary and batch.is_text)

    def takes_own_layers(self, batch: DraftBatch) -> bool:
        """Whether the batch is a token that goes through this package's layers, which read no `metadata`."""
        is_text = not batch.visual and (batch.is_text or not self.uses_mrope)
        return self.one_token is not None and is_text and len(batch.token_ids) == 1

    def run(self, batch: DraftBatch, metadata: Any) -> torch.Tensor:
        """Hidden states `[num_tokens, hidden_size]` of the last layer; keys and values go into the cache."""
        with self.forward_context(batch, metadata):
            embeds = self._embed(batch)
            if self.takes_own_layers(batch):
                assert self.one_token is not None
                return self.one_token(embeds, rows_of(batch))
            positions = batch.positions[0] if self.takes_one_position(batch) else batch.positions
            found = self.model(input_ids=None, positions=positions, inputs_embeds=embeds)
        # The target as its own drafter also gives the states of the layer that verification compares, if one is asked.
        return found[0] if isinstance(found, tuple) else found

    def run_far(self, batch: DraftBatch, metadata: Any) -> torch.Tensor | NextTokens:
        """As far as this package's kernels go: to the next token where they choose it, else as `run`."""
        if self.one_token is None or self.one_token.head is None or not self.takes_own_layers(batch):
            return self.run(batch, metadata)
        with self.forward_context(batch, metadata):
            return self.one_token.next_token(self._embed(batch), rows_of(batch))

    def _embed(self, batch: DraftBatch) -> torch.Tensor:
        return self.model.embed_input_ids(
            # A prompt may hold ids that only the target's padded vocabulary has.
            batch.token_ids.clamp(max=self.vocab_size - 1),
            multimodal_embeddings=batch.visual or None,
            is_multimodal=batch.visual_mask,  # on the host, as vLLM's models are given it
        )

    @property
    def tokens_at_once(self) -> int:
        return 1 if self.graphs is None else self.graphs.most_tokens

    def chain_tokens(self, num_requests: int, num_tokens: int) -> int | None:
        return num_tokens if self.graphs is None else self.graphs.chain_tokens(num_requests, num_tokens)

    def record_graphs(self) -> None:
        """Have decode steps launched as CUDA graphs from now on, where that can be, on all ranks alike."""
        if not self._wants_graphs:
            return
        self._choose_layers()
        # Not all that can record one token of each request can record two, or more.
        for most_tokens, whole_chains in ((MOST_TOKENS, True), (MOST_TOKENS, False), (1, False)):
            graphs = DecodeGraphs(self, most_tokens=most_tokens, whole_chains=whole_chains)
            if graphs.most_tokens < most_tokens or graphs.whole_chains < whole_chains:
                continue  # and will be tried as what it is
            if graphs.record(lambda fine: bool(least_of_ranks(int(fine)))):
                self.graphs = graphs
                logger.info_once("lvspec: the drafter's steps of up to %d requests are CUDA graphs.", graphs.sizes[-1])
                return
        forget_graphs(self.vllm_config)
        self._wants_graphs = False  # and layers are chosen anew
        self.group.create_metadata_builders(self.vllm_config, self.device, kernel_block_size=self.pool.page_size)

    @torch.inference_mode()
    def _choose_layers(self) -> None:
        """This package's for single tokens, where these are decoded faster so than by vLLM's, behind few tokens and
        behind many."""
        if self.one_token is None:
            return
        step, taken = self.one_token, {}
        contexts = [min(context, self.longest_context) for context in (1024, 16384)]
        for whose, self.one_token in (("vLLM", None), ("lvspec", step)):
            if self._wants_graphs:
                graphs = DecodeGraphs(self, sizes=(1,), most_tokens=1, whole_chains=False)
                self.graphs = graphs if graphs.record() else None
            taken[whose] = [
                min(self.decode_seconds(1, context, with_probs=False) for _ in range(5)) for context in contexts
            ]
        self.graphs = None
        self.token_seconds = taken
        logger.info_once(
            "lvspec: a drafted token behind %d and behind %d others takes %.2f and %.2f ms by vLLM's layers, %.2f and "
            "%.2f by lvspec's.",
            *contexts,
            *(1e3 * seconds for each in taken.values() for seconds in each),
        )
        is_faster = all(mine < theirs for mine, theirs in zip(taken["lvspec"], taken["vLLM"], strict=True))
        if not least_of_ranks(int(is_faster)):
            self.one_token = None

    def warm_up(self) -> None:
        """Compile what only requests run."""
        if not self._wants_graphs:
            self._choose_layers()

    def of_first_rank(self, values: torch.Tensor) -> torch.Tensor:
        return get_tp_group().broadcast_object(values, src=0)

    def copy(self, target_slots: torch.Tensor, slots: torch.Tensor) -> None:
        raise NotImplementedError("another model's keys and values mean nothing to this one")

    def decode_seconds(self, num_rows: int, context: int, tokens: int = 1, *, with_probs: bool) -> float:
        """What a forward over so many requests' next `tokens` takes, each with `context` tokens in the cache."""
        batch = self.decode_batch(num_rows, context, tokens)
        batch.asks_all = True
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        self.forward(batch, with_probs).token_ids.tolist()
        return time.perf_counter() - started

    def decode_batch(self, num_rows: int, context: int, tokens: int = 1) -> DraftBatch:
        """`num_rows` requests of `context` tokens with `tokens` more: a batch to measure with, of no meaning, as what
        is in the cache then has none."""
        self.pool.forget_keys()
        places = torch.arange(context, context + tokens)
        pages = -(-(context + tokens) // self.pool.page_size)
        # Pages of each one's own, as far as there are: those that all read would come from the device's caches.
        table = torch.arange(num_rows * pages, dtype=torch.int32).view(num_rows, pages) % self.pool.num_pages
        slots = table[:, places // self.pool.page_size].long() * self.pool.page_size + places % self.pool.page_size
        starts = torch.arange(num_rows + 1, dtype=torch.int32) * tokens
        lens = torch.full((num_rows,), context + tokens, dtype=torch.int32)
        return DraftBatch(
            token_ids=torch.zeros(num_rows * tokens, dtype=torch.int64, device=self.device),
            positions=places.repeat(3, num_rows).to(self.device),
            slots=slots.flatten().to(self.device),
            query_starts=starts.to(self.device),
            query_starts_cpu=starts,
            seq_lens=lens.to(self.device),
            seq_lens_cpu=lens,
            block_table=table.to(self.device),
            max_query_len=tokens,
            max_seq_len=context + tokens,
            is_text=True,
        )

    def profile(self) -> None:
        """Run the largest forward once, so that vLLM's memory profile has seen the drafter's activations."""
        pages_per_row = -(-min(self.max_model_len, self.max_batch_tokens) // self.pool.page_size)
        row_tokens = min(self.max_model_len, self.max_batch_tokens, self.pool.num_pages * self.pool.page_size)
        rows = min(max(1, self.max_batch_tokens // row_tokens), self.vllm_config.scheduler_config.max_num_seqs)
        num_tokens = rows * row_tokens
        # All rows write the same pages: what they hold means nothing yet.
        table = torch.arange(pages_per_row, dtype=torch.int32, device=self.device).clamp(max=self.pool.num_pages - 1)
        places = torch.arange(row_tokens, device=self.device).repeat(rows)
        starts = torch.arange(rows + 1, dtype=torch.int32) * row_tokens
        lens = torch.full((rows,), row_tokens, dtype=torch.int32)
        batch = DraftBatch(
            token_ids=torch.zeros(num_tokens, dtype=torch.int64, device=self.device),
            positions=places.repeat(3, 1),
            slots=places,
            query_starts=starts.to(self.device),
            query_starts_cpu=starts,
            seq_lens=lens.to(self.device),
            seq_lens_cpu=lens,
            block_table=table.repeat(rows, 1),
            max_query_len=row_tokens,
            max_seq_len=row_tokens,
        )
        self.forward(batch)
        # Compiles the kernel here and not under the first request; the last entry's page is at hand.
        last, slots = batch.seq_lens - 1, torch.zeros_like(batch.seq_lens, dtype=torch.int64)
        advance_decode(batch.positions[:, :rows].contiguous(), last, slots, batch.block_table, self.pool.page_size)


class SelfDraftModel(VLLMDraftModel):
    """The target as its own drafter: its weights, and a KV cache of its own over the pruned video.

    `copies`: keys and values of what it sees are copied from the target's pages (Sparse-to-Dense, arXiv 2505.19155),
    which have read the whole video; else they are computed again from the kept tokens.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: LVSpecConfig,
        device: torch.device,
        target: Any,
        encoder_cache: Mapping[str, torch.Tensor],
    ):
        # The target's layers, but a KV cache configuration that vLLM does not see.
        own = copy.copy(vllm_config)
        own.cache_config = copy.copy(vllm_config.cache_config)
        own.cache_config.kv_cache_layout = own.cache_config.num_gpu_blocks_override = None
        self._prepare(own, vllm_config.model_config, config, device)
        self.model = target
        self.uses_mrope = supports_mrope(target) and vllm_config.model_config.uses_mrope
        self._encoder_cache = encoder_cache
        self._allocate_cache(config)
        self._layers = {name: layer for name, layer in self._attention_layers().items() if name in self.caches}
        if config.self_cache == "copy":
            name, cache = next(iter(self.caches.items()))
            try:
                self.layout = KVLayout(self._layers[name], self.group.kv_cache_spec, cache)
                self.copies = True
            except UnknownLayoutError as error:
                logger.warning_once("lvspec: self_cache=copy: %s; what is kept is computed again.", str(error))

    @property
    def num_weight_bytes(self) -> int:
        return 0

    def encode(self, payload: MultiModalFeatureSpec) -> torch.Tensor:
        # The target has just encoded it, unless a prefix hit has spared it that.
        known = self._encoder_cache.get(payload.identifier)
        return super().encode(payload) if known is None else known.flatten(0, -2).clone()

    def forward(self, batch: DraftBatch, with_probs: bool = False) -> NextTokens:
        target_caches = {name: layer.kv_cache for name, layer in self._layers.items()}
        try:
            for name, layer in self._layers.items():
                layer.bind_kv_cache(self.caches[name])
            return super().forward(batch, with_probs)
        finally:
            for name, cache in target_caches.items():
                self._layers[name].kv_cache = cache

    def warm_up(self) -> None:
        if self.copies and self.device.type == "cuda":
            nowhere = torch.full((1,), -1, dtype=torch.int64, device=self.device)
            self.copy(nowhere, nowhere)

    def copy(self, target_slots: torch.Tensor, slots: torch.Tensor) -> None:
        sources = [layer.kv_cache for layer in self._layers.values()]
        destinations = [self.caches[name] for name in self._layers]
        self.layout.copy(sources, destinations, target_slots, slots)
