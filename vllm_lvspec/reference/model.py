"""Shapes of the reference pair, and its forward pass with vLLM's positions and an optional pruned view."""

from __future__ import annotations

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

PATCH = 14
MERGE = 2
TEMPORAL_PATCH = 2
TOKENS_PER_SECOND = 4

# The two vocabularies are padded to different sizes, as those of Qwen2.5-VL 3B and 7B are.
SHAPES = {
    "target": dict(
        vocab_size=640, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, mrope_section=[8, 12, 12],
        vision=dict(depth=3, hidden_size=128, intermediate_size=256, num_heads=4),
    ),
    "draft": dict(
        vocab_size=704, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mrope_section=[4, 6, 6],
        vision=dict(depth=1, hidden_size=64, intermediate_size=128, num_heads=2),
    ),
}  # fmt: skip


def build_config(shape: dict, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL configuration of one of `SHAPES` (or a dictionary of the same form)."""
    token = tokenizer.convert_tokens_to_ids
    end = token("<|im_end|>")
    text = dict(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"], num_hidden_layers=shape["num_hidden_layers"],
        num_attention_heads=shape["num_attention_heads"], num_key_value_heads=shape["num_key_value_heads"],
        max_position_embeddings=32768, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=end,
        rope_parameters={
            "rope_type": "default", "type": "mrope", "mrope_section": shape["mrope_section"], "rope_theta": 10000.0,
        },
        tie_word_embeddings=True,
    )  # fmt: skip
    vision = dict(
        **shape["vision"], out_hidden_size=shape["hidden_size"], patch_size=PATCH, spatial_merge_size=MERGE,
        temporal_patch_size=TEMPORAL_PATCH, tokens_per_second=TOKENS_PER_SECOND, window_size=112,
        fullatt_block_indexes=[shape["vision"]["depth"] - 1],
    )  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def build_model(shape: dict, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A float32 model with random weights that follow from `seed`."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config(shape, tokenizer))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=tokenizer.pad_token_id, do_sample=False, bos_token_id=None
    )
    return model


def save_checkpoint(model, tokenizer: PreTrainedTokenizerFast, path: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a checkpoint that stock transformers and stock vLLM load: weights, tokenizer, processors."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 256}
    common = dict(size=size, patch_size=PATCH, merge_size=MERGE, temporal_patch_size=TEMPORAL_PATCH)
    image_processor = Qwen2VLImageProcessor(**common)
    video_processor = Qwen2VLVideoProcessor(**common, do_sample_frames=False, cap_pixels_per_frame=False)
    processor = Qwen2_5_VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=video_processor,
        chat_template=tokenizer.chat_template,
    )
    model.to(dtype).save_pretrained(path)
    processor.save_pretrained(path)


def patchify(frames: np.ndarray) -> torch.Tensor:
    """Qwen2-VL patches of `frames [num_frames, height, width, 3]` (uint8): `[num_patches, 3 * 2 * 14 * 14]`, float32.

    The same numbers as the transformers processor gives for frames that need no resizing.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    video = torch.from_numpy(frames).float().permute(0, 3, 1, 2) / 255
    video = (video - torch.tensor(OPENAI_CLIP_MEAN).view(1, 3, 1, 1)) / torch.tensor(OPENAI_CLIP_STD).view(1, 3, 1, 1)
    if pad := -len(video) % TEMPORAL_PATCH:
        video = torch.cat([video, video[-1:].expand(pad, -1, -1, -1)])
    t, c, h, w = video.shape
    blocks = video.view(
        t // TEMPORAL_PATCH, TEMPORAL_PATCH, c, h // PATCH // MERGE, MERGE, PATCH, w // PATCH // MERGE, MERGE, PATCH
    )
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, c * TEMPORAL_PATCH * PATCH * PATCH)


def position_ids(num_before: int, grid: tuple[int, int, int], num_after: int, seconds_per_grid: float) -> torch.Tensor:
    """M-RoPE positions `[3, length]` of text, one visual item, text, as vLLM and Qwen's own code count them.

    Text goes on after the largest position of all; transformers' `get_rope_index` goes on after the largest *spatial*
    one, which gives a trained model other times than it learned.
    """
    before = torch.arange(num_before).expand(3, -1)
    t, h, w = grid
    times = (torch.arange(t) * (seconds_per_grid * TOKENS_PER_SECOND if t > 1 else 1.0)).long()
    item = torch.stack(torch.meshgrid(times, torch.arange(h), torch.arange(w), indexing="ij")).reshape(3, -1)
    item = item + num_before
    start = int(item.max()) + 1
    after = torch.arange(start, start + num_after).expand(3, -1)
    return torch.cat([before, item, after], dim=1)


def encode_visual(
    model: Qwen2_5_VLForConditionalGeneration, patches: torch.Tensor, grids: torch.Tensor
) -> torch.Tensor:
    """Projected visual tokens `[num_tokens, hidden_size]` of all items, in order."""
    return model.model.visual(patches, grid_thw=grids).pooler_output
