"""Drafts at which the device still is: the scheduler plans with their lengths, and no output is another one.

CPUs do nothing later. Here they are told not to look at drafted tokens, as on a GPU.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from harness import Engine, in_graphs_of_chains, ragged
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from workload import QWEN, Request, generate_requests, token_ids, turn, video

from vllm_lvspec.draft.drafts import Drafted, Drafts
from vllm_lvspec.draft.learned import RequestHistory
from vllm_lvspec.engine.placeholders import PADDING_TOKEN_ID, Placeholders, num_drafted, padded
from vllm_lvspec.engine.runner import LVSpecGPUModelRunner
from vllm_lvspec.reference import PAIRS

NEW, OLD, VLLMS = "of the last step's drafts", "of an earlier step's", "vLLM's own"


def drafts_of(lengths: list[int], rng: np.random.Generator) -> Drafts:
    """Random drafts, in the drafter's order: by falling length."""
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    made = Drafts(list(lengths), [[] for _ in lengths])
    if order:
        made.drafted = [Drafted(i, 0, RequestHistory(), frozenset()) for i in order]
        made.members = [np.arange(sum(length > n for length in lengths)) for n in range(max(lengths))]
        made.token_ids = torch.from_numpy(rng.integers(1000, size=(max(lengths), len(order))))
        for column, i in enumerate(order):
            made.tokens[i] = made.token_ids[: lengths[i], column].tolist()
    return made


@pytest.mark.parametrize("seed", range(20))
def test_every_token_comes_to_its_place_whenever_it_was_drafted(seed):
    rng = np.random.default_rng(seed)
    placeholders, drafted = Placeholders(), {}
    for names in ("abcd", "bd", "cae"):  # the newest draft of each counts
        lengths = rng.integers(5, size=len(names)).tolist()
        made = drafts_of(lengths, rng)
        assert placeholders.put(names, made) == [[-1] * n for n in lengths]
        drafted |= {name: tokens for name, tokens in zip(names, made.tokens, strict=True) if tokens}
    names = rng.permutation(list("abcdefg")).tolist()
    scheduled: dict[str, list[int]] = {}
    for name, tokens in drafted.items():
        if count := int(rng.integers(len(tokens) + 1)):  # the budget may cut a draft
            scheduled[name] = [-1] * count
    scheduled["f"] = [7, 8]  # known to the scheduler
    scheduled["g"] = [-1, -1]  # vLLM's own
    counted = {name: len(tokens) for name, tokens in scheduled.items()}
    if seed % 2:
        for name in names:  # the budget may cut padding, too
            scheduled[name] = padded([scheduled.get(name, [])], 6)[0][: int(rng.integers(counted.get(name, 0), 7))]
        scheduled = {name: tokens for name, tokens in scheduled.items() if tokens}
    assert {name: num_drafted(tokens) for name, tokens in scheduled.items()} == dict.fromkeys(scheduled, 0) | counted
    counts = [1 + int(rng.integers(3)) * (name not in scheduled) + len(scheduled.get(name, ())) for name in names]
    ends = np.cumsum(counts)
    wanted = np.arange(2000, 2000 + ends[-1])
    for name, end in zip(names, ends.tolist(), strict=True):
        if name in scheduled and name not in "fg":
            begin, count = end - len(scheduled[name]), counted.get(name, 0)
            wanted[begin : begin + count] = drafted.get(name, [])[:count]
    input_ids = torch.arange(2000, 2000 + ends[-1] + 3, dtype=torch.int32)
    placeholders.fill_inputs(input_ids, names, scheduled, ends)
    assert input_ids.tolist() == [*wanted.tolist(), *range(2000 + ends[-1], 2003 + ends[-1])]

    lists = [list(scheduled.get(name, ())[: counted.get(name, 0)]) for name in names]
    placeholders.fill_lists(names, lists)
    known = {**drafted, "f": [7, 8], "g": [-1, -1]}
    assert lists == [known[n][: counted[n]] if n in counted else [] for n in names]


