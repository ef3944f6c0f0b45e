"""A token through small layers, beside the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vllm_lvspec.kernels.advance_decode import launch_advance_decode
from vllm_lvspec.kernels.benchmark import Shape, cached, layers_of
from vllm_lvspec.kernels.decode_attention import Rows
from vllm_lvspec.kernels.shared import Workspace
from vllm_lvspec.kernels.token_layers import Layer, TokenLayers, token_layers_reference

CONTEXT = 90
# The interpreter cuts bfloat16's bits off where GPUs round them: 0.27 % of each of six sums, and all to one side.
TOLERANCE = 0.01 if torch.cuda.is_available() else 0.03
SHAPES = [Shape(3, 128, 192, 4, 2), Shape(2, 192, 320, 7, 1, 64)]


@pytest.fixture(params=SHAPES, ids=["heads of 128", "heads of 64"])
def token(request, device: torch.device) -> tuple[TokenLayers, Rows]:
    torch.manual_seed(0)
    found = cached(1, CONTEXT, request.param, device)
    return TokenLayers(layers_of(request.param, found, device), Workspace(device)), found.rows


def embedding(token: TokenLayers, device: torch.device) -> torch.Tensor:
    return torch.randn(1, token.layers[0].qkv.shape[0], device=device).bfloat16()


def check(token: TokenLayers, rows: Rows, stream: torch.Tensor) -> None:
    """The last layer's sum, and all keys and values."""
    copies = [replace(layer, cache=layer.cache.clone()) for layer in token.layers]
    wanted = token_layers_reference(copies, stream, rows).float()
    found = token.through(stream, rows).float()
    assert (found - wanted).norm() <= TOLERANCE * wanted.norm()
    for layer, copy in zip(token.layers, copies, strict=True):
        assert torch.allclose(layer.cache.float(), copy.cache.float(), rtol=0.05, atol=0.1)
    assert not token.workspace.arrived.any()


def test_tokens_are_what_they_are_by_the_reference(token, device):
    """One behind the other, each read by the next; where kernels may overlap, they do."""
    layers, rows = token
    can_overlap = device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 9
    for layers.overlaps in (False, True) if can_overlap else (False,):
        for place in range(60, 63):
            rows.positions.fill_(place)
            rows.seq_lens.fill_(place + 1)
            rows.slots.copy_(rows.block_table[:, place // 16].long() * 16 + place % 16)
            check(layers, rows, embedding(layers, device))


def test_a_layer_by_itself_is_what_it_is_among_others(token, device):
    layers, rows = token
    stream = embedding(layers, device)
    whole = layers.through(stream, rows)
    for layer in layers.layers:
        stream = layers.layer(layer, stream, rows)
    assert torch.equal(stream, whole)


def test_every_norm_counts(token, device):
    layers, rows = token
    stream = embedding(layers, device)
    before = layers.through(stream, rows)

    def with_another(layer: Layer, name: str) -> Layer:
        norm = getattr(layer, name)
        return replace(layer, **{name: replace(norm, weight=norm.weight.flip(0))})

    for number, layer in enumerate(layers.layers):
        for name in ("attention_norm", "mlp_norm"):
            changed = [*layers.layers]
            changed[number] = with_another(layer, name)
            assert not torch.equal(TokenLayers(changed, layers.workspace).through(stream, rows), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter has no graphs")
def test_a_replayed_graph_finds_each_token_as_the_one_before_has_left_it(token, device):
    layers, rows = token
    can_overlap = torch.cuda.get_device_capability()[0] >= 9
    inputs = torch.randn(40, 1, layers.layers[0].qkv.shape[0], device=device).bfloat16()
    caches, found = [layer.cache.clone() for layer in layers.layers], []
    for layers.overlaps in (False, True) if can_overlap else (False,):
        stream = inputs[0].clone()
        layers.through(stream, rows)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layers.through(stream, rows)
        for layer, cache in zip(layers.layers, caches, strict=True):
            layer.cache.copy_(cache)
        for values, place in ((rows.positions, 40), (rows.seq_lens, 41)):
            values.fill_(place)
        rows.slots.copy_(rows.block_table[:, 40 // 16].long() * 16 + 40 % 16)
        outs = []
        for each in inputs:
            stream.copy_(each)
            graph.replay()
            outs.append(out.clone())
            launch_advance_decode(rows.positions[None], rows.seq_lens, rows.slots, rows.block_table, 16)
        found.append(torch.stack(outs))
    assert all(torch.equal(each, found[0]) for each in found) and found[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow")  # in the interpreter's exp
def test_tuning_launches_every_product(token):
    layers, _ = token
    launched = []
    layers.tune(lambda run: (run(), launched.append(run))[0] or len(launched))
    assert len(launched) == 12 and set(layers.num_loops.values()) == {1}
    assert not layers.workspace.arrived.any()
