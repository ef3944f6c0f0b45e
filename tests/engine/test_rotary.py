"""Rotary embeddings of a drafter's text, by vLLM's kernel for text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope_interleaved import MRotaryEmbeddingInterleaved
from workload import LLAVA, QWEN

from vllm_lvspec.engine.rotary import TextRotary, give_text_rotary


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
    (runner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner)
    model = runner.drafter.drafter.model
    assert model._has_text_rotary is expected
    assert any(isinstance(module, TextRotary) for module in model.model.modules()) is expected
    assert not any(isinstance(module, TextRotary) for module in runner.get_model().modules())
    batch = model.decode_batch(2, 40, 3)
    with torch.inference_mode():
        found = model.run(batch, model.metadata(batch)).clone()
        batch.is_text = False
        assert torch.allclose(found, model.run(batch, model.metadata(batch)), atol=1e-5)
