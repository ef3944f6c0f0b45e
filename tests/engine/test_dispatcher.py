"""Which of the target's CUDA graphs a batch gets, and that each is recorded as what it is asked for."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.multimodal.inputs import PlaceholderRange
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_lvspec.draft.costs import StepCosts
from vllm_lvspec.engine.dispatcher import SIZES, DecodeDispatcher, tokens_each
from vllm_lvspec.engine.placeholders import PADDING_TOKEN_ID
from vllm_lvspec.engine.runner import LVSpecGPUModelRunner
from vllm_lvspec.engine.scoring import PromptScores

CHAIN = 11  # a token and ten drafted ones
NO_METRICS = SimpleNamespace(cudagraph_metrics=False)


def runner_of(
    cls: type[GPUModelRunner],
    dispatcher: type[CudagraphDispatcher],
    mode: str,
    most: int = 88,
    max_num_seqs: int = 8,
    **options: Any,
) -> Any:
    """What a runner has of all that these methods ask for, with graphs of up to `most` tokens."""
    compilation = CompilationConfig(
        mode=CompilationMode.VLLM_COMPILE,
        cudagraph_mode=mode,
        cudagraph_capture_sizes=list(range(CHAIN, most + 1, CHAIN)),
        max_cudagraph_capture_size=most,
    )
    compilation.set_splitting_ops_for_v1(all2all_backend="allgather_reducescatter", data_parallel_size=1)
    compilation.post_init_cudagraph_sizes()
    parallel = SimpleNamespace(data_parallel_size=1, use_ubatching=False)
    config = SimpleNamespace(
        compilation_config=compilation,
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        lora_config=None,
        num_speculative_tokens=CHAIN - 1,
        parallel_config=parallel,
        observability_config=NO_METRICS,
    )
    runner = object.__new__(cls)
    runner.vllm_config, runner.compilation_config, runner.parallel_config = config, compilation, parallel
    runner.model_config = SimpleNamespace(is_encoder_decoder=False)
    nobody = np.zeros(0, dtype=np.int32)
    runner.input_batch = SimpleNamespace(
        lora_id_to_lora_request={}, num_reqs=0, num_computed_tokens_cpu=nobody, num_prompt_tokens=nobody
    )
    runner.lora_config, runner.load_config = None, SimpleNamespace(use_tqdm_on_load=False)
    runner.scores = SimpleNamespace(must_look=lambda: False)
    runner.uniform_decode_query_len, runner._measures_pieces = CHAIN, False
    runner.cudagraph_dispatcher = dispatcher(config, **options)
    runner.cudagraph_dispatcher.initialize_cudagraph_keys(CUDAGraphMode[mode], CHAIN)
    return runner


def ours(mode: str = "FULL_AND_PIECEWISE", **options: Any) -> Any:
    return runner_of(LVSpecGPUModelRunner, DecodeDispatcher, mode, **options)


def graph_of(runner: Any, lens: list[int], **forced: Any) -> tuple[CUDAGraphMode, BatchDescriptor]:
    found = runner._determine_batch_execution_and_padding(
        num_tokens=sum(lens),
        num_reqs=len(lens),
        num_scheduled_tokens_np=np.array(lens, dtype=np.int32),
        max_num_scheduled_tokens=max(lens),
        **forced,
    )
    assert runner.uniform_decode_query_len == runner.cudagraph_dispatcher.uniform_decode_query_len == CHAIN
    return found[:2]


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_a_step_without_drafts_has_a_full_graph_of_its_own_size(mode):
    runner = ours(mode)
    for count, size in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)):
        assert graph_of(runner, [1] * count) == (CUDAGraphMode.FULL, BatchDescriptor(size, size, uniform=True))


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_a_single_requests_shorter_draft_has_a_full_graph_where_drafts_may_be_shorter(mode):
    with_parts, without = ours(mode, has_parts=True), ours(mode)
    for tokens in range(2, CHAIN):
        assert graph_of(with_parts, [tokens]) == (CUDAGraphMode.FULL, BatchDescriptor(tokens, 1, uniform=True))
        assert graph_of(without, [tokens])[0] != CUDAGraphMode.FULL
    for lens in ([CHAIN], [1], [CHAIN] * 3, [1] * 3, [5, 5], [5, 1], [CHAIN + 1], [40]):
        assert graph_of(with_parts, lens) == graph_of(without, lens)
    few = ours(mode, most=CHAIN, max_num_seqs=1, has_parts=True)
    assert graph_of(few, [CHAIN - 1])[0] == CUDAGraphMode.FULL


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "PIECEWISE", "FULL", "NONE"])
@pytest.mark.parametrize("has_parts", [True, False])
def test_it_knows_which_batches_have_a_graph_that_others_have_not(mode, has_parts):
    runner = ours(mode, has_parts=has_parts)
    has_such = mode in ("FULL_AND_PIECEWISE", "FULL_DECODE_ONLY")
    for count, tokens in itertools.product(range(1, 10), range(1, CHAIN + 2)):
        is_full = graph_of(runner, [tokens] * count)[0] == CUDAGraphMode.FULL
        assert runner.cudagraph_dispatcher.has_graph(count, tokens) == (has_such and is_full), (count, tokens)


K = CHAIN - 1
PADDED = {  # by lengths of drafts, whether padding makes one graph of their step
    "whole": ([K, K], False), "one": ([4], True), "none": ([0, 0], False), "shorter": ([4, 4], True),
    "ragged": ([K, 3], True), "one without": ([K, 3, 0], True), "too many": ([4] * 9, False),
}  # fmt: skip


@pytest.mark.parametrize(("lens", "is_padded"), PADDED.values(), ids=PADDED)
def test_drafts_are_padded_where_that_makes_one_graph_and_costs_little(lens, is_padded):
    runner = ours()
    runner.num_spec_tokens, runner.drafter = (
        K,
        SimpleNamespace(drafter=SimpleNamespace(payoff=SimpleNamespace(costs=None))),
    )
    runner.input_batch.num_tokens_no_spec = np.full(16, 100)
    drafts = [[7] * length for length in lens]
    want = [[7] * length + [PADDING_TOKEN_ID] * (K - length) if length else [] for length in lens]
    assert runner._in_one_graph(drafts) == (want if is_padded else drafts)
    for slope, in_pieces, pays in ((0.0001, 0.1, True), (0.1, 0.1, False), (0.1, 100.0, True)):  # seconds a row more
        pieces = [1 + in_pieces, 1 + in_pieces + slope]
        runner.drafter.drafter.payoff.costs = StepCosts([1, 2], [1, 1 + slope], [0.0, 0.0], pieces=pieces)
        assert runner._in_one_graph(drafts) == (want if is_padded and pays else drafts)


def test_a_single_draft_that_has_a_graph_is_not_padded():
    runner = ours(has_parts=True)
    runner.num_spec_tokens, runner.drafter = (
        K,
        SimpleNamespace(drafter=SimpleNamespace(payoff=SimpleNamespace(costs=None))),
    )
    assert runner._in_one_graph([[7] * 4]) == [[7] * 4]
    assert runner._in_one_graph([[7] * 4, [7] * 4]) == [[7] * 4 + [PADDING_TOKEN_ID] * (K - 4)] * 2


ONE_EACH = [1] * 8
BATCHES = ([CHAIN], [CHAIN] * 3, [CHAIN, 1, 1], [5, 5], [40], [1, 300], [90], ONE_EACH)


@pytest.mark.parametrize(
    ("mode", "lens"),
    [
        (mode, lens)
        for mode in ("FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "PIECEWISE", "FULL", "NONE")
        for lens in BATCHES
        if lens is not ONE_EACH or mode in ("PIECEWISE", "FULL", "NONE")  # the other modes' are above
    ],
)
def test_any_other_batch_has_the_graph_that_vllm_gives_it(mode, lens):
    theirs = runner_of(GPUModelRunner, CudagraphDispatcher, mode)
    assert graph_of(ours(mode), lens) == graph_of(theirs, lens)


def test_vllm_alone_pads_a_step_without_drafts_to_a_chain_and_runs_it_piecewise():
    """Why there is such a dispatcher; where this fails, it may go."""
    theirs = runner_of(GPUModelRunner, CudagraphDispatcher, "FULL_AND_PIECEWISE")
    assert graph_of(theirs, [1]) == (CUDAGraphMode.PIECEWISE, BatchDescriptor(CHAIN))


def test_where_a_full_graph_is_not_allowed_or_too_small_it_is_the_piecewise_one():
    runner = ours()
    dispatch = runner.cudagraph_dispatcher.dispatch
    with runner._decodes_of(1):
        assert dispatch(2, True)[0] == CUDAGraphMode.FULL
        for barred in ({"invalid_modes": {CUDAGraphMode.FULL}}, {"valid_modes": {CUDAGraphMode.PIECEWISE}}):
            assert dispatch(2, True, **barred) == (CUDAGraphMode.PIECEWISE, BatchDescriptor(CHAIN))
        assert dispatch(2, True, valid_modes={CUDAGraphMode.NONE}) == (CUDAGraphMode.NONE, BatchDescriptor(2))
        assert dispatch(9, True) == (CUDAGraphMode.PIECEWISE, BatchDescriptor(CHAIN))
    assert graph_of(runner, [1], force_eager=True) == (CUDAGraphMode.NONE, BatchDescriptor(1))


def test_a_prompt_whose_attention_is_asked_for_is_read_where_one_can_look_on():
    """Its rest may be as long as a decode; a full graph would run past whoever looks at its layers."""
    runner = ours()
    runner.scores = PromptScores.__new__(PromptScores)
    runner.scores.runner, runner.scores.looks_at = runner, "attention"
    runner.input_batch.req_ids = ["a", "b"]
    decoding = SimpleNamespace(num_computed_tokens=21, num_prompt_tokens=21)
    for rest, each in ((SimpleNamespace(num_computed_tokens=20, num_prompt_tokens=21), 1), (decoding, CHAIN)):
        runner.requests = {"a": decoding, "b": rest}
        for looks_at in ("attention", "grid"):
            runner.scores.looks_at = looks_at
            runner.scores.begin_step(object())
            is_full = rest is decoding or looks_at == "grid"
            assert graph_of(runner, [each] * 2)[0] == (CUDAGraphMode.FULL if is_full else CUDAGraphMode.PIECEWISE)
    runner.requests = {"a": decoding, "b": SimpleNamespace(num_computed_tokens=10, num_prompt_tokens=21)}
    runner.scores.looks_at = "attention"
    assert graph_of(runner, [CHAIN] * 2)[0] == CUDAGraphMode.PIECEWISE
    runner.scores.begin_step(None)  # no step: a trial
    assert graph_of(runner, [CHAIN] * 2)[0] == CUDAGraphMode.FULL


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "FULL"])
@pytest.mark.parametrize(("computed", "is_full"), [(12, False), (19, False), (20, True), (30, True)])
@pytest.mark.parametrize("rest", [CHAIN, CHAIN - 3, 1])
def test_what_is_seen_is_read_where_the_model_can_tidy_up_behind_it(computed, is_full, rest, mode):
    """Qwen3-VL's later layers are given more of it, in buffers that are cleared behind the graph."""
    runner = ours(mode, has_parts=True)
    runner.input_batch.req_ids, runner.input_batch.num_reqs = ["a"], 1
    runner.input_batch.num_computed_tokens_cpu = np.array([computed, 7], dtype=np.int32)
    runner.input_batch.num_prompt_tokens = np.array([min(computed + rest, 30), 9], dtype=np.int32)
    image = SimpleNamespace(mm_position=PlaceholderRange(offset=4, length=16))
    runner.requests = {"a": SimpleNamespace(mm_features=[image])}
    assert (graph_of(runner, [rest])[0] == CUDAGraphMode.FULL) == is_full


