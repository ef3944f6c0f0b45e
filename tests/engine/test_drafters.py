"""What the drafter sees of a video, who it is and how far it drafts: as is said, and no matter to any output."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import Engine
from transformers import AutoModelForImageTextToText
from vllm import SamplingParams, ir
from vllm.config import VllmConfig
from vllm.config.kernel import IrOpPriorityConfig
from vllm.model_executor.layers.attention import attention as vllm_attention
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from workload import LLAVA, QWEN, Family, Request, generate_requests, token_ids, turn, video

from vllm_lvspec.bench.samples import videofacts
from vllm_lvspec.draft.costs import Corrections, StepCosts
from vllm_lvspec.engine import draft_model, scoring
from vllm_lvspec.engine.kv_layout import KVLayout, UnknownLayoutError
from vllm_lvspec.engine.runner import LVSpecGPUModelRunner
from vllm_lvspec.engine.scoring import MAX_LAYERS, MAX_QUERIES
from vllm_lvspec.reference import PAIRS
from vllm_lvspec.reference.families import FAMILIES

SIZES = (1, 8, 3, 5, 2, 7, 4, 6)
AS_FAR_AS_PAYS = {"draft_length": "adaptive", "only_if_faster": True}
SELF = {"model": "self"}
# Prompts in chunks, prefix hits, and too few pages for eight requests.
STRESS = {"max_num_batched_tokens": 96, "num_gpu_blocks_override": 20}
# Verifying costs nothing beyond the first row, or as much with each.
FREE = StepCosts([1, 128], [1.0, 1.0], [0.001, 0.001])
LINEAR = StepCosts([1, 128], [1.0, 128.0], [0.001, 0.001])


def greedy(max_tokens: int, ignore_eos: bool = True) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos)


def runner_of(engine: Engine) -> LVSpecGPUModelRunner:
    """Of an engine of one rank, which runs in this process."""
    (runner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner)
    return runner


def ask_videos(family: Family, questions: Sequence[tuple[int, str]], params: SamplingParams) -> list[Request]:
    """A request for each scene and question, about a video of the length that the bundled pair knows."""
    frames = PAIRS[family.checkpoint].num_frames
    return [
        Request(
            "video",
            turn("user", family.video + question) + "<|im_start|>assistant\n",
            {"video": [video(scene, frames)]},
            params,
        )
        for scene, question in questions
    ]


# No output is another one ---------------------------------------------------------------------------------------------


VIEWS = [
    pytest.param(1, {"pruning": "random"}, id="random"),
    pytest.param(1, {"pruning": "redundancy"}, id="redundancy"),
    pytest.param(0, {"pruning": "attention"}, id="attention"),
    pytest.param(0, {"pruning": "similarity"}, id="similarity"),
    pytest.param(None, SELF, id="self_copy"),
    pytest.param(None, {**SELF, "self_cache": "compute"}, id="self_compute"),
    pytest.param(None, {**SELF, "pruning": "attention"}, id="self_by_attention"),
]


@pytest.mark.parametrize(("drafter", "settings"), VIEWS)
def test_no_view_changes_an_output_whatever_is_scheduled(drafter, settings, engines, oracle):
    count, again = 45, 38
    want = token_ids(oracle(QWEN, count, 2))
    engine = engines(QWEN, drafter=drafter, lvspec=settings, **STRESS)
    requests = generate_requests(QWEN, count, seed=2)
    assert token_ids(engine.run(requests, (8, 8, 8, 8, 3, 8, 1))) == want
    assert engine.metric("num_preemptions") > 0
    # In so few pages a video lasts from one request to the next at most.
    assert requests[again].kind == "video_again"
    repeated = engine.run([requests[again]] * 4, (1, 3))
    assert token_ids(repeated) == [want[again]] * 4
    assert all(o.num_cached_tokens > len(o.prompt_token_ids) - 64 for o in repeated[1:])
    stats = engine.stats()
    assert stats["drafted_tokens"] > 500
    assert stats["pages_free"] == stats["pages_total"]
    if drafter != 1:
        assert engine.metric("spec_decode_num_accepted_tokens") > 0.05 * stats["drafted_tokens"]
    nothing_left(engine)


@pytest.mark.parametrize(
    ("drafter", "settings"), [p for p in VIEWS if p.id in ("attention", "similarity", "self_copy")]
)
def test_no_view_changes_an_output_of_the_other_family(drafter, settings, engines, oracle):
    count = 36
    want = oracle(LLAVA, count, 2)
    engine = engines(LLAVA, drafter=drafter, lvspec=settings)
    got = engine.run(generate_requests(LLAVA, count, seed=2), SIZES)
    assert token_ids(got) == token_ids(want)
    stats = engine.stats()
    assert stats["drafted_tokens"] > 500
    assert stats["pages_free"] == stats["pages_total"]
    nothing_left(engine)


def test_where_nobody_has_a_draft_vllms_metadata_are_what_it_would_make_itself(engines):
    runner = runner_of(engines(QWEN, drafter=1))
    ours, theirs = (
        calculate(runner, np.zeros(3, dtype=np.int32), np.array([1, 40, 41], dtype=np.int32))
        for calculate in (LVSpecGPUModelRunner._calc_spec_decode_metadata, GPUModelRunner._calc_spec_decode_metadata)
    )
    assert vars(ours).keys() == vars(theirs).keys()
    for name, value in vars(theirs).items():
        mine = getattr(ours, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(mine, value) and mine.dtype == value.dtype and mine.device == value.device, name
        else:
            assert mine == value, name


def test_what_a_step_emits_does_not_wait_for_the_drafter(engines, monkeypatch):
    engine = engines(QWEN, drafter=0)
    core = engine.llm.llm_engine.engine_core.engine_core
    counts = runner_of(engine).drafter.drafter.counts
    steps: list[tuple[int, Any, Any]] = []  # tokens that leave, what the drafter has done by then, and after it

    def step() -> Any:
        outputs, executed = run_step()
        told = sum(len(output.new_token_ids) for each in outputs.values() for output in each.outputs)
        steps.append((told, counts.copy(), None))
        return outputs, executed

    def post_step(model_executed: bool) -> None:
        ask_for_drafts(model_executed)
        steps[-1] = *steps[-1][:2], counts.copy()

    run_step, ask_for_drafts = core.step_fn, core.post_step
    before = counts.copy()
    with monkeypatch.context() as patch:
        patch.setattr(core, "step_fn", step)
        patch.setattr(core, "post_step", post_step)
        engine.run(ask_videos(QWEN, [(0, "What is seen?"), (1, "What moves?")], greedy(24)))
    for _, when_it_leaves, afterwards in steps:
        assert when_it_leaves == before
        before = afterwards
    first = next(step for step in steps if step[0])
    assert first[1]["prefills"] < first[2]["prefills"]
    assert sum(step[0] for step in steps) == 48
    engine.stats()
    nothing_left(engine)


def nothing_left(engine: Engine) -> None:
    """Of requests that are gone."""
    runner = runner_of(engine)
    drafter = runner.drafter.drafter
    assert not runner.scores._prompts
    assert not drafter.sequences and not drafter._prompts and not drafter._undraftable and not drafter.payoff.histories


def test_drafts_as_long_as_they_pay_change_no_output(engines, oracle):
    count = 45
    want = oracle(QWEN, count, 2)
    engine = engines(QWEN, drafter=0, lvspec={**AS_FAR_AS_PAYS, "pruning": "attention"}, **STRESS)
    costs = runner_of(engine).drafter.drafter.payoff.costs
    assert all(seconds > 0 for seconds in (*costs.target, *costs.draft))
    got = engine.run(generate_requests(QWEN, count, seed=2), (8, 3, 8, 1))
    assert token_ids(got) == token_ids(want)
    # How much is drafted hangs on the machine; on any it is drafted or said why not.
    stats = engine.stats()
    assert stats["drafted_tokens"] + stats["skipped_cost"] > 0
    assert stats["pages_free"] == stats["pages_total"]
    nothing_left(engine)


def test_what_steps_cost_in_pieces_is_known_where_they_can_be_graphs(engines, monkeypatch):
    engine = engines(QWEN, drafter=0, lvspec={**AS_FAR_AS_PAYS, "pruning": "attention"}, **STRESS)
    proposer = runner_of(engine).drafter
    monkeypatch.setattr(proposer.drafter.payoff, "costs", None)
    batches, chain = [(1, 1), (2, 1), (1, 11), (2, 11)], 11

    def seconds(num_requests: int, each: int, context: int, in_pieces: bool = False) -> float:
        assert not in_pieces or num_requests * each <= 11
        device = 1 + 0.01 * num_requests * each + 1e-6 * context
        return max(1.1, device) if in_pieces else device  # the host's, unless the device takes longer

    proposer.measure_costs(seconds, batches, lambda num_requests, each: num_requests * each <= 11)
    costs = proposer.drafter.payoff.costs
    for rows, more in ((1, 0.09), (2, 0.08), (11, 0.0), (22, 0.0)):
        asked = costs.of_verification(rows, 100, 0), costs.of_pieces(rows, 100, 0)
        assert asked[1] - asked[0] == pytest.approx(more, abs=1e-4)
    assert costs.of_pieces(1, 1e6, 0) == costs.of_verification(1, 1e6, 0)  # the device takes longer than the host
    assert costs.scaled(2.0, 1.0, 1.0, 1.0).pieces == [2 * value for value in costs.pieces]
    taken = costs.of_pieces(1, 0, 0)
    for in_pieces, factor in ((True, 1.0), (False, 1.1 / 1.01)):  # what is foretold by the wrong price is corrected
        monkeypatch.setattr(proposer.drafter.payoff, "corrections", Corrections())
        for _ in range(40):
            proposer.note_step(taken, 1, 1, 0, in_pieces)
        assert proposer.drafter.payoff.corrections.factor("target", 1) == pytest.approx(factor, rel=1e-3)
    proposer.measure_costs(seconds, batches, lambda num_requests, each: False)
    costs = proposer.drafter.payoff.costs
    assert costs.pieces is None
    assert costs.of_pieces(chain, 100, 0) == costs.of_verification(chain, 100, 0)


@pytest.mark.parametrize("cache", ["copy", "compute"])
def test_nothing_is_drafted_behind_what_ends_an_answer(cache, engines):
    engine = engines(QWEN, lvspec={**SELF, "self_cache": cache, "pruning": "none"})
    requests = [replace(r, params=greedy(40)) for r in generate_requests(QWEN, 18, seed=13)]
    whole = token_ids(engines(QWEN).run(requests))
    ends = [3 + i for i in range(len(requests))]
    requests = [
        replace(r, params=SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=[tokens[end]]))
        for r, tokens, end in zip(requests, whole, ends, strict=True)
    ]
    before = engine.stats()["drafted_tokens"]
    got = token_ids(engine.run(requests, (8, 1, 3)))
    assert got == [tokens[: tokens.index(tokens[end]) + 1] for tokens, end in zip(whole, ends, strict=True)]
    # Whoever drafts for itself is always right, so that nothing is drafted which is not part of the answer.
    assert 0 < engine.stats()["drafted_tokens"] - before <= sum(map(len, got)) - len(got)


@pytest.mark.two_ranks
def test_a_target_of_two_ranks_drafts_for_itself_and_says_what_one_says(engines, oracle):
    count = 27
    want = oracle(QWEN, count, 2)
    engine = engines(QWEN, tensor_parallel_size=2, lvspec={**SELF, "pruning": "attention", "pruning_ratio": 0.5})
    got = engine.run(generate_requests(QWEN, count, seed=2), (8, 1, 5))
    assert token_ids(got) == token_ids(want)
    stats = engine.stats()  # asserts that the ranks agree
    assert stats["drafted_tokens"] > 150
    assert stats["pages_free"] == stats["pages_total"]
    assert engine.metric("spec_decode_num_accepted_tokens") > 0.05 * stats["drafted_tokens"]


def costs_of(worker: Any) -> StepCosts:
    return worker.model_runner.drafter.drafter.payoff.costs


def corrections_of(worker: Any) -> dict[tuple[str, int], float]:
    return worker.model_runner.drafter.drafter.payoff.corrections._factors


def draft_whether_it_pays_or_not(worker: Any, yes: bool) -> None:
    worker.model_runner.drafter.drafter.payoff.only_if_faster = not yes


@pytest.mark.two_ranks
def test_two_ranks_draft_as_far_by_the_clock_of_one(engines, oracle):
    count = 27
    want = oracle(QWEN, count, 2)
    settings = {**AS_FAR_AS_PAYS, "pruning": "none"}
    engine = engines(QWEN, drafter=0, tensor_parallel_size=2, lvspec=settings)
    before = engine.llm.collective_rpc(costs_of)
    assert before[0] == before[1]
    assert 0 < before[0].target[0] <= before[0].target[-1]
    # Whether it pays hangs on the machine, so that a first part is drafted for whether or not.
    engine.llm.collective_rpc(draft_whether_it_pays_or_not, args=(True,))
    requests = generate_requests(QWEN, count, seed=2)
    got = engine.run(requests[:20], (8, 1, 5))
    stats = engine.stats()  # asserts that the ranks agree
    assert stats["drafted_tokens"] > 0 == stats["skipped_cost"]
    first, second = engine.llm.collective_rpc(costs_of)
    assert first == second
    assert replace(first, prompt=0.0) == before[0], "of what is measured at the start nothing changes"
    assert first.prompt > 0
    first, second = engine.llm.collective_rpc(corrections_of)
    assert first == second and {part for part, _ in first} == {"target", "first", "draft"}
    engine.llm.collective_rpc(draft_whether_it_pays_or_not, args=(False,))
    drafted = stats["drafted_tokens"]
    got += engine.run(requests[20:], (8, 1, 5))
    stats = engine.stats()
    assert stats["drafted_tokens"] + stats["skipped_cost"] > drafted
    assert stats["pages_free"] == stats["pages_total"]
    assert token_ids(got) == token_ids(want)
    first, second = engine.llm.collective_rpc(corrections_of)
    assert first == second


# The target as its own drafter ----------------------------------------------------------------------------------------


def test_the_target_as_its_own_drafter_takes_no_memory_but_for_its_cache(engines):
    engine = engines(QWEN, lvspec={**SELF, "self_cache": "copy", "pruning": "none"})
    runner = runner_of(engine)
    model = runner.drafter.drafter.model
    assert model.num_weight_bytes == 0
    ours, theirs = (dict(m.named_parameters()) for m in (model.model, runner.get_model()))
    assert {name: p.data_ptr() for name, p in ours.items()} == {name: p.data_ptr() for name, p in theirs.items()}
    # And the target's layers look at the target's own cache again.
    for name, layer in model._layers.items():
        assert layer.kv_cache.data_ptr() != model.caches[name].data_ptr()
        assert len(layer.kv_cache) == runner.kv_cache_config.num_blocks


@pytest.mark.parametrize("cache", ["copy", "compute"])
@pytest.mark.parametrize("family", [QWEN, LLAVA], ids=lambda f: f.checkpoint)
def test_the_unpruned_target_believes_itself(family, cache, engines):
    engine = engines(family, lvspec={**SELF, "self_cache": cache, "pruning": "none"})
    assert runner_of(engine).drafter.drafter.model.copies == (cache == "copy")
    requests = generate_requests(family, 27, seed=1)
    for request in requests:
        request.params = greedy(40)
    before = engine.stats()["drafted_tokens"], engine.metric("spec_decode_num_accepted_tokens")
    engine.run(requests, SIZES)
    stats = engine.stats()
    drafted = stats["drafted_tokens"] - before[0]
    assert drafted > 500
    assert engine.metric("spec_decode_num_accepted_tokens") - before[1] == drafted
    assert stats["pages_free"] == stats["pages_total"]


def test_pruned_the_target_believes_itself_less_and_copies_not_less_than_what_is_computed(engines):
    samples = videofacts(8, 8, tasks=("caption",), num_frames=PAIRS["qwen2_5_vl"].num_frames)
    requests = [
        Request("video", turn("user", QWEN.video + s.question) + "<|im_start|>assistant\n",
                {"video": [s.load_video()]}, greedy(128, ignore_eos=False))
        for s in samples
    ]  # fmt: skip
    shares, answers = {}, {}
    for cache in ("copy", "compute"):
        engine = engines(QWEN, pair=True, lvspec={**SELF, "self_cache": cache, "pruning_ratio": 0.9})
        answers[cache] = token_ids(engine.run(requests))
        drafted = engine.stats()["drafted_tokens"]
        assert drafted > 300
        shares[cache] = engine.metric("spec_decode_num_accepted_tokens") / drafted
    assert answers["copy"] == answers["compute"]
    assert max(shares.values()) < 0.95
    # What is copied has seen the whole video, what is computed a tenth of it.
    assert shares["copy"] > shares["compute"] - 0.03


def test_a_target_that_no_partner_is_known_of_drafts_for_itself(engines):
    # All by default, but that on this machine drafting might not pay.
    engine = engines(QWEN, speculative_config="lvspec", lvspec=SELF)
    runner = runner_of(engine)
    drafter = runner.drafter.drafter
    config = runner.drafter.config
    assert (config.model, config.draft_length, config.only_if_faster) == ("self", "fixed", True)
    assert drafter.model.copies and drafter.model.num_weight_bytes == 0
    assert drafter.model.model is runner.get_model()
    requests = generate_requests(QWEN, 18, seed=3)
    for request in requests:
        request.params = greedy(24)
        request.params.extra_args = {"lvspec_policy": "strict"}
    drafter.payoff.costs = FREE
    before = engine.stats()["drafted_tokens"]
    got = engine.run(requests)
    assert token_ids(got) == token_ids(engines(QWEN).run(requests))
    assert engine.stats()["drafted_tokens"] > before + 100


def test_the_target_drafts_for_itself_when_the_states_of_one_of_its_layers_are_compared(engines):
    """Which it then returns beside the last ones, to the drafter, too."""
    compared = {"policy": "lvspec", "anchor_source": "layer:1"}
    engine = engines(QWEN, lvspec={**SELF, **compared, "pruning": "none"})
    requests = generate_requests(QWEN, 18, seed=3)
    got = engine.run(requests)
    # All but what is drafted behind the last token that fits.
    assert engine.metric("spec_decode_num_accepted_tokens") > 0.9 * engine.stats()["drafted_tokens"] > 90
    assert token_ids(got) == token_ids(engines(QWEN).run(requests))
    nothing_left(engine)


# Load -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drafter", "settings"),
    [
        pytest.param(0, {"only_if_faster": True}, id="fixed"),
        pytest.param(0, {**AS_FAR_AS_PAYS, "pruning": "attention"}, id="attention"),
        pytest.param(None, {**AS_FAR_AS_PAYS, **SELF}, id="self"),
    ],
)
def test_under_load_nothing_is_drafted_and_drafting_goes_on_when_it_is_over(drafter, settings, engines):
    requests = ask_videos(QWEN, [(i, "Describe the video.") for i in range(6)], greedy(48))
    want = token_ids(engines(QWEN).run(requests))
    engine = engines(QWEN, drafter=drafter, lvspec=settings)
    before = engine.stats()

    def set_costs(costs: StepCosts) -> None:
        engine.llm.collective_rpc(lambda worker: setattr(worker.model_runner.drafter.drafter.payoff, "costs", costs))

    def counts() -> dict[str, int]:
        return {k: v - before[k] for k, v in engine.llm.collective_rpc("lvspec_stats")[0].items() if k in before
                and isinstance(v, int)}  # fmt: skip

    core = engine.llm.llm_engine
    for i, request in enumerate(requests):
        core.add_request(f"load-{i}", request.inputs, request.params)
    set_costs(LINEAR)
    for _ in range(16):
        assert not [o for o in core.step() if o.finished]
    under_load = counts()
    assert under_load["drafted_tokens"] == under_load["prefills"] == under_load["forwards"] == 0
    assert under_load["skipped_cost"] > 50
    set_costs(FREE)
    answers = {}
    steps = 0
    while core.has_unfinished_requests():
        answers |= {o.request_id: list(o.outputs[0].token_ids) for o in core.step() if o.finished}
        steps += 1
    assert [answers[f"load-{i}"] for i in range(len(requests))] == want
    later = counts()
    assert later["prefills"] == len(requests), "requests that were running are drafted for"
    assert later["drafted_tokens"] > 50
    assert later["pruned_uniformly"] == under_load["pruned_uniformly"]
    # And back under load: what is drafted for is let alone, and its pages are free in the end.
    set_costs(LINEAR)
    assert token_ids(engine.run(requests)) == want
    stats = engine.stats()
    assert stats["drafted_tokens"] - before["drafted_tokens"] == later["drafted_tokens"]
    assert stats["pages_free"] == stats["pages_total"]


# One encoding ---------------------------------------------------------------------------------------------------------


def test_two_questions_about_one_video_see_other_parts_of_one_encoding(engines, monkeypatch):
    engine = engines(QWEN, drafter=0, lvspec={"pruning": "attention"})
    drafter = runner_of(engine).drafter.drafter
    encoded, kept = [], []
    encode, keep = drafter.model.encode, drafter._kept_rows
    monkeypatch.setattr(drafter.model, "encode", lambda payload: encoded.append(payload.identifier) or encode(payload))
    monkeypatch.setattr(drafter, "_kept_rows", lambda *args: kept.append(keep(*args)) or kept[-1])
    requests = ask_videos(
        QWEN, [(77, "the red circle moves up, then left. " * 5 + ask) for ask in ("Describe it.", "What is blue?")],
        greedy(24),
    )  # fmt: skip
    before = engine.stats()
    got = engine.run(requests, (1,))
    after = engine.stats()
    assert got[1].num_cached_tokens > 200, "the second question does not bring the video's pixels"
    assert len(encoded) == 1
    assert after["prefills"] == before["prefills"] + 2
    assert after["skipped_embeddings"] == before["skipped_embeddings"]
    assert after["pruned_uniformly"] == before["pruned_uniformly"]
    assert len(kept) == 2 and len(kept[0]) == len(kept[1]) and not torch.equal(*kept)
    assert token_ids(got) == token_ids(engines(QWEN).run(requests, (1,)))


# What the capture relies on -------------------------------------------------------------------------------------------


def test_vllm_still_calls_its_backends_as_the_capture_expects():
    forward = list(inspect.signature(AttentionImpl.forward).parameters)
    assert forward[:8] == ["self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"]
    for method, names in (
        (CPUAttentionBackendImpl.forward, forward),
        (
            CPUAttentionBackendImpl.do_kv_cache_update,
            ["self", "layer", "key", "value", "kv_cache", "slot_mapping"],
        ),
    ):
        assert list(inspect.signature(method).parameters)[: len(names)] == names
    # `forward` is looked up on the instance for each call, where the wrapper stands.
    assert "self.impl.forward(" in inspect.getsource(vllm_attention.unified_attention_with_output)
    assert "impl.do_kv_cache_update(" in inspect.getsource(vllm_attention.unified_kv_cache_update)
    assert not CPUAttentionBackendImpl.__dict__.get("__slots__")


def test_in_a_prefill_the_layers_that_are_looked_at_see_all_queries_after_their_keys_were_written(engines, monkeypatch):
    engine = engines(QWEN, drafter=0, lvspec={"pruning": "attention"})
    runner = runner_of(engine)
    layers = runner.vllm_config.compilation_config.static_forward_context
    events: list[tuple] = []

    def watch(name: str, impl: Any) -> None:
        forward, update = impl._lvspec_forward, impl.do_kv_cache_update

        def seen_forward(*args: Any, **kwargs: Any) -> Any:
            layer, query, _, _, kv_cache, metadata = args
            events.append(("forward", name, query.shape, kv_cache.data_ptr(), layer is layers[name], set(kwargs)))
            assert metadata.num_actual_tokens == len(query)
            return forward(*args, **kwargs)

        def seen_update(*args: Any) -> Any:
            _, key, _, kv_cache, slots = args
            events.append(("update", name, key.shape, kv_cache.data_ptr(), len(slots)))
            return update(*args)

        monkeypatch.setattr(impl, "_lvspec_forward", seen_forward)
        monkeypatch.setattr(impl, "do_kv_cache_update", seen_update)

    chosen = runner.scores._layers
    assert len(chosen) == 2, "this target has no more"
    for name in chosen:
        assert layers[name].impl.forward.func == runner.scores._attend
        watch(name, layers[name].impl)
    (request,) = ask_videos(QWEN, [(91, "Describe the video.")], greedy(1))
    (output,) = engine.run([request])
    length, heads, size = len(output.prompt_token_ids) - output.num_cached_tokens, 2, 32
    assert length > 100
    assert [event[:2] for event in events] == [(what, name) for name in chosen for what in ("update", "forward")]
    for update, forward in zip(events[::2], events[1::2], strict=True):
        assert update[2] == forward[2] == (length, heads, size)
        assert update[3] == forward[3] == layers[update[1]].kv_cache.data_ptr()
        assert forward[4] and "output" in forward[5]


# The target's scores --------------------------------------------------------------------------------------------------


@dataclass
class Scored:
    """Scores of a request's items, and what they follow from."""

    token_ids: tuple[int, ...]
    begin: int  # place of the first query
    num_queries: int
    positions: torch.Tensor | None
    scores: list[torch.Tensor | None]


