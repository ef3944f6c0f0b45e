"""What only a GPU can show: compiled kernels, FlashAttention's cache, CUDA graphs of target and drafter, bfloat16."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from harness import Engine
from vllm import RequestOutput, SamplingParams
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.model_executor.kernels.linear.mxfp4.base import MxFp4LinearLayerConfig
from vllm.model_executor.kernels.linear.mxfp4.marlin import MarlinMxFp4LinearKernel
from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import prepare_fp4_layer_for_marlin
from vllm.model_executor.layers.quantization.utils.mxfp4_utils import mxfp4_quantize
from vllm.platforms import current_platform
from vllm.utils import jit_monitor

from vllm_lvspec import kernels
from vllm_lvspec.bench.run import prompt_writer
from vllm_lvspec.bench.samples import videofacts
from vllm_lvspec.engine.few_rows import OneRowLinear, give_few_rows
from vllm_lvspec.engine.one_token import _head, _recorded, one_token_step
from vllm_lvspec.engine.placeholders import PADDING_TOKEN_ID
from vllm_lvspec.kernels.greedy_head import in_eight_bits, reads_e4m3
from vllm_lvspec.reference import PAIRS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")

SEED = 90
LEAST_GAP = 0.25  # between logprobs: bfloat16 rounds logits of 10 to 20 by up to a sixteenth, in two forwards
AS_SERVED: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": False, "block_size": 16, "max_model_len": 1024}


@contextmanager
def running(family: str, has_drafter: bool = True, **options: Any) -> Iterator[Engine]:
    pair = PAIRS[family]
    engine = Engine(str(pair.target), str(pair.draft) if has_drafter else None, **{**AS_SERVED, **options})
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: Engine, family: str, count: int = 12) -> list[RequestOutput]:
    """Captions, then questions; one, three, then all at once."""
    write = prompt_writer(engine.llm)
    samples = videofacts(count, SEED, ("caption", "question"), PAIRS[family].num_frames)
    params = SamplingParams(temperature=0, max_tokens=200, logprobs=5)
    inputs = [write(sample) for sample in samples]
    return [
        output
        for first, end in ((0, 1), (1, 4), (4, len(inputs)))
        for output in engine.llm.generate(inputs[first:end], params, use_tqdm=False)
    ]


@pytest.fixture(scope="module")
def alone() -> Any:
    """Answers of vLLM without speculation, by family."""
    answers: dict[str, list[RequestOutput]] = {}

    def of(family: str) -> list[RequestOutput]:
        if family not in answers:
            with running(family, has_drafter=False) as engine:
                answers[family] = ask(engine, family)
        return answers[family]

    return of


def assert_same_but_for_rounding(got: list[RequestOutput], want: list[RequestOutput]) -> None:
    """Where answers part, the target must have held both tokens for as good as equally likely."""
    parted = 0
    for ours, theirs in zip(got, want, strict=True):
        said, wanted = ours.outputs[0].token_ids, theirs.outputs[0].token_ids
        place = next((i for i, (a, b) in enumerate(zip(said, wanted, strict=False)) if a != b), None)
        if place is None:
            assert len(said) == len(wanted)
            continue
        parted += 1
        likely = theirs.outputs[0].logprobs[place]
        assert said[place] in likely, f"at {place}: {said[place]} instead of {wanted[place]}"
        gap = likely[wanted[place]].logprob - likely[said[place]].logprob
        assert gap < LEAST_GAP, f"at {place}: {said[place]} instead of {wanted[place]}, {gap:.2f} less likely"
    assert parted <= 2 * len(want) // 3, (
        "a caption has about 140 tokens, of which now and then two are nearly as likely"
    )


def check_drafts(engine: Engine, least: float) -> dict[str, Any]:
    """Counts, once it is known that at least this share of the drafted tokens was accepted."""
    accepted = engine.metric("spec_decode_num_accepted_tokens")
    stats = engine.stats()
    assert accepted >= least * stats["drafted_tokens"] > 100 * least, (accepted, stats["drafted_tokens"])
    assert stats["pages_free"] == stats["pages_total"]
    return stats


def graphs_of(engine: Engine) -> Any:
    (graphs,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.drafter.drafter.model.graphs)
    return graphs


@pytest.mark.parametrize("family", PAIRS)
def test_as_served_strict_says_what_the_target_says_but_for_rounding(family, alone):
    with running(family) as engine:
        graphs = graphs_of(engine)
        assert graphs is not None, "the drafter's steps must be CUDA graphs"
        # The target is compiled and has PyTorch's operations, of which the drafter would run a dozen a normalisation.
        assert graphs._model.vllm_config.kernel_config.ir_op_priority.rms_norm[0] == "vllm_c"
        got = ask(engine, family)
        check_drafts(engine, 0.2)
    assert_same_but_for_rounding(got, alone(family))


@pytest.mark.parametrize(
    "view",
    [
        pytest.param({"pruning": "attention"}, id="attention"),
        pytest.param({"pruning": "similarity"}, id="similarity"),
        pytest.param({"pruning": "redundancy"}, id="redundancy"),
        pytest.param({"draft_quantization": "fp8"}, id="fp8"),
        pytest.param({"draft_quantization": "mxfp4"}, id="mxfp4"),
        pytest.param({"draft_quantization": "none"}, id="bfloat16"),
    ],
)
def test_every_view_drafts_under_cuda_graphs(view, alone):
    with running("qwen2_5_vl", lvspec=view) as engine:
        assert graphs_of(engine) is not None
        got = ask(engine, "qwen2_5_vl")
        check_drafts(engine, 0.2)
    assert_same_but_for_rounding(got, alone("qwen2_5_vl"))


@pytest.mark.parametrize("cache", ["copy", "compute"])
def test_the_target_drafts_for_itself_under_cuda_graphs(cache, alone):
    view = {"model": "self", "self_cache": cache, "pruning": "uniform"}
    with running("qwen2_5_vl", lvspec=view) as engine:
        got = ask(engine, "qwen2_5_vl")
        check_drafts(engine, 0.3)
    assert_same_but_for_rounding(got, alone("qwen2_5_vl"))


def test_loose_answers_take_fewer_steps(alone):
    with running("qwen2_5_vl", lvspec={"policy": "lvspec"}) as engine:
        got = ask(engine, "qwen2_5_vl")
        stats = check_drafts(engine, 0.5)
    assert stats["tokens_loose"] > 0.05 * sum(len(output.outputs[0].token_ids) for output in got)


def own_kernels() -> dict[str, triton.JITFunction]:
    modules = [
        importlib.import_module(f"{kernels.__name__}.{name}") for _, name, _ in pkgutil.iter_modules(kernels.__path__)
    ]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, triton.JITFunction)]
    return {kernel.__name__: kernel for kernel in found}


@pytest.mark.parametrize(
    ("view", "runs"),
    [
        pytest.param({"policy": "lvspec"}, "_accept_kernel", id="loose"),
        pytest.param({"policy": "lvspec", "pruning": "attention"}, "_attention_mass_kernel", id="attention"),
        pytest.param({"model": "self"}, "_copy_slots_kernel", id="self"),
    ],
)
def test_no_kernel_is_compiled_under_a_request(view, runs, monkeypatch):
    ours = own_kernels()
    for kernel in ours.values():
        kernel.device_caches.clear()
    compiled: list[str] = []
    with running("qwen2_5_vl", lvspec=view) as engine:
        assert jit_monitor._active
        monkeypatch.setattr(jit_monitor, "_handle_jit_event", lambda **event: compiled.append(event["fn_name"]))
        ask(engine, "qwen2_5_vl")
    assert any(cached[0] for cached in ours[runs].device_caches.values()), f"{runs} has not run at all"
    assert not [name for name in compiled if name in ours]


@pytest.mark.parametrize(("height", "width"), [(256, 192), (3584, 4608), (11008, 2048)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_weights_are_read_where_marlin_has_them(height, width, has_bias):
    """Weights, scales and bias as vLLM quantises and repacks them."""
    layer, weights = torch.nn.Module(), torch.randn(width, height, device="cuda", dtype=torch.bfloat16) / height**0.5
    layer.input_size_per_partition, layer.output_size_per_partition, layer.params_dtype = height, width, torch.bfloat16
    parts = dict(zip(("weight", "weight_scale"), mxfp4_quantize(weights), strict=True))
    if has_bias:
        parts["bias"] = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    for name, values in parts.items():
        layer.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))
    prepare_fp4_layer_for_marlin(layer)
    marlin = MarlinMxFp4LinearKernel(MxFp4LinearLayerConfig(activation_quant_key=None))
    layer.quant_method = SimpleNamespace(kernel=marlin)
    give_few_rows(torch.nn.ModuleList([layer]), torch.bfloat16, torch.device("cuda"))
    kernel = layer.quant_method.kernel
    assert type(kernel) is OneRowLinear
    for _ in range(3):
        x = torch.randn(1, height, device="cuda", dtype=torch.bfloat16)
        found, wanted = kernel.apply_weights(layer, x, layer.bias if has_bias else None), x @ weights.T
        # Four bits leave a tenth of a weight's size out.
        added = parts["bias"] if has_bias else 0
        assert (found - added - wanted).norm() < 0.2 * wanted.norm()


@torch.inference_mode()
def test_a_token_through_this_packages_layers_is_what_it_is_through_vllms():
    """As a whole, and where kernels start while those before still run, to the last bit; and so is the next one."""
    settings = {} if current_platform.is_device_capability(90) else {"draft_quantization": "mxfp4"}
    with running("qwen2_5_vl", lvspec=settings) as engine:
        (model,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.drafter.drafter.model)
        model.one_token = None
        step = one_token_step(model)
        assert step is not None
        prompt, batch = model.decode_batch(1, 0, 700), model.decode_batch(1, 700)
        prompt.token_ids = torch.arange(700, device="cuda")
        model.run(prompt, model.metadata(prompt))
        wanted = model.run(batch, model.metadata(batch)).float()
        logits = model.model.compute_logits(wanted.to(torch.bfloat16))[0, : model.shared_vocab_size].float()
        model.one_token = step
        metadata, found = model.metadata(batch, is_recorded=True), []
        for step.overlaps in (False, True) if torch.cuda.get_device_capability()[0] >= 9 else (False,):
            graph, out = _recorded(lambda: model.run(batch, metadata))
            for _ in range(20):
                graph.replay()
            found.append(out.clone())
        assert all(torch.equal(each, found[0]) for each in found)
        assert (found[0].float() - wanted).norm() <= 0.02 * wanted.norm()
        plain = _head(model)
        assert plain is not None
        for step.head in (plain, in_eight_bits(plain)) if reads_e4m3(model.device) else (plain,):
            graph, (token_ids, probs) = _recorded(lambda: model.run_far(batch, metadata))
            for _ in range(20):
                graph.replay()
            assert all(map(torch.equal, (token_ids, probs), model.run_far(batch, metadata)))
            assert logits.max() - logits[token_ids] <= 0.25 * logits.std()
            assert abs(probs / logits.softmax(-1)[token_ids] - 1) < 0.2


def test_the_device_is_not_waited_for_while_it_drafts():
    """PyTorch says so where a copy or a look at a value would wait; only for grammars the host does."""
    num_watched = 0

    def watch(worker: Any) -> None:
        runner = worker.model_runner
        take = runner.take_draft_token_ids

        def watched() -> Any:
            nonlocal num_watched
            if any(req_id not in runner.drafter.drafter.sequences for req_id in runner.input_batch.req_ids):
                return take()  # reading a video is another thing
            torch.cuda.set_sync_debug_mode("error")
            try:
                taken = take()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if taken is not None:
                num_watched += 1
                assert runner.drafter._started is not None, "waited for by an event, of which PyTorch says nothing"
                assert {token for draft in taken.draft_token_ids for token in draft} <= {-1, PADDING_TOKEN_ID}
            return taken

        runner.take_draft_token_ids = watched

    with running("qwen2_5_vl", lvspec={"policy": "lvspec"}) as engine:
        engine.llm.collective_rpc(watch)
        ask(engine, "qwen2_5_vl", 6)
    assert num_watched > 10


def test_costs_are_measured_and_drafts_go_on_where_they_pay():
    """The default settings, as a server has them."""
    with running("qwen2_5_vl", lvspec={"policy": "lvspec", "only_if_faster": True}) as engine:
        got = ask(engine, "qwen2_5_vl", 6)
        (costs,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.drafter.drafter.payoff.costs)
    assert costs is not None and costs.pieces is not None
    assert costs.pieces[0] > costs.target[0] > 0
    assert all(output.outputs[0].token_ids for output in got)


def graphs_of_steps(engine: Engine) -> list[tuple[CUDAGraphMode, BatchDescriptor]]:
    """In which the target's steps are launched from now on."""
    graphs: list[tuple[CUDAGraphMode, BatchDescriptor]] = []

    def spy(worker: Any) -> None:
        dispatcher = worker.model_runner.cudagraph_dispatcher
        dispatch = dispatcher.dispatch
        dispatcher.dispatch = lambda *args, **kwargs: graphs.append(dispatch(*args, **kwargs)) or graphs[-1]

    engine.llm.collective_rpc(spy)
    return graphs


