"""Small Video-LLM pairs that have learned to describe the generated world, and how they were trained."""

import json
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parent
CLIPS = _ROOT / "clips"


@dataclass(frozen=True)
class Pair:
    """A target, its drafter, and the number of frames of a video that they were trained with.

    `sampling`: what makes a server take these frames from a file, as `--media-io-kwargs` has it for videos.
    """

    target: Path
    draft: Path
    num_frames: int
    sampling: dict[str, int]

    @property
    def server_arguments(self) -> list[str]:
        return ["--media-io-kwargs", json.dumps({"video": self.sampling})]


def _pair(family: str, num_frames: int, sampling: dict[str, int]) -> Pair:
    folder = _ROOT / "checkpoints" / family
    return Pair(folder / "target", folder / "draft", num_frames, sampling)


PAIRS = {
    "qwen2_5_vl": _pair("qwen2_5_vl", 24, {"fps": 4}),  # vLLM takes two frames a second from files for this family
    "llava_onevision": _pair("llava_onevision", 12, {"num_frames": 12}),
}
TARGET, DRAFT = PAIRS["qwen2_5_vl"].target, PAIRS["qwen2_5_vl"].draft
