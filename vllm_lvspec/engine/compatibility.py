"""What can't work together is refused here, at start-up, by name."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from vllm import envs
from vllm.config import CompilationConfig, CompilationMode, ModelConfig, ParallelConfig, VllmConfig
from vllm.config.kernel import IrOpPriorityConfig
from vllm.config.quantization import (
    ONLINE_QUANT_SHORTHAND_NAMES,
    QuantizationConfigArgs,
    resolve_quantization_config,
)
from vllm.config.utils import replace as replace_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.tokenizers.registry import get_tokenizer

from vllm_lvspec.config import AUTO, SELF, LVSpecConfig, LVSpecConfigError
from vllm_lvspec.verify.sources import AnchorSource

# Layers that stay as they are where weights are quantised as they are loaded: all but the language model's, which are
# read for every token. The visual encoder runs once a video, and has sizes that no block of 16 or 32 divides
# (Qwen2.5-VL's 3420, SigLIP's 4304).
NOT_OF_LANGUAGE = r"re:(?!(.*\.)?language_model\.)"


def draft_model_config(target: ModelConfig, config: LVSpecConfig) -> ModelConfig:
    """The drafter's ModelConfig: the target's tokenizer, dtype and multimodal settings, the drafter's own weights.

    Raises LVSpecConfigError where the drafter can't be read, or not be quantised as `config` says.
    """
    config = settle_quantization(target, config)
    assert config.model is not None
    multimodal = target.get_multimodal_config()
    path = Path(config.model)
    if (path.is_absolute() or config.model.startswith(".")) and not (path / "config.json").is_file():
        raise LVSpecConfigError(f"model={config.model!r}: no such drafter; must be a folder with a config.json")
    try:
        draft = ModelConfig(
            model=config.model,
            tokenizer=target.tokenizer,
            tokenizer_mode=target.tokenizer_mode,
            trust_remote_code=target.trust_remote_code,
            allowed_local_media_path=target.allowed_local_media_path,
            allowed_media_domains=target.allowed_media_domains,
            dtype=target.dtype,
            quantization=config.draft_quantization,
            hf_overrides=copy.deepcopy(config.draft_hf_overrides),
            allow_deprecated_quantization=target.allow_deprecated_quantization,
            seed=target.seed,
            enforce_eager=True,
            mm_device_do_normalize=multimodal.mm_device_do_normalize,
            limit_mm_per_prompt={name: limit.count for name, limit in multimodal.limit_per_prompt.items()},
            mm_encoder_tp_mode=multimodal.mm_encoder_tp_mode,
            mm_encoder_attn_backend=multimodal.mm_encoder_attn_backend,
            skip_mm_profiling=True,
            generation_config="vllm",
        )
    except (OSError, ValueError) as error:
        if config.draft_quantization is not None:
            # It is to blame if the drafter can be read without it; if not, this says what is.
            plain = draft_model_config(target, config.model_copy(update={"draft_quantization": None}))
            raise unfit_quantization(config, _reason(error), plain.quantization) from error
        raise LVSpecConfigError(
            f"model={config.model!r}: the drafter can't be read ({_reason(error).splitlines()[0]}); must be a folder "
            "or a hub name of a vision-language model that vLLM supports"
        ) from error
    draft.max_model_len = min(draft.max_model_len, target.max_model_len)
    # vLLM calls the first of its methods that quantise as they load by an older name, too.
    as_loaded = config.draft_quantization in ("fp8", *ONLINE_QUANT_SHORTHAND_NAMES)
    if as_loaded and draft.model_arch_config.quantization_config is None:
        draft.quantization_config = resolve_quantization_config(
            config.draft_quantization, QuantizationConfigArgs(ignore=[NOT_OF_LANGUAGE])
        )
    return draft


def settle_quantization(target: ModelConfig, config: LVSpecConfig) -> LVSpecConfig:
    """`config` with what `auto` means for this drafter on this device. Raises LVSpecConfigError where the drafter can't
    be read."""
    if config.draft_quantization != AUTO:
        return config
    plain = config.model_copy(update={"draft_quantization": None})
    if not _is_hopper():
        return plain
    draft = draft_model_config(target, plain)
    if draft.dtype != torch.bfloat16 or draft.model_arch_config.quantization_config is not None or draft.is_moe:
        return plain
    return config.model_copy(update={"draft_quantization": "mxfp4"})


def _is_hopper() -> bool:
    """Where four bits have been measured. vLLM's kernels for later GPUs also round what is multiplied with them."""
    return current_platform.is_cuda() and current_platform.is_device_capability(90)