def start_recording(worker: Any) -> None:
    """Keep what the drafter is told by `PromptScores.of`, on each rank."""
    runner = worker.model_runner
    drafter, scores = runner.drafter.drafter, runner.scores
    found: list[Scored] = []
    worker.lvspec_recorded = found
    firsts: dict[str, int] = {}
    begin_forward = type(scores).begin_forward

    def begin() -> None:
        begin_forward(scores)
        for queries in scores._queries:
            firsts.setdefault(queries.req_id, queries.position)

    def of(req_id: str) -> list[torch.Tensor | None]:
        state, prompt = runner.requests[req_id], scores._prompts.get(req_id)
        num_queries = prompt.num_queries if prompt is not None else 0
        result = type(scores).of(scores, req_id)
        places = state.mrope_positions
        found.append(
            Scored(tuple(state.prompt_token_ids), firsts.pop(req_id, -1), num_queries, places, result)
        )  # fmt: skip
        return result

    scores.begin_forward = begin
    drafter._scores = of


def recorded(worker: Any) -> list[Scored]:
    found, worker.lvspec_recorded[:] = list(worker.lvspec_recorded), []
    return found


def scored(engine: Engine, requests: Sequence[Request], batch_sizes: Sequence[int] = (8,)) -> list[list[Scored]]:
    """By rank: scores of each request's videos, in the requests' order."""
    engine.llm.collective_rpc(start_recording)
    outputs = engine.run(requests, batch_sizes)
    ranks = engine.llm.collective_rpc(recorded)
    order = [tuple(o.prompt_token_ids) for o in outputs]
    assert all(sorted(s.token_ids for s in rank) == sorted(order) for rank in ranks)
    return [sorted(rank, key=lambda s: order.index(s.token_ids)) for rank in ranks]


