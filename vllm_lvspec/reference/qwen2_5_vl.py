"""The reference pair of the Qwen2.5-VL family: shapes, checkpoints, and a forward pass with vLLM's positions."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vllm_lvspec.bench.videofacts.scene import FPS, NUM_FRAMES, SIDE
from vllm_lvspec.reference.tokenizer import greedy

PATCH = 14
MERGE = 2
TEMPORAL_PATCH = 2
TOKENS_PER_SECOND = 4
VIDEO_FRAMES = NUM_FRAMES
BEFORE_VISUAL, AFTER_VISUAL = "<|vision_start|>", "<|vision_end|>"
POSITION_AXES: tuple[int, ...] = (3,)
SEES_IMAGES = True
_GRID_SIDE = SIDE // PATCH

# The two vocabularies are padded to different sizes, as those of Qwen2.5-VL 3B and 7B are. Drafters by layers and width
# are there to see how small one may be, and are not bundled.
SHAPES: dict[str, dict] = {
    "target": dict(
        vocab_size=1472, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, mrope_section=[8, 12, 12],
        vision=dict(depth=3, hidden_size=128, intermediate_size=256, num_heads=4),
    ),
    "draft": dict(
        vocab_size=1536, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, mrope_section=[4, 6, 6],
        vision=dict(depth=1, hidden_size=64, intermediate_size=128, num_heads=2),
    ),
}  # fmt: skip
SHAPES["draft-2x64"] = SHAPES["draft"] | dict(hidden_size=64, intermediate_size=192, num_attention_heads=2)
SHAPES["draft-1x64"] = SHAPES["draft-2x64"] | dict(num_hidden_layers=1)


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
    model.generation_config = greedy(tokenizer)
    return model


def save_checkpoint(model, tokenizer: PreTrainedTokenizerFast, path: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a checkpoint that stock transformers and stock vLLM load: weights, tokenizer, processors."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1024}
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


def moments(num_frames: int) -> list[float]:
    """When, in frames, each row of visual tokens shows its squares."""
    return [(t + 0.5) * TEMPORAL_PATCH - 0.5 for t in range(-(-num_frames // TEMPORAL_PATCH))]


def num_visual_tokens(num_frames: int) -> int:
    return len(moments(num_frames)) * (_GRID_SIDE // MERGE) ** 2


def patchify(frames: np.ndarray) -> torch.Tensor:
    """Qwen2-VL patches of `frames [num_frames, height, width, 3]` (uint8): `[num_patches, 3 * 2 * 14 * 14]`, float32.

    The same numbers as the transformers processor gives for frames that need no resizing.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    if pad := -len(frames) % TEMPORAL_PATCH:
        frames = np.concatenate([frames, frames[-1:].repeat(pad, axis=0)])
    t, h, w, c = frames.shape
    blocks = torch.from_numpy(frames).view(
        t // TEMPORAL_PATCH, TEMPORAL_PATCH, h // PATCH // MERGE, MERGE, PATCH, w // PATCH // MERGE, MERGE, PATCH, c
    )
    # Moved as bytes and turned into floats afterwards: a quarter of the memory's work.
    pixels = blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, c, TEMPORAL_PATCH * PATCH * PATCH).float()
    mean, std = (torch.tensor(x).view(1, 3, 1) * 255 for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return pixels.sub_(mean).div_(std).view(len(pixels), -1)


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


def text_positions(num_before: int, num_frames: int, num_after: int, size: int) -> torch.Tensor:
    """Positions `[3, size, length]` of `size` equal sequences with one video (or image) of `num_frames` each."""
    side = _GRID_SIDE // MERGE
    return position_ids(
        num_before, (len(moments(num_frames)), side, side), num_after, TEMPORAL_PATCH / FPS
    )[:, None].expand(-1, size, -1)  # fmt: skip


def pixel_values(videos: list[np.ndarray]) -> torch.Tensor:
    """Patches of equally long videos, one after another."""
    frames = [np.concatenate([v, v[-1:].repeat(-len(v) % TEMPORAL_PATCH, axis=0)]) for v in videos]
    return patchify(np.concatenate(frames))


def encode_visual(
    model: Qwen2_5_VLForConditionalGeneration, pixels: torch.Tensor, num_frames: int, size: int
) -> torch.Tensor:
    """Projected visual tokens `[size, num_visual, hidden_size]` of `size` videos of the generated world."""
    grids = torch.tensor([[len(moments(num_frames)), _GRID_SIDE, _GRID_SIDE]] * size, device=pixels.device)
    return model.model.visual(pixels, grid_thw=grids).pooler_output.view(size, num_visual_tokens(num_frames), -1)


def prepare_for_training(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Let the vision tower attend to all frames in one call; transformers calls once per frame, which CPUs pay for.

    Same numbers: every window of this geometry is exactly one frame of patches.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
        length = hidden_states.shape[0]
        q, k, v = self.qkv(hidden_states).reshape(length, 3, self.num_heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        shape = -1, _GRID_SIDE**2, self.num_heads, self.head_dim
        q, k, v = (x.view(shape).transpose(1, 2).to(v.dtype) for x in (q, k, v))
        # Written out: on CPUs it takes a sixth of the time of torch's fused attention for so many small windows.
        out = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).reshape(length, -1))

    for block in model.model.visual.blocks:
        block.attn.forward = forward.__get__(block.attn)
