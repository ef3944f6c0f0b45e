"""Ray Data: a folder of videos, described by as many engines as there is room for.

    python batch.py VIDEOS --model Qwen/Qwen2.5-VL-32B-Instruct --tensor-parallel-size 2 --engines 4 --out captions

writes one JSON line per video, `{"video", "text", "error"}`; what can't be read has an error and no text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ray

KINDS = (".mp4", ".mkv", ".mov", ".webm", ".avi")


class Describe:
    """One engine; Ray Data keeps it and gives it batches of paths."""

    def __init__(self, model: str, speculative_config: Any, prompt: str, max_tokens: int, root: str, engine: dict):
        from vllm import LLM, SamplingParams

        self.llm = LLM(model, speculative_config=speculative_config, allowed_local_media_path=root, **engine)
        self.prompt = prompt
        self.params = SamplingParams(temperature=0, max_tokens=max_tokens)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list]:
        videos = [str(path) for path in batch["video"]]
        texts: list[str | None] = []
        errors: list[str | None] = []
        try:
            answers = self.llm.chat([self._messages(path) for path in videos], self.params, use_tqdm=False)
            texts, errors = [answer.outputs[0].text for answer in answers], [None] * len(videos)
        except ValueError:  # one that can't be read ends the whole call: now one at a time
            for path in videos:
                try:
                    (answer,) = self.llm.chat([self._messages(path)], self.params, use_tqdm=False)
                    texts, errors = [*texts, answer.outputs[0].text], [*errors, None]
                except ValueError as error:
                    texts, errors = [*texts, None], [*errors, str(error)]
        return {"video": videos, "text": texts, "error": errors}

    def _messages(self, path: str) -> list[dict[str, Any]]:
        video = {"type": "video_url", "video_url": {"url": Path(path).as_uri()}}
        return [{"role": "user", "content": [video, {"type": "text", "text": self.prompt}]}]


def videos_in(folder: Path) -> list[dict[str, str]]:
    """All videos of a folder and of those in it. Raises ValueError where there is none."""
    found = [{"video": str(path.resolve())} for path in sorted(folder.rglob("*")) if path.suffix.lower() in KINDS]
    if not found:
        raise ValueError(f"{folder}: no videos; must be a folder with {', '.join(KINDS)} files")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt", default="Describe the video in full detail.")
    parser.add_argument("--speculative-config", default="lvspec", help="the word, lvspec:DRAFTER, or settings as JSON")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32, help="videos that an engine is given at once")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--cpus-per-engine", type=int, help="on CPUs; unset on GPUs")
    parser.add_argument("--engine", default="{}", help="more arguments of vLLM's engine, as JSON")
    options = parser.parse_args()
    speculative = options.speculative_config
    if speculative.lstrip().startswith("{"):
        speculative = json.loads(speculative)
    engine = {"tensor_parallel_size": options.tensor_parallel_size, **json.loads(options.engine)}
    on_gpus = options.cpus_per_engine is None
    described = ray.data.from_items(videos_in(options.videos)).map_batches(
        Describe,
        fn_constructor_args=(
            options.model, speculative, options.prompt, options.max_tokens, str(options.videos.resolve()), engine,
        ),
        batch_size=options.batch_size,
        concurrency=options.engines,
        num_gpus=options.tensor_parallel_size if on_gpus else 0,
        num_cpus=None if on_gpus else options.cpus_per_engine,
    )  # fmt: skip
    described.write_json(str(options.out.resolve()))


if __name__ == "__main__":
    main()