def num_draft_ranks(vllm_config: VllmConfig, draft: ModelConfig, config: LVSpecConfig) -> int:
    """How many ranks share the drafter: one, where each has the whole of it, or all."""
    if config.draft_tensor_parallel_size is not None:
        return config.draft_tensor_parallel_size
    size = vllm_config.parallel_config.tensor_parallel_size
    return size if indivisible(draft, size) is None else 1


def draft_parallel_config(vllm_config: VllmConfig, num_ranks: int) -> ParallelConfig:
    """Of a drafter that `num_ranks` share."""
    parallel = copy.deepcopy(vllm_config.parallel_config)
    parallel.enable_expert_parallel = parallel.enable_eplb = False
    parallel.tensor_parallel_size = parallel.world_size = num_ranks
    return parallel


def draft_vllm_config(vllm_config: VllmConfig, draft: ModelConfig, config: LVSpecConfig) -> VllmConfig:
    """The configuration that `draft` is built from. Raises LVSpecConfigError where vLLM refuses it."""
    num_ranks = num_draft_ranks(vllm_config, draft, config)
    fit_encoder(draft, num_ranks)
    # vLLM writes into the parts of a configuration when it is made; the target must not see that.
    cache = copy.deepcopy(vllm_config.cache_config)
    cache.kv_cache_layout = cache.sliding_window = cache.num_gpu_blocks_override = cache.skip_page_size_padded = None
    cache.cache_dtype = "auto"
    cache.kv_cache_dtype_skip_layers = []
    observability = copy.deepcopy(vllm_config.observability_config)
    observability.per_request_spec_decode_metrics = "none"
    kernel = copy.deepcopy(vllm_config.kernel_config)
    kernel.ir_op_priority = _asked_ir_op_priority(vllm_config)
    try:
        return replace_config(
            vllm_config,
            model_config=draft,
            cache_config=cache,
            parallel_config=draft_parallel_config(vllm_config, num_ranks),
            scheduler_config=copy.deepcopy(vllm_config.scheduler_config),
            observability_config=observability,
            kernel_config=kernel,
            compilation_config=CompilationConfig(mode=CompilationMode.NONE),
            attention_config=replace(vllm_config.attention_config, backend=None),
            additional_config={},
            speculative_config=None,
            quant_config=None,
        )
    except ValueError as error:
        reason = " ".join(_reason(error).split())
        raise LVSpecConfigError(f"model={draft.model!r}: vLLM can't configure the drafter ({reason})") from error


def _asked_ir_op_priority(target: VllmConfig) -> IrOpPriorityConfig:
    """Which kernels `target`'s user prefers, without those that vLLM has added for the target.

    For a compiled target these are PyTorch's own operations, which its compiler fuses. In the drafter, which is not
    compiled, a normalisation would then be a dozen kernels instead of one.
    """
    added = asdict(current_platform.get_default_ir_op_priority(target))
    asked = {}
    for op, names in asdict(target.kernel_config.ir_op_priority).items():
        last = next((i for i in reversed(range(len(names))) if names[i] not in added[op]), -1)
        asked[op] = names[: last + 1]  # vLLM adds its own behind them
    return IrOpPriorityConfig(**asked)


def _reason(error: Exception) -> str:
    """What vLLM says, without the frame that pydantic puts around it."""
    said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return said.removeprefix("Value error, ").strip() or type(error).__name__


def unfit_quantization(config: LVSpecConfig, reason: str, own: str | None = None) -> LVSpecConfigError:
    """What to say where `config`'s quantisation can't be.

    `own`: the method of the drafter's checkpoint, where it is another one.
    """
    right = "a method that quantises weights as they are loaded and that this device has kernels for, such as "
    right = f"{own!r}, as its checkpoint says" if own is not None else right + "fp8_per_channel in bfloat16"
    return LVSpecConfigError(
        f"draft_quantization={config.draft_quantization!r}: vLLM can't quantise the drafter {config.model!r} so on "
        f"{current_platform.device_type} ({' '.join(reason.split())}); must be none or {right}"
    )


# Arguments of vLLM that lvspec has no support for, and the values that are fine.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "pipeline_parallel_size": (1,),
    "prefill_context_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "enable_dbo": (False,),
    "enable_lora": (False, None),
    "enable_sleep_mode": (False,),
    "enable_prompt_embeds": (False,),
    "enable_mm_embeds": (False,),
    "video_pruning_rate": (None, 0.0),
    "mm_encoder_only": (False,),
    "language_model_only": (False,),
    "kv_transfer_config": (None,),
    "kv_offloading_size": (None,),
    "ec_transfer_config": (None,),
    "weight_transfer_config": (None,),
    "diffusion_config": (None,),
    "watermark_config": (None,),
    "logits_processors": (None, []),
}