def test_drafts_that_some_leave_early_can_not_be_placed():
    """As where drafted tokens are looked at, so that nobody needs to."""
    made = drafts_of([3, 2], np.random.default_rng(0))
    made.members = [np.array([0, 1]), np.array([1])]
    with pytest.raises(AssertionError):
        Placeholders().put(["a", "b"], made)


def test_who_is_gone_leaves_nothing():
    placeholders = Placeholders()
    placeholders.put(["a", "b"], drafts_of([3, 2], np.random.default_rng(0)))
    placeholders.forget("a")
    placeholders.forget("unknown")
    assert list(placeholders._drafts) == ["b"]


@contextmanager
def running_ahead(engine: Engine, yes: bool = True) -> Iterator[Counter[str]]:
    """Drafts are placeholders, or not; counts whose they were when they came into the target's inputs."""
    runner: LVSpecGPUModelRunner
    (runner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner)
    placeholders = runner.drafter.placeholders
    filled: Counter[str] = Counter()
    newest: list[Drafts] = []
    put, fill = placeholders.put, placeholders.fill_inputs

    def watched_put(req_ids: Any, drafts: Drafts) -> list[list[int]]:
        newest[:] = [drafts]
        return put(req_ids, drafts)

    def watched_fill(input_ids: torch.Tensor, req_ids: Any, scheduled: Any, ends: np.ndarray) -> None:
        for name in req_ids:
            if not (tokens := scheduled.get(name)):
                continue
            if tokens[0] == PADDING_TOKEN_ID:
                filled[VLLMS] += len(tokens)
            elif tokens[0] == -1:
                filled[NEW if placeholders._drafts[name][0] is newest[0] else OLD] += num_drafted(tokens)
        fill(input_ids, req_ids, scheduled, ends)

    drafter = runner.drafter.drafter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafter, "sees_tokens", False)
        patch.setattr(placeholders, "fill_inputs", watched_fill)
        if yes:
            patch.setattr(placeholders, "put", watched_put)
        else:
            patch.setattr(type(drafter), "runs_ahead", False)
        yield filled
    engine.stats()
    assert not placeholders._drafts and runner.drafter._started is None


# Prompts in chunks, too few pages for all, and in every second step no room for most drafts.
SCARCE = {"max_num_batched_tokens": 96, "num_gpu_blocks_override": 19}


@pytest.mark.parametrize(
    ("drafter", "options"),
    [
        pytest.param(0, {}, id="plenty"),
        pytest.param(0, SCARCE, id="scarce"),
        pytest.param(1, SCARCE, id="scarce and mostly rejected"),
    ],
)
def test_no_output_changes_where_the_scheduler_does_not_know_the_drafts(drafter, options, engines, oracle, monkeypatch):
    count = 36
    want = oracle(QWEN, count, 2)
    engine = engines(QWEN, drafter=drafter, **options)
    requests = generate_requests(QWEN, count, seed=2)
    assert any(r.params.repetition_penalty != 1 for r in requests) and any(r.params.bad_words for r in requests)
    if options:
        let_drafts_wait(engine, monkeypatch)
    before = engine.metric("num_preemptions")
    accepted = {}
    for yes in (True, False):
        engine.llm.reset_prefix_cache()
        num_accepted = engine.metric("spec_decode_num_accepted_tokens")
        with running_ahead(engine, yes) as filled:
            got = engine.run(requests, (8, 8, 3, 8, 1))
        assert token_ids(got) == token_ids(want)
        assert (filled[NEW] > 250) == yes
        assert (filled[OLD] > 0) == (yes and bool(options))
        accepted[yes] = engine.metric("spec_decode_num_accepted_tokens") - num_accepted
    assert accepted[True] == accepted[False]
    assert (engine.metric("num_preemptions") > before) == bool(options)
    stats = engine.stats()
    assert stats["pages_free"] == stats["pages_total"]


