"""The reference pair of the LLaVA-OneVision family: SigLIP tower, Qwen2 text model, pooled frames, one line end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from vllm_lvspec.bench.videofacts.scene import NUM_FRAMES, SIDE
from vllm_lvspec.reference.tokenizer import greedy

PATCH = 14
POOL = 2
VIDEO_FRAMES = NUM_FRAMES // 2  # every other frame: a frame costs as much here as two do in Qwen2.5-VL
BEFORE_VISUAL = AFTER_VISUAL = ""
POSITION_AXES: tuple[int, ...] = ()
SEES_IMAGES = False  # images come as several tiles, which these models never learned
_SQUARES = (SIDE // PATCH // POOL) ** 2

SHAPES = {
    "target": dict(
        vocab_size=1472, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2,
        vision=dict(num_hidden_layers=3, hidden_size=128, intermediate_size=256, num_attention_heads=4),
    ),
    "draft": dict(
        vocab_size=1536, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
        vision=dict(num_hidden_layers=1, hidden_size=64, intermediate_size=128, num_attention_heads=2),
    ),
}  # fmt: skip


def build_config(shape: dict, tokenizer: PreTrainedTokenizerFast) -> LlavaOnevisionConfig:
    """LLaVA-OneVision configuration of one of `SHAPES` (or a dictionary of the same form)."""
    token = tokenizer.convert_tokens_to_ids
    text = {key: value for key, value in shape.items() if key != "vision"}
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **shape["vision"], image_size=SIDE, patch_size=PATCH, vision_use_head=False
        ),
        text_config=Qwen2Config(
            **text, max_position_embeddings=32768, rms_norm_eps=1e-6, bos_token_id=None,
            eos_token_id=token("<|im_end|>"), rope_theta=10000.0, tie_word_embeddings=True,
        ),
        image_token_index=token("<|image_pad|>"),
        video_token_index=token("<|video_pad|>"),
        image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )  # fmt: skip


def build_model(
    shape: dict, tokenizer: PreTrainedTokenizerFast, seed: int = 0
) -> LlavaOnevisionForConditionalGeneration:
    """A float32 model with random weights that follow from `seed`."""
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(build_config(shape, tokenizer))
    model.generation_config = greedy(tokenizer)
    return model


def save_checkpoint(model, tokenizer: PreTrainedTokenizerFast, path: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a checkpoint that stock transformers and stock vLLM load: weights, tokenizer, processors."""
    from safetensors.torch import load_file, save_file
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    model.to(dtype).save_pretrained(path)
    # Published checkpoints, and vLLM's loader, call the tower `vision_tower.vision_model`.
    weights = Path(path) / "model.safetensors"
    renamed = {
        name if "vision_tower.vision_model." in name else name.replace("vision_tower.", "vision_tower.vision_model."): t
        for name, t in load_file(weights).items()
    }
    save_file(renamed, weights, metadata={"format": "pt"})
    # Only the placeholder itself: this family has no marks around it.
    tokenizer.chat_template = tokenizer.chat_template.replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    size = {"height": SIDE, "width": SIDE}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=model.config.image_grid_pinpoints),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    ).save_pretrained(path)


def moments(num_frames: int) -> list[float]:
    """When, in frames of the scene, each row of visual tokens shows its squares."""
    return [float(i * NUM_FRAMES / num_frames) for i in range(num_frames)]


def num_visual_tokens(num_frames: int) -> int:
    """One token for every square of every frame, and one line end."""
    return num_frames * _SQUARES + 1


def text_positions(num_before: int, num_frames: int, num_after: int, size: int) -> torch.Tensor:
    """Positions `[size, length]`: Qwen2 counts tokens, whatever they show."""
    return torch.arange(num_before + num_visual_tokens(num_frames) + num_after).expand(size, -1)


def pixel_values(videos: list[np.ndarray]) -> torch.Tensor:
    """Normalised frames `[num_videos, num_frames, 3, height, width]`, as the processor gives for this size."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    frames = torch.from_numpy(np.stack(videos)).permute(0, 1, 4, 2, 3).float()
    mean, std = (torch.tensor(x).view(1, 1, 3, 1, 1) * 255 for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return frames.sub_(mean).div_(std).contiguous()


def encode_visual(
    model: LlavaOnevisionForConditionalGeneration, pixels: torch.Tensor, num_frames: int, size: int
) -> torch.Tensor:
    """Projected and pooled visual tokens with the line end, `[size, num_visual, hidden_size]`."""
    return model.model.get_video_features(pixel_values_videos=pixels).pooler_output


def prepare_for_training(model: LlavaOnevisionForConditionalGeneration) -> None:
    """Nothing to do: SigLIP takes frames as a batch."""
