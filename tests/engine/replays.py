"""The drafter's CUDA graphs without CUDA."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from vllm_lvspec.engine.decode_graphs import DecodeGraphs


class Replays(DecodeGraphs):
    """As a graph does, a replay reads what the inputs hold then, and writes where the recording wrote."""

    num_rows: list[tuple[int, int]]  # requests, tokens of each

    @contextmanager
    def _recording(self):
        self.num_rows = []
        yield

    @contextmanager
    def _without_waiting(self):
        yield

    def _replay(self, batch, metadata):
        found = self._model.run_far(batch, metadata)

        def replay():
            self.num_rows.append((len(batch.seq_lens), batch.max_query_len))
            # On CPUs metadata hold plans of their own, which graphs' backends keep in buffers.
            again = self._model.run_far(batch, self._model.metadata(batch))
            for kept, new in [(found, again)] if isinstance(found, torch.Tensor) else zip(found, again, strict=True):
                kept.copy_(new)

        return replay, found
