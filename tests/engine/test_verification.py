"""Loose verification on a real engine: what is emitted and why, whatever is scheduled and whoever is beside it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from simulation import Simulated, Simulation
from test_sampling import chi_square_p_value
from vllm import RequestOutput, SamplingParams, ir
from vllm.sampling_params import StructuredOutputsParams
from workload import LLAVA, QWEN, Family, Request, generate_requests, token_ids, turn, video

from vllm_lvspec.bench.run import prompt_writer
from vllm_lvspec.bench.samples import Sample, videofacts
from vllm_lvspec.config import LVSpecConfig
from vllm_lvspec.reference import PAIRS

LOOSE = {"policy": "lvspec"}
# With the target as its own drafter of a pruned video, all reasons are to be seen, and nothing is too unlikely.
EVERYTHING = {
    "policy": "lvspec", "probability_floor": 0.0, "relaxation": 0.9, "guards": (), "num_speculative_tokens": 24,
    "shift_window": 24,
}  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=256)
NUM_BLOCKS = 256


def questions(num_frames: int, count: int = 12) -> list[Sample]:
    """One question on each of `count` videos, of all tasks in turn."""
    samples = videofacts(count, 5, num_frames=num_frames)
    tasks = len(samples) // count
    return [samples[i * tasks + i % tasks] for i in range(count)]


@functools.cache
def simulation(name: str) -> Simulation:
    return Simulation(name)


@dataclass
class Asked:
    """Questions about videos, an engine's answers, and what the simulation answers."""

    samples: list[Sample]
    outputs: list[RequestOutput]
    simulated: list[Simulated]
    reasons: list[dict[str, int]]

    def check(self, least: float = 0.8) -> None:
        """All is as simulated, at least `least` of it; a decision too close to call ends an answer's comparison."""
        compared = total = 0
        for output, want, reasons in zip(self.outputs, self.simulated, self.reasons, strict=True):
            certain = want.num_certain()
            assert list(output.outputs[0].token_ids)[:certain] == want.token_ids[:certain]
            if certain == len(want.token_ids):
                assert len(output.outputs[0].token_ids) == certain
                assert reasons == want.counts()
            compared += certain
            total += len(want.token_ids)
        assert compared > least * total


def ask(engine: Any, oracle: Simulation, samples: Sequence[Sample], settings: dict, size: int, max_tokens=256) -> Asked:
    prompt = prompt_writer(engine.llm)
    config = LVSpecConfig(**settings).model_dump_json()
    params = replace_params(GREEDY, max_tokens=max_tokens)
    outputs = engine.run([Request("video", **as_request(prompt(s)), params=params) for s in samples], (size,))
    simulated = [oracle.answer(sample, config, max_tokens) for sample in samples]
    return Asked(list(samples), outputs, simulated, [reasons_of(engine, o) for o in outputs])


