"""The drafter's decode steps as CUDA graphs: one launch for what would be hundreds.

A drafter of 7B reads its weights in a few milliseconds, in which the host can hardly launch the kernels of a forward
one by one; smaller ones wait for the host most of the time. vLLM's own graphs are the target's: they belong to its
configuration and its batches. These are the drafter's, over batches in which every request has one token, or two: of
a draft that was accepted to its end, the last token has not been read when the target's comes behind it. For the few
requests whose last drafts are tried again there are graphs of a whole draft's tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed.parallel_state import get_tp_group, graph_capture
from vllm.logger import init_logger
from vllm.model_executor.offloader.base import get_offloader
from vllm.platforms import current_platform
from vllm.utils.gc_utils import freeze_gc_for_cudagraph_capture
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.worker.workspace import (
    current_workspace_manager,
    is_workspace_manager_initialized,
    lock_workspace,
    unlock_workspace,
)

from vllm_lvspec.draft.batch import DraftBatch
from vllm_lvspec.draft.drafter import NextTokens
from vllm_lvspec.draft.leftover import MOST_RECALLING
from vllm_lvspec.draft.pages import NO_SLOT

if TYPE_CHECKING:
    from vllm_lvspec.engine.draft_model import VLLMDraftModel

logger = init_logger("vllm.lvspec")

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # requests; of more a forward is long enough to be launched in time
MOST_TOKENS = 2  # of each request
MOST_CHAIN_TOKENS = 16  # likewise, where drafts are tried again
PLANS_ON_HOST = ("FLASHINFER",)  # backends whose plan of a step would overwrite that of one still running
_NUM_WARM_UP = 2
_TOLERANCE = 0.05  # of the norm: kernels may sum in another order

Replay = tuple[Callable[[], Any], torch.Tensor | NextTokens]
Shape = tuple[int, int]  # requests, tokens of each


def has_graphs(target: VllmConfig, device: torch.device) -> bool:
    """Whether the target runs under CUDA graphs, so that its drafter should, too."""
    return device.type == "cuda" and target.compilation_config.cudagraph_mode != CUDAGraphMode.NONE


def prepare_for_graphs(draft: VllmConfig, backend: type[AttentionBackend], spec: KVCacheSpec) -> bool:
    """Have the drafter's attention `backend` keep what graphs read in buffers of its own; whether it can.

    To be called before metadata builders are made. `draft` has been checked by vLLM without graphs, because it would
    ask for a compiled model where it is told of them.
    """
    support = backend.get_builder_cls().get_cudagraph_support(draft, spec)
    single = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    if support.value < single.value or backend.get_name() in PLANS_ON_HOST:
        return False
    draft.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    sizes = sorted({tokens * size for size in SIZES for tokens in range(1, MOST_TOKENS + 1)})
    draft.compilation_config.cudagraph_capture_sizes = sizes
    draft.compilation_config.max_cudagraph_capture_size = sizes[-1]
    return True


def forget_graphs(draft: VllmConfig) -> None:
    """Take `prepare_for_graphs` back; metadata builders are to be made anew."""
    draft.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    draft.compilation_config.cudagraph_capture_sizes = []
    draft.compilation_config.max_cudagraph_capture_size = 0


@contextmanager
def unlocked_workspace() -> Iterator[list[torch.Tensor | None]]:
    """vLLM locks what kernels share once it has recorded its own graphs; some, like Marlin's, want a part for each
    stream, and the one on which these are recorded is new.

    Gives the buffers that graphs recorded before read: should a larger one take their place, they must be kept.
    """
    if not is_workspace_manager_initialized() or not current_workspace_manager().is_locked():
        yield []
        return
    shared = list(current_workspace_manager()._current_workspaces)
    unlock_workspace()
    try:
        yield shared
    finally:
        lock_workspace()


class DecodeGraphs:
    """Graphs of a drafter's forward, as far as its `run_far` goes, by number of requests and tokens of each.

    Those of as many tokens read one set of inputs, into which a batch is copied; requests behind it are padding, which
    is written nowhere. `most_tokens`: of each request; `whole_chains`: of a few requests as many as drafts have, too.
    """

    def __init__(
        self,
        model: VLLMDraftModel,
        sizes: Sequence[int] = SIZES,
        most_tokens: int = MOST_TOKENS,
        whole_chains: bool = True,
    ):
        most = model.vllm_config.scheduler_config.max_num_seqs
        self.sizes = sorted({min(size, most) for size in sizes})
        takes_several = _takes_several(model)
        self.most_tokens = most_tokens if takes_several else 1
        self._sizes = dict.fromkeys(range(1, self.most_tokens + 1), self.sizes)  # by tokens of each request
        chain = min(model.num_speculative_tokens, MOST_CHAIN_TOKENS, model.max_model_len // 2)
        self.whole_chains = whole_chains and takes_several and chain > self.most_tokens
        if self.whole_chains:
            self._sizes[chain] = sorted({min(size, most) for size in range(1, MOST_RECALLING + 1)})
        self._model = model
        self._graphs: dict[Shape, Replay] = {}
        self._different: list[Shape] = []  # of those, which compute something else
        self._pool: Any = None  # of memory, which all share: the largest comes first, and no two run at once
        inputs: dict[Shape, DraftBatch] = {}
        for tokens, sizes in self._sizes.items():
            largest = self._padding(sizes[-1], tokens)
            inputs |= {(size, tokens): _first_requests(largest, size, tokens) for size in sizes}
        self._inputs = dict(sorted(inputs.items(), key=lambda item: (-item[0][0] * item[0][1], item[0])))

    def _padding(self, num_requests: int, tokens: int) -> DraftBatch:
        """A batch of requests with so many tokens each, with room for the longest."""
        model = self._model
        batch = model.decode_batch(num_requests, 0, tokens)
        pages = -(-model.max_model_len // model.pool.page_size)
        table = torch.zeros((num_requests, pages), dtype=torch.int32, device=model.device)
        slots = torch.full_like(batch.slots, NO_SLOT)
        return replace(batch, block_table=table, slots=slots, max_seq_len=model.max_model_len)

    @torch.inference_mode()
    def record(self, agreed: Callable[[bool], bool] = bool) -> bool:
        """Record all sizes and try them; whether they do what the model does, by `agreed` on all ranks.

        Where none can go on, all stop at the next of three places; they must not wait for each other in between. Raises
        RuntimeError on all ranks where only some can.
        """
        with self._recording():
            for step in (self._warm_up, self._record):
                if not self._all_or_none(self._succeeds(step), agreed):
                    return False
        return agreed(self._succeeds(self._try) and not self._differing())

    def _all_or_none(self, fine: bool, agreed: Callable[[bool], bool]) -> bool:
        if agreed(fine):
            return True
        if self._model.is_whole:  # on each rank, so that these have nothing recorded with each other
            return False
        if agreed(not fine):
            return False
        # Ranks would tell each other where the sums are that they have recorded, and not all have recorded the same.
        communicator = getattr(get_tp_group().device_communicator, "ca_comm", None)
        if communicator is not None:
            communicator.disabled = True
        raise RuntimeError(
            "lvspec: some ranks could record the drafter's CUDA graphs and others could not, which say why; the same "
            "on all ranks, or --enforce-eager, would be right"
        )

    def _succeeds(self, step: Callable[[Shape], Any]) -> bool:
        """With every shape, the largest first: what it leaves of the pool the others take."""
        try:
            for shape in self._inputs:
                step(shape)
        except Exception as error:  # whatever a model or a backend can't do in a graph: drafts need none
            logger.warning("lvspec: the drafter's steps can't be recorded as CUDA graphs: %r", error)
            return False
        return True

    def _try(self, shape: Shape) -> None:
        if not self._does_the_same(*shape):
            self._different.append(shape)

    def _differing(self) -> bool:
        if self._different:
            logger.warning(
                "lvspec: the drafter's CUDA graphs of %s tokens compute something else.",
                ", ".join(f"{size} x {tokens}" for size, tokens in self._different),
            )
        return bool(self._different)

    def _warm_up(self, shape: Shape) -> None:
        """Compile and choose kernels; then again, where waiting for the device, which no graph can, is an error."""
        inputs = self._inputs[shape]
        # Made right before they are used: backends keep but one plan in the buffers that graphs read.
        metadata = self._model.metadata(inputs, is_recorded=True)
        for _ in range(_NUM_WARM_UP):
            self._model.run_far(inputs, metadata)
        with self._without_waiting():
            self._model.run_far(inputs, metadata)

    def _record(self, shape: Shape) -> None:
        inputs = self._inputs[shape]
        self._graphs[shape] = self._replay(inputs, self._model.metadata(inputs, is_recorded=True))

    @contextmanager
    def _recording(self) -> Iterator[None]:
        self._pool = current_platform.graph_pool_handle()
        device = self._model.device
        with freeze_gc_for_cudagraph_capture(), unlocked_workspace() as shared, graph_capture(device=device):
            self._model.kept_for_others += shared
            yield

    @contextmanager
    def _without_waiting(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def _replay(self, batch: DraftBatch, metadata: Any) -> Replay:
        """What launches a forward over `batch` anew, and where it leaves what comes of it."""
        graph = torch.cuda.CUDAGraph()
        with capture_pool(self._pool, self._model.vllm_config) as pool:
            get_offloader().sync_prev_onload()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                found = self._model.run_far(batch, metadata)
                get_offloader().join_after_forward()
        return graph.replay, found

    def _does_the_same(self, size: int, tokens: int) -> bool:
        """Over a full batch and, where there can be padding, over one with a request less."""
        model, same = self._model, True
        for num_requests in sorted({size, max(1, size - 1)}):
            batch = self._trial(num_requests, tokens)
            wanted = model.run_far(batch, model.metadata(batch))
            found = self.run(batch)
            if isinstance(wanted, NextTokens):
                assert isinstance(found, NextTokens) and found.probs is not None and wanted.probs is not None
                # Programs sum in the same order. No number is another one than itself.
                same &= torch.equal(found.token_ids, wanted.token_ids) and torch.equal(found.probs, wanted.probs)
            else:
                assert isinstance(found, torch.Tensor)
                # No number is within it, either. All are compared: ranks run the same forwards.
                same &= bool((found.float() - wanted.float()).norm() <= _TOLERANCE * wanted.float().norm())
        return same

    def _trial(self, num_requests: int, tokens: int) -> DraftBatch:
        """Of requests that differ in tokens, length and, while there are some, in pages."""
        model = self._model
        size, device = model.pool.page_size, model.device
        longest = min(2 * size + 3, model.max_model_len - tokens)
        context = np.maximum(longest - np.arange(num_requests) % size, 1)
        pages = (longest + tokens - 1) // size + 1
        table = torch.arange(num_requests * pages, dtype=torch.int32).view(num_requests, pages) % model.pool.num_pages
        places = context[:, None] + np.arange(tokens)
        slots = table.numpy()[np.arange(num_requests)[:, None], places // size].astype(np.int64) * size + places % size
        batch = model.decode_batch(num_requests, longest, tokens)
        lens = torch.from_numpy(context + tokens).int()
        return replace(
            batch,
            token_ids=torch.arange(num_requests * tokens, dtype=torch.int64, device=device) % model.vocab_size,
            positions=torch.from_numpy(places.flatten()).repeat(len(batch.positions), 1).to(device),
            slots=torch.from_numpy(slots.flatten()).to(device),
            seq_lens=lens.to(device),
            seq_lens_cpu=lens,
            block_table=table.to(device),
        )

    def chain_tokens(self, num_requests: int, num_tokens: int) -> int | None:
        """Tokens of each request of the smallest graph for so many, into which `num_tokens` of each go; or, where none
        is large enough, of the largest."""
        found = [tokens for tokens, sizes in self._sizes.items() if tokens > 1 and num_requests <= sizes[-1]]
        fits = [tokens for tokens in found if tokens >= num_tokens]
        return min(fits) if fits else max(found, default=None)

    def run(self, batch: DraftBatch) -> torch.Tensor | NextTokens | None:
        """The batch's last hidden states `[num_tokens, hidden_size]`, or next tokens, to be read before the next ones
        are asked for.

        None for batches that no graph is for: of too many requests, of different or too many tokens, or no text. A
        batch of single tokens is the graph's inputs from then on.
        """
        num_requests, num_tokens, tokens = len(batch.seq_lens), len(batch.token_ids), batch.max_query_len
        sizes = self._sizes.get(tokens)
        if sizes is None or num_requests > sizes[-1] or num_tokens != tokens * num_requests:
            return None
        if batch.visual or (self._model.uses_mrope and not batch.is_text):
            return None
        size = sizes[bisect_left(sizes, num_requests)]
        inputs = self._inputs[size, tokens]
        self._take_in(batch, inputs)
        if size > num_requests:
            inputs.slots[num_tokens:].fill_(NO_SLOT)
            inputs.seq_lens[num_requests:].fill_(tokens)
            inputs.seq_lens_cpu[num_requests:].fill_(tokens)
        if not self._model.takes_own_layers(inputs):
            # Backends that plan a step do so here, into the buffers that the graph reads.
            self._model.metadata(replace(inputs, max_seq_len=batch.max_seq_len))
        get_offloader().sync_prev_onload()
        replay, found = self._graphs[size, tokens]
        replay()
        return found if isinstance(found, NextTokens) else found[:num_tokens]

    def _take_in(self, batch: DraftBatch, inputs: DraftBatch) -> None:
        """Put the batch into `inputs`, where one of single tokens stays: whoever moves that on moves `inputs` on, and
        has but the tokens to be copied for the next forward."""
        there = _first_requests(inputs, len(batch.seq_lens), batch.max_query_len)
        there.token_ids.copy_(batch.token_ids)
        there.seq_lens_cpu.copy_(batch.seq_lens_cpu)
        for name in ("positions", "slots", "seq_lens", "block_table"):
            to, values = getattr(there, name), getattr(batch, name)
            if to.data_ptr() == values.data_ptr():
                continue
            to = to[:, : values.shape[1]] if name == "block_table" else to
            to.copy_(values)
        if batch.max_query_len == 1:
            batch.positions, batch.slots = there.positions, there.slots
            batch.seq_lens, batch.block_table = there.seq_lens, there.block_table


def _takes_several(model: VLLMDraftModel) -> bool:
    """Whether graphs of the model's attention may have several tokens of each request."""
    support = model.group.backend.get_builder_cls().get_cudagraph_support(model.vllm_config, model.group.kv_cache_spec)
    return support.value >= AttentionCGSupport.UNIFORM_BATCH.value


def _first_requests(batch: DraftBatch, num_requests: int, tokens: int) -> DraftBatch:
    num_tokens = num_requests * tokens
    return replace(
        batch,
        token_ids=batch.token_ids[:num_tokens],
        positions=batch.positions[:, :num_tokens],
        slots=batch.slots[:num_tokens],
        query_starts=batch.query_starts[: num_requests + 1],
        query_starts_cpu=batch.query_starts_cpu[: num_requests + 1],
        seq_lens=batch.seq_lens[:num_requests],
        seq_lens_cpu=batch.seq_lens_cpu[:num_requests],
        block_table=batch.block_table[:num_requests],
    )
