"""Which drafter goes with which target where the user names none."""

from __future__ import annotations

import re
from pathlib import Path

# Names of published checkpoints; a size may differ, the tokenizer may not.
KNOWN_PAIRS = {
    "Qwen2-VL-72B-Instruct": "Qwen2-VL-7B-Instruct",
    "Qwen2-VL-7B-Instruct": "Qwen2-VL-2B-Instruct",
    "Qwen2.5-VL-72B-Instruct": "Qwen2.5-VL-7B-Instruct",
    "Qwen2.5-VL-32B-Instruct": "Qwen2.5-VL-7B-Instruct",
    "Qwen2.5-VL-7B-Instruct": "Qwen2.5-VL-3B-Instruct",
    "Qwen3-VL-32B-Instruct": "Qwen3-VL-4B-Instruct",
    "Qwen3-VL-8B-Instruct": "Qwen3-VL-2B-Instruct",
    "llava-onevision-qwen2-72b-ov-hf": "llava-onevision-qwen2-7b-ov-hf",
    "llava-onevision-qwen2-72b-ov-chat-hf": "llava-onevision-qwen2-7b-ov-chat-hf",
    "llava-onevision-qwen2-7b-ov-hf": "llava-onevision-qwen2-0.5b-ov-hf",
}

# What Qwen's own quantised checkpoints have behind the name; their tokenizer and image geometry are the same.
_QUANTIZED = re.compile(r"-(AWQ|FP8|GPTQ-Int[48])$")


def default_draft_model(target: str) -> str | None:
    """The drafter that goes with `target`, a folder or a name of the hub, or None where none is known.

    A quantised target of Qwen's has the drafter of the one that it was made from; who quantises others' models seldom
    has small ones, too. A target in a folder takes the drafter from the folder beside it, if that is there. A folder
    called `target` beside one called `draft` is a pair.
    """
    path = Path(target)
    if cached := re.search(r"models--([^/]+?)--([^/]+)/snapshots/", target + "/"):
        target = "/".join(cached.groups())  # where vLLM works offline it names the hub's cache
    elif path.is_dir():
        path = path.absolute()
        partner = "draft" if path.name == "target" else KNOWN_PAIRS.get(_QUANTIZED.sub("", path.name))
        return str(path.with_name(partner)) if partner and path.with_name(partner).is_dir() else None
    owner, _, name = target.rpartition("/")
    partner = KNOWN_PAIRS.get(_QUANTIZED.sub("", name) if owner in ("", "Qwen") else name)
    if partner is None:
        return None
    return f"{owner}/{partner}" if owner else partner