def as_request(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": inputs["prompt"], "data": inputs["multi_modal_data"]}


def replace_params(params: SamplingParams, **changes: Any) -> SamplingParams:
    params = params.clone()
    for key, value in changes.items():
        setattr(params, key, value)
    return params


def reasons_of(engine: Any, output: RequestOutput) -> dict[str, int]:
    (rank,) = {repr(rank): rank for rank in engine.llm.collective_rpc("lvspec_reasons")}.values()
    (counts,) = [counts for key, counts in rank.items() if key.startswith(output.request_id + "-")]
    return counts


def verification(engine: Any) -> Any:
    """The engine's own: it runs in this process."""
    return engine.llm.collective_rpc(lambda worker: worker.model_runner.verification)[0]


def loose_pair(engines: Callable, family: Family = QWEN, **settings: Any) -> Any:
    return engines(family, pair=True, num_gpu_blocks_override=NUM_BLOCKS, lvspec={**LOOSE, **settings})


def loose_random(engines: Callable, **options: Any) -> Any:
    return engines(QWEN, drafter=0, lvspec=EVERYTHING, **options)


Key = tuple[tuple[int, ...], tuple[str, ...]]


def record_features(engine: Any, monkeypatch: pytest.MonkeyPatch) -> dict[Key, list[torch.Tensor]]:
    """Features that verification reads, by the request's prompt and items, each time that it reads them."""
    found: dict[Key, list[torch.Tensor]] = {}
    verifying = verification(engine)
    original = verifying.verifier.relevance

    def relevance(queries, starts, pages, max_drafted):
        size = pages.features.shape[1]
        for row, req_id in enumerate(verifying.runner.input_batch.req_ids):
            positions = pages.positions[pages.starts[row] : pages.starts[row + 1]].long()
            if not len(positions):
                continue
            state = verifying.runner.requests[req_id]
            blocks = pages.block_table[row].long()[positions // size]
            key = tuple(state.prompt_token_ids), tuple(f.identifier for f in state.mm_features)
            found.setdefault(key, []).append(pages.features[blocks, positions % size].flatten(1).clone())
        return original(queries, starts, pages, max_drafted)

    monkeypatch.setattr(verifying.verifier, "relevance", relevance)
    return found


# A target that drafts for itself: everything happens ------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 8])
def test_shifts_and_unlikely_tokens_are_accepted_as_in_the_simulation(size, engines, checkpoint):
    target = checkpoint("qwen2_5_vl", seed=0)
    asked = ask(loose_random(engines), Simulation("qwen2_5_vl", target, target), questions(24), EVERYTHING, size, 64)
    asked.check()
    totals = sum((Counter(r) for r in asked.reasons), Counter())
    assert totals["shift"] > 0 and totals["loose"] > 100 and totals["exact"] > 100


def test_aborted_requests_leave_nothing_behind(engines):
    engine = loose_random(engines)
    engine.run_and_abort(generate_requests(QWEN, 18, seed=5), max_tokens=150, before_step=20)
    engine.stats()
    # But for the one that was asked in order to know: workers hear of its end with the next step.
    assert len(verification(engine)._requests) == 1
    assert not [key for key in verification(engine)._requests if key.startswith("abort-")]


def test_a_request_with_features_of_another_item_is_verified_strictly(engines):
    engine = loose_random(engines)
    body = QWEN.video + "the red circle moves up, then left. " * 5 + "Go on."
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    request = Request("video", turn("user", body), {"video": [video(7)]}, params)
    (plain,) = token_ids(engines(QWEN).run([request]))
    engine.llm.reset_prefix_cache()
    loose, again = (token_ids(engine.run([request]))[0] for _ in range(2))
    assert loose == again != plain
    tags = verification(engine).features.tags
    kept = tags.copy()
    before = engine.stats()["missing_features"]
    tags[tags != 0] += 1
    (output,) = engine.run([request])
    assert output.num_cached_tokens > 64
    assert token_ids([output]) == [plain]
    assert engine.stats()["missing_features"] == before + 1
    assert {k: reasons_of(engine, output)[k] for k in ("loose", "shift")} == {"loose": 0, "shift": 0}
    tags[:] = kept
    assert token_ids(engine.run([request])) == [loose]


# Strict requests beside loose ones ------------------------------------------------------------------------------------


def test_strict_requests_beside_loose_ones_get_what_the_target_alone_says(engines):
    requests = generate_requests(QWEN, 72, seed=22)
    strict = set()
    for i, request in enumerate(requests):
        if i % 4 == 0:
            request.params.extra_args = {"lvspec_policy": "strict"}
        elif i % 4 == 1:
            request.params.extra_args = {"lvspec_relaxation": 0}
        elif i % 12 == 2:
            choices = ["a red circle moves", "a blue square slides to the left", "1 2 3 4 5 6 7 8"]
            outputs = StructuredOutputsParams(choice=choices)
            request.params = SamplingParams(temperature=0, max_tokens=40, structured_outputs=outputs)
        elif request.data:
            continue
        strict.add(i)
    want = engines(QWEN).run(requests)
    engine = loose_random(engines)
    got = engine.run(requests)
    loose = 0
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        counts = reasons_of(engine, ours)
        if i not in strict:
            loose += counts["loose"]
            continue
        assert token_ids([ours]) == token_ids([theirs]), (i, requests[i].kind)
        assert ours.outputs[0].text == theirs.outputs[0].text
        assert counts["loose"] == counts["shift"] == 0
    assert len(strict) > 40 and loose > 100


def mixed(count: int, params: SamplingParams) -> list[Request]:
    """`count` strict requests for samples, each followed by a loose one that does not matter."""
    prompt = turn("user", QWEN.video + "Describe the video.") + "<|im_start|>assistant\n"
    data = {"video": [video(5)]}
    loose = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    requests = []
    for i in range(count):
        strict = replace_params(params, seed=1000 * i, extra_args={"lvspec_policy": "strict"})
        requests += [Request("video", prompt, data, strict), Request("video", prompt, data, loose)]
    return requests


def test_seeded_strict_requests_draw_the_same_whoever_is_beside_them(engines):
    engine = loose_random(engines)
    params = SamplingParams(temperature=1.3, top_k=20, max_tokens=16, ignore_eos=True)
    requests = mixed(8, params)
    together = token_ids(engine.run(requests))[::2]
    assert together == token_ids(engine.run(requests[::2], (1,)))
    assert len({tuple(t) for t in together}) == 8


def test_strict_sampling_beside_loose_requests_has_the_targets_distribution(engines):
    plain, engine = engines(QWEN), loose_random(engines)

    def draw(engine: Any, temperature: float) -> Counter:
        params = SamplingParams(temperature=temperature, top_k=3, max_tokens=3, n=50, ignore_eos=True)
        answers = engine.run(mixed(10, params))[::2]
        return Counter(tuple(o.token_ids) for answer in answers for o in answer.outputs)

    ours = draw(engine, 2.0)
    assert chi_square_p_value(ours, draw(plain, 2.0)) > 1e-4
    assert chi_square_p_value(ours, draw(plain, 1.0)) < 1e-4


# The feature cache ----------------------------------------------------------------------------------------------------


def same_features(found: dict[Key, list[torch.Tensor]], want: dict[Key, list[torch.Tensor]]) -> None:
    assert found.keys() == want.keys()
    for key, each in found.items():
        for features in each:
            assert torch.allclose(features, want[key][0], atol=2e-3, rtol=2e-3)


@pytest.fixture(scope="module")
def undisturbed(engines) -> tuple[list[Request], list[RequestOutput], dict[Key, list[torch.Tensor]]]:
    """Mixed requests, their answers one at a time without prefix caching, and the features that were read."""
    requests = generate_requests(QWEN, 36, seed=21, max_tokens=32)
    engine = loose_random(engines, enable_prefix_caching=False)
    with pytest.MonkeyPatch.context() as patch:
        found = record_features(engine, patch)
        outputs = engine.run(requests, (1,))
    assert len(found) > 20 and engine.stats()["tokens_loose"] > 100
    return requests, outputs, found


@pytest.mark.parametrize(
    ("options", "size"),
    [
        pytest.param({}, 1, id="prefix_caching"),
        pytest.param({"max_num_batched_tokens": 96}, 1, id="chunked_prefill"),
        pytest.param({"num_gpu_blocks_override": 26}, 8, id="preemption"),
    ],
)
def test_scheduling_changes_no_feature(options, size, undisturbed, engines, monkeypatch):
    requests, want, features = undisturbed
    engine = loose_random(engines, **options)
    engine.llm.reset_prefix_cache()
    before = engine.stats()
    found = record_features(engine, monkeypatch)
    first = engine.run(requests, (size,))
    again = engine.run(requests, (size,))
    same_features(found, features)
    assert engine.stats()["missing_features"] == before["missing_features"]
    if size == 1:
        assert token_ids(first) == token_ids(want) == token_ids(again)
        assert sum(o.num_cached_tokens > 64 for o in again) > 10, "prefix hits are part of this test"
    else:  # who is preempted loses his drafts, and with them what was accepted loosely
        assert engine.metric("num_preemptions") > 0


# The bundled pair: reasons, lengths, log-probabilities, ranks ---------------------------------------------------------


@pytest.mark.parametrize("size", [1, 8])
def test_answers_and_reasons_are_those_of_the_simulation(size, engines):
    engine = loose_pair(engines)
    asked = ask(engine, simulation("qwen2_5_vl"), questions(24), LOOSE, size)
    asked.check()
    totals = sum((Counter(r) for r in asked.reasons), Counter())
    assert totals["loose"] > 50 and totals["exact"] > 200
    # Nothing of this is what the target alone would have said.
    strict = {"policy": "strict", "relaxation": 0.0}
    config = LVSpecConfig(**strict).model_dump_json()
    alone = [simulation("qwen2_5_vl").answer(s, config).token_ids for s in asked.samples[:4]]
    assert alone != token_ids(asked.outputs[:4])


def test_reasons_add_up_to_the_tokens_that_clients_get(engines):
    engine = loose_pair(engines)
    prompt = prompt_writer(engine.llm)
    tokenizer = engine.llm.get_tokenizer()
    (stop,) = tokenizer(" the").input_ids
    strict = {"lvspec_policy": "strict"}
    asking = [
        SamplingParams(temperature=0, max_tokens=7),
        SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(temperature=0, max_tokens=256),
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, stop_token_ids=[stop]),
        SamplingParams(temperature=0, max_tokens=256, min_tokens=70),
        SamplingParams(temperature=0, max_tokens=90, min_tokens=12, stop_token_ids=[stop]),
        SamplingParams(temperature=0.8, top_p=0.9, max_tokens=50),
        SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True),  # up to the model's length
        SamplingParams(temperature=0, max_tokens=60, extra_args=strict),
    ]
    requests = [
        Request("video", **as_request(prompt(sample)), params=params)
        for params in asking
        for sample in questions(24)[:3]
    ]
    before = engine.stats()
    outputs = engine.run(requests)
    after = engine.stats()
    for request, output in zip(requests, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        counts = reasons_of(engine, output)
        assert sum(counts.values()) == len(tokens), request.params
        if request.params.extra_args:
            assert counts["loose"] == counts["shift"] == 0
        _check_length(request.params, tokens, len(output.prompt_token_ids), tokenizer.eos_token_id)
    total = sum(after[f"tokens_{name}"] - before[f"tokens_{name}"] for name in ("exact", "loose", "shift", "target"))
    assert total == sum(len(o.outputs[0].token_ids) for o in outputs) + 1, "one token is that of asking for the counts"
    assert after["tokens_loose"] > before["tokens_loose"] + 50


def _check_length(params: SamplingParams, tokens: list[int], num_prompt: int, eos: int) -> None:
    ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else (eos,))}
    length = min(params.max_tokens or 0, 1024 - num_prompt)
    assert ends.isdisjoint(tokens[:-1])
    assert len(tokens) == length or (len(tokens) < length and tokens[-1] in ends)
    assert len(tokens) >= params.min_tokens