@contextmanager
def counted_by_vllm(engine: Engine) -> Iterator[Counter[str]]:
    """Drafts, drafted and accepted tokens, as they come to vLLM's metrics."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    make, counts = scheduler.make_stats, Counter()

    def watched(spec_decoding_stats: Any = None, *args: Any, **kwargs: Any) -> Any:
        if spec_decoding_stats is not None:
            for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
                counts[name] += getattr(spec_decoding_stats, name)
        return make(spec_decoding_stats, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "make_stats", watched)
        yield counts


@pytest.mark.parametrize("yes", [True, False], ids=["ahead", "not ahead"])
@pytest.mark.parametrize(
    ("drafter", "options"),
    [pytest.param(0, {}, id="plenty"), pytest.param(1, SCARCE, id="scarce and mostly rejected")],
)
def test_no_output_changes_and_nothing_is_counted_where_drafts_are_padded(drafter, options, yes, engines, oracle):
    count = 27
    want = oracle(QWEN, count, 2)
    engine = engines(QWEN, drafter=drafter, **options)
    requests = generate_requests(QWEN, count, seed=2)
    counted = {}
    for pads in (False, True):
        engine.llm.reset_prefix_cache()
        before = engine.stats()
        with (
            running_ahead(engine, yes),
            ragged(engine),
            counted_by_vllm(engine) as by_vllm,
            in_graphs_of_chains(engine) if pads else nullcontext() as seen,
        ):
            got = engine.run(requests, (8, 8, 3, 8, 1))
        assert token_ids(got) == token_ids(want)
        after = engine.stats()
        counted[pads] = by_vllm, {name: after[name] - before[name] for name in ("verified_strict", "strict_chains")}
    assert seen["padding"] > 250
    if not options:  # nobody is preempted, or waits
        assert seen["whole"] > 0.5 * seen["steps"]
        assert counted[True] == counted[False] and counted[True][0]["num_draft_tokens"] > 250


def let_drafts_wait(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second step has room for some running requests only."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    schedule, budget = scheduler.schedule, scheduler.max_num_scheduled_tokens
    turn = itertools.cycle([budget, 20])

    def narrow(*args: Any) -> Any:
        scheduler.max_num_scheduled_tokens = next(turn)
        return schedule(*args)

    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", budget)
    monkeypatch.setattr(scheduler, "schedule", narrow)


@pytest.mark.parametrize("yes", [True, False])
def test_requests_that_begin_with_one_token_are_filled_up_with_padding(yes, engines):
    """Whose prompt but for a token is cached; vLLM fills them up to the number that others have."""
    engine = engines(QWEN, drafter=0)
    words = {"prompt_token_ids": [*([5, 7, 11, 13] * 40)[:64], 9]}  # of two blocks and one more
    engine.llm.generate(words, greedy(1), use_tqdm=False)
    others = generate_requests(QWEN, 4, seed=21)
    for request in others:
        request.params = greedy(60)
    forced = StructuredOutputsParams(choice=["a red circle moves", "a blue square slides to the left"])
    params = [
        greedy(20),
        SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3),
        SamplingParams(temperature=0, max_tokens=20, structured_outputs=forced),
    ]
    want = [engines(QWEN).llm.generate(words, p, use_tqdm=False)[0].outputs[0].token_ids for p in params]
    engine = engines(QWEN, drafter=0)
    core = engine.llm.llm_engine
    answers: dict[str, list[int]] = {}
    before = engine.stats()
    with running_ahead(engine, yes) as filled, counted_by_vllm(engine) as by_vllm:
        for i, request in enumerate(others):
            core.add_request(f"other-{i}", request.inputs, request.params)
        for step in range(10**4):
            if step == 8:
                for i, asked in enumerate(params):
                    core.add_request(f"again-{i}", words, asked)
            for output in core.step():
                if output.finished:
                    answers[output.request_id] = list(output.outputs[0].token_ids)
            if step > 8 and not core.has_unfinished_requests():
                break
    assert filled[VLLMS] == 3 * engine.llm.llm_engine.vllm_config.speculative_config.num_speculative_tokens
    # None of it is verified, and so it has no logits.
    verified, drafted = (engine.stats()[name] - before[name] for name in ("verified_strict", "drafted_tokens"))
    assert verified == by_vllm["num_draft_tokens"] <= drafted
    assert [answers[f"again-{i}"] for i in range(len(params))] == [list(tokens) for tokens in want]


def test_grammars_see_what_they_are_asked_to_allow_and_others_go_on(engines):
    """A step in which one request has a grammar is drafted for while the host waits, and then they mix."""
    body = turn("user", QWEN.video + "Describe the video.") + "<|im_start|>assistant\n"
    answers = ["a red circle moves", "a blue square slides to the left"]
    choices = StructuredOutputsParams(choice=answers)
    forced = SamplingParams(temperature=0, max_tokens=40, structured_outputs=choices)
    free = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, presence_penalty=0.5)
    requests = [
        Request("video", body, {"video": [video(i)]}, forced if i == 1 else free.clone() if i % 2 else greedy(60))
        for i in range(6)
    ]
    want = token_ids(engines(QWEN).run(requests))
    engine = engines(QWEN, drafter=0)
    with running_ahead(engine) as filled:
        got = engine.run(requests)
    assert token_ids(got) == want
    assert got[1].outputs[0].text in answers
    assert filled[NEW] > 100


@pytest.mark.parametrize("drops", [True, False], ids=["as it is", "nothing dropped"])
def test_grammars_of_requests_that_join_others_whose_drafts_are_padded(drops, engines, monkeypatch):
    body = turn("user", QWEN.video + "Describe the video.") + "<|im_start|>assistant\n"
    answers = ["a red circle moves", "a blue square slides to the left"]
    forced = SamplingParams(temperature=0, max_tokens=40, structured_outputs=StructuredOutputsParams(choice=answers))
    inputs = [{"prompt": body, "multi_modal_data": {"video": [video(i)]}} for i in range(8)]
    params = [greedy(60)] * 4 + [forced] * 4
    want = token_ids(engines(QWEN).llm.generate(inputs, params, use_tqdm=False))
    engine = engines(QWEN, drafter=0)
    core = engine.llm.llm_engine
    if not drops:
        scheduler = core.engine_core.engine_core.scheduler
        monkeypatch.setattr(scheduler, "_drop_useless_padding", lambda: None)
    got: dict[str, list[int]] = {}
    with running_ahead(engine), ragged(engine), in_graphs_of_chains(engine) as seen:
        for step in itertools.count():
            for i in range(4) if step == 0 else [step // 2 + 1] if step in (6, 8, 10, 12) else []:
                core.add_request(f"padded-{i}", inputs[i], params[i])
            for output in core.step():
                if output.finished:
                    got[output.request_id] = list(output.outputs[0].token_ids)
            if step > 12 and not core.has_unfinished_requests():
                break
    assert [got[f"padded-{i}"] for i in range(8)] == [list(tokens) for tokens in want]
    assert seen["padding"] > 50


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def test_loose_answers_are_the_same_and_times_add_up(engines):
    engine = engines(QWEN, pair=True, lvspec={"policy": "lvspec"})
    frames = PAIRS[QWEN.checkpoint].num_frames
    prompt = turn("user", QWEN.video + "Describe the video in detail.") + "<|im_start|>assistant\n"
    requests = [
        Request("video", prompt, {"video": [video(i, frames)]}, SamplingParams(temperature=t, seed=i, max_tokens=96))
        for i in range(6)
        for t in ((0.0, 1.0)[i % 2],)
    ]
    answers, drafted = {}, {}
    for yes in (True, False):
        engine.llm.reset_prefix_cache()
        started, before = time.perf_counter(), step_times(engine)
        with running_ahead(engine, yes) as filled:
            answers[yes] = token_ids(engine.run(requests, (4, 2)))
        spent = {name: value - before[name] for name, value in step_times(engine).items()}
        assert bool(filled) == yes
        assert spent["draft_seconds"] > 0 and 0 < spent["verify_seconds"] < spent["target_seconds"]
        assert spent["draft_seconds"] + spent["target_seconds"] < time.perf_counter() - started
        drafted[yes] = spent["drafted_tokens"], spent["steps"], spent["requests"]
    assert answers[True] == answers[False]
    assert drafted[True] == drafted[False] and drafted[True][0] > 200
    for pads in (False, True):
        engine.llm.reset_prefix_cache()
        with ragged(engine), in_graphs_of_chains(engine) if pads else nullcontext() as seen:
            answers[pads] = token_ids(engine.run(requests, (4, 2)))
    assert answers[True] == answers[False]
    assert seen["padding"] > 100


def step_times(engine: Engine) -> dict[str, float]:
    return engine.llm.collective_rpc("lvspec_step_times")[0]


def test_requests_that_are_gone_before_their_drafts_are_verified_harm_nobody(engines):
    engine = engines(QWEN, drafter=1)
    with running_ahead(engine):
        engine.run_and_abort(generate_requests(QWEN, 18, seed=5), max_tokens=200, before_step=28)
        fresh = generate_requests(QWEN, 8, seed=6)
        got = token_ids(engine.run(fresh))
    stats = engine.stats()
    assert stats["pages_free"] == stats["pages_total"]
    assert got == token_ids(engines(QWEN).run(fresh))


@pytest.mark.two_ranks
def test_two_ranks_put_the_same_tokens_into_their_inputs(engines: Callable[..., Engine], oracle):
    count = 27
    want = oracle(QWEN, count, 2)
    engine = engines(QWEN, drafter=0, tensor_parallel_size=2, lvspec={"pruning": "none"})
    engine.llm.collective_rpc(look_at_tokens, args=(False,))
    engine.llm.collective_rpc(count_placeholders)
    got = engine.run(generate_requests(QWEN, count, seed=2), (8, 1, 5))
    stats = engine.stats()  # asserts that the ranks agree
    assert token_ids(got) == token_ids(want)
    first, second = engine.llm.collective_rpc(num_placeholders)
    assert first == second == stats["drafted_tokens"] > 150
    assert engine.metric("spec_decode_num_accepted_tokens") > 0.5 * stats["drafted_tokens"]
    engine.llm.collective_rpc(have_graphs_of_chains)
    got = engine.run(generate_requests(QWEN, count, seed=2), (8, 1, 5))
    engine.llm.collective_rpc(look_at_tokens, args=(True,))
    assert token_ids(got) == token_ids(want)
    first, second = engine.llm.collective_rpc(num_padding)
    assert first == second > 10
    engine.stats()


def look_at_tokens(worker: Any, yes: bool) -> None:
    worker.model_runner.drafter.drafter.sees_tokens = yes


def count_placeholders(worker: Any) -> None:
    placeholders = worker.model_runner.drafter.placeholders
    put, worker.num_placeholders = placeholders.put, 0

    def counted(req_ids: Any, drafts: Drafts) -> list[list[int]]:
        worker.num_placeholders += sum(drafts.lengths)
        return put(req_ids, drafts)

    placeholders.put = counted


def have_graphs_of_chains(worker: Any) -> None:
    runner = worker.model_runner
    execute, worker.num_padding = runner.execute_model, 0

    def watched(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        drafted = scheduler_output.scheduled_spec_decode_tokens.values()
        worker.num_padding += sum(tokens.count(PADDING_TOKEN_ID) for tokens in drafted)
        return execute(scheduler_output, *args, **kwargs)

    runner.execute_model = watched
    runner.cudagraph_dispatcher.has_graph = lambda num_requests, tokens: tokens == 1 + runner.num_spec_tokens


def num_placeholders(worker: Any) -> int:
    return worker.num_placeholders


def num_padding(worker: Any) -> int:
    return worker.num_padding
