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

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed.parallel_state import graph_capture
from vllm.logger import init_logger
from vllm.utils.gc_utils import freeze_gc_for_cudagraph_capture
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.utils import AttentionGroup

from vllm_lvspec.draft.drafter import DraftBatch

if TYPE_CHECKING:
    from vllm_lvspec.engine.draft_model import VLLMDraftModel

logger = init_logger("vllm.lvspec")

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # rows; of more requests a forward is long enough to be launched in time
_NUM_WARM_UP = 2
_PADDING_SLOT = -1  # vLLM writes nothing there
_TOLERANCE = 0.05  # of the norm: kernels may sum in another order

Replay = tuple[Callable[[], Any], torch.Tensor]


def prepare_for_graphs(draft: VllmConfig, target: VllmConfig, device: torch.device) -> None:
    """Have attention backends keep what graphs read in buffers of their own, where the target runs under graphs, too.

    To be called before the drafter's metadata builders are made. `draft` has been checked by vLLM without graphs,
    because it would ask for a compiled model where it is told of them.
    """
    if device.type == "cuda" and target.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        draft.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        draft.compilation_config.max_cudagraph_capture_size = SIZES[-1]


def may_be_recorded(draft: VllmConfig, group: AttentionGroup) -> bool:
    """Whether the drafter was prepared for graphs, and its attention backend runs one-token requests in full ones."""
    if draft.compilation_config.cudagraph_mode != CUDAGraphMode.FULL_DECODE_ONLY:
        return False
    support = group.get_metadata_builder().get_cudagraph_support(draft, group.kv_cache_spec)
    return support.value >= AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE.value


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
        self._inputs = self._padding(self.sizes[-1])

    def _padding(self, num_rows: int) -> DraftBatch:
        """A batch of one-token requests, with room for the longest."""
        model = self._model
        batch = model.decode_batch(num_rows, 0)
        pages = -(-model.max_model_len // model.pool.page_size)
        table = torch.zeros((num_rows, pages), dtype=torch.int32, device=model.device)
        slots = torch.full_like(batch.slots, _PADDING_SLOT)
        return replace(batch, block_table=table, slots=slots, max_seq_len=model.max_model_len)

    @torch.inference_mode()
    def record(self) -> bool:
        """Record all sizes and try them; whether they do what the model does. False leaves the model without."""
        model = self._model
        try:
            with self._recording():
                for size in reversed(self.sizes):
                    batch = self._first(size)
                    metadata = model.metadata(batch, is_recorded=True)
                    for _ in range(_NUM_WARM_UP):
                        model.run(batch, metadata)
                    self._graphs[size] = self._record(batch, metadata)
            differing = [size for size in self.sizes if not self._does_the_same(size)]
        except Exception as error:  # whatever a backend can't do in a graph: drafts need none
            logger.warning("lvspec: the drafter's steps can't be recorded as CUDA graphs: %r", error)
            return False
        if differing:
            logger.warning("lvspec: the drafter's CUDA graphs of %s rows compute something else.", differing)
        return not differing

    @contextmanager
    def _recording(self) -> Iterator[None]:
        with freeze_gc_for_cudagraph_capture(), graph_capture(device=self._model.device):
            yield

    def _record(self, batch: DraftBatch, metadata: Any) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream()):
            hidden = self._model.run(batch, metadata)
        self._pool = graph.pool()
        return graph.replay, hidden

    def _does_the_same(self, size: int) -> bool:
        """Over a full batch and, where there can be padding, over one with a row less."""
        model = self._model
        context = min(2 * model.pool.page_size + 3, model.max_model_len - 1)
        for num_rows in {size, max(1, size - 1)}:
            batch = model.decode_batch(num_rows, context)
            wanted = model.run(batch, model.metadata(batch)).float()
            found = self.hidden(batch)
            assert found is not None
            if not (found.float() - wanted).norm() <= _TOLERANCE * wanted.norm():  # nor if one is no number
                return False
        return True

    def _first(self, num_rows: int) -> DraftBatch:
        """The inputs' first rows."""
        inputs = self._inputs
        return replace(
            inputs,
            token_ids=inputs.token_ids[:num_rows],
            positions=inputs.positions[:, :num_rows],
            slots=inputs.slots[:num_rows],
            query_starts=inputs.query_starts[: num_rows + 1],
            query_starts_cpu=inputs.query_starts_cpu[: num_rows + 1],
            seq_lens=inputs.seq_lens[:num_rows],
            seq_lens_cpu=inputs.seq_lens_cpu[:num_rows],
            block_table=inputs.block_table[:num_rows],
        )

    def hidden(self, batch: DraftBatch) -> torch.Tensor | None:
        """The batch's last hidden states `[num_rows, hidden_size]`, to be read before the next ones are asked for.

        None for batches that no graph is for: of too many rows, with longer queries or with visual tokens.
        """
        num_rows = len(batch.seq_lens)
        if batch.max_query_len > 1 or batch.visual or num_rows > self.sizes[-1]:
            return None
        size = self.sizes[bisect_left(self.sizes, num_rows)]
        inputs = self._first(size)
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
        replay, hidden = self._graphs[size]
        replay()
        return hidden[:num_rows]