@functools.cache
def eager(name: str) -> Any:
    path = str(PAIRS[name].target)
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@dataclass
class Seen:
    """What transformers makes of a prompt."""

    visual: torch.Tensor  # places of visual tokens, ascending
    lengths: list[int]  # of the videos
    attention: torch.Tensor  # [num_layers, num_heads, length, length], softmax over keys
    hidden: torch.Tensor  # [length, hidden_size], behind the last norm

    def queries(self, begin: int = 0) -> range:
        """The last of the text behind the last video, from `begin` on."""
        length = len(self.hidden)
        return range(max(int(self.visual[-1]) + 1, length - MAX_QUERIES, begin), length)

    def attention_scores(self, layers: Sequence[int], begin: int = 0) -> list[torch.Tensor]:
        rows = self.queries(begin)
        chosen = self.attention[list(layers)][:, :, rows.start :][..., self.visual]
        return list(chosen.sum((0, 1, 2)).div(len(rows)).split(self.lengths))

    def similarity_scores(self, begin: int = 0) -> list[torch.Tensor]:
        text, visual = self.hidden[self.queries(begin).start :], self.hidden[self.visual]
        cosines = torch.nn.functional.cosine_similarity(text[:, None], visual[None], dim=-1)
        return list(cosines.mean(0).split(self.lengths))


