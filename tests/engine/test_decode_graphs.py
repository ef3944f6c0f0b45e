"""The drafter's decode steps from recorded inputs; without a GPU, a replay is a forward over the inputs themselves."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from workload import QWEN

from vllm_lvspec.bench.run import prompt_writer
from vllm_lvspec.bench.samples import videofacts
from vllm_lvspec.engine import decode_graphs
from vllm_lvspec.engine.decode_graphs import SIZES, DecodeGraphs, may_be_recorded, prepare_for_graphs


class Replays(DecodeGraphs):
    """As a graph does, a replay reads what the inputs hold then, and writes where the recording wrote."""

    num_rows: list[int]

    @contextmanager
    def _recording(self):
        self.num_rows = []
        yield

    def _record(self, batch, metadata):
        hidden = self._model.run(batch, metadata)

        def replay():
            self.num_rows.append(len(hidden))
            # On CPUs metadata hold plans of their own, which graphs' backends keep in buffers.
            hidden.copy_(self._model.run(batch, self._model.metadata(batch)))

        return replay, hidden


@pytest.fixture
def model(engines):
    """The drafter of an engine of the bundled pair, in this process."""
    engine = engines(QWEN, pair=True, lvspec={"num_speculative_tokens": 6})
    (runner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner)
    return runner.drafter.drafter.model


def test_padded_replays_draft_what_forwards_draft(model, engines, monkeypatch):
    engine = engines(QWEN, pair=True, lvspec={"num_speculative_tokens": 6})
    write = prompt_writer(engine.llm)
    inputs = [write(sample) for sample in videofacts(6, 77, ("question", "choice"))]

    def ask() -> tuple[list[Any], float, int]:
        accepted = engine.metric("spec_decode_num_accepted_tokens")
        drafted = engine.stats()["drafted_tokens"]
        answers = []
        for first, end in ((0, 1), (1, 4), (4, 12)):
            found = engine.llm.generate(inputs[first:end], SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
            answers += [output.outputs[0].token_ids for output in found]
        more = engine.metric("spec_decode_num_accepted_tokens") - accepted
        return answers, more, engine.stats()["drafted_tokens"] - drafted

    want = ask()
    graphs = Replays(model, sizes=(1, 4, 6))
    assert graphs.record()
    assert graphs.sizes == [1, 4, 6]
    graphs.num_rows.clear()
    monkeypatch.setattr(model, "graphs", graphs)
    assert ask() == want
    assert want[1] > 0.3 * want[2] > 50
    assert set(graphs.num_rows) == {1, 4, 6}  # eight requests at once have none, three and two are padded


def test_batches_that_no_graph_is_for_are_run(model):
    graphs = Replays(model, sizes=(2,))
    assert graphs.record()
    assert graphs.hidden(model.decode_batch(3, 5)) is None
    two = model.decode_batch(2, 5)
    two.visual = [torch.zeros(1, 8)]
    assert graphs.hidden(two) is None
    two.visual, two.max_query_len = [], 2
    assert graphs.hidden(two) is None


def test_no_more_rows_than_requests_are_recorded(model):
    assert model.vllm_config.scheduler_config.max_num_seqs == 8
    assert DecodeGraphs(model, SIZES).sizes == [1, 2, 4, 8]
    assert DecodeGraphs(model, (1, 2)).sizes == [1, 2]


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(decode_graphs.logger, "warning", lambda message, *args: found.append(message % args))
    return found


def test_graphs_that_compute_something_else_are_not_used(model, warnings):
    class Stale(Replays):
        def _record(self, batch, metadata):
            return (lambda: None), self._model.run(batch, metadata).clone()

    assert not Stale(model, sizes=(1, 2)).record()
    assert warnings == ["lvspec: the drafter's CUDA graphs of [1, 2] rows compute something else."]


def test_where_nothing_can_be_recorded_the_drafter_goes_on_without(model, warnings):
    class Broken(Replays):
        def _record(self, batch, metadata):
            raise RuntimeError("operation not permitted when stream is capturing")

    assert not Broken(model, sizes=(1,)).record()
    (said,) = warnings
    assert "can't be recorded" in said and "stream is capturing" in said


def config(mode: CUDAGraphMode = CUDAGraphMode.NONE) -> Any:
    return SimpleNamespace(compilation_config=CompilationConfig(cudagraph_mode=mode))


def group(support: AttentionCGSupport) -> Any:
    builder = SimpleNamespace(get_cudagraph_support=lambda vllm_config, spec: support)
    return SimpleNamespace(get_metadata_builder=lambda: builder, kv_cache_spec=None)


@pytest.mark.parametrize(
    ("device", "target", "support", "expected"),
    [
        ("cuda", CUDAGraphMode.FULL_AND_PIECEWISE, AttentionCGSupport.ALWAYS, True),
        ("cuda", CUDAGraphMode.PIECEWISE, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, True),
        ("cuda", CUDAGraphMode.FULL_AND_PIECEWISE, AttentionCGSupport.NEVER, False),
        ("cuda", CUDAGraphMode.NONE, AttentionCGSupport.ALWAYS, False),  # as with enforce_eager
        ("cpu", CUDAGraphMode.FULL_AND_PIECEWISE, AttentionCGSupport.ALWAYS, False),
    ],
)
def test_graphs_are_recorded_where_the_target_has_some_and_the_backend_can(device, target, support, expected):
    draft = config()
    prepare_for_graphs(draft, config(target), torch.device(device))
    assert may_be_recorded(draft, group(support)) == expected
    has_full = draft.compilation_config.cudagraph_mode.has_full_cudagraphs()
    assert has_full == (device == "cuda" and target != CUDAGraphMode.NONE)