def sampled(engine: Any, params: SamplingParams, count: int = 6) -> list[tuple[Sample, RequestOutput]]:
    samples = questions(24)[:count]
    prompt = prompt_writer(engine.llm)
    requests = [Request("video", **as_request(prompt(s)), params=params) for s in samples]
    return list(zip(samples, engine.run(requests), strict=True))


def processed(logits: torch.Tensor, tokens: list[int], params: SamplingParams) -> torch.Tensor:
    """vLLM's order: penalties on what was emitted, temperature, top-k."""
    logits = logits.clone()
    for i in range(len(logits)):
        logits[i, list(set(tokens[:i]))] -= params.presence_penalty
    if params.temperature:
        logits /= params.temperature
    if params.top_k > 0:
        least = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least - 1e-4, float("-inf"))
    return logits.log_softmax(-1)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_logprobs_of_loosely_accepted_tokens_are_the_targets(mode, engines):
    engine = engines(
        QWEN, pair=True, num_gpu_blocks_override=NUM_BLOCKS, lvspec=LOOSE,
        **({} if mode == "raw_logprobs" else {"logprobs_mode": mode}),
    )  # fmt: skip
    num_loose = 0
    for params in (
        SamplingParams(temperature=0, max_tokens=120, logprobs=2),
        SamplingParams(temperature=0, presence_penalty=0.6, max_tokens=120, logprobs=2),
        SamplingParams(temperature=0.7, top_k=12, seed=1, max_tokens=120, logprobs=2),
    ):
        for sample, output in sampled(engine, params, 3):
            tokens = list(output.outputs[0].token_ids)
            raw = simulation("qwen2_5_vl").teacher_forced(sample, tokens)
            want = processed(raw, tokens, params)
            logprobs = raw.log_softmax(-1) if mode == "raw_logprobs" else want
            reported = [place[token] for place, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
            for i, token in enumerate(tokens):
                assert reported[i].logprob == pytest.approx(float(logprobs[i, token]), abs=1e-3)
                better = int((logprobs[i] > logprobs[i, token] + 1e-3).sum())
                worse = int((logprobs[i] >= logprobs[i, token] - 1e-3).sum())
                assert better < reported[i].rank <= worse
            if params.temperature == 0:
                # All that is not the target's best was accepted loosely or shifted.
                counts = reasons_of(engine, output)
                unlikely = int((want.argmax(-1) != torch.tensor(tokens)).sum())
                assert unlikely == counts["loose"] + counts["shift"]
                num_loose += unlikely
    assert num_loose > 30


@pytest.mark.two_ranks
def test_two_ranks_share_the_features_and_decide_what_one_decides(engines):
    one = loose_pair(engines)
    samples = questions(24)[:6]
    ask(one, simulation("qwen2_5_vl"), samples, LOOSE, 6).check()
    num_bytes = one.stats()["feature_bytes"]
    two = engines(QWEN, pair=True, num_gpu_blocks_override=NUM_BLOCKS, tensor_parallel_size=2, lvspec=LOOSE)
    asked = ask(two, simulation("qwen2_5_vl"), samples, LOOSE, 6)
    asked.check()
    stats = two.stats()  # asserts that the ranks agree
    assert stats["feature_bytes"] * 2 == num_bytes == NUM_BLOCKS * 32 * 256 * 4
    assert stats["tokens_loose"] > 20


# Settings -------------------------------------------------------------------------------------------------------------


EMBEDDING = {"anchor_source": "embedding", "guards": ("negation", "number", "order")}
SOURCES = [
    ("qwen2_5_vl", {"anchor_source": "hidden:read", "probability_floor": 0.0, "relaxation": 0.5}),
    ("qwen2_5_vl", {"anchor_source": "layer:4", "relaxation": 1.0, "anchor_threshold": 0.6}),
    ("qwen2_5_vl", {"anchor_source": "value"}),
    (
        "qwen2_5_vl",
        {"anchor_source": "embedding", "guards": ("negation", "number", "order"), "shift_direction": "back"},
    ),
    ("llava_onevision", {"anchor_source": "layer:6:read", "relaxation": 0.2}),
]


def test_no_loosely_accepted_token_lies_outside_of_top_k(engines):
    engine = loose_pair(engines, **SOURCES[0][1])
    before = engine.stats()["tokens_loose"]
    for params in (
        SamplingParams(temperature=1.5, top_k=2, seed=2, max_tokens=100),
        SamplingParams(temperature=1.0, top_p=0.8, seed=3, max_tokens=100),
    ):
        for sample, output in sampled(engine, params):
            tokens = torch.tensor(output.outputs[0].token_ids)
            logits = simulation("qwen2_5_vl").teacher_forced(sample, tokens.tolist())
            chosen = logits.gather(1, tokens[:, None])
            if params.top_k == 2:
                assert bool((chosen >= logits.topk(2).values[:, 1:] - 1e-3).all())
            else:
                # What is likelier than an emitted token has less than top_p together.
                likelier = torch.where(logits > chosen + 1e-3, logits.softmax(-1), 0.0).sum(-1)
                assert bool((likelier < params.top_p + 1e-3).all())
    assert engine.stats()["tokens_loose"] > before + 20


@pytest.mark.parametrize(("name", "settings"), SOURCES, ids=lambda x: x if isinstance(x, str) else x["anchor_source"])
def test_every_source_of_features_is_what_its_name_says(name, settings, engines, monkeypatch):
    oracle = simulation(name)
    engine = loose_pair(engines, QWEN if name == QWEN.checkpoint else LLAVA, **settings)
    found = record_features(engine, monkeypatch)
    samples = questions(PAIRS[name].num_frames)[:6]
    # Equal tokens have equal embeddings, and ties that rounding decides.
    least = 0.3 if settings["anchor_source"] == "embedding" else 0.7
    ask(engine, oracle, samples, {**LOOSE, **settings}, 4).check(least)
    assert len(found) == len(samples)
    for sample in samples:
        want = oracle.visual_states(sample, settings["anchor_source"])
        (read,) = [read for read in found.values() if torch.allclose(read[0], want, atol=1e-3, rtol=1e-3)]
        assert all(torch.equal(features, read[0]) for features in read)


def test_embeddings_are_kept_where_kernels_add_to_the_residual_in_place(engines, monkeypatch):
    """As vLLM's kernels for GPUs do; the first residual is what goes into the model."""
    engine, oracle = loose_pair(engines, **EMBEDDING), simulation("qwen2_5_vl")
    sample = questions(24)[0]
    native = ir.ops.fused_add_rms_norm.impls["native"]
    compute = native.impl_fn

    def in_place(x, residual, *args):
        normed, total = compute(x, residual, *args)
        x.copy_(normed)
        residual.copy_(total)
        return x, residual

    monkeypatch.setattr(native, "impl_fn", in_place)
    engine.llm.reset_prefix_cache()
    found = record_features(engine, monkeypatch)
    ask(engine, oracle, [sample], {**LOOSE, **EMBEDDING}, 1)
    (read,) = found.values()
    assert torch.allclose(read[0], oracle.visual_states(sample, "embedding"), atol=1e-3, rtol=1e-3)


def test_projected_features_are_narrow_and_decide_nearly_the_same(engines):
    engine = loose_pair(engines, anchor_projection=64)
    samples = questions(24)[:6]
    asked = ask(engine, simulation("qwen2_5_vl"), samples, LOOSE, 6)
    stats = engine.stats()
    assert stats["feature_bytes"] == NUM_BLOCKS * 32 * 64 * 4
    assert stats["tokens_loose"] > 20 and stats["missing_features"] == 0
    for output, want in zip(asked.outputs, asked.simulated, strict=True):
        assert output.outputs[0].finish_reason == "stop"
        assert abs(len(output.outputs[0].token_ids) - len(want.token_ids)) < 25
