"""The drafter's decode steps as CUDA graphs: one launch for what would be hundreds.

A drafter of 7B reads its weights in a few milliseconds, in which the host can hardly launch the kernels of a forward
one by one; smaller ones wait for the host most of the time. vLLM's own graphs are the target's: they belong to its
configuration and its batches. These are the drafter's, over batches in which every request has one token.
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
from vllm.distributed.parallel_state import graph_capture
from vllm.logger import init_logger
from vllm.model_executor.offloader.base import get_offloader
from vllm.platforms import current_platform
from vllm.utils.gc_utils import freeze_gc_for_cudagraph_capture
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_lvspec.draft.drafter import DraftBatch

if TYPE_CHECKING:
    from vllm_lvspec.engine.draft_model import VLLMDraftModel

logger = init_logger("vllm.lvspec")

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # rows; of more requests a forward is long enough to be launched in time
PLANS_ON_HOST = ("FLASHINFER",)  # backends whose plan of a step would overwrite that of one still running
_NUM_WARM_UP = 2
_PADDING_SLOT = -1  # vLLM writes nothing there
_TOLERANCE = 0.05  # of the norm: kernels may sum in another order

Replay = tuple[Callable[[], Any], torch.Tensor]


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
    draft.compilation_config.cudagraph_capture_sizes = list(SIZES)
    draft.compilation_config.max_cudagraph_capture_size = SIZES[-1]
    return True


def forget_graphs(draft: VllmConfig) -> None:
    """Take `prepare_for_graphs` back; metadata builders are to be made anew."""
    draft.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    draft.compilation_config.cudagraph_capture_sizes = []
    draft.compilation_config.max_cudagraph_capture_size = 0


class DecodeGraphs:
    """Graphs of a drafter's forward, up to its last hidden states, by number of rows.

    All read one set of inputs, into which a batch is copied; rows behind it are padding, which is written nowhere.
    """

    def __init__(self, model: VLLMDraftModel, sizes: Sequence[int] = SIZES):
        most = model.vllm_config.scheduler_config.max_num_seqs
        self.sizes = sorted({min(size, most) for size in sizes})
        self._model = model
        self._graphs: dict[int, Replay] = {}
        self._pool: Any = None  # of memory, which all share: the largest comes first, and no two run at once
        inputs = self._padding(self.sizes[-1])
        self._inputs = {size: _first_rows(inputs, size) for size in self.sizes}

    def _padding(self, num_rows: int) -> DraftBatch:
        """A batch of one-token requests, with room for the longest."""
        model = self._model
        batch = model.decode_batch(num_rows, 0)
        pages = -(-model.max_model_len // model.pool.page_size)
        table = torch.zeros((num_rows, pages), dtype=torch.int32, device=model.device)
        slots = torch.full_like(batch.slots, _PADDING_SLOT)
        return replace(batch, block_table=table, slots=slots, max_seq_len=model.max_model_len)

    @torch.inference_mode()
    def record(self, agreed: Callable[[bool], bool] = bool) -> bool:
        """Record all sizes and try them; whether they do what the model does, by `agreed` on all ranks.

        Where one rank can't go on, all stop at the next of three places; they must not wait for each other in between.
        """
        with self._recording():
            if not agreed(self._succeeds(self._warm_up)) or not agreed(self._succeeds(self._record)):
                return False
        differing = [size for size in self.sizes if not self._does_the_same(size)]
        if differing:
            logger.warning("lvspec: the drafter's CUDA graphs of %s rows compute something else.", differing)
        return agreed(not differing)

    def _succeeds(self, step: Callable[[DraftBatch], Any]) -> bool:
        """With the inputs of every size, the largest first: what it leaves of the pool the others take."""
        try:
            for size in reversed(self.sizes):
                step(self._inputs[size])
        except Exception as error:  # whatever a model or a backend can't do in a graph: drafts need none
            logger.warning("lvspec: the drafter's steps can't be recorded as CUDA graphs: %r", error)
            return False
        return True

    def _warm_up(self, inputs: DraftBatch) -> None:
        """Compile and choose kernels; then again, where waiting for the device, which no graph can, is an error."""
        # Made right before they are used: backends keep but one plan in the buffers that graphs read.
        metadata = self._model.metadata(inputs, is_recorded=True)
        for _ in range(_NUM_WARM_UP):
            self._model.run(inputs, metadata)
        with self._without_waiting():
            self._model.run(inputs, metadata)

    def _record(self, inputs: DraftBatch) -> None:
        metadata = self._model.metadata(inputs, is_recorded=True)
        self._graphs[len(inputs.seq_lens)] = self._replay(inputs, metadata)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        self._pool = current_platform.graph_pool_handle()
        with freeze_gc_for_cudagraph_capture(), graph_capture(device=self._model.device):
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
        """What launches a forward over `batch` anew, and where it leaves the hidden states."""
        graph = torch.cuda.CUDAGraph()
        with capture_pool(self._pool, self._model.vllm_config) as pool:
            get_offloader().sync_prev_onload()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                hidden = self._model.run(batch, metadata)
                get_offloader().join_after_forward()
        return graph.replay, hidden

    def _does_the_same(self, size: int) -> bool:
        """Over a full batch and, where there can be padding, over one with a row less."""
        model, same = self._model, True
        for num_rows in sorted({size, max(1, size - 1)}):
            batch = self._trial(num_rows)
            wanted = model.run(batch, model.metadata(batch)).float()
            found = self.hidden(batch)
            assert found is not None
            # No number is within it, either. All are compared: ranks run the same forwards.
            same &= bool((found.float() - wanted).norm() <= _TOLERANCE * wanted.norm())
        return same

    def _trial(self, num_rows: int) -> DraftBatch:
        """Of rows that differ in token, length and, while there are some, in pages."""
        model = self._model
        size, device = model.pool.page_size, model.device
        longest = min(2 * size + 3, model.max_model_len - 1)
        context = np.maximum(longest - np.arange(num_rows) % size, 1)
        pages = longest // size + 1
        table = torch.arange(num_rows * pages, dtype=torch.int32).view(num_rows, pages) % model.pool.num_pages
        slots = table.numpy()[np.arange(num_rows), context // size].astype(np.int64) * size + context % size
        batch = model.decode_batch(num_rows, longest)
        lens = torch.from_numpy(context + 1).int()
        return replace(
            batch,
            token_ids=torch.arange(num_rows, dtype=torch.int64, device=device) % model.vocab_size,
            positions=torch.from_numpy(context).repeat(len(batch.positions), 1).to(device),
            slots=torch.from_numpy(slots).to(device),
            seq_lens=lens.to(device),
            seq_lens_cpu=lens,
            block_table=table.to(device),
        )

    def hidden(self, batch: DraftBatch) -> torch.Tensor | None:
        """The batch's last hidden states `[num_rows, hidden_size]`, to be read before the next ones are asked for.

        None for batches that no graph is for: of too many rows, with longer queries or with visual tokens.
        """
        num_rows = len(batch.seq_lens)
        if batch.max_query_len > 1 or batch.visual or num_rows > self.sizes[-1]:
            return None
        size = self.sizes[bisect_left(self.sizes, num_rows)]
        inputs = self._inputs[size]
        inputs.token_ids[:num_rows].copy_(batch.token_ids)
        inputs.positions[:, :num_rows].copy_(batch.positions)
        inputs.slots[:num_rows].copy_(batch.slots)
        inputs.seq_lens[:num_rows].copy_(batch.seq_lens)
        inputs.seq_lens_cpu[:num_rows].copy_(batch.seq_lens_cpu)
        inputs.block_table[:num_rows, : batch.block_table.shape[1]].copy_(batch.block_table)
        if size > num_rows:
            inputs.slots[num_rows:].fill_(_PADDING_SLOT)
            inputs.seq_lens[num_rows:].fill_(1)
            inputs.seq_lens_cpu[num_rows:].fill_(1)
        # Backends that plan a step do so here, into the buffers that the graph reads.
        self._model.metadata(replace(inputs, max_seq_len=batch.max_seq_len))
        get_offloader().sync_prev_onload()
        replay, hidden = self._graphs[size]
        replay()
        return hidden[:num_rows]


def _first_rows(batch: DraftBatch, num_rows: int) -> DraftBatch:
    return replace(
        batch,
        token_ids=batch.token_ids[:num_rows],
        positions=batch.positions[:, :num_rows],
        slots=batch.slots[:num_rows],
        query_starts=batch.query_starts[: num_rows + 1],
        query_starts_cpu=batch.query_starts_cpu[: num_rows + 1],
        seq_lens=batch.seq_lens[:num_rows],
        seq_lens_cpu=batch.seq_lens_cpu[:num_rows],
        block_table=batch.block_table[:num_rows],
    )
