"""The drafter's decode steps from recorded inputs; without a GPU, a replay is a forward over the inputs themselves."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from replays import Replays
from vllm import SamplingParams
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.distributed import get_tp_group
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.worker import workspace
from vllm.v1.worker.workspace import current_workspace_manager, init_workspace_manager, lock_workspace
from workload import QWEN

from vllm_lvspec.bench.run import prompt_writer
from vllm_lvspec.bench.samples import videofacts
from vllm_lvspec.engine import decode_graphs
from vllm_lvspec.engine.decode_graphs import (
    SIZES,
    DecodeGraphs,
    forget_graphs,
    has_graphs,
    prepare_for_graphs,
    unlocked_workspace,
)
from vllm_lvspec.kernels.advance_decode import advance_decode


@pytest.fixture
def model(engines, monkeypatch):
    """The drafter of an engine of the bundled pair, in this process."""
    engine = engines(QWEN, pair=True, lvspec={"num_speculative_tokens": 6})
    (runner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner)
    monkeypatch.setattr(decode_graphs, "_takes_several", lambda model: True)  # CPUs' attention knows no graphs
    return runner.drafter.drafter.model


def test_padded_replays_draft_what_forwards_draft(model, engines, monkeypatch):
    engine = engines(QWEN, pair=True, lvspec={"num_speculative_tokens": 6})
    write = prompt_writer(engine.llm)
    samples = [*videofacts(6, 77, ("question", "choice")), *videofacts(2, 78, ("caption",))]
    inputs = [write(sample) for sample in samples]

    def ask() -> tuple[list[Any], float, int]:
        accepted = engine.metric("spec_decode_num_accepted_tokens")
        drafted = engine.stats()["drafted_tokens"]
        answers = []
        for first, end in ((0, 1), (1, 4), (4, 12), (12, 14)):
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
    # Eight requests at once have none, three and two are padded; a draft that was accepted whole leaves two tokens, and
    # of one that was not, the rest is tried again where one or two requests are left.
    assert set(graphs.num_rows) == {(1, 1), (4, 1), (6, 1), (1, 2), (4, 2), (6, 2), (1, 6), (2, 6)}


def test_what_kernels_share_may_grow_while_graphs_are_recorded_and_not_behind_it(monkeypatch):
    monkeypatch.setattr(workspace, "_manager", None)
    with unlocked_workspace():  # on CPUs there is none
        pass
    init_workspace_manager(torch.device("cpu"))
    manager = current_workspace_manager()
    with unlocked_workspace():
        pass
    assert not manager.is_locked()
    (before,) = manager.get_simultaneous(((4,), torch.float32))
    lock_workspace()
    with unlocked_workspace() as kept:
        assert before.untyped_storage().data_ptr() in [buffer.data_ptr() for buffer in kept if buffer is not None]
        assert manager.get_persistent_resource("of a new stream", lambda: 1) == 1
    with pytest.raises(AssertionError, match="locked"):
        manager.get_persistent_resource("of another stream", lambda: 1)


def test_requests_to_measure_with_have_pages_of_their_own(model):
    size = model.pool.page_size
    batch = model.decode_batch(3, 2 * size, 2)
    assert batch.block_table.shape == (3, 3) and len(batch.block_table.unique()) == 9
    assert (batch.slots.view(3, 2) // size == batch.block_table[:, 2:]).all()
    many = model.decode_batch(2, size * model.pool.num_pages)
    assert many.block_table.max() < model.pool.num_pages


def test_batches_that_no_graph_is_for_are_run(model):
    graphs = Replays(model, sizes=(2,))
    assert graphs.record()
    assert graphs.run(model.decode_batch(3, 5)) is None
    two = model.decode_batch(2, 5)
    two.visual = [torch.zeros(1, 8)]
    assert graphs.run(two) is None
    two.visual, two.max_query_len = [], 2  # one of the two, or as many as there are tokens
    assert graphs.run(two) is None
    assert graphs.run(model.decode_batch(2, 5, 3)) is None
    with torch.inference_mode():
        assert graphs.run(model.decode_batch(2, 5, 2)).shape[0] == 4


def test_a_batch_stays_in_the_inputs_and_moves_on_there(model):
    """What becomes of it is what forwards over a batch apart give; and what it had been made of stays as it was."""
    graphs = Replays(model, sizes=(1, 2, 4))
    assert graphs.record()
    generator = torch.Generator().manual_seed(0)
    apart, there = model.decode_batch(4, 40), model.decode_batch(4, 40)
    there.block_table = apart.block_table = torch.cat([apart.block_table, apart.block_table + 20], dim=1)
    own = there.positions, there.slots, there.seq_lens
    before = [values.clone() for values in own]
    rows = np.arange(4)
    with torch.inference_mode():
        for stays in (rows, rows, rows[:3], rows[:3], rows[1:3], rows[:2], rows[1:2], rows[:1]):
            apart, there = apart.rows(stays), there.rows(stays)
            apart.token_ids = torch.randint(0, 1000, (len(stays),), generator=generator)
            there.token_ids = apart.token_ids.clone()
            wanted = model.run(apart, model.metadata(apart))
            assert torch.allclose(graphs.run(there), wanted, atol=1e-5)
            inputs = graphs._inputs[len(stays) + (len(stays) == 3), 1]
            for name in ("positions", "slots", "seq_lens", "block_table"):
                assert getattr(there, name).data_ptr() == getattr(inputs, name).data_ptr()
            for batch in (apart, there):
                batch.max_seq_len += 1
                batch.seq_lens_cpu = batch.seq_lens_cpu + 1
                advance_decode(batch.positions, batch.seq_lens, batch.slots, batch.block_table, model.pool.page_size)
    assert all(torch.equal(values, was) for values, was in zip(own, before, strict=True))


def test_of_a_batch_that_is_there_nothing_but_its_tokens_is_copied(model):
    graphs = Replays(model, sizes=(2,))
    assert graphs.record()
    batch, inputs = model.decode_batch(2, 40), graphs._inputs[2, 1]
    graphs._take_in(batch, inputs)
    # On CPUs `seq_lens` are those of the host, too, which are copied.
    written = {name: getattr(inputs, name)._version for name in ("token_ids", "positions", "slots", "block_table")}
    graphs._take_in(batch, inputs)
    assert {name for name, was in written.items() if getattr(inputs, name)._version > was} == {"token_ids"}


def test_a_plan_that_is_written_on_the_host_waits_until_the_last_one_was_copied(model, monkeypatch):
    log: list[str] = []

    class Event:
        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(model, "_planned", None)
    batch = model.decode_batch(2, 5)
    model.metadata(batch)
    assert not log
    monkeypatch.setattr(model, "_plans_on_host", True)
    for _ in range(2):
        model.metadata(batch)
    assert log == ["record", "wait", "record"]


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
        def _replay(self, batch, metadata):
            return (lambda: None), self._model.run(batch, metadata).clone()

    assert not Stale(model, sizes=(1, 2)).record()
    assert warnings == [
        "lvspec: the drafter's CUDA graphs of 2 x 6, 1 x 6, 2 x 2, 1 x 2, 2 x 1, 1 x 1 tokens compute something else."
    ]


def test_where_nothing_can_be_recorded_the_drafter_goes_on_without(model, warnings):
    class Broken(Replays):
        def _replay(self, batch, metadata):
            raise RuntimeError("operation not permitted when stream is capturing")

    assert not Broken(model, sizes=(1,)).record()
    (said,) = warnings
    assert "can't be recorded" in said and "stream is capturing" in said


def test_no_rank_uses_graphs_that_another_one_could_not_record(model):
    asked: list[bool] = []

    def agreed(fine: bool) -> bool:
        asked.append(fine)
        return len(asked) < 3  # at the third place, another rank's graphs compute something else

    assert not Replays(model, sizes=(1, 2)).record(agreed)
    assert asked == [True] * 3


@pytest.mark.parametrize("all_fail", [True, False])
def test_where_some_ranks_alone_can_record_graphs_all_stop_with_what_to_do(all_fail, model, monkeypatch, warnings):
    """What they have recorded would be exchanged, and must be the same."""
    exchanged: Any = SimpleNamespace(disabled=False)
    monkeypatch.setattr(get_tp_group(), "device_communicator", SimpleNamespace(ca_comm=exchanged))

    class Broken(Replays):
        def _replay(self, batch, metadata):
            raise RuntimeError("operation not permitted when stream is capturing")

    votes: list[bool] = []

    def agreed(fine: bool) -> bool:
        """Of two ranks, of which the other one fails where all do."""
        votes.append(fine)
        return fine if len(votes) == 1 or all_fail else False

    if all_fail:
        assert not Broken(model, sizes=(1,)).record(agreed)
    else:
        with pytest.raises(RuntimeError, match=r"some ranks could record .* --enforce-eager, would be right"):
            Broken(model, sizes=(1,)).record(agreed)
    assert votes == [True, False, True]
    assert exchanged.disabled is not all_fail


def test_a_model_whose_graphs_are_of_no_use_goes_back_to_forwards(model, monkeypatch):
    config = copy.copy(model.vllm_config)
    config.compilation_config = copy.deepcopy(config.compilation_config)
    monkeypatch.setattr(model, "vllm_config", config)
    monkeypatch.setattr(model, "_wants_graphs", True)
    monkeypatch.setattr(model.group, "metadata_builders", list(model.group.metadata_builders))
    assert prepare_for_graphs(config, Backend, None)
    builder = model.group.get_metadata_builder()
    monkeypatch.setattr(DecodeGraphs, "record", lambda self, agreed: False)
    model.record_graphs()
    assert model.graphs is None
    assert not config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    assert model.group.get_metadata_builder() is not builder


@pytest.mark.parametrize("takes_several", [True, False])
def test_where_several_tokens_of_a_request_fail_one_of_each_is_recorded_all_the_same(takes_several, model, monkeypatch):
    tried = []
    monkeypatch.setattr(decode_graphs, "_takes_several", lambda model: takes_several)
    monkeypatch.setattr(model, "_wants_graphs", True)
    monkeypatch.setattr(model, "graphs", None)

    def record(graphs, agreed) -> bool:
        tried.append((graphs.most_tokens, graphs.whole_chains))
        return graphs.most_tokens == 1

    monkeypatch.setattr(DecodeGraphs, "record", record)
    model.record_graphs()
    assert tried == ([(2, True), (2, False), (1, False)] if takes_several else [(1, False)])
    assert model.graphs.most_tokens == model.tokens_at_once == 1
    assert model.chain_tokens(1, 3) is None


def test_drafts_are_tried_again_in_the_smallest_graph_that_holds_what_is_left_of_them(model, monkeypatch):
    monkeypatch.setattr(model, "graphs", None)
    assert model.chain_tokens(2, 4) == 4
    monkeypatch.setattr(model, "graphs", DecodeGraphs(model))
    assert [model.chain_tokens(num, 2) for num in (1, 2, 3, 9)] == [2, 2, 2, None]
    assert [model.chain_tokens(num, 3) for num in (1, 2, 3)] == [6, 6, 2]  # no more than two have the large one
    monkeypatch.setattr(model, "num_speculative_tokens", 40)
    assert DecodeGraphs(model).chain_tokens(2, 30) == 16


class Backend:
    support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    name = "FLASH_ATTN"

    @classmethod
    def get_builder_cls(cls) -> Any:
        return SimpleNamespace(get_cudagraph_support=lambda vllm_config, spec: cls.support)

    @classmethod
    def get_name(cls) -> str:
        return cls.name


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"support": AttentionCGSupport.ALWAYS}, True),
        ({"support": AttentionCGSupport.NEVER}, False),
        ({"name": "FLASHINFER"}, False),
    ],
)
def test_backends_are_prepared_that_can(changed, expected):
    draft: Any = SimpleNamespace(compilation_config=CompilationConfig(cudagraph_mode=CUDAGraphMode.NONE))
    backend: Any = type("Changed", (Backend,), changed)
    assert prepare_for_graphs(draft, backend, None) == expected
    assert draft.compilation_config.cudagraph_mode.has_full_cudagraphs() == expected
    forget_graphs(draft)
    assert not draft.compilation_config.cudagraph_mode.has_full_cudagraphs()


def test_vllms_builders_for_gpus_are_satisfied_with_what_is_prepared(model):
    """They read more of the configuration than whether there are graphs."""
    config = copy.copy(model.vllm_config)
    config.compilation_config = copy.deepcopy(config.compilation_config)
    assert prepare_for_graphs(config, TritonAttentionBackend, model.group.kv_cache_spec)
    builder = TritonAttentionBackend.get_builder_cls()(
        model.group.kv_cache_spec, model.group.layer_names, config, torch.device("cpu")
    )
    assert builder.decode_cudagraph_enabled


@pytest.mark.parametrize(
    ("device", "mode", "expected"),
    [
        ("cuda", CUDAGraphMode.FULL_AND_PIECEWISE, True),
        ("cuda", CUDAGraphMode.PIECEWISE, True),
        ("cuda", CUDAGraphMode.NONE, False),  # as with enforce_eager
        ("cpu", CUDAGraphMode.FULL_AND_PIECEWISE, False),
    ],
)
def test_a_drafter_has_graphs_where_its_target_has(device, mode, expected):
    target: Any = SimpleNamespace(compilation_config=CompilationConfig(cudagraph_mode=mode))
    assert has_graphs(target, torch.device(device)) == expected
