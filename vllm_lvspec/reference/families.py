"""The families in which a reference pair exists, and what training asks of one."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from vllm_lvspec.reference import llava_onevision, qwen2_5_vl


class Family(Protocol):
    """A module of this package.

    `SHAPES`: what `build_model` takes, by role. `VIDEO_FRAMES`: frames of a scene that its models see.
    `BEFORE_VISUAL`, `AFTER_VISUAL`: marks around a placeholder in a prompt. `POSITION_AXES`: what stands before
    `[size, length]` in the shape of positions.
    """

    SHAPES: dict[str, dict[str, Any]]
    VIDEO_FRAMES: int
    BEFORE_VISUAL: str
    AFTER_VISUAL: str
    SEES_IMAGES: bool
    POSITION_AXES: tuple[int, ...]

    def build_model(self, shape: dict, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Any: ...

    def save_checkpoint(self, model: Any, tokenizer: PreTrainedTokenizerFast, path: str) -> None: ...

    def moments(self, num_frames: int) -> list[float]: ...

    def num_visual_tokens(self, num_frames: int) -> int: ...

    def text_positions(self, num_before: int, num_frames: int, num_after: int, size: int) -> torch.Tensor: ...

    def pixel_values(self, videos: list[np.ndarray]) -> torch.Tensor: ...

    def encode_visual(self, model: Any, pixels: torch.Tensor, num_frames: int, size: int) -> torch.Tensor: ...

    def prepare_for_training(self, model: Any) -> None: ...


FAMILIES: dict[str, Family] = {"qwen2_5_vl": qwen2_5_vl, "llava_onevision": llava_onevision}
