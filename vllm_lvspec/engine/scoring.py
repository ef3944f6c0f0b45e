"""What the target makes of the tokens of a video while it reads the prompt, for strategies that ask it."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

from vllm_lvspec.device import upload
from vllm_lvspec.draft.pruning import STRATEGIES
from vllm_lvspec.engine.arguments import lvspec_config
from vllm_lvspec.engine.kv_layout import KVLayout, UnknownLayoutError
from vllm_lvspec.engine.proposer import PIXELS, embedded_rows
from vllm_lvspec.engine.verification import Verification
from vllm_lvspec.kernels.attention_mass import MAX_QUERIES, attention_mass, attention_mass_reference

logger = init_logger("vllm.lvspec")

MAX_LAYERS = 8  # of the target's, evenly spread


@dataclass
class _Prompt:
    """`sums [num_visual]` float32 over `num_queries` of the prompt's last tokens, this rank's part."""

    sums: torch.Tensor
    num_queries: int = 0


@dataclass(frozen=True)
class _Queries:
    """Rows of a step's batch that hold a prompt's text behind its videos."""

    req_id: str
    row: int  # of the request in the batch
    begin: int
    end: int
    position: int  # of the first, in the sequence


class PromptScores:
    """Scores of visual tokens by request. `runner` is vLLM's model runner.

    Attention is summed up layer by layer while the target's forward runs: the wrapped layers see the queries, and the
    keys of all that was read before, in other chunks or by other requests, lie in the paged cache. Similarity compares
    the last states with those in the feature cache. `seconds`: of its own work, by the host's clock.
    """

    def __init__(self, runner: Any, verification: Verification):
        self.runner = runner
        self.verification = verification
        self.looks_at = STRATEGIES[lvspec_config(runner.vllm_config).pruning].looks_at
        self.seconds = 0.0
        self._layers: list[str] = []
        self._layout: KVLayout | None = None
        self._prompts: dict[str, _Prompt] = {}
        self._queries: list[_Queries] = []
        self._step: Any = None

    def allocate(self, kv_cache_config: KVCacheConfig) -> None:
        """Look at some of the target's layers from now on, where attention is asked for."""
        if self.looks_at != "attention":
            return
        reason = self._wrap_layers(kv_cache_config)
        if reason is not None:
            self.looks_at = "grid"
            logger.warning("lvspec: pruning=attention: %s; videos are pruned uniformly.", reason)

    def _wrap_layers(self, kv_cache_config: KVCacheConfig) -> str | None:
        """Why it can't be done, or None."""
        config = self.runner.vllm_config
        group = kv_cache_config.kv_cache_groups[0]
        spec = group.kv_cache_spec
        if len(kv_cache_config.kv_cache_groups) > 1 or not isinstance(spec, FullAttentionSpec):
            return "the target's layers have different kinds of KV cache"
        mode = config.compilation_config.cudagraph_mode
        if mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL and self.runner.device.type == "cuda":
            return "prompts are read within full CUDA graphs, where nobody can look on (cudagraph_mode)"
        layers = config.compilation_config.static_forward_context
        names = [name for name in group.layer_names if name in layers]
        chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, MAX_LAYERS).round().astype(int))]
        first = layers[chosen[0]]
        if getattr(first, "query_quant", None) is not None:
            return "queries are quantised"
        if not hasattr(getattr(first, "impl", None), "scale"):
            return f"{type(first).__name__} is no plain attention"
        if getattr(first.impl, "logits_soft_cap", 0):
            return "the target caps its attention"
        try:
            self._layout = KVLayout(first, spec, first.kv_cache)
        except UnknownLayoutError as error:
            return f"its keys can't be read ({error})"
        if self.runner.device.type == "cuda" and not self._layout.is_strided:
            return f"its keys can't be read ({type(first.impl).__name__} packs them)"
        self._layers = chosen
        for name in chosen:
            impl = layers[name].impl
            if not hasattr(impl, "_lvspec_forward"):
                impl._lvspec_forward = impl.forward
            impl.forward = functools.partial(self._attend, impl)
        return None

    def warm_up(self) -> None:
        """Compile the kernels that look at attention, so that no prompt waits for that."""
        if self.looks_at != "attention" or self._layout is None or self.runner.device.type != "cuda":
            return
        config = self.runner.vllm_config
        layer = config.compilation_config.static_forward_context[self._layers[0]]
        heads, size, dtype = layer.num_heads, layer.head_size, config.model_config.dtype
        nothing = torch.zeros(MAX_QUERIES, dtype=torch.int32, device=self.runner.device)
        for num_queries in (1, MAX_QUERIES):  # in tiles of other sizes
            queries = torch.zeros((num_queries, heads, size), dtype=dtype, device=self.runner.device)
            keys = layer.kv_cache[..., :size]
            attention_mass(queries, nothing[:num_queries], keys, nothing[:1], nothing[:1], layer.impl.scale)

    # A step -------------------------------------------------------------------------------------------------------

    def begin_step(self, scheduler_output: Any) -> None:
        """The step whose forward comes next."""
        self._step = scheduler_output

    def must_look(self) -> bool:
        """Whether the step's forward reads prompts whose attention is asked for, which a full graph would not show."""
        if self._step is None or self.looks_at != "attention":
            return False
        states = (self.runner.requests[req_id] for req_id in self.runner.input_batch.req_ids)
        return any(state.num_computed_tokens < state.num_prompt_tokens for state in states)

    def begin_forward(self) -> None:
        """Find the text behind videos that this forward reads."""
        step, self._step, self._queries = self._step, None, []
        if step is None or self.looks_at not in ("attention", "similarity"):
            return
        first = 0
        for row, req_id in enumerate(self.runner.input_batch.req_ids):
            begin, first = first, first + step.num_scheduled_tokens[req_id]
            state = self.runner.requests[req_id]
            computed, length = state.num_computed_tokens, state.num_prompt_tokens
            if computed >= length:
                continue
            visual = self.verification.visual_positions(state)
            if not len(visual):
                continue
            text = max(int(visual[-1]) + 1, length - MAX_QUERIES, computed)
            end = min(length, computed + first - begin)
            if end > text:
                self._queries.append(_Queries(req_id, row, begin + text - computed, begin + end - computed, text))
                prompt = self._prompts.get(req_id)
                if prompt is None or len(prompt.sums) != len(visual):
                    sums = torch.zeros(len(visual), dtype=torch.float32, device=self.runner.device)
                    prompt = self._prompts[req_id] = _Prompt(sums)
                prompt.num_queries += end - text

    def end_forward(self) -> None:
        """No more of this forward's layers will be looked at: the drafter may run them, too."""
        if self.looks_at == "attention":
            self._queries = []

    def _attend(self, impl: Any, layer: Any, query: torch.Tensor, key: Any, value: Any, kv_cache: torch.Tensor,
                *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        result = impl._lvspec_forward(layer, query, key, value, kv_cache, *args, **kwargs)
        if self._queries:
            started = time.perf_counter()
            for queries in self._queries:
                self._add_attention(impl.scale, query, kv_cache, queries)
            self.seconds += time.perf_counter() - started
        return result

    def _add_attention(self, scale: float, query: torch.Tensor, kv_cache: torch.Tensor, queries: _Queries) -> None:
        assert self._layout is not None
        state = self.runner.requests[queries.req_id]
        device = query.device
        (visual,) = upload([self.verification.visual_positions(state).astype(np.int32)], device)
        rows = query[queries.begin : queries.end]
        num_keys = queries.position + len(rows)
        positions = torch.arange(queries.position, num_keys, dtype=torch.int32, device=device)
        table = self.runner.input_batch.block_table[0]
        blocks = table.get_device_tensor(queries.row + 1)[queries.row]
        if device.type == "cuda":
            ratio = table.block_size // self._layout.block_size
            if ratio > 1:  # pages of the kernels' own size
                blocks = (blocks[:, None] * ratio + torch.arange(ratio, dtype=torch.int32, device=device)).flatten()
            keys = kv_cache[..., : query.shape[-1]]
            mass = attention_mass(rows, positions, keys, blocks, visual, scale)
        else:
            places = torch.arange(num_keys)
            slots = blocks[places // table.block_size].long() * table.block_size + places % table.block_size
            keys = self._layout.read_keys(kv_cache, slots)
            mass = attention_mass_reference(rows, positions, keys, visual, scale)
        self._prompts[queries.req_id].sums += mass

    def add_similarity(self) -> None:
        """After the forward, when the states of the step's tokens are known."""
        if self.looks_at != "similarity" or not self._queries:
            return
        started = time.perf_counter()
        for queries in self._queries:
            state = self.runner.requests[queries.req_id]
            sums = self.verification.similarity(state, queries.row, queries.begin, queries.end)
            if sums is None:
                del self._prompts[queries.req_id]
            else:
                self._prompts[queries.req_id].sums += sums
        self._queries = []
        self.seconds += time.perf_counter() - started

    # Asking -------------------------------------------------------------------------------------------------------

    def of(self, req_id: str) -> list[torch.Tensor | None]:
        """Scores of the tokens of each of the request's items, `[num_embeddings]` float32; the same on all ranks."""
        state = self.runner.requests[req_id]
        prompt = self._prompts.get(req_id)
        # Nobody asks for scores of what is heard.
        lengths = [len(embedded_rows(item)) if item.modality in PIXELS else 0 for item in state.mm_features]
        # What a session has added since may have had no text behind it that asks.
        if prompt is None or not prompt.num_queries or len(prompt.sums) != sum(lengths):
            return [None] * len(lengths)
        group = get_tp_group()
        sums = prompt.sums
        if group.world_size > 1:  # in the same order everywhere, so that all ranks prune alike
            sums = group.all_gather(sums[None], dim=0).sum(0)
        scores = (sums / prompt.num_queries).cpu()
        order = np.argsort([item.mm_position.offset for item in state.mm_features], kind="stable")
        parts = torch.split(scores, [lengths[i] for i in order])
        found: list[torch.Tensor | None] = [None] * len(lengths)
        for i, part in zip(order, parts, strict=True):
            found[i] = part
        return found

    def release(self, req_id: str) -> None:
        """Forget a request; unknown ones are fine."""
        self._prompts.pop(req_id, None)