@pytest.mark.parametrize(
    ("max_num_seqs", "budget", "rows"),
    [
        (8, 4096, [1, 2, 4, 8, 11, 22, 44, 88]),
        (1, 4096, [1, 11]),
        (100, 4096, [1, 2, 4, 8, 16, 32, 64, 100, 176, 352, 704, 1100]),
        (8, 40, [1, 2, 4, 8, 11, 22]),
        (64, 4096, [1, 2, 4, 8, 16, 32, 64, 88, 176, 352, 704]),
    ],
)
def test_what_steps_cost_is_measured_over_batches_that_have_graphs(max_num_seqs, budget, rows):
    """But for sizes above what the user wants recorded."""
    runner = ours(most=704, max_num_seqs=max_num_seqs)
    runner.num_spec_tokens = CHAIN - 1
    runner.scheduler_config = SimpleNamespace(max_num_seqs=max_num_seqs)
    runner.drafter = SimpleNamespace(drafter=SimpleNamespace(payoff=SimpleNamespace(most_rows=budget)))
    batches = runner._batches_measured()
    assert [num_requests * each for num_requests, each in batches] == rows
    for num_requests, each in batches:
        assert each == (1 if num_requests * each <= max_num_seqs else CHAIN)
        if num_requests * each <= 704:
            assert graph_of(runner, [each] * num_requests)[0] == CUDAGraphMode.FULL


