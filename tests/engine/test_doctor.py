"""`lvspec doctor` on the bundled pair: what would be used, whether it fits, and its exit codes."""

import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner
from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES
from vllm.engine.arg_utils import EngineArgs

from vllm_lvspec.cli import app
from vllm_lvspec.engine import doctor
from vllm_lvspec.engine.arguments import lvspec_config
from vllm_lvspec.engine.doctor import FINE, REFUSED, TOO_LARGE, UNKNOWN, WRONG_VERSION, Fit, Part, weight_bytes
from vllm_lvspec.reference import DRAFT, TARGET

SMALL = ("--max-model-len", "1024", "--max-num-seqs", "4", "--dtype", "float32")


def run(*arguments):
    result = CliRunner().invoke(app, ["doctor", str(TARGET), *SMALL, *arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(autouse=True)
def _own_cache_size(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # which other tests set, and vLLM prefers


def test_a_pair_that_fits_is_described_with_the_command_that_serves_it():
    code, shown = run("--kv-cache-memory-bytes", "256M")
    assert code == FINE, shown
    for said in ("vllm-lvspec", "cores", "Qwen2_5_VL", "uniform, 90% of a video pruned", "relaxation 0.9", "CPU_ATTN"):
        assert said in shown
    assert "the target's known partner, or the folder beside it" in shown
    assert "✓ fits: KV cache of 0.250 GiB" in shown
    assert shown.replace(" ", "").endswith("--speculative-configlvspec")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--kv-cache-memory-bytes", "1M"), TOO_LARGE, "max_model_len=1024: lower it"),
        (("--gpu-memory-utilization", "1.0"), TOO_LARGE, "are free: lower gpu_memory_utilization"),
        (("--enable-lora",), REFUSED, "enable_lora=True: not supported with lvspec"),
        (("-sc", "lvspec:/no/such/drafter"), REFUSED, "no such drafter"),
        (("-sc", '{"method": "ngram", "num_speculative_tokens": 2}'), REFUSED, "must be lvspec"),
    ],
)
def test_what_does_not_fit_or_is_refused_is_named_and_has_an_exit_code(arguments, code, said):
    found, shown = run(*arguments)
    assert found == code and said in shown, shown


@pytest.mark.parametrize(("drafter", "said"), [("self", "the target's own weights"), (str(TARGET), "as named")])
def test_it_says_why_this_drafter(drafter, said):
    code, shown = run("--kv-cache-memory-bytes", "256M", "-sc", f"lvspec:{drafter}")
    assert code == FINE and said in shown, shown


def test_where_sizes_are_unknown_the_exit_code_says_so(monkeypatch):
    monkeypatch.setattr(doctor, "weight_bytes", lambda *args: None)
    monkeypatch.setattr(doctor, "_tensors", lambda *args: None)
    code, shown = run("--kv-cache-memory-bytes", "256M")
    assert code == UNKNOWN and "whether it fits can't be told" in shown, shown


def test_another_vllm_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "is_tested_vllm", lambda: False)
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", None)  # such a vLLM may lack anything
    code, shown = run()
    assert code == WRONG_VERSION and "lvspec works with vllm" in shown


def test_the_size_of_weights_is_that_of_the_files_of_one_format(tmp_path):
    assert weight_bytes(str(DRAFT)) == sum(file.stat().st_size for file in DRAFT.glob("*.safetensors")) > 0
    (tmp_path / "model.safetensors").write_bytes(bytes(10))
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(99))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "more.safetensors").write_bytes(bytes(1000))
    assert weight_bytes(str(tmp_path)) == 10
    assert doctor._of_one_format({"a.safetensors": 3, "b.safetensors": 4, "original/c.safetensors": 5}) == 7
    assert weight_bytes("nobody/knows-this") is None


