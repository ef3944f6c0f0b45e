"""Small checkpoints with random weights, one per family of architectures; nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
)

from vllm_lvspec.kernels.greedy_head import Head, in_eight_bits
from vllm_lvspec.reference import TARGET
from vllm_lvspec.reference.qwen2_5_vl import build_config, save_checkpoint

VOCAB = 1472
TEXT = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=4096, rms_norm_eps=1e-6, bos_token_id=None, head_dim=32,
)  # fmt: skip


def bundled_tokenizer() -> PreTrainedTokenizerFast:
    """The reference pairs', which takes a quarter of a minute to train."""
    return PreTrainedTokenizerFast.from_pretrained(str(TARGET))


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights wide enough that greedy outputs wander instead of repeating one token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                if "norm" not in name:
                    parameter.normal_(0, 0.1, generator=generator)
                continue
            fan_in = parameter[0].numel()
            wide = 3.0 if "embed_tokens" in name or "lm_head" in name else 1.7
            std = wide if "embed_tokens" in name else wide / fan_in**0.5
            parameter.normal_(0, std, generator=generator)


def qwen2_5_vl(path: Path, seed: int = 0, vocab_size: int = VOCAB, heads: int = 2, vision_mlp: int = 64) -> str:
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer = bundled_tokenizer()
    shape = dict(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads, mrope_section=[4, 6, 6] if heads == 2 else [2, 3, 3],
        vision=dict(depth=1, hidden_size=64, intermediate_size=vision_mlp, num_heads=2),
    )  # fmt: skip
    config = build_config(shape, tokenizer)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    model = Qwen2_5_VLForConditionalGeneration(config)
    randomise(model, seed)
    save_checkpoint(model, tokenizer, str(path), torch.float32)
    return str(path)


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict:
    token = tokenizer.convert_tokens_to_ids
    return dict(
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip


def qwen2_vl(path: Path, seed: int = 0) -> str:
    tokenizer = bundled_tokenizer()
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config=dict(
            **{**TEXT, "num_attention_heads": 2}, vocab_size=VOCAB, rope_parameters=rope,
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=dict(
            depth=1, embed_dim=64, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        **_token_ids(tokenizer),
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config)
    randomise(model, seed)
    model.save_pretrained(path)
    common = dict(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 256})
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**common),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**common, do_sample_frames=False, cap_pixels_per_frame=False),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(path)
    return str(path)


def qwen3_vl(path: Path, seed: int = 0) -> str:
    tokenizer = bundled_tokenizer()
    rope = {
        "rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 10000.0, "mrope_interleaved": True,
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=dict(
            **TEXT, vocab_size=VOCAB, rope_parameters=rope, rope_scaling=rope, eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=64, num_heads=2, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=64, num_position_embeddings=64, deepstack_visual_indexes=[0],
        ),
        **_token_ids(tokenizer),
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    randomise(model, seed)
    model.save_pretrained(path)
    common = dict(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 2048}, patch_size=14)
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**common),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**common, do_sample_frames=False),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(path)
    return str(path)


def llava_onevision(path: Path, seed: int = 0, vocab_size: int = VOCAB) -> str:
    tokenizer = bundled_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    ids = _token_ids(tokenizer)
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=84, patch_size=14,
        vision_use_head=False,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(
            **{**TEXT, "num_attention_heads": 2, "hidden_size": 64}, vocab_size=vocab_size,
            rope_theta=10000.0, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
        ),
        image_token_index=ids["image_token_id"], video_token_index=ids["video_token_id"],
        image_grid_pinpoints=[[84, 84], [84, 168], [168, 84]], vision_feature_layer=-1,
        vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaOnevisionForConditionalGeneration(config)
    randomise(model, seed)
    model.save_pretrained(path)
    # Published checkpoints, and vLLM's loader, call the tower `vision_tower.vision_model`.
    weights = path / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(weights).items():
        if "vision_tower." in name and "vision_tower.vision_model." not in name:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        renamed[name] = tensor
    save_file(renamed, weights, metadata={"format": "pt"})
    size = {"height": 84, "width": 84}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=36,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    ).save_pretrained(path)
    return str(path)


def save_in_int8(source: Path, folder: Path) -> str:
    """`source` with the language model's linear layers in int8, a scale per row; inputs get theirs per token.

    The format of llm-compressor's W8A8 recipes, and one of the few that vLLM has kernels for on CPUs.
    """
    shutil.copytree(source, folder)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".layers." in name and name.endswith("proj.weight"):
            scale = tensor.float().abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (tensor.float() / scale).round().to(torch.int8)
            tensors[name + "_scale"] = scale
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**int8, "strategy": "channel", "dynamic": False},
                "input_activations": {**int8, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head", "re:.*visual.*"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def save_rounded_to_mxfp4(source: Path, folder: Path, head_in_e4m3: bool = False) -> str:
    """`source` with the weights of the language model's linear layers at values that MXFP4 has (OCP Microscaling
    Formats v1.0: 32 numbers of four bits share a power of two), in its own dtype: what vLLM makes of them on GPUs.

    `head_in_e4m3`: with its head, a copy of the embeddings, at values that this package's has in eight bits.
    """
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    if head_in_e4m3:
        (embeddings,) = [tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")]
        rounded = in_eight_bits(Head(embeddings))
        assert rounded.scales is not None
        tensors["lm_head.weight"] = (rounded.weight.float() * rounded.scales[:, None]).to(embeddings.dtype)
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(config))
    for name, tensor in tensors.items():
        if ".layers." in name and name.endswith("proj.weight"):
            tensors[name] = _rounded_to_mxfp4(tensor.float()).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def _rounded_to_mxfp4(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.unflatten(1, (-1, 32))
    largest = blocks.abs().amax(2, keepdim=True).clamp(min=2.0**-120)
    scales = torch.exp2(torch.floor(torch.log2(largest * 8 / 7)) - 2)  # the largest becomes 3.5 to 7
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = torch.bucketize((blocks / scales).abs(), (values[1:] + values[:-1]) / 2)
    return (values[nearest] * blocks.sign() * scales).flatten(1)


def text_only(path: Path) -> str:
    tokenizer = bundled_tokenizer()
    config = Qwen2Config(**{**TEXT, "num_attention_heads": 2}, vocab_size=VOCAB, eos_token_id=tokenizer.eos_token_id)
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