def test_drafts_of_different_length_are_padded_to_a_full_graph(alone):
    """As if padding cost nothing: what it costs this small target is not asked here."""
    with running("qwen2_5_vl", lvspec={"draft_length": "adaptive"}) as engine:
        (runner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner)
        graphs, of_padded = graphs_of_steps(engine), []
        pad, execute = runner._in_one_graph, runner.execute_model

        def padded_for_nothing(drafts: list[list[int]]) -> list[list[int]]:
            drafter = runner.drafter.drafter
            costs, drafter.payoff.costs = drafter.payoff.costs, None
            try:
                return pad(drafts)
            finally:
                drafter.payoff.costs = costs

        def watched(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            result = execute(scheduler_output, *args, **kwargs)
            if any(tokens[-1] == PADDING_TOKEN_ID for tokens in scheduler_output.scheduled_spec_decode_tokens.values()):
                of_padded.append(graphs[-1])
            return result

        runner._in_one_graph, runner.execute_model = padded_for_nothing, watched
        got = ask(engine, "qwen2_5_vl")
        check_drafts(engine, 0.2)
    assert len(of_padded) > 10
    in_one = [mode == CUDAGraphMode.FULL for mode, _ in of_padded]
    assert sum(in_one) > 0.9 * len(in_one)  # near the length limit the scheduler cuts drafts
    assert_same_but_for_rounding(got, alone("qwen2_5_vl"))


def test_steps_without_drafts_have_full_graphs_of_one_token_a_request():
    """Two tokens leave no room for a draft: a prompt's step, then one of one token of each."""
    with running("qwen2_5_vl") as engine:
        graphs = graphs_of_steps(engine)
        write = prompt_writer(engine.llm)
        inputs = [write(sample) for sample in videofacts(3, SEED, ("caption",), PAIRS["qwen2_5_vl"].num_frames)]
        outputs = engine.llm.generate(inputs, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert graphs[-1] == (CUDAGraphMode.FULL, BatchDescriptor(4, 4, uniform=True))
    with running("qwen2_5_vl", has_drafter=False) as engine:
        wanted = engine.llm.generate(inputs, SamplingParams(temperature=0, max_tokens=2, logprobs=5), use_tqdm=False)
    assert_same_but_for_rounding(outputs, wanted)


def test_without_compilation_target_and_drafter_have_graphs_of_decodes_alone(alone):
    modes = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    with running("qwen2_5_vl", **modes) as engine:
        assert graphs_of(engine) is not None
        got = ask(engine, "qwen2_5_vl")
        check_drafts(engine, 0.2)
    assert_same_but_for_rounding(got, alone("qwen2_5_vl"))


def test_keys_and_values_lie_where_kernels_look_for_them():
    with running("qwen2_5_vl", lvspec={"model": "self"}) as engine:
        (layout,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.drafter.drafter.model.layout)
        assert layout.is_strided