def check_arguments(args: EngineArgs) -> None:
    """Raise LVSpecConfigError, naming key and value, for arguments that lvspec has no support for.

    Before vLLM reads them, because some it would refuse itself with another, less fitting reason.
    """
    for key, allowed in UNSUPPORTED.items():
        value = getattr(args, key)
        shown = repr(value) if isinstance(value, bool | int | float | str) else type(value).__name__
        _require(value in allowed, f"{key}={shown}: not supported with lvspec; must be {allowed[0]!r}")
    # It would admit requests that nobody has checked.
    _require(not envs.VLLM_USE_RUST_FRONTEND, "VLLM_USE_RUST_FRONTEND=1: not supported with lvspec; must be 0")


def check_engine(vllm_config: VllmConfig, config: LVSpecConfig) -> LVSpecConfig:
    """`config` with what follows from the models. Raises LVSpecConfigError, naming key, value and what would be right,
    for whatever can't work with lvspec."""
    target = vllm_config.model_config
    _require(
        target.is_multimodal_model and target.runner_type == "generate",
        f"model={target.model!r}: lvspec needs a vision-language target that generates text; this one is "
        f"{'text-only' if not target.is_multimodal_model else 'a ' + target.runner_type + ' model'}",
    )
    _require(not target.is_encoder_decoder, f"model={target.model!r}: encoder-decoder targets are not supported")
    _require(not target.is_hybrid, f"model={target.model!r}: targets with recurrent layers are not supported")
    num_engines = vllm_config.parallel_config.data_parallel_size
    _require(
        num_engines == 1 or not target.is_moe,
        f"data_parallel_size={num_engines}: engines with a mixture of experts wait for each other in every step, which "
        "lvspec has no support for; must be 1 for this target",
    )
    launcher = vllm_config.parallel_config.distributed_executor_backend
    _require(
        num_engines == 1 or launcher != "external_launcher",
        f"data_parallel_size={num_engines}: with distributed_executor_backend={launcher!r} engines wait for each other "
        "in every step, which lvspec has no support for; must be 1",
    )
    if config.model == SELF:
        _require(
            config.draft_quantization in (None, AUTO),
            f"draft_quantization={config.draft_quantization!r}: the drafter self has the target's weights; must be "
            "none, or model another drafter",
        )
        _require(
            not config.draft_hf_overrides,
            f"draft_hf_overrides={config.draft_hf_overrides!r}: the drafter self has the target's configuration; must "
            "be unset, or model another drafter",
        )
        asked, size = config.draft_tensor_parallel_size, vllm_config.parallel_config.tensor_parallel_size
        _require(
            asked in (None, size),
            f"draft_tensor_parallel_size={asked}: the drafter self has the target's weights; must be {size}, or model "
            "another drafter",
        )
    else:
        config = _check_drafter(vllm_config, config)
    _check_source(vllm_config, config)
    return config


def _check_drafter(vllm_config: VllmConfig, config: LVSpecConfig) -> LVSpecConfig:
    """As `check_engine`, of a drafter with weights of its own."""
    target = vllm_config.model_config
    draft = draft_model_config(target, config)
    _require(
        draft.is_multimodal_model,
        f"model={config.model!r}: the drafter is text-only; it must be a vision-language model of the target's family",
    )
    _require(not draft.is_hybrid, f"model={config.model!r}: drafters with recurrent layers are not supported")
    _check_tokenizer(target, config)
    _check_vision(target, draft)
    _check_draft_ranks(vllm_config, draft, config)
    _check_quantization(vllm_config, draft, config)
    draft_vllm_config(vllm_config, draft, config)
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return config
    return config.model_copy(update={"draft_tensor_parallel_size": num_draft_ranks(vllm_config, draft, config)})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise LVSpecConfigError(message)


def _check_tokenizer(target: ModelConfig, config: LVSpecConfig) -> None:
    ours = get_tokenizer(target.tokenizer, trust_remote_code=target.trust_remote_code).get_vocab()
    try:
        theirs = get_tokenizer(config.model, trust_remote_code=target.trust_remote_code).get_vocab()
    except (OSError, ValueError) as error:
        raise LVSpecConfigError(f"model={config.model!r}: the drafter's tokenizer can't be read ({error})") from error
    different = {token for token, _ in set(ours.items()) ^ set(theirs.items())}
    if different:
        example = min(different, key=lambda t: (ours.get(t, theirs.get(t, 0)), t))
        raise LVSpecConfigError(
            f"model={config.model!r}: the drafter's tokenizer is not the target's: {len(different)} tokens differ, "
            f"such as {example!r} (target {ours.get(example)}, drafter {theirs.get(example)}); must be a model "
            "with the same tokenizer"
        )


