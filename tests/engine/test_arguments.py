"""How users write `lvspec`, and what is refused before anything starts."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import vllm.engine.arg_utils
from checkpoints import save_in_int8
from vllm.config import CompilationMode, ModelConfig, VllmConfig
from vllm.config.kernel import IrOpPriorityConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_lvspec.config import LVSpecConfigError
from vllm_lvspec.draft.pairs import default_draft_model
from vllm_lvspec.engine import compatibility
from vllm_lvspec.engine.arguments import PROPOSER, SCHEDULER, lvspec_config
from vllm_lvspec.engine.compatibility import draft_model_config, draft_vllm_config
from vllm_lvspec.engine.versions import TESTED, installed_vllm, require_tested_vllm
from vllm_lvspec.plugin import register


@pytest.fixture(scope="module")
def pair(checkpoint, tmp_path_factory) -> tuple[str, str]:
    """A target and a drafter beside each other, as a pair that needs no name."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "target").symlink_to(checkpoint("qwen2_5_vl", seed=0))
    (folder / "draft").symlink_to(checkpoint("qwen2_5_vl", seed=1, vocab_size=1536))
    return str(folder / "target"), str(folder / "draft")


def parse(*arguments: str) -> AsyncEngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(list(arguments)))


def config_of(args: EngineArgs):
    args.max_model_len = 512
    return args.create_engine_config()


def drafters_config(theirs: VllmConfig) -> VllmConfig:
    config = lvspec_config(theirs)
    return draft_vllm_config(theirs, draft_model_config(theirs.model_config, config), config)


def test_every_way_to_write_it_on_the_command_line_means_the_same(pair, tmp_path):
    target, draft = pair
    full = json.dumps({"method": "lvspec", "model": draft, "num_speculative_tokens": 4})
    yaml = tmp_path / "config.yaml"
    yaml.write_text(f"model: {target}\nspeculative-config:\n  method: lvspec\n  num_speculative_tokens: 4\n")
    word = tmp_path / "word.yaml"
    word.write_text(f"model: {target}\nspeculative-config: lvspec:{draft}\n")
    for arguments, k in (
        (["--model", target, "--speculative-config", "lvspec"], 10),
        (["--model", target, "-sc", f"lvspec:{draft}"], 10),
        (["--model", target, "-sc", full], 4),
        (["--model", target, "--speculative-config.method", "lvspec", "--speculative-config.pruning", "none"], 10),
        (["serve", "--config", str(yaml)], 4),
        (["serve", "--config", str(word)], 10),
    ):
        if arguments[0] == "serve":
            arguments = FlexibleArgumentParser()._pull_args_from_config(arguments)[1:]
        args = parse(*arguments)
        vllm_config = config_of(args)
        config = lvspec_config(vllm_config)
        assert Path(config.model).resolve() == Path(draft).resolve()
        assert config.num_speculative_tokens == k
        assert vllm_config.speculative_config.method == "custom_class"
        assert vllm_config.speculative_config.model == PROPOSER
        assert vllm_config.speculative_config.num_speculative_tokens == k
        assert vllm_config.parallel_config.worker_cls.startswith("vllm_lvspec.engine.")
        assert not vllm_config.scheduler_config.async_scheduling


def test_vllms_short_options_say_the_same(pair):
    target, draft = pair
    for args in (
        parse("--model", target, "--spec-method", "lvspec", "--spec-tokens", "3"),
        parse("--model", target, "-sc", "lvspec", "--spec-tokens", "3", "--spec-model", draft),
        EngineArgs(model=target, spec_method="lvspec", spec_tokens=3),
    ):
        config = lvspec_config(config_of(args))
        assert (config.model, config.num_speculative_tokens) == (draft, 3)
        assert args.spec_tokens == 3
    both = parse("--model", target, "-sc.method", "lvspec", "-sc.num_speculative_tokens", "4", "--spec-tokens", "3")
    with pytest.raises(LVSpecConfigError, match="num_speculative_tokens=4: given twice"):
        config_of(both)