@torch.inference_mode()
def read_by_transformers(family: Family, request: Request, found: Scored) -> Seen:
    """With the positions that vLLM gave the tokens, where these are M-RoPE's."""
    name = family.checkpoint
    model, pair = eager(name), FAMILIES[name]
    ids = torch.tensor(found.token_ids)
    config = model.config
    video_id = config.video_token_id if name == QWEN.checkpoint else config.video_token_index
    visual = (ids == video_id).nonzero()[:, 0]
    parts = [
        pair.encode_visual(model, pair.pixel_values([frames]), len(frames), 1)[0] for frames, _ in request.data["video"]
    ]
    embeds = model.get_input_embeddings()(ids)
    embeds[visual] = torch.cat(parts)
    positions = torch.arange(len(ids))[None] if found.positions is None else found.positions[:, None, : len(ids)].long()
    out = model.model.language_model(
        inputs_embeds=embeds[None], position_ids=positions, use_cache=False, output_attentions=True
    )
    attention = torch.cat(out.attentions)
    return Seen(visual, [len(part) for part in parts], attention, out.last_hidden_state[0])


def scene_requests(family: Family) -> list[Request]:
    """Short and long questions, two videos with text between, an earlier turn; other lengths where these may differ."""
    frames = PAIRS[family.checkpoint].num_frames
    other = frames if family is LLAVA else 9
    answer = "<|im_start|>assistant\n"
    long = "the red circle moves up, then left. " * 18
    two = {"video": [video(41, other), video(42, frames)]}
    turns = turn("user", family.video + "Go on.") + turn("assistant", "The red circle moves first.")
    return [
        Request("video", turn("user", family.video + "Describe the video.") + answer, {"video": [video(40, frames)]}),
        Request("video", turn("user", family.video + long + "Go on.") + answer, {"video": [video(43, other)]}),
        Request("two_videos", turn("user", family.video + "And" + family.video + "Compare them.") + answer, two),
        Request("two_turns", turns + turn("user", "And then?") + answer, {"video": [video(44, frames)]}),
    ]


