"""Generated requests that mix videos, images, text, turns, lengths and sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from vllm import RequestOutput, SamplingParams

from vllm_lvspec.bench.videofacts.scene import Scene, video_item

QUESTIONS = (
    "Describe the video.", "Which object moves first?", "How many objects are there?", "What happens in this video?",
    "Where does it move, and what is left in the end of the clip?", "Describe the image.",
)  # fmt: skip
KINDS = ("video", "video", "video_again", "two_videos", "image", "image_and_video", "two_turns", "text", "long_text")


@dataclass(frozen=True)
class Family:
    """How a family of models writes an image and a video into a prompt.

    `lengths`: frames that its videos may have; stock vLLM's LLaVA-OneVision dies of different ones in a batch.
    """

    checkpoint: str
    image: str
    video: str
    lengths: tuple[int, ...]


QWEN = Family(
    "qwen2_5_vl",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_start|><|video_pad|><|vision_end|>",
    (2, 4, 5, 8),
)
LLAVA = Family("llava_onevision", "<|image_pad|>", "<|video_pad|>", (8,))


@dataclass
class Request:
    kind: str
    prompt: str
    data: dict[str, list[Any]] = field(default_factory=dict)
    params: SamplingParams = field(default_factory=SamplingParams)

    @property
    def inputs(self) -> dict[str, Any]:
        return {"prompt": self.prompt, **({"multi_modal_data": self.data} if self.data else {})}


def video(seed: int, num_frames: int = 8) -> tuple[np.ndarray, dict]:
    return video_item(Scene.from_seed(seed).render(num_frames))


def image(seed: int) -> Image.Image:
    return Image.fromarray(Scene.from_seed(seed).render(1)[0])


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def generate_requests(family: Family, count: int, seed: int, max_tokens: int = 48) -> list[Request]:
    """`count` greedy requests that follow from `seed`; some ask for penalties, bad words, stops and least lengths."""
    rng = np.random.default_rng(seed)
    requests = []
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        ask = QUESTIONS[int(rng.integers(len(QUESTIONS)))]
        scene = int(rng.integers(1000))
        length = family.lengths[int(rng.integers(len(family.lengths)))]
        data: dict[str, list[Any]] = {}
        if kind == "text":
            body = ask * int(rng.integers(1, 6))
        elif kind == "long_text":
            # One token more than whole blocks: asked again, all but the last token come from the prefix cache.
            body = "the red circle moves " * int(rng.integers(10, 50))
        elif kind == "image":
            data, body = {"image": [image(scene)]}, family.image + ask
        elif kind == "two_videos":
            data, body = {"video": [video(scene), video(scene + 1, length)]}, family.video + "And" + family.video + ask
        elif kind == "image_and_video":
            data = {"image": [image(scene)], "video": [video(scene)]}
            body = family.video + "Compare with" + family.image + ask
        else:
            again = kind == "video_again"  # the same video, with other questions
            data = {"video": [video(7) if again else video(scene, length)]}
            # Enough text in common after the video that a prefix hit covers it whole, and its pixels are stripped.
            body = family.video + ("the red circle moves up, then left. " * 5 if again else "") + ask
        prompt = turn("user", body)
        if kind == "two_turns":
            prompt += turn("assistant", "The red circle moves first.") + turn("user", "And then?")
        prompt += "<|im_start|>assistant\n"
        params = SamplingParams(temperature=0, max_tokens=int(rng.integers(1, max_tokens + 1)))
        params.ignore_eos = bool(rng.random() < 0.7)
        extra = int(rng.integers(8))
        if extra == 0:
            params.repetition_penalty = 1.3
        elif extra == 1:
            params.presence_penalty, params.frequency_penalty = 0.5, 0.3
        elif extra == 2:
            params = SamplingParams(temperature=0, max_tokens=params.max_tokens, bad_words=[" the", " circle"])
        elif extra == 3:
            params.min_tokens = min(20, params.max_tokens)
        elif extra == 4:
            params = SamplingParams(temperature=0, max_tokens=params.max_tokens, stop=["e", " m"], ignore_eos=True)
        elif extra == 5:
            params.logprobs = 3
        requests.append(Request(kind, prompt, data, params))
    return requests


def token_ids(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in outputs]
