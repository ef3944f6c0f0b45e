"""What spares the drafter forwards and changes none of its drafts: what is left of earlier ones."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from workload import LLAVA, QWEN

from vllm_lvspec.bench.run import prompt_writer
from vllm_lvspec.bench.samples import videofacts
from vllm_lvspec.reference import PAIRS


def runner_of(engine: Any) -> Any:
    (runner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner)
    return runner


@pytest.mark.parametrize(
    ("family", "settings", "most_forwards"),
    [
        pytest.param(QWEN, {"policy": "strict"}, 0.8, id="strict"),
        pytest.param(LLAVA, {"policy": "strict"}, 0.8, id="strict, other family"),
        pytest.param(QWEN, {"policy": "lvspec"}, 0.99, id="loose"),
        pytest.param(QWEN, {"policy": "strict", "model": "self", "pruning_ratio": 0.95}, 0.99, id="self"),
    ],
)
def test_what_is_left_of_drafts_spares_forwards_and_changes_no_draft(family, settings, most_forwards, engines):
    engine = engines(family, pair=True, lvspec=settings)
    drafter = runner_of(engine).drafter.drafter
    frames = PAIRS[family.checkpoint].num_frames
    write = prompt_writer(engine.llm)
    prompts = [write(sample) for sample in videofacts(4, 79, ("caption",), num_frames=frames)]
    params = SamplingParams(temperature=0, max_tokens=100)
    finish = drafter.finish
    found = []
    for recalls in (True, False):
        drafts: list[list[list[int]]] = []
        drafter.payoff.recalls = recalls
        drafter.finish = lambda started, drafts=drafts: (finish(started), drafts.append(started.tokens))
        before = drafter.counts.copy()
        answers = [
            engine.llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts[:3]
        ]
        one, before = drafter.counts - before, drafter.counts.copy()
        answers += [o.outputs[0].token_ids for o in engine.llm.generate(prompts[2:], params, use_tqdm=False)]
        found.append((answers, drafts, one, drafter.counts - before))
    drafter.finish, drafter.payoff.recalls = finish, True
    (answers, drafts, one, two), (plain_answers, plain_drafts, plain_one, plain_two) = found
    assert answers == plain_answers and drafts == plain_drafts
    assert sum(len(draft) for step in drafts for draft in step) > 300
    assert not plain_one["recalled_tokens"] and not plain_two["recalled_tokens"]
    assert plain_one["forwards"] - one["forwards"] == one["recalled_tokens"] > 0
    assert one["forwards"] < most_forwards * plain_one["forwards"]
    # Of two at once a forward is spared where it is for both, which are two tokens.
    spared = plain_two["forwards"] - two["forwards"]
    assert two["recalled_tokens"] / 2 <= spared <= two["recalled_tokens"]


@pytest.mark.parametrize(("read", "expected"), [(10, 0.05), (2, 0.05), (None, 0.0)])
def test_what_guesses_cost_is_measured_at_the_start(read, expected, engines, monkeypatch):
    proposer = runner_of(engines(QWEN, pair=True, lvspec={"policy": "strict"})).drafter
    model = proposer.drafter.model
    monkeypatch.setattr(proposer.drafter.payoff, "costs", None)
    monkeypatch.setattr(
        model, "decode_seconds", lambda rows, context, tokens=1, with_probs=False: 1 + 0.05 * (tokens - 1)
    )
    monkeypatch.setattr(model, "chain_tokens", lambda num_requests, num_tokens: read)
    proposer.measure_costs(lambda *batch: 1.0, [(1, 1), (1, 11)], lambda *batch: False)
    assert proposer.drafter.payoff.costs.per_guess == pytest.approx(expected)
