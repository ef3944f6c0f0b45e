"""A drafter whose weights are quantised, by its checkpoint or as they are loaded, beside a target that is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checkpoints import save_in_int8, save_rounded_to_mxfp4
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
from workload import QWEN, token_ids, turn

from vllm_lvspec.bench.samples import videofacts
from vllm_lvspec.config import LVSpecConfigError
from vllm_lvspec.engine import compatibility, draft_model
from vllm_lvspec.reference import PAIRS

PAIR = PAIRS["qwen2_5_vl"]
INT8 = "CompressedTensorsW8A8Int8"
NUM_VIDEOS = 8
SEED = 71  # of the suite


def kinds_of_layers(model: torch.nn.Module) -> dict[str, set[str]]:
    """How the linear layers of a model in vLLM hold their weights, by part of the model."""
    kinds: dict[str, set[str]] = {"language_model": set(), "visual": set()}
    for name, layer in model.named_modules():
        part = name.partition(".")[0]
        if part in kinds and name.endswith("proj"):
            # Kernels keep int8 weights to themselves, so what is left of the layer only says how it was made.
            scheme = getattr(layer, "scheme", None)
            kinds[part].add(type(scheme).__name__ if scheme is not None else str(layer.weight.dtype))
    return kinds


def models_of_worker(worker: Any) -> dict[str, dict[str, set[str]]]:
    runner = worker.model_runner
    models = {"target": kinds_of_layers(runner.model)}
    if runner.speculative_config is not None:
        models["drafter"] = kinds_of_layers(runner.drafter.drafter.model.model)
    return models


@dataclass
class Run:
    """What an engine answered to captions' prompts, tokens per step of its target, and its layers."""

    answers: list[list[int]]
    tokens_per_step: float
    layers: dict[str, dict[str, set[str]]]


Runs = Callable[..., Run]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """`run("target", "drafter in int8")`: each engine is started once; a drafter that is None means none."""
    folder = tmp_path_factory.mktemp("quantised")
    models = {
        "target": str(PAIR.target),
        "drafter": str(PAIR.draft),
        "target in int8": save_in_int8(PAIR.target, folder / "target"),
        "drafter in int8": save_in_int8(PAIR.draft, folder / "draft"),
        "drafter at values of mxfp4": save_rounded_to_mxfp4(PAIR.draft, folder / "mxfp4"),
    }
    samples = videofacts(NUM_VIDEOS, SEED, tasks=("caption",), num_frames=PAIR.num_frames)
    prompts = [
        {
            "prompt": turn("user", QWEN.video + sample.question) + "<|im_start|>assistant\n",
            "multi_modal_data": {"video": [sample.load_video()]},
        }
        for sample in samples
    ]
    done: dict[tuple, Run] = {}

    def start(target: str, drafter: str | None, dtype: str = "float32", quantization: str | None = None) -> Run:
        key = (target, drafter, dtype, quantization)
        if key not in done:
            # Always as many drafted tokens, so that what is accepted of them does not hang on how fast this machine is.
            settings = {
                "method": "lvspec", "policy": "strict", "only_if_faster": False, "draft_quantization": quantization,
            }  # fmt: skip
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
                llm = LLM(
                    models[target], dtype=dtype, max_model_len=1024, max_num_seqs=4, enforce_eager=True,
                    disable_log_stats=False, kv_cache_memory_bytes=2**28, limit_mm_per_prompt={"video": 1, "image": 0},
                    speculative_config=settings | {"model": models[drafter]} if drafter else None,
                )  # fmt: skip
            try:
                params = SamplingParams(temperature=0, max_tokens=192)
                answers = token_ids(llm.generate(prompts, params, use_tqdm=False))
                tokens = sum(len(answer) - 1 for answer in answers)
                name = "vllm:spec_decode_num_accepted_tokens"
                accepted = sum(metric.value for metric in llm.get_metrics() if metric.name == name)
                (layers,) = llm.collective_rpc(models_of_worker)
                done[key] = Run(answers, tokens / (tokens - accepted), layers)
            finally:
                llm.llm_engine.engine_core.shutdown()
        return done[key]

    return start