def _check_vision(target: ModelConfig, draft: ModelConfig) -> None:
    """The drafter reads the pixels that the target's processor made, so both must cut them alike."""
    for key in (
        "vision_config.patch_size", "vision_config.temporal_patch_size", "vision_config.spatial_merge_size",
        "vision_config.image_size", "image_grid_pinpoints", "image_token_id", "image_token_index", "video_token_id",
        "video_token_index", "vision_feature_select_strategy",
    ):  # fmt: skip
        ours, theirs = _lookup(target.hf_config, key), _lookup(draft.hf_config, key)
        _require(
            ours == theirs,
            f"model={draft.model!r}: the drafter reads images another way than the target ({key}={theirs!r}, target "
            f"{ours!r}); must be a model of the target's family",
        )


def _lookup(hf_config: Any, key: str) -> Any:
    for part in key.split("."):
        hf_config = getattr(hf_config, part, None)
    return list(hf_config) if isinstance(hf_config, tuple) else hf_config


def indivisible(draft: ModelConfig, num_ranks: int) -> str | None:
    """What of the drafter so many ranks can't share, with its name; None where they can share all."""
    text = draft.hf_text_config
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None) or text.num_attention_heads
        if heads % num_ranks and (name == "num_attention_heads" or num_ranks % heads):
            return f"{name}={heads}"
    if not draft._model_info.supports_multimodal_encoder_tp_data:
        return _indivisible_of_encoder(draft, num_ranks)
    return None


def _indivisible_of_encoder(draft: ModelConfig, num_ranks: int) -> str | None:
    vision = getattr(draft.hf_config, "vision_config", None)
    for name in ("num_heads", "num_attention_heads", "intermediate_size"):
        size = getattr(vision, name, None)
        if isinstance(size, int) and size % num_ranks:
            return f"vision_config.{name}={size}"
    return None


def fit_encoder(draft: ModelConfig, num_ranks: int) -> None:
    """Have each rank encode some of the drafter's items whole, where its visual encoder can't be split over so many.

    Qwen2.5-VL's of 3B and 7B can't over 8 ranks, and that of 32B and 72B can.
    """
    if num_ranks == 1:
        draft.multimodal_config.mm_encoder_tp_mode = "weights"
    elif _indivisible_of_encoder(draft, num_ranks) is not None:
        draft.multimodal_config.mm_encoder_tp_mode = "data"


def _check_draft_ranks(vllm_config: VllmConfig, draft: ModelConfig, config: LVSpecConfig) -> None:
    asked, size = config.draft_tensor_parallel_size, vllm_config.parallel_config.tensor_parallel_size
    shared, whole = indivisible(draft, size), "1, so that each rank has the whole drafter"
    _require(
        asked != size or shared is None,
        f"draft_tensor_parallel_size={asked}: {size} ranks can't share {shared} of the drafter {draft.model!r}; must "
        f"be {whole}",
    )
    _require(
        asked in (None, 1, size),
        f"draft_tensor_parallel_size={asked}: tensor_parallel_size is {size}; must be "
        + (f"that, or {whole}" if shared is None else whole),
    )


def _check_quantization(vllm_config: VllmConfig, draft: ModelConfig, config: LVSpecConfig) -> None:
    if config.draft_quantization in (None, AUTO):
        return
    try:
        quantization = VllmConfig.get_quantization_config(draft, vllm_config.load_config)
    except Exception as error:  # each method fails in a way of its own
        raise unfit_quantization(config, _reason(error)) from error
    spec = getattr(quantization, "args", None)  # of methods that quantise weights as they are loaded
    is_for_experts = draft.quantization == "experts_int8" or (spec is not None and not (spec.linear or spec.targets))
    if is_for_experts and not draft.is_moe:
        raise unfit_quantization(config, "it is for experts alone, and this drafter has none")


def _check_source(vllm_config: VllmConfig, config: LVSpecConfig) -> None:
    size = vllm_config.parallel_config.tensor_parallel_size
    _require(
        size == 1 or AnchorSource.parse(config.anchor_source).kind != "value",
        f"anchor_source={config.anchor_source!r}: each of {size} ranks has other heads' values; must be hidden where "
        "tensor_parallel_size is above 1",
    )