def answering(requests: Sequence[Request]) -> list[Request]:
    for request in requests:
        request.params = greedy(4)
    return list(requests)


def same_scores(found: Sequence[torch.Tensor | None], want: Sequence[torch.Tensor]) -> None:
    assert [len(x) for x in found] == [len(x) for x in want]
    for ours, theirs in zip(found, want, strict=True):
        assert ours.dtype == torch.float32 and ours.device.type == "cpu"
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-3)


ALL_LAYERS = range(6)  # that the bundled targets have
THREE_LAYERS = (0, 2, 5)


def scoring_engine(engines: Callable[..., Engine], family: Family, pruning: str, **options: Any) -> Engine:
    return engines(family, pair=True, lvspec={"pruning": pruning}, **options)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        pytest.param({}, 4, id="together"),
        pytest.param({"max_num_batched_tokens": 96, "enable_prefix_caching": False}, 4, id="chunked_prefill"),
    ],
)
def test_attention_is_what_transformers_computes(options, size, engines):
    engine = scoring_engine(engines, QWEN, "attention", **options)
    engine.llm.reset_prefix_cache()
    requests = answering(scene_requests(QWEN))
    (found,) = scored(engine, requests, (size,))
    lengths = []
    for request, ours in zip(requests, found, strict=True):
        seen = read_by_transformers(QWEN, request, ours)
        assert ours.num_queries == len(seen.queries())
        lengths.append(ours.num_queries)
        same_scores(ours.scores, seen.attention_scores(ALL_LAYERS))
        assert all(float(x.std() / x.mean()) > 0.1 for x in ours.scores), "scores that are all alike show nothing"
    assert max(lengths) == MAX_QUERIES > min(lengths)