def test_a_checkpoint_in_int8_drafts_in_int8_for_a_target_that_is_not(run: Runs):
    layers = run("target", "drafter in int8").layers
    assert layers["drafter"] == {"language_model": {INT8}, "visual": {"torch.float32"}}
    assert layers["target"] == {"language_model": {"torch.float32"}, "visual": {"torch.float32"}}


def test_with_a_quantised_drafter_the_answers_are_the_targets(run: Runs):
    assert run("target", "drafter in int8").answers == run("target", None).answers


def test_a_quantised_drafter_is_believed_nearly_as_often(run: Runs):
    quantised, plain = run("target", "drafter in int8").tokens_per_step, run("target", "drafter").tokens_per_step
    assert plain > 1.8
    assert quantised == pytest.approx(plain, rel=0.15)


def test_a_drafter_at_the_values_of_four_bits_is_believed_nearly_as_often(run: Runs):
    rounded, plain = run("target", "drafter at values of mxfp4"), run("target", "drafter")
    assert rounded.answers == plain.answers
    assert rounded.tokens_per_step == pytest.approx(plain.tokens_per_step, rel=0.15)


def test_a_quantised_target_leaves_its_drafter_as_it_is(run: Runs):
    quantised = run("target in int8", "drafter")
    assert quantised.layers["target"] == {"language_model": {INT8}, "visual": {"torch.float32"}}
    assert quantised.layers["drafter"] == {"language_model": {"torch.float32"}, "visual": {"torch.float32"}}
    assert quantised.tokens_per_step == pytest.approx(run("target", "drafter").tokens_per_step, rel=0.15)


def test_weights_of_a_drafter_can_be_quantised_as_they_are_loaded(run: Runs):
    quantised = run("target", "drafter", "bfloat16", "fp8_per_channel")
    assert quantised.layers["drafter"] == {"language_model": {"torch.float8_e4m3fn"}, "visual": {"torch.bfloat16"}}
    assert quantised.layers["target"] == {"language_model": {"torch.bfloat16"}, "visual": {"torch.bfloat16"}}
    assert quantised.tokens_per_step == pytest.approx(run("target", "drafter").tokens_per_step, rel=0.15)


def test_a_drafter_without_a_language_model_by_that_name_is_not_left_as_it_is_in_silence(run: Runs, monkeypatch):
    monkeypatch.setattr(compatibility, "NOT_OF_LANGUAGE", "re:.*")
    with pytest.raises(LVSpecConfigError, match=r"draft_quantization=.fp8_per_channel.: .* the name language_model"):
        run("target in int8", "drafter", "bfloat16", "fp8_per_channel")


@pytest.mark.skipif(not current_platform.is_cpu(), reason="GPUs have kernels for it")
def test_what_nobody_asked_to_be_quantised_is_loaded_as_it_is_where_it_can_not_be(run: Runs, monkeypatch):
    monkeypatch.setattr(compatibility, "_is_hopper", lambda: True)
    warnings: list[str] = []
    monkeypatch.setattr(draft_model.logger, "warning", lambda text, *args: warnings.append(text % args))
    automatic = run("target", "drafter", "bfloat16", "auto")
    (why,) = warnings
    assert why.startswith("lvspec: draft_quantization='auto': not mxfp4, because ")
    assert automatic.layers["drafter"] == {"language_model": {"torch.bfloat16"}, "visual": {"torch.bfloat16"}}
    assert automatic.tokens_per_step == pytest.approx(run("target", "drafter").tokens_per_step, rel=0.15)


@pytest.mark.skipif(not current_platform.is_cpu(), reason="GPUs have kernels for it")
def test_a_method_that_this_device_has_no_kernels_for_is_refused_when_the_drafter_is_loaded(run: Runs):
    with pytest.raises(LVSpecConfigError, match=r"draft_quantization=.fp8_per_tensor.: .* on cpu .*fp8_per_channel"):
        run("target", "drafter", "bfloat16", "fp8_per_tensor")
