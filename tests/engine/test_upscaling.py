"""A small checkpoint in a larger shape: vLLM serves the larger model, and it answers what the small one answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from workload import LLAVA, QUESTIONS, QWEN, Family, token_ids, turn, video

from vllm_lvspec.config import LVSpecConfigError
from vllm_lvspec.reference import DRAFT, TARGET
from vllm_lvspec.reference.upscale import LOAD_FORMAT, TEXT_SHAPES, TextShape, upscaled

# Heads of 128, twice the bundled target's, in groups of three instead of two.
TWICE_THE_HEAD = TextShape(
    hidden_size=768, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2, intermediate_size=1280
)


@contextmanager
def engine(one_process: bool = True, **arguments) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        if one_process:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        common = dict(
            dtype="float32", max_model_len=1024, max_num_seqs=4, enforce_eager=True, kv_cache_memory_bytes=2**28,
            limit_mm_per_prompt={"video": 1, "image": 0},
        )  # fmt: skip
        llm = LLM(**{**common, **arguments})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def describe(llm: LLM, family: Family, num_videos: int = 8) -> list[RequestOutput]:
    """Greedy answers, with the five best tokens' logprobs."""
    prompts = [
        {
            "prompt": turn("user", family.video + QUESTIONS[seed % len(QUESTIONS)]) + "<|im_start|>assistant\n",
            "multi_modal_data": {"video": [video(seed)]},
        }
        for seed in range(num_videos)
    ]
    return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32, logprobs=5), use_tqdm=False)


def largest_difference(got: list[RequestOutput], want: list[RequestOutput]) -> float:
    """Between the logprobs of the same rank, over all tokens of all answers."""

    def ranked(outputs: list[RequestOutput]) -> torch.Tensor:
        return torch.tensor(
            [
                sorted(choice.logprob for choice in choices.values())
                for output in outputs
                for choices in output.outputs[0].logprobs
            ]
        )

    return float((ranked(got) - ranked(want)).abs().max())


def assert_same_answers(got: list[RequestOutput], want: list[RequestOutput]) -> None:
    assert token_ids(got) == token_ids(want)
    assert len({tuple(ids) for ids in token_ids(want)}) > 2, "the answers should differ from video to video"
    assert largest_difference(got, want) < 1e-3


def multiplied_weights(model: torch.nn.Module) -> int:
    """Weights that a token is multiplied with in the layers of the text model, by the sizes of vLLM's matrices."""
    return sum(
        module.input_size_per_partition * module.output_size_per_partition
        for name, module in model.named_modules()
        if "language_model." in name and ".layers." in name and hasattr(module, "output_size_per_partition")
    )


def weights_of(shape: TextShape) -> int:
    """As Qwen2 counts them: q, k, v and o, and three matrices of the MLP per layer."""
    kv = shape.num_key_value_heads * shape.head_dim
    return shape.num_hidden_layers * shape.hidden_size * (2 * shape.hidden_size + 2 * kv + 3 * shape.intermediate_size)


@pytest.fixture(scope="module")
def bundled_answers() -> list[RequestOutput]:
    with engine(model=str(TARGET)) as llm:
        return describe(llm, QWEN)


def test_qwen_answers_as_before_in_a_larger_shape_and_is_drafted_for(bundled_answers):
    drafting = {"method": "lvspec", "policy": "strict", "model": str(DRAFT), "only_if_faster": False}
    with engine(**upscaled(str(TARGET), "0.5b"), speculative_config=drafting, disable_log_stats=False) as llm:
        assert llm.apply_model(multiplied_weights) == [weights_of(TEXT_SHAPES["0.5b"])]
        assert_same_answers(describe(llm, QWEN), bundled_answers)
        (stats,) = llm.collective_rpc("lvspec_stats")
        assert stats["drafted_tokens"] > 100
        accepted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
        assert accepted > 10


