"""A small Video-LLM pair that has learned to describe the generated world, and how they were trained."""

from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parent
CLIPS = _ROOT / "clips"


@dataclass(frozen=True)
class Pair:
    """A target, its drafter, and the number of frames of a video that they were trained with."""

    target: Path
    draft: Path
    num_frames: int


PAIRS = {
    "qwen2_5_vl": Pair(
        _ROOT / "checkpoints" / "qwen2_5_vl" / "target", _ROOT / "checkpoints" / "qwen2_5_vl" / "draft", 24
    ),
}
TARGET, DRAFT = PAIRS["qwen2_5_vl"].target, PAIRS["qwen2_5_vl"].draft
