"""`lvspec bench`: from options to a JSON file, a page and plots beside it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_lvspec.bench.peers import PEERS, DraftSettings
from vllm_lvspec.bench.report import markdown, plot
from vllm_lvspec.bench.results import Environment, Report, Settings, summarise
from vllm_lvspec.bench.run import Journal, run_policies
from vllm_lvspec.bench.samples import Sample, dataset, videofacts
from vllm_lvspec.bench.videofacts.tasks import TASKS
from vllm_lvspec.config import METHOD, LVSpecConfig
from vllm_lvspec.reference import PAIRS

VIDEOFACTS = "videofacts"


class BenchError(ValueError):
    """An option that can't work, named with its value and with what would be right."""


@dataclass(frozen=True)
class BenchOptions:
    """What to run. None: what fits the suite and the model."""

    json_path: Path
    suite: str = VIDEOFACTS
    dataset: str | None = None
    samples: int | None = None
    seed: int = 1
    tasks: Sequence[str] = TASKS
    policies: Sequence[str] = ("ar", "strict")
    family: str = "qwen2_5_vl"
    model: str | None = None
    draft: DraftSettings = field(default_factory=DraftSettings)
    shape: str | None = None
    dtype: str | None = None
    batch_size: int = 1
    max_tokens: int = 256
    num_frames: int | None = None
    video_key: str = "video"
    prompt_key: str = "prompt"
    engine_arguments: dict[str, Any] = field(default_factory=dict)
    restart: bool = False


def run_bench(options: BenchOptions, console: Console, command: Sequence[str] = ()) -> Report:
    """Run, write JSON, Markdown and PNG, and show a table. Raises ValueError for an option that can't work."""
    _check(options)
    pair = PAIRS[options.family]
    is_reference = options.model is None
    model = str(pair.target) if options.model is None else options.model
    draft = options.draft
    if is_reference and draft.model is None:
        draft = DraftSettings(**{**vars(draft), "model": str(pair.draft)})
    num_frames = options.num_frames or (pair.num_frames if is_reference else 32)
    samples = _samples(options, num_frames)
    # Rounding differs between a step of one row and one of several; in float32 hardly ever enough to change a token.
    dtype = options.dtype or ("float32" if is_reference else "auto")
    engine: dict[str, Any] = {"dtype": dtype}
    if is_reference:
        engine |= {"max_model_len": 2048, "kv_cache_memory_bytes": 2**29}
    if options.shape is not None:
        from vllm_lvspec.reference.upscale import upscaled

        arguments = upscaled(model, options.shape)
        engine |= {key: value for key, value in arguments.items() if key != "model"}
    engine |= options.engine_arguments
    settings = Settings(
        suite=options.dataset or options.suite,
        samples=len(samples),
        videos=len({s.video_name for s in samples}),
        seed=None if options.dataset else options.seed,
        tasks=list(dict.fromkeys(s.task for s in samples)),
        policies=list(options.policies),
        model=model if options.model else f"{options.family}/target",
        draft=draft.model if options.draft.model or not is_reference else f"{options.family}/draft",
        shape=options.shape,
        dtype=str(engine["dtype"]),
        batch_size=options.batch_size,
        num_speculative_tokens=draft.num_speculative_tokens,
        pruning=draft.pruning,
        pruning_ratio=draft.pruning_ratio,
        max_tokens=options.max_tokens,
        num_frames=num_frames,
        engine=engine,
    )
    options.json_path.parent.mkdir(parents=True, exist_ok=True)
    partial = options.json_path.with_suffix(".partial")
    if options.restart:
        partial.unlink(missing_ok=True)
    environment = _environment(command)
    # Policies are apart in the journal, so that one can be added to a run that was stopped.
    compared = {**settings.model_dump(exclude={"policies"}), "versions": environment.versions, "weights": _dates(model)}
    journal = Journal(partial, compared)
    environment.resumed = journal.resumed
    with _progress(console) as progress:
        bars = {p: progress.add_task(p, total=len(samples), state="waits") for p in options.policies}
        runs = run_policies(
            options.policies,
            samples,
            model,
            draft,
            options.batch_size,
            options.max_tokens,
            engine,
            journal,
            on_start=lambda p: progress.update(bars[p], state="engine starts"),
            on_answer=lambda p: progress.update(bars[p], advance=1, state=""),
        )
    report = summarise(runs, samples, settings, environment)
    options.json_path.write_text(report.model_dump_json(indent=1) + "\n")
    options.json_path.with_suffix(".md").write_text(markdown(report))
    plot(report, options.json_path.with_suffix(".png"))
    partial.unlink()
    console.print(_table(report))
    console.print(f"written: {', '.join(str(options.json_path.with_suffix(s)) for s in ('.json', '.md', '.png'))}")
    return report