def test_the_drafter_drafts_the_same_in_a_larger_shape():
    drafted = []
    many_tokens = replace(TWICE_THE_HEAD, vocab_size=4096)
    for overrides in ({}, upscaled(str(DRAFT), many_tokens)["hf_overrides"]):
        drafting = {
            "method": "lvspec", "policy": "strict", "model": str(DRAFT), "only_if_faster": False,
            "draft_hf_overrides": overrides,
        }  # fmt: skip
        with engine(**upscaled(str(TARGET), many_tokens), speculative_config=drafting) as llm:
            describe(llm, QWEN)
            (stats,) = llm.collective_rpc("lvspec_stats")
            (drafter,) = llm.collective_rpc(lambda worker: worker.model_runner.drafter.drafter.model)
            weights = multiplied_weights(drafter.model)
            drafted.append((stats["drafted_tokens"], stats["tokens_exact"]))
    assert weights == weights_of(TWICE_THE_HEAD)
    assert drafter.shared_vocab_size == len(drafter.model.language_model.lm_head.weight) == 4096
    assert drafted[0] == drafted[1]
    assert drafted[0][1] > 50


def test_a_drafter_in_a_larger_shape_can_be_quantised_as_it_is_loaded():
    """Beside a target in its own shape, of which vLLM asks no more than to be loaded in the same format."""
    drafting = {
        "method": "lvspec", "policy": "strict", "model": str(DRAFT), "only_if_faster": False,
        "draft_quantization": "fp8_per_channel",
        "draft_hf_overrides": upscaled(str(DRAFT), TWICE_THE_HEAD)["hf_overrides"],
    }  # fmt: skip
    with engine(model=str(TARGET), load_format=LOAD_FORMAT, dtype="bfloat16", speculative_config=drafting) as llm:
        describe(llm, QWEN, 2)
        (stats,) = llm.collective_rpc("lvspec_stats")
        (drafter,) = llm.collective_rpc(lambda worker: worker.model_runner.drafter.drafter.model)
    layers = [layer for name, layer in drafter.model.named_modules() if ".layers." in name and name.endswith("_proj")]
    assert {layer.weight.dtype for layer in layers} == {torch.float8_e4m3fn}
    assert stats["tokens_exact"] > 0.1 * stats["drafted_tokens"] > 4


def test_llava_answers_as_before_in_a_larger_shape(checkpoint: Callable[..., str]):
    path = checkpoint("llava_onevision")
    with engine(model=path) as llm:
        want = describe(llm, LLAVA)
    with engine(**upscaled(path, TWICE_THE_HEAD)) as llm:
        assert llm.apply_model(multiplied_weights) == [weights_of(TWICE_THE_HEAD)]
        assert_same_answers(describe(llm, LLAVA), want)


@pytest.mark.two_ranks
def test_larger_heads_answer_as_before_on_two_ranks(bundled_answers, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(one_process=False, **upscaled(str(TARGET), TWICE_THE_HEAD), tensor_parallel_size=2) as llm:
        assert_same_answers(describe(llm, QWEN), bundled_answers)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_the_command_line_takes_the_overrides_as_json(family, checkpoint):
    arguments = upscaled(checkpoint(family), "72b")
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = AsyncEngineArgs.from_cli_args(
        parser.parse_args(
            [
                *("--model", arguments["model"], "--max-model-len", "512"),
                *("--load-format", LOAD_FORMAT, "--hf-overrides", json.dumps(arguments["hf_overrides"])),
            ]
        )
    )
    config = args.create_engine_config()
    assert config.load_config.load_format == LOAD_FORMAT
    model = config.model_config
    assert (model.get_hidden_size(), model.get_head_size(), model.get_total_num_hidden_layers()) == (8192, 128, 80)
    assert model.hf_text_config.rms_norm_eps == pytest.approx(1e-6 * 64 / 8192)
    if family == "qwen2_5_vl":
        assert model.hf_config.vision_config.out_hidden_size == 8192
        assert model.hf_text_config.rope_parameters["mrope_section"] == [16, 24, 24]


def test_overrides_that_do_not_go_together_end_the_start(checkpoint):
    arguments = upscaled(checkpoint("llava_onevision"), "0.5b")
    del arguments["hf_overrides"]["text_config"]["rms_norm_eps"]
    with pytest.raises(LVSpecConfigError, match=r"text_config.rms_norm_eps=1e-06 .* must be 7\.1"):
        with engine(**arguments):
            pass