def test_attention_of_some_layers_of_the_other_family_is_what_transformers_computes(engines, monkeypatch):
    monkeypatch.setattr(scoring, "MAX_LAYERS", len(THREE_LAYERS))
    engine = scoring_engine(engines, LLAVA, "attention", max_num_batched_tokens=MAX_LAYERS * 64)
    requests = answering(scene_requests(LLAVA))
    (found,) = scored(engine, requests)
    for request, ours in zip(requests, found, strict=True):
        seen = read_by_transformers(LLAVA, request, ours)
        assert ours.num_queries == len(seen.queries())
        same_scores(ours.scores, seen.attention_scores(THREE_LAYERS))


def after_a_prefix_hit(engine: Engine) -> tuple[list[Request], list[Scored]]:
    """Two questions about a video, of which the second finds the video and some of the text in the prefix cache."""
    engine.llm.reset_prefix_cache()
    text = "the red circle moves up, then left. " * 5
    requests = ask_videos(QWEN, [(60, text + "Describe it."), (60, text + "What is left of it in the end?")], greedy(4))
    (found,) = scored(engine, requests, (1,))
    for ours in found:
        assert ours.num_queries == len(ours.token_ids) - ours.begin
    assert found[1].begin % 32 == 0 and found[1].num_queries < found[0].num_queries
    return requests, found


def test_behind_a_prefix_hit_attention_is_that_of_the_queries_that_are_computed(engines):
    requests, found = after_a_prefix_hit(scoring_engine(engines, QWEN, "attention"))
    for request, ours in zip(requests, found, strict=True):
        seen = read_by_transformers(QWEN, request, ours)
        same_scores(ours.scores, seen.attention_scores(ALL_LAYERS, ours.begin))


@pytest.mark.two_ranks
def test_two_ranks_have_the_same_attention_as_one(engines):
    check_two_ranks(engines, "attention", lambda seen: seen.attention_scores(ALL_LAYERS))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="together"),
        pytest.param({"max_num_batched_tokens": 96, "enable_prefix_caching": False}, id="chunked_prefill"),
    ],
)
def test_similarity_is_what_transformers_computes(options, engines):
    engine = scoring_engine(engines, QWEN, "similarity", **options)
    engine.llm.reset_prefix_cache()
    requests = answering(scene_requests(QWEN))
    (found,) = scored(engine, requests)
    for request, ours in zip(requests, found, strict=True):
        seen = read_by_transformers(QWEN, request, ours)
        assert ours.num_queries == len(seen.queries())
        same_scores(ours.scores, seen.similarity_scores())


def test_behind_a_prefix_hit_similarity_is_that_of_the_states_that_are_computed(engines):
    requests, found = after_a_prefix_hit(scoring_engine(engines, QWEN, "similarity"))
    for request, ours in zip(requests, found, strict=True):
        same_scores(ours.scores, read_by_transformers(QWEN, request, ours).similarity_scores(ours.begin))


@pytest.mark.two_ranks
def test_two_ranks_have_the_same_similarity_as_one(engines):
    check_two_ranks(engines, "similarity", lambda seen: seen.similarity_scores())