@pytest.mark.parametrize(
    ("mode", "pieces"), [("FULL_AND_PIECEWISE", CUDAGraphMode.PIECEWISE), ("FULL_DECODE_ONLY", CUDAGraphMode.NONE)]
)
def test_what_a_step_costs_in_pieces_is_measured_without_the_graph_that_there_is_for_it(mode, pieces):
    runner, launched = ours(mode), []

    def dummy_run(num_tokens: int, uniform_decode: bool, **options: Any) -> tuple[torch.Tensor, None]:
        lens = [runner.uniform_decode_query_len] * (num_tokens // runner.uniform_decode_query_len)
        with runner._decodes_of(CHAIN):
            launched.append(graph_of(runner, lens, force_uniform_decode=uniform_decode)[0])
        return torch.zeros(num_tokens, 1), None

    runner._dummy_run, runner._sync_device = dummy_run, lambda: None
    runner._blocks_apart = lambda num_requests, context: nullcontext()
    runner.model = SimpleNamespace(compute_logits=lambda hidden: hidden)
    for batch in ((1, 1), (1, CHAIN), (3, CHAIN)):
        for in_pieces in (False, True):
            assert runner._target_seconds(*batch, 1, in_pieces) > 0
    assert launched == [CUDAGraphMode.FULL, pieces] * 3
    assert graph_of(runner, [CHAIN])[0] == CUDAGraphMode.FULL


def test_what_steps_were_launched_as_follows_from_their_tokens():
    runner = ours()
    for lens, is_graph in (([1], True), ([CHAIN] * 3, True), ([CHAIN, 4], False), ([4], False), ([CHAIN] * 9, False)):
        step = SimpleNamespace(num_scheduled_tokens=dict(enumerate(lens)), total_num_scheduled_tokens=sum(lens))
        assert runner._was_one_graph(step) == is_graph == (graph_of(runner, lens)[0] == CUDAGraphMode.FULL)


def test_requests_to_measure_with_read_blocks_of_their_own():
    runner = ours()
    table = np.zeros((8, 9), dtype=np.int32)
    buffer = SimpleNamespace(block_table=SimpleNamespace(np=table), block_size=16)
    runner.input_batch.block_table = SimpleNamespace(block_tables=[buffer])
    runner.kv_cache_config = SimpleNamespace(num_blocks=12)
    with runner._blocks_apart(3, 65):
        assert table[:3, :5].flatten().tolist() == [*range(12), 0, 1, 2]
        assert not table[:3, 5:].any() and not table[3:].any()
    assert not table.any()


def test_sizes_are_bounded_by_requests_and_by_what_the_user_wants_recorded():
    for most, max_num_seqs, largest in ((88, 8, 8), (22, 64, 22), (22, 3, 3), (5632, 512, SIZES[-1])):
        descs = dict(ours(most=most, max_num_seqs=max_num_seqs).cudagraph_dispatcher.get_capture_descs())
        assert max(desc.num_tokens for desc in descs[CUDAGraphMode.FULL] if tokens_each(desc) == 1) == largest


def test_behind_vllms_look_at_their_memory_graphs_are_as_before():
    """It clears all keys then, and initialises them anew."""
    runner = ours()
    dispatcher = runner.cudagraph_dispatcher
    before = dispatcher.get_capture_descs()
    for keys in dispatcher.cudagraph_keys.values():
        keys.clear()
    dispatcher.keys_initialized = False
    assert graph_of(runner, [1]) == (CUDAGraphMode.NONE, BatchDescriptor(1))
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE, CHAIN)
    assert dispatcher.get_capture_descs() == before


