"""Small Video-LLM pairs that have learned to describe the generated world, and how they were trained."""

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


def _pair(family: str, num_frames: int) -> Pair:
    folder = _ROOT / "checkpoints" / family
    return Pair(folder / "target", folder / "draft", num_frames)


PAIRS = {family: _pair(family, frames) for family, frames in (("qwen2_5_vl", 24), ("llava_onevision", 12))}
TARGET, DRAFT = PAIRS["qwen2_5_vl"].target, PAIRS["qwen2_5_vl"].draft