def check_two_ranks(engines: Callable, pruning: str, want: Callable) -> None:
    engine = scoring_engine(engines, QWEN, pruning, tensor_parallel_size=2)
    requests = answering(scene_requests(QWEN))
    first, second = scored(engine, requests)
    for request, ours, theirs in zip(requests, first, second, strict=True):
        assert ours.num_queries == theirs.num_queries
        assert all(torch.equal(a, b) for a, b in zip(ours.scores, theirs.scores, strict=True)), "not one bit may differ"
        same_scores(ours.scores, want(read_by_transformers(QWEN, request, ours)))


# Where nobody can look on ---------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(checkpoint: Callable[..., str]):
    """`fresh(drafter, **options)`: an engine that no other test gets."""
    started: list[Engine] = []

    def start(drafter: int | None, **options: Any) -> Engine:
        path = None if drafter is None else checkpoint("qwen2_5_vl", seed=drafter)
        started.append(Engine(checkpoint("qwen2_5_vl", seed=0), path, **options))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


def refuse(*args: Any) -> KVLayout:
    raise UnknownLayoutError("a layout that nobody knows")


def test_where_keys_cannot_be_read_videos_are_pruned_uniformly(fresh, oracle, monkeypatch):
    want = oracle(QWEN, 18, 2)
    warnings: list[str] = []
    monkeypatch.setattr(scoring.logger, "warning", lambda message, *args: warnings.append(message % args))
    monkeypatch.setattr(scoring, "KVLayout", refuse)
    engine = fresh(0, lvspec={"pruning": "attention"})
    assert len(warnings) == 1
    assert "pruning=attention" in warnings[0] and "a layout that nobody knows" in warnings[0]
    assert "uniformly" in warnings[0]
    requests = generate_requests(QWEN, 18, seed=2)
    assert token_ids(engine.run(requests)) == token_ids(want)
    stats = engine.stats()
    assert len(warnings) == 1
    assert stats["drafted_tokens"] > 100
    videos = sum(len(r.data.get("video", ())) for r in requests)
    assert 0 < stats["pruned_uniformly"] <= videos + stats["prefills"]
    assert runner_of(engine).scores.looks_at == "grid"
    nothing_left(engine)