def counted(quantization: str | None = None, num_ranks: int = 1, encoder: str = "weights", dtype=torch.float32) -> Part:
    model = SimpleNamespace(
        model=str(DRAFT),
        revision=None,
        dtype=dtype,
        quantization=quantization,
        model_arch_config=SimpleNamespace(quantization_config=None),
        multimodal_config=SimpleNamespace(mm_encoder_tp_mode=encoder),
    )
    return doctor._weights("drafter", model, num_ranks, None)


def test_weights_are_counted_as_they_are_loaded():
    params = load_file(DRAFT / "model.safetensors")
    every = sum(p.numel() for p in params.values())
    seen = sum(p.numel() for name, p in params.items() if name.startswith("visual."))
    layers = [p for name, p in params.items() if "model.layers." in name and name.endswith("_proj.weight")]
    linear = sum(p.numel() for p in layers)
    assert 0 < seen < every / 2 < linear + seen < every
    assert counted().num_bytes == 4 * every
    assert counted(dtype=torch.bfloat16).num_bytes == 2 * every
    assert counted("fp8", dtype=torch.bfloat16).num_bytes == 2 * (every - linear) + linear
    assert counted("mxfp4", dtype=torch.bfloat16).num_bytes == int(2 * (every - linear) + linear * 4.25 / 8)
    assert counted(num_ranks=2).num_bytes == 2 * every
    whole = counted(num_ranks=2, encoder="data")
    assert whole.num_bytes == 2 * (every - seen) + 4 * seen
    assert whole.why == "shared by 2 ranks, but for its visual encoder"


def test_the_target_is_counted_as_it_is_quantised_and_encoders_as_they_are_split(monkeypatch):
    counted = []
    monkeypatch.setattr(
        doctor, "_weights", lambda name, model, *args: counted.append((name, model, *args)) or Part(name, 0, "")
    )
    code, shown = run("--kv-cache-memory-bytes", "256M", "--dtype", "bfloat16", "--quantization", "fp8_per_channel")
    assert code == FINE, shown
    assert [(name, model.quantization) for name, model, *_ in counted] == [
        ("target", "fp8_per_channel"),
        ("drafter", None),
    ]
    monkeypatch.setattr("vllm_lvspec.engine.compatibility.fit_encoder", lambda model, size: counted.append(size))
    run("--kv-cache-memory-bytes", "256M")
    assert counted.count(1) == 2, "where the engine is checked, and where it is counted"


def test_a_drafter_that_each_rank_has_whole_is_counted_so():
    def parts(**settings: int) -> dict[str, Part]:
        args = EngineArgs(
            str(TARGET),
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=4,
            tensor_parallel_size=2,
            speculative_config={"method": "lvspec", "model": str(DRAFT), **settings},
        )
        vllm_config = args.create_engine_config()
        return {part.name: part for part in doctor.memory_fit(vllm_config, lvspec_config(vllm_config)).parts}

    shared, whole = parts(), parts(draft_tensor_parallel_size=1)
    assert shared["drafter's weights"].why == "shared by 2 ranks"
    assert whole["drafter's weights"].why == "whole on each rank"
    assert shared["target's weights"] == whole["target's weights"]
    for name in ("drafter's weights", "drafter's KV cache"):
        assert 0 < shared[name].num_bytes * 2 == whole[name].num_bytes


def test_what_is_known_of_sizes_fits_what_vllm_quantises():
    assert set(doctor.QUANTISED_BITS) <= {"fp8", *ONLINE_QUANT_SHORTHAND_NAMES}


def test_room_is_what_parts_leave_and_unknown_where_one_is():
    parts = [Part("target", 6, ""), Part("drafter", 2, "")]
    assert Fit(parts, 20, 20, None, bytes_per_token=2, feature_bytes_per_token=1).num_tokens == 4
    assert Fit(parts, 20, 20, 4, bytes_per_token=2, feature_bytes_per_token=1).num_tokens == 2
    assert Fit(parts, 5, 20, None, bytes_per_token=2, feature_bytes_per_token=1).num_tokens == 0
    assert Fit([*parts, Part("x", None, "")], 20, 20, None, 2, 1).num_tokens is None