def _check(options: BenchOptions) -> None:
    if options.json_path.suffix != ".json":
        raise BenchError(f"json={str(options.json_path)!r}: must end in .json; .md and .png are written beside it")
    if options.suite != VIDEOFACTS:
        raise BenchError(f"suite={options.suite!r}: must be {VIDEOFACTS}; other data go into dataset")
    if options.family not in PAIRS:
        raise BenchError(f"family={options.family!r}: must be one of {', '.join(PAIRS)}")
    if not options.policies or len(set(options.policies)) < len(options.policies):
        raise BenchError(f"policies={','.join(options.policies)!r}: must name one or more, each once")
    for policy in options.policies:
        if policy not in PEERS:
            raise BenchError(f"policies={policy!r}: must be of {', '.join(PEERS)}")
        config = PEERS[policy](options.draft)
        if config is not None and config["method"] == METHOD:
            LVSpecConfig.parse(config)
    if "max_num_seqs" in options.engine_arguments:
        value = options.engine_arguments["max_num_seqs"]
        raise BenchError(f"engine: max_num_seqs={value!r}: leave it out; batch_size says it")
    for key in ("batch_size", "max_tokens", "num_frames", "samples"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise BenchError(f"{key}={value}: must be 1 or more")


def _samples(options: BenchOptions, num_frames: int) -> list[Sample]:
    if options.dataset is None:
        return videofacts(options.samples or 20, options.seed, options.tasks, num_frames)
    return dataset(options.dataset, options.samples, num_frames, options.video_key, options.prompt_key)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )  # fmt: skip
    return Progress(*columns, console=console)


def _environment(command: Sequence[str]) -> Environment:
    import torch

    versions = {"python": platform.python_version()}
    for name in ("vllm_lvspec", "vllm", "torch", "transformers", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(command or ["lvspec", *sys.argv[1:]]),
        versions=versions,
        device=device,
        cores=len(os.sched_getaffinity(0)),
        resumed=False,
    )


def _dates(model: str) -> list[float]:
    """When the weights in a folder were written: answers of others are not taken up again."""
    return [path.stat().st_mtime for path in sorted(Path(model).glob("*.safetensors"))]


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _table(report: Report) -> Table:
    table = Table(title=f"{report.settings.suite}, {report.settings.samples} questions, {report.settings.dtype}")
    for heading in (
        "policy",
        "tokens per target step",
        "speed over ar",
        "bound",
        "facts",
        "order",
        "retention",
        "same",
    ):
        table.add_column(heading)

    def shown(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    for name, p in report.policies.items():
        table.add_row(
            name,
            shown(p.mean_accepted_length, 2),
            shown(p.speedup, 2),
            shown(p.bound.speedup if p.bound else None, 2),
            shown(p.fact_accuracy, 3),
            shown(p.order_accuracy, 3),
            shown(p.retention, 3),
            shown(p.same_answers, 3),
        )
    return table


def parse_engine_arguments(text: str) -> dict[str, Any]:
    """`--engine` as a dictionary; raises BenchError where it is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchError(f"engine={text!r}: not JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise BenchError(f"engine={text!r}: must be an object of vLLM's engine arguments")
    return value