def test_what_is_heard_beside_a_video_has_no_scores(monkeypatch):
    monkeypatch.setattr(scoring, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    scores = scoring.PromptScores.__new__(scoring.PromptScores)
    features = [
        MultiModalFeatureSpec(data=None, modality=modality, identifier=modality, mm_position=PlaceholderRange(*place))
        for modality, place in (("video", (9, 4)), ("audio", (2, 3)), ("image", (6, 2)))
    ]
    scores.runner = SimpleNamespace(requests={"a": SimpleNamespace(mm_features=features)})
    scores._prompts = {"a": scoring._Prompt(torch.arange(6.0), num_queries=2)}
    of_video, of_audio, of_image = scores.of("a")
    assert of_video.tolist() == [1.0, 1.5, 2.0, 2.5] and of_image.tolist() == [0.0, 0.5]
    assert not len(of_audio)


def test_an_item_that_no_text_has_asked_about_yet_has_no_scores_and_neither_have_those_before(monkeypatch):
    monkeypatch.setattr(scoring, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    scores = scoring.PromptScores.__new__(scoring.PromptScores)
    features = [
        MultiModalFeatureSpec(data=None, modality="video", identifier=str(at), mm_position=PlaceholderRange(at, 4))
        for at in (2, 9)
    ]
    scores.runner = SimpleNamespace(requests={"a": SimpleNamespace(mm_features=features)})
    scores._prompts = {"a": scoring._Prompt(torch.arange(4.0), num_queries=2)}
    assert scores.of("a") == [None, None]


def test_where_a_cache_cannot_be_copied_the_target_computes_what_it_sees(fresh, oracle, monkeypatch):
    want = oracle(QWEN, 18, 2)
    warnings: list[str] = []
    warn = lambda message, *args: warnings.append(message % args)  # noqa: E731
    monkeypatch.setattr(draft_model.logger, "warning_once", warn)
    monkeypatch.setattr(draft_model, "KVLayout", refuse)
    engine = fresh(None, lvspec=SELF)
    assert [w for w in warnings if "self_cache=copy" in w and "a layout that nobody knows" in w]
    assert not runner_of(engine).drafter.drafter.model.copies
    got = engine.run(generate_requests(QWEN, 18, seed=2))
    assert token_ids(got) == token_ids(want)
    assert engine.stats()["drafted_tokens"] > 100


# Kernels of a drafter that is not compiled ----------------------------------------------------------------------------


def test_a_drafter_runs_the_kernels_that_vllm_has_for_models_that_are_not_compiled(fresh, oracle, monkeypatch):
    """Behind a compiled target, for which vLLM chooses PyTorch's own operations in the whole worker."""
    norm = ir.ops.fused_add_rms_norm
    calls = []

    def spied(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(weight)
        return norm.impls["native"].impl_fn(x, x_residual, weight, epsilon, variance_size)

    def default(vllm_config: VllmConfig) -> IrOpPriorityConfig:
        is_target = vllm_config.additional_config
        return IrOpPriorityConfig.with_default(
            ["native"], fused_add_rms_norm=["native"] if is_target else ["spied", "native"]
        )

    monkeypatch.setattr(norm, "impls", dict(norm.impls))
    monkeypatch.setattr(current_platform, "get_default_ir_op_priority", default)
    norm.register_impl("spied")(spied)
    want = oracle(QWEN, 6, 2)
    engine = fresh(1)
    assert norm.get_priority() == ["native"]
    weights = {p.data_ptr() for p in runner_of(engine).drafter.drafter.model.model.parameters()}
    calls.clear()
    got = engine.run(generate_requests(QWEN, 6, seed=2))
    assert token_ids(got) == token_ids(want)
    stats = engine.stats()
    assert stats["drafted_tokens"] > 30
    # Of the drafter's two layers each has two, and the first of the first layer adds nothing; the last norm follows.
    assert len(calls) >= 4 * stats["forwards"]
    assert all(weight.data_ptr() in weights for weight in calls)
    assert norm.get_priority() == ["native"]


# Where keys and values lie --------------------------------------------------------------------------------------------


HEADS, BLOCK = 2, 32
KINDS_OF_CPUS = [
    (dtype, isa, size)
    for dtype, size in ((torch.float32, 32), (torch.float32, 64), (torch.bfloat16, 64), (torch.bfloat16, 128))
    for isa in sorted({_get_attn_isa(dtype, BLOCK, size), "vec16"})
]


def cpu_layer(isa: str) -> SimpleNamespace:
    current_platform.import_kernels()
    # Its constructor asks for the configuration of an engine, its writing for these two alone.
    impl = object.__new__(CPUAttentionBackendImpl)
    impl.attn_type, impl.kv_cache_dtype = "decoder", "auto"
    return SimpleNamespace(impl=impl, isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)


class StridedImpl:
    """Keys and values side by side, as FlashAttention has them; `write` puts tokens into pages."""

    def __init__(self, write: Callable[[torch.Tensor], torch.Tensor] = lambda x: x):
        self.write = write

    def do_kv_cache_update(self, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: Any):
        size = cache.shape[2]
        cache[slots // size, :, slots % size] = self.write(torch.cat([key, value], dim=-1))


def layers_of_noise(num_blocks: int, size: int, dtype: torch.dtype, seed: int, slots_first: bool = False) -> list:
    """Caches of three layers in one allocation, page by page, as vLLM may have them."""
    generator = torch.Generator().manual_seed(seed)
    inner = (BLOCK, HEADS) if slots_first else (HEADS, BLOCK)
    whole = torch.randn(num_blocks, 3, *inner, 2 * size, generator=generator).to(dtype)
    return [whole[:, i].transpose(1, 2) if slots_first else whole[:, i] for i in range(3)]


def check_layout(layer: Any, layout: KVLayout, size: int, dtype: torch.dtype, slots_first: bool = False) -> None:
    """Reading and copying do what writing by the backend's own means does."""
    make = functools.partial(layers_of_noise, size=size, dtype=dtype, slots_first=slots_first)
    sources, destinations = make(7, seed=1), make(5, seed=2)
    random = np.random.default_rng(0)
    source_slots, slots = (torch.from_numpy(random.permutation(n * BLOCK)[:77]) for n in (7, 5))
    written = torch.randn(3, 2, 77, HEADS, size, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = [cache.clone(memory_format=torch.preserve_format) for cache in destinations]
    for cache, want, (key, value) in zip(sources, expected, written, strict=True):
        layer.impl.do_kv_cache_update(layer, key, value, cache, source_slots)
        layer.impl.do_kv_cache_update(layer, key, value, want, slots)
    unchanged = [cache.clone() for cache in sources]
    for cache, (key, _) in zip(sources, written, strict=True):
        assert torch.equal(layout.read_keys(cache, source_slots), key)
    layout.copy(sources, destinations, source_slots, slots)
    assert all(torch.equal(cache, want) for cache, want in zip(destinations, expected, strict=True))
    assert all(torch.equal(cache, want) for cache, want in zip(sources, unchanged, strict=True))
    # A table of pointers that is kept must not outlive the caches that it points to.
    other = make(6, seed=4)
    again = [cache.clone(memory_format=torch.preserve_format) for cache in other]
    for cache, (key, value) in zip(again, written, strict=True):
        layer.impl.do_kv_cache_update(layer, key, value, cache, slots)
    layout.copy(sources, other, source_slots, slots)
    assert all(torch.equal(cache, want) for cache, want in zip(other, again, strict=True))


def spec_of(dtype: torch.dtype, size: int) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=size, dtype=dtype)


@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's kernels for CPUs")
@pytest.mark.parametrize(("dtype", "isa", "size"), KINDS_OF_CPUS, ids=str)
def test_keys_and_values_of_cpus_are_found_where_vllm_writes_them(dtype, isa, size):
    layer = cpu_layer(isa)
    layout = KVLayout(layer, spec_of(dtype, size), layers_of_noise(2, size, dtype, 0)[1])
    assert not layout.is_strided, "these write the numbers of a key far from each other"
    check_layout(layer, layout, size, dtype)


@pytest.mark.parametrize("slots_first", [False, True], ids=["HND", "NHD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_and_values_that_lie_side_by_side_are_known_to(dtype, slots_first):
    layer = SimpleNamespace(impl=StridedImpl())
    layout = KVLayout(layer, spec_of(dtype, 64), layers_of_noise(2, 64, dtype, 0, slots_first)[1])
    assert layout.is_strided
    check_layout(layer, layout, 64, dtype, slots_first)


def test_keys_and_values_in_an_order_of_their_own_are_found_and_are_not_side_by_side():
    layer = SimpleNamespace(impl=StridedImpl(lambda x: x.flip(-1)))
    layout = KVLayout(layer, spec_of(torch.float32, 32), layers_of_noise(2, 32, torch.float32, 0)[0])
    assert not layout.is_strided
    check_layout(layer, layout, 32, torch.float32)


ELSEWHERE = {
    "halves": lambda x: x / 2,
    "doubles": lambda x: x * 2,
    "rotates": lambda x: x.roll(1, 0) * 3 - 1,
    "keeps_keys_alone": lambda x: torch.cat([x[..., : x.shape[-1] // 2]] * 2, dim=-1),
    "writes_nothing": lambda x: torch.full_like(x, -1),
}


@pytest.mark.parametrize("write", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_backend_that_writes_something_else_is_refused(write):
    layer = SimpleNamespace(impl=StridedImpl(write))
    with pytest.raises(UnknownLayoutError, match="StridedImpl"):
        KVLayout(layer, spec_of(torch.float32, 32), layers_of_noise(2, 32, torch.float32, 0)[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
def test_a_quantised_cache_is_refused(dtype):
    cache = torch.zeros(2, HEADS, BLOCK, 64).to(dtype)
    with pytest.raises(UnknownLayoutError, match=str(dtype)):
        KVLayout(SimpleNamespace(impl=StridedImpl()), spec_of(dtype, 32), cache)
