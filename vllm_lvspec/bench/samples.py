"""What is asked: generated scenes with known truth, or anybody's videos with a list of prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vllm_lvspec.bench.videofacts.scene import FPS, NUM_FRAMES, Scene, video_item
from vllm_lvspec.bench.videofacts.score import Claim, Score, claims, score_answer
from vllm_lvspec.bench.videofacts.tasks import TASKS, make_task

SEEDS_PER_SUITE = 10_000  # suites of different seeds share no scene
NUM_SUITES = 100  # scenes from a million on are what the reference pairs were trained with
Video = tuple[np.ndarray, dict[str, Any]]  # frames [num_frames, height, width, 3], uint8, and vLLM's metadata


class DatasetError(ValueError):
    """A dataset that can't be used, named with what would be right."""


@dataclass(frozen=True)
class Sample:
    """One question about one video.

    `score` and `claims` are None where no truth is known. `version`: a text that is another one when the video's
    content is. `group`: the suite's seed.
    """

    name: str
    video_name: str
    version: str
    task: str
    question: str
    load_video: Callable[[], Video]
    score: Callable[[str], Score] | None = None
    claims: Callable[[str], list[Claim]] | None = None
    group: str = ""


def videofacts(num_videos: int, seed: int, tasks: Sequence[str] = TASKS, num_frames: int = NUM_FRAMES) -> list[Sample]:
    """Each of `tasks` on each of `num_videos` scenes that follow from `seed`."""
    if not 0 <= seed < NUM_SUITES:
        raise DatasetError(f"seed={seed}: must be from 0 to {NUM_SUITES - 1}")
    if not 1 <= num_videos <= SEEDS_PER_SUITE:
        raise DatasetError(f"samples={num_videos}: must be from 1 to {SEEDS_PER_SUITE}")
    if not tasks or set(tasks) - set(TASKS) or len(set(tasks)) < len(tasks):
        raise DatasetError(f"tasks={','.join(tasks)!r}: must be one or more of {', '.join(TASKS)}, each once")
    samples = []
    for index in range(seed * SEEDS_PER_SUITE, seed * SEEDS_PER_SUITE + num_videos):
        scene = Scene.from_seed(index)
        for kind in tasks:
            task = make_task(scene, kind, np.random.default_rng([index, TASKS.index(kind)]))
            samples.append(
                Sample(
                    name=f"{index}-{kind}",
                    video_name=str(index),
                    version=repr(scene),
                    task=kind,
                    question=task.prompt,
                    load_video=partial(_rendered, scene, num_frames),
                    score=partial(score_answer, scene, task),
                    claims=partial(claims, scene),
                    group=str(seed),
                )
            )
    return samples


def _rendered(scene: Scene, num_frames: int) -> Video:
    return video_item(scene.render(num_frames), FPS * num_frames / NUM_FRAMES)


def dataset(
    name: str, num_samples: int | None, num_frames: int, video_key: str = "video", prompt_key: str = "prompt"
) -> list[Sample]:
    """Samples of a folder, or of `hf:NAME`, a dataset repository of the hub that holds such a folder.

    The folder has one or more `.jsonl` files; each line names a video file, relative to the folder, and a prompt. Of a
    repository only the lists and the videos that are asked about are downloaded. Raises DatasetError, which names file,
    line and key, where that is not so.
    """
    repository = name.removeprefix("hf:") if name.startswith("hf:") else None
    folder = Path(name) if repository is None else _download_lists(repository)
    if not folder.is_dir():
        raise DatasetError(f"dataset={name!r}: no such folder; give a folder, or hf:NAME for one of the hub")
    lists = sorted(folder.rglob("*.jsonl"))
    if not lists:
        raise DatasetError(
            f"dataset={name!r}: no .jsonl file in it; each line must name a {video_key} and a {prompt_key}"
        )
    samples = []
    opened: set[Path] = set()
    for path in lists:
        for number, entry in _entries(path):
            where = f"{path.relative_to(folder)}:{number}"
            for key in (video_key, prompt_key):
                if not isinstance(entry.get(key), str):
                    raise DatasetError(
                        f"{where}: {key}={entry.get(key)!r}: must be text; its keys are {', '.join(entry)}"
                    )
            # A hub's files are links out of their folder: what must stay inside is what is asked for.
            video = Path(os.path.normpath(folder / entry[video_key]))
            inside = video.is_relative_to(os.path.normpath(folder))
            if inside and repository is not None:
                if not video.is_file():
                    _download(repository, folder.name, str(video.relative_to(folder)), where)
            elif inside:
                inside = video.resolve().is_relative_to(folder.resolve())
            if not inside or not video.is_file():
                raise DatasetError(f"{where}: {video_key}={entry[video_key]!r}: no such file in the dataset's folder")
            if video not in opened and not _can_be_opened(video):  # before any engine has answered anything
                raise DatasetError(f"{where}: {video_key}={entry[video_key]!r}: can't be opened as a video")
            opened.add(video)
            task = str(entry.get("task", "prompt"))
            load = partial(_decoded, video, num_frames)
            version = f"{video.stat().st_size} bytes, {video.stat().st_mtime_ns}"
            samples.append(Sample(where, entry[video_key], version, task, entry[prompt_key], load))
            if num_samples is not None and len(samples) == num_samples:
                return samples
    if not samples:
        raise DatasetError(f"dataset={name!r}: its .jsonl files are empty")
    return samples


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path.name}: byte {error.start} is not UTF-8; must be text") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path.name}:{number}: not JSON: {error.msg}") from None
        if not isinstance(entry, dict):
            raise DatasetError(f"{path.name}:{number}: {line.strip()[:60]}: must be an object")
        yield number, entry


def _download_lists(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns="*.jsonl"))
    except (OSError, ValueError) as error:  # what the hub raises is one of these
        raise DatasetError(f"dataset='hf:{repository}': can't be had from the hub: {error}") from None


def _download(repository: str, revision: str, file: str, where: str) -> None:
    """Fetch a file beside the lists: a snapshot's folder is called by its revision."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(repository, file, repo_type="dataset", revision=revision)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{where}: {file!r} of 'hf:{repository}' can't be had from the hub: {error}") from None


def _can_be_opened(path: Path) -> bool:
    capture = cv2.VideoCapture(str(path))
    try:
        return capture.isOpened()
    finally:
        capture.release()


def _decoded(path: Path, num_frames: int) -> Video:
    from vllm.multimodal.media import ImageMediaIO, VideoMediaIO

    try:
        return VideoMediaIO(ImageMediaIO(), num_frames=num_frames).load_file(path).media
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: can't be read as a video: {error}") from None