def test_the_targets_configuration_is_what_it_would_be_without_a_drafter(pair):
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    options = {"model": pair[0], "per_request_spec_decode_metrics": "summary"}
    ours = config_of(EngineArgs(speculative_config="lvspec", **options))
    theirs = config_of(EngineArgs(speculative_config=ngram, scheduler_cls=SCHEDULER, **options))
    for part in ("kernel_config", "cache_config", "scheduler_config", "observability_config", "compilation_config"):
        assert repr(getattr(ours, part)) == repr(getattr(theirs, part)), part


def test_the_worker_for_gpus_does_not_load_what_replaces_cuda_on_cpus():
    code = (
        "import sys, vllm_lvspec.engine.worker, vllm_lvspec.engine.runner, vllm_lvspec.engine.proposer; "
        "print('vllm.v1.worker.cpu.shm' in sys.modules, 'vllm.v1.worker.cpu_worker' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["False", "False"]


def test_the_users_arguments_stay_as_they_were(pair):
    args = AsyncEngineArgs(model=pair[0], speculative_config="lvspec", additional_config={"mine": 1})
    first, second = config_of(args), config_of(args)
    assert args.speculative_config == "lvspec"
    assert args.additional_config == {"mine": 1}
    assert args.worker_cls == "auto" and args.scheduler_cls is None
    assert first.additional_config == second.additional_config
    assert first.additional_config["mine"] == 1


def test_the_target_is_compiled_anew_only_for_what_changes_its_graph(pair):
    def hash_of(more=None, **settings):
        speculative = {"method": "lvspec", **settings}
        return config_of(
            EngineArgs(model=pair[0], speculative_config=speculative, additional_config=more or {})
        ).compute_hash()

    usual = hash_of()
    assert usual == hash_of()
    for same in ({"policy": "strict"}, {"model": "self"}, {"num_speculative_tokens": 4}, {"trace": 3}):
        assert hash_of(**same) == usual, same
    for same in ({"anchor_source": "value"}, {"anchor_source": "hidden:read", "policy": "strict"}):
        assert hash_of(**same) == usual, same
    inner = hash_of(anchor_source="layer:1")
    others = [hash_of(anchor_source="layer:1", policy="strict"), hash_of(anchor_source="layer:2")]
    assert len({usual, inner, *others}) == 4
    assert hash_of(anchor_source="layer:1", num_speculative_tokens=4) == inner
    assert hash_of({"mine": 1}) != usual
    assert hash_of({"mine": 1}) != hash_of({"mine": 2})


def test_workers_are_sent_the_settings(pair):
    vllm_config = config_of(EngineArgs(model=pair[0], speculative_config="lvspec", additional_config={"mine": 1}))
    sent = pickle.loads(pickle.dumps(vllm_config))
    assert lvspec_config(sent) == lvspec_config(vllm_config)
    assert sent.additional_config["mine"] == 1 and sent.compute_hash() == vllm_config.compute_hash()
    copied = replace(vllm_config)  # vLLM copies it for parts of a model
    assert copied.compute_hash() == vllm_config.compute_hash()


def test_other_methods_are_untouched(pair):
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    assert parse("--model", pair[0], "-sc", json.dumps(ngram)).speculative_config == ngram
    vllm_config = config_of(EngineArgs(model=pair[0], speculative_config=dict(ngram)))
    assert vllm_config.speculative_config.method == "ngram"
    assert "lvspec" not in vllm_config.additional_config
    assert "lvspec" not in vllm_config.parallel_config.worker_cls
    assert config_of(EngineArgs(model=pair[0])).speculative_config is None
    with pytest.raises(SystemExit):
        parse("--model", pair[0], "-sc", "no json")


def test_loading_the_plugin_again_changes_nothing():
    before = EngineArgs.add_cli_args, EngineArgs.create_engine_config
    register()
    register()
    assert (EngineArgs.add_cli_args, EngineArgs.create_engine_config) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"method": "lvspec", "num_speculative_tokens": 0}', "num_speculative_tokens=0"),
        ('{"method": "lvspec", "pruning_ratio": 1.0}', "pruning_ratio=1.0"),
        ('{"method": "lvspec", "what": 1}', "what=1: unknown key"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(text, words, pair, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--model", pair[0], "--speculative-config", text)
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert words in line


def assert_refused(match: str, target: str, **options) -> None:
    with pytest.raises(LVSpecConfigError, match=match) as caught:
        config_of(EngineArgs(model=target, **{"speculative_config": "lvspec", **options}))
    assert "\n" not in str(caught.value)


def test_a_target_without_a_known_drafter_drafts_for_itself(checkpoint):
    args = EngineArgs(model=checkpoint("qwen2_vl"), dtype="float32", speculative_config="lvspec")
    assert lvspec_config(config_of(args)).model == "self"


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [("draft_quantization", "fp8", "weights"), ("draft_hf_overrides", {"rope_theta": 1e6}, "configuration")],
)
def test_the_target_can_not_be_another_one_for_drafting_alone(key, value, what, pair):
    assert_refused(
        f"{key}={value!r}: the drafter self has the target's {what}; must be (none|unset), or model another drafter",
        pair[0],
        speculative_config={"method": "lvspec", "model": "self", key: value},
    )


def test_a_drafter_that_is_not_there_is_refused(pair):
    assert_refused("model='/no/such/folder': no such drafter", pair[0], speculative_config="lvspec:/no/such/folder")


def test_a_hub_name_that_can_not_be_read_is_refused(pair):
    assert_refused(
        "model='nobody/nothing': the drafter can't be read", pair[0], speculative_config="lvspec:nobody/nothing"
    )


def test_a_text_only_target_is_refused(checkpoint, pair):
    assert_refused("vision-language target.*text-only", checkpoint("text_only"), speculative_config=f"lvspec:{pair[1]}")


def test_a_text_only_drafter_is_refused(checkpoint, pair):
    assert_refused("the drafter is text-only", pair[0], speculative_config="lvspec:" + checkpoint("text_only"))


def test_a_drafter_with_another_tokenizer_is_refused(checkpoint, pair, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(checkpoint("qwen2_5_vl", seed=1, vocab_size=1536)).iterdir():
        data = file.read_bytes()
        if file.suffix == ".json":
            data = data.replace(b"<|vision_pad|>", b"<|another_pad|>")
        (other / file.name).write_bytes(data)
    assert_refused(
        "tokenizer is not the target's: 2 tokens differ.*_pad", pair[0], speculative_config=f"lvspec:{other}"
    )


def test_a_drafter_that_cuts_images_another_way_is_refused(checkpoint, pair):
    assert_refused("reads images another way", pair[0], speculative_config="lvspec:" + checkpoint("llava_onevision"))


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2.*must be 1"),
        ({"enable_lora": True}, "enable_lora=True.*must be False"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds=True"),
        ({"enable_mm_embeds": True}, "enable_mm_embeds=True"),
        ({"video_pruning_rate": 0.5}, "video_pruning_rate=0.5"),
        ({"enable_sleep_mode": True}, "enable_sleep_mode=True"),
        ({"kv_offloading_size": 1.0}, "kv_offloading_size=1.0"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "decode_context_parallel_size=2"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size=2"),
        ({"kv_transfer_config": "connector"}, "kv_transfer_config"),
        ({"ec_transfer_config": "connector"}, "ec_transfer_config"),
        ({"weight_transfer_config": {"backend": "nccl"}}, "weight_transfer_config"),
        ({"worker_cls": "some.Worker"}, "worker_cls='some.Worker'"),
        ({"scheduler_cls": "some.Scheduler"}, "scheduler_cls='some.Scheduler': lvspec brings its own scheduler"),
        ({"logits_processors": ["some.Processor"]}, "logits_processors=list: not supported.*must be None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_can_not_work_with_it_is_refused_by_name(option, match, pair):
    from vllm.config import ECTransferConfig, KVTransferConfig

    if option.get("kv_transfer_config"):
        option = {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")}
    if option.get("ec_transfer_config"):
        option = {"ec_transfer_config": ECTransferConfig(ec_connector="ECExampleConnector", ec_role="ec_both")}
    assert_refused(match, pair[0], **option)


def test_a_server_that_would_not_check_requests_is_refused(pair, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert_refused("VLLM_USE_RUST_FRONTEND=1: not supported.*must be 0", pair[0])


def test_values_of_heads_that_no_rank_has_all_of_are_refused_as_anchors(pair):
    assert_refused(
        "anchor_source='value': each of 2 ranks has other heads' values; must be hidden",
        pair[0],
        speculative_config={"method": "lvspec", "anchor_source": "value"},
        tensor_parallel_size=2,
    )


def quantised(name: str, drafter: str) -> dict:
    return {"method": "lvspec", "model": drafter, "draft_quantization": name}


@pytest.fixture(scope="module")
def int8_drafter(pair, tmp_path_factory) -> str:
    return save_in_int8(Path(pair[1]), tmp_path_factory.mktemp("int8") / "draft")


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("nonsense", "float32", "Unknown quantization method: nonsense. Must be one of .*fp8"),
        ("fp8", "float32", "torch.float32 is not supported"),
        ("awq", "bfloat16", "Cannot find the config file for awq"),
        ("compressed-tensors", "float32", "missing .* required positional argument"),
        ("int8_per_channel_weight_only", "bfloat16", "for experts alone, and this drafter has none"),
        ("experts_int8", "bfloat16", "for experts alone, and this drafter has none"),
    ],
)
def test_a_drafter_that_can_not_be_quantised_so_is_refused(name, dtype, reason, pair):
    assert_refused(
        f"draft_quantization='{name}': vLLM can't quantise the drafter '.*draft' so on .*{reason}.*; must be "
        "none or a method that quantises weights as they are loaded",
        pair[0],
        speculative_config=quantised(name, pair[1]),
        dtype=dtype,
    )


def test_another_method_than_the_drafters_checkpoint_has_is_refused(pair, int8_drafter):
    for name in ("fp8", "nonsense"):
        assert_refused(
            f"draft_quantization='{name}'.*does not match.*must be none or 'compressed-tensors', as its "
            "checkpoint says",
            pair[0],
            speculative_config=quantised(name, int8_drafter),
            dtype="bfloat16",
        )


def test_a_drafter_that_is_not_there_is_named_before_its_quantisation(pair):
    assert_refused(
        "model='nobody/nothing': the drafter can't be read",
        pair[0],
        speculative_config=quantised("fp8", "nobody/nothing"),
    )


def test_target_and_drafter_are_quantised_each_in_its_own_way(pair, int8_drafter):
    for target, drafter, name, of_target, of_drafter in (
        (pair[0], pair[1], None, None, None),
        (pair[0], int8_drafter, None, None, "compressed-tensors"),
        (pair[0], int8_drafter, "compressed-tensors", None, "compressed-tensors"),
        (pair[0], pair[1], "FP8_per_channel", None, "online"),
        (int8_drafter, pair[1], None, "compressed-tensors", None),
        (int8_drafter, pair[1], "fp8_per_channel", "compressed-tensors", "online"),
    ):
        args = EngineArgs(model=target, dtype="bfloat16", speculative_config=quantised(name, drafter))
        theirs = config_of(args)
        ours = drafters_config(theirs)
        methods = [c.quant_config and c.quant_config.get_name() for c in (theirs, ours)]
        assert methods == [of_target, of_drafter]


def test_a_drafter_is_in_four_bits_by_itself_where_that_is_known_to_pay(pair, int8_drafter, monkeypatch):
    for is_hopper, drafter, dtype, name, method in (
        (False, pair[1], "bfloat16", "auto", None),
        (True, pair[1], "bfloat16", "auto", "mxfp4"),
        (True, pair[1], "bfloat16", "none", None),
        (True, pair[1], "float32", "auto", None),
        (True, int8_drafter, "bfloat16", "auto", "compressed-tensors"),
    ):
        monkeypatch.setattr(compatibility, "_is_hopper", lambda is_hopper=is_hopper: is_hopper)
        theirs = config_of(EngineArgs(model=pair[0], dtype=dtype, speculative_config=quantised(name, drafter)))
        ours = draft_model_config(theirs.model_config, lvspec_config(theirs))
        assert ours.quantization == method
        if method == "mxfp4":
            assert draft_vllm_config(theirs, ours, lvspec_config(theirs)).quant_config.get_name() == "online"
            assert ours.quantization_config.ignore == [compatibility.NOT_OF_LANGUAGE]


def test_the_drafter_has_kernels_of_its_own_and_those_that_the_user_asks_for(pair, monkeypatch):
    def default(vllm_config: VllmConfig) -> IrOpPriorityConfig:  # as on CUDA
        is_compiled = vllm_config.compilation_config.mode != CompilationMode.NONE
        return IrOpPriorityConfig.with_default(["native"] if is_compiled else ["vllm_c", "native"])

    monkeypatch.setattr(current_platform, "get_default_ir_op_priority", default)
    for mode, asked, of_target, of_drafter in (
        (CompilationMode.VLLM_COMPILE, {}, ["native"], ["vllm_c", "native"]),
        (CompilationMode.NONE, {}, ["vllm_c", "native"], ["vllm_c", "native"]),
        (CompilationMode.VLLM_COMPILE, {"rms_norm": ["oink"]}, ["oink", "native"], ["oink", "vllm_c", "native"]),
        (
            CompilationMode.VLLM_COMPILE,
            {"rms_norm": ["native", "oink"]},
            ["native", "oink"],
            ["native", "oink", "vllm_c"],
        ),
    ):
        theirs = config_of(
            EngineArgs(
                model=pair[0],
                dtype="bfloat16",
                compilation_config={"mode": mode},
                ir_op_priority=IrOpPriorityConfig(**asked),
                speculative_config=f"lvspec:{pair[1]}",
            )
        )
        ours = drafters_config(theirs)
        found = [config.kernel_config.ir_op_priority.rms_norm for config in (theirs, ours)]
        assert found == [of_target, of_drafter]


def test_a_visual_encoder_that_ranks_can_not_share_is_whole_on_each(checkpoint, pair):
    """As those of Qwen2.5-VL's 3B and 7B over 8 ranks, of whose targets all can be split."""
    odd = checkpoint("qwen2_5_vl", seed=5, vision_mlp=63)
    for drafter, size, expected in ((pair[1], 2, "weights"), (odd, 1, "weights"), (odd, 2, "data")):
        args = EngineArgs(
            model=pair[0], dtype="float32", speculative_config=f"lvspec:{drafter}", tensor_parallel_size=size
        )
        theirs = config_of(args)
        ours = drafters_config(theirs)
        modes = [config.model_config.multimodal_config.mm_encoder_tp_mode for config in (theirs, ours)]
        assert modes == ["weights", expected]
    # Which not all models have.
    config = lvspec_config(theirs).model_copy(update={"draft_tensor_parallel_size": None})
    draft = draft_model_config(theirs.model_config, config)
    draft._model_info = replace(draft._model_info, supports_multimodal_encoder_tp_data=False)
    ours = draft_vllm_config(theirs, draft, config)
    assert ours.parallel_config.tensor_parallel_size == 1
    assert ours.model_config.multimodal_config.mm_encoder_tp_mode == "weights"


def test_ranks_share_a_drafter_where_they_can_and_it_is_not_asked_for_whole(checkpoint, pair):
    """As a 7B of 28 heads over 8 ranks."""
    target, (_, draft) = checkpoint("qwen2_5_vl", heads=4), pair
    for size, asked, expected in ((1, None, 1), (2, None, 2), (2, 2, 2), (2, 1, 1), (4, None, 1), (4, 1, 1)):
        settings = {"method": "lvspec", "model": draft, "draft_tensor_parallel_size": asked}
        theirs = config_of(
            EngineArgs(model=target, dtype="float32", speculative_config=settings, tensor_parallel_size=size)
        )
        ours = drafters_config(theirs).parallel_config
        assert (ours.tensor_parallel_size, ours.world_size) == (expected, expected)
        assert lvspec_config(theirs).draft_tensor_parallel_size == (asked if size == 1 else expected), (
            "ranks compare it"
        )
        assert theirs.parallel_config.tensor_parallel_size == theirs.parallel_config.world_size == size
    for size, asked, right in (
        (4, 4, "4 ranks can't share num_attention_heads=2 of the drafter '.*'; must be 1, so that each rank has"),
        (2, 3, "tensor_parallel_size is 2; must be that, or 1, so that each rank has the whole drafter"),
        (4, 2, "tensor_parallel_size is 4; must be 1, so that each rank has the whole drafter"),
        (1, 2, "tensor_parallel_size is 1; must be that"),
        (2, 0, ".*must be greater than or equal to 1"),
        (2, "1", ".*must be a valid integer"),
    ):
        settings = {"method": "lvspec", "model": draft, "draft_tensor_parallel_size": asked}
        match = f'draft_tensor_parallel_size="?{asked}"?: {right}'
        assert_refused(match, target, speculative_config=settings, tensor_parallel_size=size)
    settings = {"method": "lvspec", "model": "self", "draft_tensor_parallel_size": 1}
    match = (
        "draft_tensor_parallel_size=1: the drafter self has the target's weights; must be 2, or model another drafter"
    )
    assert_refused(match, target, speculative_config=settings, tensor_parallel_size=2)


def test_engines_side_by_side_are_fine_but_for_those_that_wait_for_each_other(pair, monkeypatch):
    args = EngineArgs(model=pair[0], dtype="float32", speculative_config="lvspec", data_parallel_size=2)
    assert config_of(args).parallel_config.data_parallel_size == 2
    monkeypatch.setattr(ModelConfig, "is_moe", property(lambda self: True))
    assert_refused("data_parallel_size=2: .*experts.*must be 1 for this target", pair[0], data_parallel_size=2)
    monkeypatch.undo()
    with monkeypatch.context() as launcher:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "VLLM_ENABLE_V1_MULTIPROCESSING"):  # the last one by vLLM
            launcher.setenv(name, "0")
        launched = {"data_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
        assert_refused(
            "data_parallel_size=2: with distributed_executor_backend='external_launcher'", pair[0], **launched
        )


def test_a_cache_smaller_than_a_page_is_refused_by_the_engine_in_words(pair):
    code = (
        "import sys; from vllm import LLM\n"
        "if __name__ == '__main__': LLM(sys.argv[1], dtype='float32', max_model_len=512, enforce_eager=True, "
        "speculative_config={'method': 'lvspec', 'draft_cache_gib': 1e-9})"
    )
    done = subprocess.run([sys.executable, "-c", code, pair[0]], capture_output=True, text=True)
    assert done.returncode != 0
    assert "draft_cache_gib=1e-09: one page of" in done.stdout + done.stderr


def test_an_untested_vllm_is_refused_by_name():
    require_tested_vllm()
    assert installed_vllm() in TESTED
    for version in ("0.31.9", "0.33.0", "unknown"):
        with pytest.raises(LVSpecConfigError, match=rf"vllm=={version}: vllm-lvspec .* works with vllm"):
            require_tested_vllm(version)


def test_another_vllm_is_left_alone_until_lvspec_is_asked_for(pair):
    code = (
        "import sys, vllm_lvspec.engine.versions as v; v.installed_vllm = lambda: '0.33.0'\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "plain = EngineArgs(model=sys.argv[1], max_model_len=512).create_engine_config()\n"
        "assert 'vllm_lvspec.engine.compatibility' not in sys.modules\n"
        "EngineArgs(model=sys.argv[1], speculative_config='lvspec').create_engine_config()"
    )
    done = subprocess.run([sys.executable, "-c", code, pair[0]], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("vllm_lvspec.config.LVSpecConfigError: vllm==0.33.0: vllm-lvspec")


def test_known_pairs_follow_the_way_the_target_is_named(pair, tmp_path):
    assert default_draft_model("Qwen/Qwen2.5-VL-32B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert default_draft_model("Qwen2.5-VL-32B-Instruct") == "Qwen2.5-VL-7B-Instruct"
    assert default_draft_model("llava-hf/llava-onevision-qwen2-72b-ov-hf") == "llava-hf/llava-onevision-qwen2-7b-ov-hf"
    assert default_draft_model("Qwen/Qwen2.5-VL-32B-Instruct-AWQ") == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert default_draft_model("Qwen/Qwen2-VL-72B-Instruct-GPTQ-Int4") == "Qwen/Qwen2-VL-7B-Instruct"
    assert default_draft_model("Qwen/Qwen3-VL-32B-Instruct-FP8") == "Qwen/Qwen3-VL-4B-Instruct"
    assert default_draft_model("someone/Qwen2.5-VL-32B-Instruct") == "someone/Qwen2.5-VL-7B-Instruct"
    for name in ("someone/Qwen2.5-VL-32B-Instruct-tuned", "someone/Qwen2.5-VL-32B-Instruct-AWQ"):
        assert default_draft_model(name) is None
    assert default_draft_model("someone/something") is None
    cached = tmp_path / "models--Qwen--Qwen2.5-VL-32B-Instruct" / "snapshots" / "0123abc"
    cached.mkdir(parents=True)
    assert default_draft_model(str(cached)) == "Qwen/Qwen2.5-VL-7B-Instruct"
    for name in ("Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-3B-Instruct", "Qwen2-VL-72B-Instruct"):
        (tmp_path / name).mkdir()
    assert default_draft_model(str(tmp_path / "Qwen2.5-VL-7B-Instruct")) == str(tmp_path / "Qwen2.5-VL-3B-Instruct")
    assert default_draft_model(str(tmp_path / "Qwen2-VL-72B-Instruct")) is None
    (tmp_path / "Qwen2.5-VL-7B-Instruct-AWQ").mkdir()
    assert default_draft_model(str(tmp_path / "Qwen2.5-VL-7B-Instruct-AWQ")) == str(tmp_path / "Qwen2.5-VL-3B-Instruct")


def test_what_this_package_relies_on_in_vllm_is_there():
    """Fails when vLLM changes under us, before anything subtle does."""
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    source = inspect.getsource(vllm.engine.arg_utils)
    assert '"--speculative-config", "-sc"' in source
    assert "def create_speculative_config" in source
    assert issubclass(CPUModelRunner, GPUModelRunner)
    assert 'self.model_runner = CPUModelRunner(self.vllm_config, torch.device("cpu"))' in inspect.getsource(
        CPUWorker.init_device
    )
    assert "self._make_model_runner()" in inspect.getsource(Worker)
    runner = inspect.getsource(GPUModelRunner)
    for use in (
        "self._input_fits_in_drafter(",
        "sampler_output = self._sample(logits, spec_decode_metadata)",
        "self._on_request_state_removed(req_id, req_state)",
        "self.drafter.load_model(",
        "gen.set_offset(gen.get_offset() - 4)",
        "cast(Any, self.drafter).propose(",
        "self.discard_request_mask.np[:num_reqs]",
        "self.input_ids.gpu[:num_input_tokens].clamp_(min=0)",
        "self.requires_sequential_video_encoding\n",
    ):
        assert use in runner, use
    # Drafted tokens are in the inputs on the device before anything reads them there.
    inputs = inspect.getsource(GPUModelRunner._prepare_inputs)
    assert inputs.index("self._prepare_input_ids(") < inputs.index("self._calc_spec_decode_metadata(")
    assert list(inspect.signature(GPUModelRunner._prepare_input_ids).parameters) == [
        "self", "scheduler_output", "num_reqs", "total_num_scheduled_tokens", "cu_num_tokens",
    ]  # fmt: skip
    assert {"preempted_req_ids", "num_spec_tokens_to_schedule", "has_structured_output_requests"} <= set(
        SchedulerOutput.__dataclass_fields__
    )
