"""A drafted token through kernels of this package's, beside vLLM's layers with the same weights."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreted import interpret
from mxfp4 import random_matrix
from replays import Replays
from torch import nn
from vllm.model_executor.layers.activation import GeluAndMul
from workload import LLAVA, QWEN

from vllm_lvspec.draft.drafter import NextTokens
from vllm_lvspec.engine import one_token
from vllm_lvspec.engine.few_rows import FewRowsSiluAndMul, OneRowLinear
from vllm_lvspec.engine.kv_layout import KVLayout
from vllm_lvspec.engine.one_token import OneTokenStep, decoder_layers, one_token_step
from vllm_lvspec.kernels import token_layers
from vllm_lvspec.kernels.advance_decode import advance_decode
from vllm_lvspec.kernels.greedy_head import Head, in_eight_bits
from vllm_lvspec.kernels.shared import Norm, Workspace

CONTEXT = 70
QWEN3 = replace(QWEN, checkpoint="qwen3_vl")


class InFourBits:
    """A linear layer's method whose weights are a matrix in MXFP4."""

    def __init__(self, layer: Any, seed: int):
        height, width = layer.input_size_per_partition, layer.output_size_per_partition
        matrix, dense = random_matrix(height, width, seed, bias=getattr(layer, "bias", None) is not None)
        self.dense = dense.bfloat16().float()
        self.matrix = matrix
        self.kernel = OneRowLinear(None, matrix, Workspace(torch.device("cpu")))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = x.float() @ self.dense
        return (out if bias is None else out + self.matrix.bias.float()).to(x.dtype)


