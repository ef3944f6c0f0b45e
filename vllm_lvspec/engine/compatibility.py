"""What can't work together is refused here, at start-up, by name."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.config import CompilationConfig, CompilationMode, ModelConfig, VllmConfig
from vllm.config.utils import replace as replace_config
from vllm.engine.arg_utils import EngineArgs
from vllm.tokenizers.registry import get_tokenizer

from vllm_lvspec.config import LVSpecConfig, LVSpecConfigError
from vllm_lvspec.draft.pairs import KNOWN_PAIRS, default_draft_model
from vllm_lvspec.verify.sources import AnchorSource


def resolve_drafter(target: str) -> str:
    """The known drafter of `target`; LVSpecConfigError where there is none."""
    drafter = default_draft_model(target)
    if drafter is None:
        raise LVSpecConfigError(
            f"model: no drafter is known for target {target!r}; name one with lvspec:PATH (known targets: "
            f"{', '.join(KNOWN_PAIRS)})"
        )
    return drafter


def draft_model_config(target: ModelConfig, config: LVSpecConfig) -> ModelConfig:
    """The drafter's ModelConfig: the target's tokenizer, dtype and multimodal settings, the drafter's own weights.

    Raises LVSpecConfigError where the drafter can't be read.
    """
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
        reason = str(error).strip().splitlines()[0]
        raise LVSpecConfigError(
            f"model={config.model!r}: the drafter can't be read ({reason}); must be a folder or a hub name of a "
            "vision-language model that vLLM supports"
        ) from error
    draft.max_model_len = min(draft.max_model_len, target.max_model_len)
    return draft


def draft_vllm_config(vllm_config: VllmConfig, draft: ModelConfig) -> VllmConfig:
    """The configuration that `draft` is built from. Raises LVSpecConfigError where vLLM refuses it."""
    # vLLM writes into the parts of a configuration when it is made; the target must not see that.
    cache = copy.deepcopy(vllm_config.cache_config)
    cache.kv_cache_layout = cache.sliding_window = cache.num_gpu_blocks_override = cache.skip_page_size_padded = None
    cache.cache_dtype = "auto"
    cache.kv_cache_dtype_skip_layers = []
    parallel = copy.deepcopy(vllm_config.parallel_config)
    parallel.enable_expert_parallel = parallel.enable_eplb = False
    observability = copy.deepcopy(vllm_config.observability_config)
    observability.per_request_spec_decode_metrics = "none"
    try:
        return replace_config(
            vllm_config,
            model_config=draft,
            cache_config=cache,
            parallel_config=parallel,
            scheduler_config=copy.deepcopy(vllm_config.scheduler_config),
            observability_config=observability,
            kernel_config=copy.deepcopy(vllm_config.kernel_config),
            compilation_config=CompilationConfig(mode=CompilationMode.NONE),
            attention_config=replace(vllm_config.attention_config, backend=None),
            additional_config={},
            speculative_config=None,
            quant_config=None,
        )
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise LVSpecConfigError(f"model={draft.model!r}: vLLM can't configure the drafter ({reason})") from error


# Arguments of vLLM that lvspec has no support for, and the values that are fine.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
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


def check_engine(vllm_config: VllmConfig, config: LVSpecConfig) -> None:
    """Raise LVSpecConfigError, naming key, value and what would be right, for whatever can't work with lvspec."""
    target = vllm_config.model_config
    _require(
        target.is_multimodal_model and target.runner_type == "generate",
        f"model={target.model!r}: lvspec needs a vision-language target that generates text; this one is "
        f"{'text-only' if not target.is_multimodal_model else 'a ' + target.runner_type + ' model'}",
    )
    _require(not target.is_encoder_decoder, f"model={target.model!r}: encoder-decoder targets are not supported")
    _require(not target.is_hybrid, f"model={target.model!r}: targets with recurrent layers are not supported")
    draft = draft_model_config(target, config)
    _require(
        draft.is_multimodal_model,
        f"model={config.model!r}: the drafter is text-only; it must be a vision-language model of the target's family",
    )
    _require(not draft.is_hybrid, f"model={config.model!r}: drafters with recurrent layers are not supported")
    _check_tokenizer(target, config)
    _check_vision(target, draft)
    _check_heads(vllm_config, draft)
    draft_vllm_config(vllm_config, draft)
    _check_source(vllm_config, config)


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


def _check_heads(vllm_config: VllmConfig, draft: ModelConfig) -> None:
    size = vllm_config.parallel_config.tensor_parallel_size
    text = draft.hf_text_config
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None) or text.num_attention_heads
        fits = heads % size == 0 or (name == "num_key_value_heads" and size % heads == 0)
        _require(
            fits,
            f"tensor_parallel_size={size}: the drafter {draft.model!r} has {name}={heads}, which {size} ranks can't "
            f"share; must be a divisor of {heads}",
        )


def _check_source(vllm_config: VllmConfig, config: LVSpecConfig) -> None:
    size = vllm_config.parallel_config.tensor_parallel_size
    _require(
        size == 1 or AnchorSource.parse(config.anchor_source).kind != "value",
        f"anchor_source={config.anchor_source!r}: each of {size} ranks has other heads' values; must be hidden where "
        "tensor_parallel_size is above 1",
    )