@pytest.mark.parametrize("has_parts", [False, True])
@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_each_graph_is_recorded_as_the_batch_that_asks_for_it(mode, has_parts, monkeypatch):
    runner = ours(mode, has_parts=has_parts)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    recorded = []

    def dummy_run(num_tokens: int, *, uniform_decode: bool, is_graph_capturing: bool = False, **more: Any) -> None:
        """As vLLM makes its batch, up to what is recorded."""
        each = runner.uniform_decode_query_len if uniform_decode else num_tokens
        num_reqs = -(-num_tokens // each) if uniform_decode else min(num_tokens, 8)
        lens = [each if uniform_decode else num_tokens // num_reqs] * num_reqs
        lens[-1] += num_tokens - sum(lens)
        found = runner._determine_batch_execution_and_padding(
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_scheduled_tokens_np=np.array(lens, dtype=np.int32),
            max_num_scheduled_tokens=each,
            force_uniform_decode=uniform_decode,
        )
        if is_graph_capturing:
            assert found[0] == more["cudagraph_runtime_mode"]
            recorded.append((*found[:2], lens))

    runner._dummy_run = dummy_run
    wanted = []
    for runtime_mode, descs in runner.cudagraph_dispatcher.get_capture_descs():
        runner._capture_cudagraphs(descs, runtime_mode)
        wanted += [(runtime_mode, desc) for desc in descs]
    assert [(mode, desc) for mode, desc, _ in recorded] == wanted
    for _, desc, lens in recorded:
        if desc.uniform:
            assert lens == [tokens_each(desc)] * desc.num_reqs
    numbers = Counter(tokens_each(desc) for _, desc in wanted if desc.uniform)
    parts = dict.fromkeys(range(2, CHAIN), 1) if has_parts else {}
    assert numbers == {1: 4, **parts, CHAIN: 8}
    assert runner.uniform_decode_query_len == CHAIN
