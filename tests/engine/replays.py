"""The drafter's CUDA graphs without CUDA."""

from __future__ import annotations

from contextlib import contextmanager

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
        hidden = self._model.run(batch, metadata)

        def replay():
            self.num_rows.append((len(batch.seq_lens), batch.max_query_len))
            # On CPUs metadata hold plans of their own, which graphs' backends keep in buffers.
            hidden.copy_(self._model.run(batch, self._model.metadata(batch)))

        return replay, hidden
