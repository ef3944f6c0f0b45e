"""What spares the drafter work and changes none of its drafts: what is left of earlier ones, and one rotary kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope_interleaved import MRotaryEmbeddingInterleaved
from workload import LLAVA, QWEN

from vllm_lvspec.bench.run import prompt_writer
from vllm_lvspec.bench.samples import videofacts
from vllm_lvspec.config import LVSpecConfigError
from vllm_lvspec.engine.rotary import TextRotary, give_text_rotary
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
        drafter.recalls = recalls
        drafter.finish = lambda started, drafts=drafts: (finish(started), drafts.append(started.tokens))
        before = drafter.counts.copy()
        answers = [
            engine.llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts[:3]
        ]
        one, before = drafter.counts - before, drafter.counts.copy()
        answers += [o.outputs[0].token_ids for o in engine.llm.generate(prompts[2:], params, use_tqdm=False)]
        found.append((answers, drafts, one, drafter.counts - before))
    drafter.finish, drafter.recalls = finish, True
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
    monkeypatch.setattr(proposer.drafter, "costs", None)
    monkeypatch.setattr(
        model, "decode_seconds", lambda rows, context, tokens=1, with_probs=False: 1 + 0.05 * (tokens - 1)
    )
    monkeypatch.setattr(model, "chain_tokens", lambda num_requests, num_tokens: read)
    proposer.measure_costs(lambda *batch: 1.0, [(1, 1), (1, 11)], lambda *batch: False)
    assert proposer.drafter.costs.per_guess == pytest.approx(expected)


def test_ranks_that_were_told_something_else_end_the_start(engines, monkeypatch):
    proposer = runner_of(engines(QWEN, pair=True, lvspec={"policy": "strict"})).drafter
    group = get_tp_group()
    proposer._check_ranks()
    for key, value in (("num_speculative_tokens", 3), ("model", "self")):
        monkeypatch.setattr(group, "broadcast_object", lambda ours, src, key=key, value=value: {**ours, key: value})
        with pytest.raises(
            LVSpecConfigError, match=f"{key}=.*: the first rank has '?{value}'?; must be the same on all"
        ):
            proposer._check_ranks()


@pytest.fixture
def rotary():
    """`rotary(dtype, **options)`: M-RoPE for heads of 32, of which options may leave something as it is."""

    def make(dtype: torch.dtype = torch.float32, of: type = MRotaryEmbedding, **options: Any) -> MRotaryEmbedding:
        defaults: dict[str, Any] = {
            "head_size": 32, "rotary_dim": 32, "max_position_embeddings": 64, "base": 10000.0, "is_neox_style": True,
            "mrope_section": [4, 6, 6],
        }  # fmt: skip
        return of(dtype=dtype, **{**defaults, **options})

    with set_current_vllm_config(VllmConfig()):
        yield make


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"mrope_interleaved": True}),
        (torch.float32, {"rotary_dim": 16, "mrope_section": [2, 3, 3]}),
        (torch.float32, {"scaling_factor": 4.0}),
    ],
)
def test_text_is_turned_as_by_three_equal_positions(dtype, options, rotary):
    torch.manual_seed(0)
    plain = rotary(dtype, **options)
    tolerance = {"atol": 1e-6} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
    # As layers hand them over: parts of one tensor.
    both = torch.randn(7, 2 * 32 + 32, dtype=dtype)
    query, key = both.split([64, 32], dim=-1)
    positions = torch.tensor([0, 1, 5, 63, 100, 17, 254])
    wanted = plain(positions.expand(3, -1), query.clone(), key.clone())
    found = TextRotary(plain)(positions, query, key)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, **tolerance)
    seen = torch.stack([positions, positions + 1, positions.flip(0)])
    query, key = torch.randn(7, 64, dtype=dtype), torch.randn(7, 32, dtype=dtype)
    for mine, theirs in zip(TextRotary(plain)(seen, query.clone(), key.clone()), plain(seen, query, key), strict=True):
        assert torch.equal(mine, theirs)


def layers(*rotary: torch.nn.Module) -> torch.nn.Module:
    found = torch.nn.ModuleList(torch.nn.Module() for _ in rotary)
    for layer, each in zip(found, rotary, strict=True):
        layer.rotary_emb = each
    return found


def test_only_layers_whose_positions_have_three_dimensions_are_changed(rotary):
    shared = rotary()
    target, drafter = layers(shared, shared), layers(shared, shared)
    assert give_text_rotary(drafter)
    assert all(type(layer.rotary_emb) is TextRotary and layer.rotary_emb.rotary is shared for layer in drafter)
    assert all(layer.rotary_emb is shared for layer in target)
    # One that turns in a way of its own is left as it is, and then all are: positions are the same for all layers.
    other = rotary(of=MRotaryEmbeddingInterleaved, mrope_section=[4, 6, 6])
    mixed = layers(shared, other)
    assert not give_text_rotary(mixed)
    assert [layer.rotary_emb for layer in mixed] == [shared, other]
    assert not give_text_rotary(layers(torch.nn.Identity()))


@pytest.mark.parametrize(("family", "expected"), [(QWEN, True), (LLAVA, False)], ids=lambda x: str(x))
def test_a_drafters_text_takes_one_kernel_where_its_positions_have_three_dimensions(family, expected, engines):
    engine = engines(family, pair=True)
    runner = runner_of(engine)
    model = runner.drafter.drafter.model
    assert model._has_text_rotary is expected
    assert any(isinstance(module, TextRotary) for module in model.model.modules()) is expected
    assert not any(isinstance(module, TextRotary) for module in runner.get_model().modules())
    batch = model.decode_batch(2, 40, 3)
    with torch.inference_mode():
        found = model.run(batch, model.metadata(batch)).clone()
        batch.is_text = False
        assert torch.allclose(found, model.run(batch, model.metadata(batch)), atol=1e-5)