@pytest.fixture
def drafter(engines, monkeypatch):
    """`drafter(family)`: an engine's drafter in bfloat16, with its layers in four bits for the time of a test."""
    interpret(monkeypatch)

    def start(family: Any) -> Any:
        engine = engines(family, drafter=3, dtype="bfloat16")
        (model,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.drafter.drafter.model)
        assert model.one_token is None  # on CPUs
        decoder = model.model.get_language_model().model
        for number, layer in enumerate(decoder.layers):
            linears = (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
            for place, linear in enumerate(linears):
                monkeypatch.setattr(linear, "quant_method", InFourBits(linear, 10 * number + place))
            monkeypatch.setitem(layer.mlp._modules, "act_fn", FewRowsSiluAndMul(layer.mlp.act_fn))
        return model

    return start


class OnGPUs:
    """The drafter's caches, with keys and values where the kernel looks for them."""

    def __init__(self, model: Any):
        self.places, self.caches = {}, {}
        for name, cache in model.caches.items():
            layer = model.vllm_config.compilation_config.static_forward_context[name]
            layout = KVLayout(layer, model.group.kv_cache_spec, cache)
            pages = cache.as_strided((len(cache), layout.page_elements), (cache.stride(0), 1))
            self.places[name] = pages, torch.cat([layout.keys, layout.values], dim=-1)  # [token, head, 2 size]
        self.fetch()

    def fetch(self) -> None:
        """What vLLM has written."""
        for name, (pages, places) in self.places.items():
            found = pages[:, places].transpose(1, 2)
            self.caches.setdefault(name, found.clone()).copy_(found)

    def put(self) -> None:
        """What vLLM is to read."""
        for name, (pages, places) in self.places.items():
            pages[:, places] = self.caches[name].transpose(1, 2)


def text(model: Any, context: int, num_tokens: int) -> Any:
    generator = torch.Generator().manual_seed(context)
    batch = model.decode_batch(1, context, num_tokens)
    token_ids = torch.randint(0, model.vocab_size, (num_tokens,), generator=generator)
    # Of a pruned video positions are ahead of places.
    return replace(batch, token_ids=token_ids, positions=batch.positions + 5)


@torch.inference_mode()
@pytest.mark.parametrize("family", [QWEN, LLAVA, QWEN3], ids=lambda family: family.checkpoint)
def test_a_token_is_what_it_is_by_vllms_layers(family, drafter):
    model = drafter(family)
    prompt, batch = text(model, 0, CONTEXT), text(model, CONTEXT, 1)
    model.run(prompt, model.metadata(prompt))
    mine, theirs = OnGPUs(model), OnGPUs(model)
    layers = decoder_layers(model.model, mine.caches)
    decoder = model.model.get_language_model().model
    assert len(layers) == len(decoder.layers)
    assert (layers[0].heads.query_norm is not None) == (family is QWEN3)
    model.one_token = OneTokenStep(layers, decoder.norm, Workspace(model.device))
    try:
        found = model.run(batch, model.metadata(batch)).float()
        assert not model.one_token.workspace.arrived.any() and len(model.one_token.workspace.parts)
        model.one_token.head, model.one_token.num_tokens = one_token._head(model), model.shared_vocab_size
        tokens, probs = model.forward(batch, with_probs=True)
        assert model.forward(batch).probs is None
        several = text(model, CONTEXT, 2)
        model.run(several, model.metadata(several))  # of this it has no say
    finally:
        del model.one_token
    wanted = model.run(batch, model.metadata(batch)).float()
    assert (found - wanted).norm() <= 0.03 * wanted.norm()
    chosen, chosen_probs = model.forward(batch, with_probs=True)
    assert torch.equal(tokens, chosen) and torch.allclose(probs, chosen_probs, rtol=0.1)
    theirs.fetch()
    page, place = int(batch.slots[0]) // model.pool.page_size, int(batch.slots[0]) % model.pool.page_size
    for name, cache in theirs.caches.items():
        left, wanted = (each[page, :, place].float() for each in (mine.caches[name], cache))
        assert wanted.norm() > 1 and (left - wanted).norm() <= 0.03 * wanted.norm()


class Stale(Replays):
    """Whose replays leave the tokens, or the probabilities, that were there when they were recorded."""

    stale: int

    def _replay(self, batch: Any, metadata: Any) -> Any:
        _, found = super()._replay(batch, metadata)

        def replay() -> None:
            new = self._model.run_far(batch, None)
            found[1 - self.stale].copy_(new[1 - self.stale])

        return replay, found


@torch.inference_mode()
def test_tokens_follow_one_another_from_recorded_steps(drafter, monkeypatch):
    """A replay chooses the next token, and asks vLLM's attention for no plan."""
    model = drafter(QWEN)
    caches = OnGPUs(model).caches
    model.one_token = OneTokenStep(
        decoder_layers(model.model, caches), model.model.get_language_model().model.norm, Workspace(model.device)
    )
    model.one_token.head, model.one_token.num_tokens = one_token._head(model), model.shared_vocab_size

    def chain() -> list[int]:
        batch, tokens = text(model, CONTEXT, 1), []
        for _ in range(6):
            batch.token_ids = model.forward(batch).token_ids
            tokens.append(batch.token_ids)
            batch.seq_lens_cpu = batch.seq_lens_cpu + 1
            advance_decode(batch.positions, batch.seq_lens, batch.slots, batch.block_table, model.pool.page_size)
        return torch.cat(tokens).tolist()

    try:
        graphs = Replays(model, sizes=(1,), most_tokens=1, whole_chains=False)
        assert graphs.record() and isinstance(graphs._graphs[1, 1][1], NextTokens)
        graphs.num_rows.clear()
        wanted = chain()  # by a cache into which graphs that were tried have written
        monkeypatch.setattr(model, "graphs", graphs)
        planned: list[Any] = []
        metadata = model.metadata
        monkeypatch.setattr(model, "metadata", lambda batch, **how: planned.append(batch) or metadata(batch, **how))
        assert chain() == wanted and len(set(wanted)) > 2
        assert graphs.num_rows == 6 * [(1, 1)] and len(planned) == 6  # by these replays, not by the graphs
        for Stale.stale in (0, 1):
            stale = Stale(model, sizes=(1,), most_tokens=1, whole_chains=False)
            assert not stale.record() and stale._different == [(1, 1)]
    finally:
        del model.one_token


@torch.inference_mode()
def test_whichever_head_is_fastest_chooses(drafter, monkeypatch):
    model = drafter(QWEN)
    warnings: list[str] = []
    monkeypatch.setattr(one_token.logger, "warning", lambda text, *args: warnings.append(text % args))
    layers = decoder_layers(model.model, OnGPUs(model).caches)
    step = OneTokenStep(layers, model.model.get_language_model().model.norm, Workspace(model.device))

    def choose(*taken: float, has_eight_bits: bool = True) -> Head | None:
        times = iter(taken)
        one_token._choose_head(step, model, has_eight_bits, lambda run: (run(), next(times))[1])
        assert not list(times)
        return step.head

    assert choose(1.0, 2.0, 3.0) is None and step.num_bytes == 0
    plain, rounded = choose(3.0, 1.0, 2.0), choose(3.0, 2.0, 1.0)
    assert plain.scales is None and step.num_tokens == model.shared_vocab_size
    assert rounded.weight.dtype == torch.float8_e4m3fn and step.num_bytes == rounded.num_bytes
    assert choose(3.0, 2.0, has_eight_bits=False).scales is None and not warnings
    # What chooses other tokens, by far, has no say.
    monkeypatch.setattr(one_token, "in_eight_bits", lambda head: in_eight_bits(Head(head.weight.flip(0))))
    assert choose(3.0, 2.0).scales is None and "float8_e4m3fn rests, because a token that it chooses" in warnings.pop()
    # Nor has what a compiler refuses, and that does not keep the other one from it.
    launch = one_token.launch_greedy_head

    def refused(x: Any, head: Head, *args: Any) -> Any:
        if head.scales is not None:
            raise ValueError("type fp8e4nv not supported in this architecture")
        return launch(x, head, *args)

    with monkeypatch.context() as patch:
        patch.setattr(one_token, "launch_greedy_head", refused)
        assert choose(3.0, 2.0).scales is None and "can't be used: ValueError('type fp8e4nv" in warnings.pop()

    def full(head: Head) -> Head:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(one_token, "in_eight_bits", full)
    assert choose(3.0, 2.0).scales is None and "no memory for the drafter's head in eight bits" in warnings.pop()
    language_model = model.model.get_language_model()
    for where, name, value in (
        (language_model.logits_processor, "soft_cap", 30.0),
        (language_model.logits_processor, "scale", 0.5),
        (language_model.logits_processor, "head_dtype", torch.float32),
        (language_model.lm_head, "quant_method", SimpleNamespace()),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            step.head = None
            assert choose() is None, name


@torch.inference_mode()
def test_a_layer_that_does_something_else_is_seen(drafter, monkeypatch):
    """What a start on a GPU tries: with vLLM's own layers, and with one whose norm, gate or sum is another."""
    model = drafter(QWEN)
    gpu = OnGPUs(model)
    decoder = model.model.get_language_model().model

    def by_vllm(module: Any) -> Any:
        def run(*args: Any) -> Any:
            gpu.put()
            done = module(*args)
            gpu.fetch()
            return done

        return run

    monkeypatch.setattr(one_token, "_TRIAL_TOKENS", CONTEXT)
    run = type(model).run

    def by_vllm_whole(self: Any, *args: Any) -> torch.Tensor:
        gpu.put()
        done = run(self, *args)
        gpu.fetch()
        return done

    monkeypatch.setattr(type(model), "run", by_vllm_whole)

    def differing(change: Any = lambda layer: layer, norm: Any = decoder.norm) -> str | None:
        layers = decoder_layers(model.model, gpu.caches)
        layers[-1] = change(layers[-1])
        step = OneTokenStep(layers, norm, Workspace(model.device))
        return one_token._differing(step, [by_vllm(module) for module in decoder.layers], model)

    assert differing() is None
    for change in (
        lambda layer: replace(layer, mlp_norm=replace(layer.mlp_norm, weight=1.2 * layer.mlp_norm.weight)),
        lambda layer: replace(layer, heads=replace(layer.heads, scale=0.1)),
        lambda layer: replace(layer, down=replace(layer.down, weight=layer.down.weight.flip(1))),
    ):
        assert "layer 1 adds something else" in str(differing(change))
    turned = differing(lambda layer: replace(layer, cos_sin=layer.cos_sin.flip(0)))
    assert "layer 1 adds something else" in turned or "layer 1 leaves other keys or values" in turned
    assert "the last hidden state" in differing(norm=nn.Identity())
    # A layer may add nothing, but then it must.
    last = decoder.layers[-1]
    for linear in (last.self_attn.o_proj, last.mlp.down_proj):
        linear.quant_method.dense.zero_(), linear.quant_method.matrix.weight.zero_()
    assert differing() is None
    last.mlp.down_proj.quant_method.matrix.weight.fill_(0x22222222)
    assert "layer 1 adds something else" in differing()


def test_models_with_other_layers_keep_vllms(drafter, monkeypatch):
    model = drafter(QWEN)
    layers = model.model.get_language_model().model.layers
    last = layers[-1]

    def refused() -> bool:
        return decoder_layers(model.model, model.caches) is None

    assert not refused()
    changes: list[tuple[Any, str, Any]] = [
        (last.mlp.down_proj, "quant_method", SimpleNamespace()),
        (last.self_attn.attn, "sliding_window", 8),
        (last.self_attn.attn, "head_size", 48),
        (last.self_attn, "qk_norm", True),  # whose norms are none
        (last.self_attn.rotary_emb.rotary, "is_neox_style", False),
        (last.self_attn.rotary_emb.rotary, "rotary_dim", 16),
        (last.input_layernorm, "variance_size_override", 8),
    ]
    for where, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            if name == "qk_norm":
                for norm in ("q_norm", "k_norm"):
                    patch.setattr(where, norm, nn.Identity(), raising=False)
            assert refused(), name
    for where, name, value in [
        (last.mlp, "act_fn", GeluAndMul.__new__(GeluAndMul)),
        (last, "self_attn", nn.Identity()),
        (last, "input_layernorm", nn.Identity()),
    ]:
        with monkeypatch.context() as patch:
            patch.setitem(where._modules, name, value)
            assert refused(), name
    assert not refused()


def test_on_cpus_and_without_four_bits_nothing_changes(engines):
    engine = engines(QWEN, drafter=3, dtype="bfloat16")
    (model,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.drafter.drafter.model)
    assert one_token_step(model) is None
    assert decoder_layers(model.model, model.caches) is None


def test_loops_are_chosen_by_the_clock(monkeypatch):
    asked: list[tuple[int, int]] = []
    kinds: dict[int, tuple[str, bool]] = {}

    def launching(kind: str) -> Any:
        def launch(x, matrix, workspace, how, **what):
            asked.append((matrix.shape[0], how.num_loops))
            kinds[matrix.shape[0]] = kind, x.squares is not None
            assert x.squares is None or len(x.squares) * 64 == matrix.shape[0]

        return launch

    for kind in ("matvec", "add_norm", "swiglu"):
        monkeypatch.setattr(token_layers, f"launch_mxfp4_{kind}", launching(kind))
    matrices = {
        name: random_matrix(height, 64, seed=height)[0]
        for name, height in (("qkv", 64), ("output", 96), ("gate_up", 128), ("down", 160))
    }
    norm = Norm(torch.ones(64).bfloat16(), 1e-6)
    layer = SimpleNamespace(**matrices, cache=torch.zeros(0), attention_norm=norm, mlp_norm=norm)
    step = OneTokenStep([layer, layer], nn.Identity(), Workspace(torch.device("cpu")))
    best = {64: 4, 96: 1, 128: 2, 160: 4}

    def seconds(run: Any) -> float:
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(token_layers.torch, "ones", None)  # nothing but the launches
            run()
        assert len(asked) == 2 and len(set(asked)) == 1
        return abs(asked[0][1] - best[asked[0][0]])

    step.tune(seconds)
    assert step.num_loops == {"qkv": 4, "output": 1, "gate_up": 2, "down": 4}
    # As they are in a step.
    assert kinds == {64: ("matvec", True), 96: ("add_norm", False), 128: ("swiglu", True), 160: ("add_norm", False)}


def test_what_a_device_cannot_do_ends_no_start(monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(one_token.logger, "warning", lambda text, *args: warnings.append(text % args))
    monkeypatch.setattr(one_token, "decoder_layers", lambda model, caches: [SimpleNamespace()])
    monkeypatch.setattr(one_token, "_is_strided", lambda model: True)
    monkeypatch.setattr(one_token, "Workspace", lambda device: None)
    monkeypatch.setattr(one_token.current_platform, "is_cuda", lambda: False)
    monkeypatch.setattr(OneTokenStep, "tune", lambda self, seconds: None)
    monkeypatch.setattr(one_token, "reads_e4m3", lambda device: False)
    monkeypatch.setattr(one_token, "_choose_head", lambda *args: None)
    decoder = SimpleNamespace(layers=[], norm=None)
    language_model = SimpleNamespace(get_language_model=lambda: SimpleNamespace(model=decoder))

    def step(outcome: Any, device: str = "cuda", ranks: int = 1) -> OneTokenStep | None:
        def differing(*args: Any) -> str | None:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(one_token, "_differing", differing)
        model: Any = SimpleNamespace(device=torch.device(device), model=language_model, caches={}, num_ranks=ranks)
        return one_token_step(model)

    assert isinstance(step(None), OneTokenStep)
    assert step(None, "cpu") is step(None, ranks=2) is None and not warnings
    assert step("layer 3 adds something else") is None and "because layer 3 adds" in warnings.pop()
    monkeypatch.setattr(one_token, "_choose_head", lambda *args: 1 / 0)
    assert step(None).head is None and "a head can't be used: ZeroDivisionError" in warnings.pop()
    assert step(RuntimeError("no such instruction")) is None and "no such instruction" in warnings.pop()
    with pytest.raises(torch.OutOfMemoryError):
        step(torch.OutOfMemoryError("full"))
    monkeypatch.setattr(one_token, "_choose_head", lambda *args: None)
    monkeypatch.setattr(one_token.current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(one_token.current_platform, "has_device_capability", lambda capability: True, raising=False)
    monkeypatch.setattr(one_token, "_overlapping_pays", lambda *args: 1 / 0)
    assert step(None).overlaps is False and "can't overlap: ZeroDivisionError" in warnings.pop()
    monkeypatch.setattr(one_token, "_overlapping_pays", lambda *args: True)
    assert step(None).overlaps is True and not warnings
    monkeypatch.setattr(OneTokenStep, "tune", lambda self, seconds: 1 / 0 if self.overlaps else None)
    assert step(None).overlaps is False and "can't overlap: ZeroDivisionError" in warnings.pop()


def test_tokens_go_through_whichever_layers_are_faster(engines, monkeypatch):
    engine = engines(QWEN, drafter=3, dtype="bfloat16")
    (model,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.drafter.drafter.model)
    step = object()
    monkeypatch.setattr(model, "max_model_len", 9000)
    monkeypatch.setattr(model.pool, "num_pages", 9000)
    # By vLLM's layers a token takes 2.0, and 3.0 behind many.
    for mine, is_faster in (((1.0, 2.9), True), ((2.0, 2.9), False), ((1.0, 3.1), False)):

        def seconds(num_rows: int, context: int, mine: Any = mine, **_: Any) -> float:
            assert num_rows == 1 and context in (1024, 8999)
            return (mine if model.one_token else (2.0, 3.0))[context > 1024]

        monkeypatch.setattr(model, "decode_seconds", seconds)
        model.one_token = step
        try:
            model.warm_up()
            assert model.one_token is (step if is_faster else None)
            assert model.token_seconds == {"vLLM": [2.0, 3.0], "lvspec": list(mine)}
        finally:
            del model.one_token, model.token_seconds
