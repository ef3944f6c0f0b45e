"""`lvspec bench`: from options to a JSON file, a page and plots beside it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoConfig, PretrainedConfig

from vllm_lvspec.bench.peers import DraftSettings, setting, speculative_config
from vllm_lvspec.bench.report import markdown, pareto, plot, plot_profile, profile
from vllm_lvspec.bench.results import Environment, Report, Settings, summarise
from vllm_lvspec.bench.run import Journal, PolicyRun, run_policies
from vllm_lvspec.bench.samples import Sample, dataset, videofacts
from vllm_lvspec.bench.videofacts.tasks import TASKS
from vllm_lvspec.config import MAX_SPECULATIVE_TOKENS
from vllm_lvspec.reference import PAIRS
from vllm_lvspec.reference.upscale import TEXT_SHAPES, TextShape, text_shape, upscaled

VIDEOFACTS = "videofacts"
_DTYPES = (None, "auto", "float32", "float", "bfloat16", "float16", "half")
_PROMPT_TOKENS = 256  # more than any question of a suite has
_MOST_TOKENS = 4096  # of a bundled pair: vLLM's room for one video's embeddings is larger
_UNSAID = re.compile("KEY|TOKEN|SECRET|PASSWORD|LOGGING_LEVEL")
LARGEST_BLOCK = 256  # of a KV cache, in tokens


class BenchError(ValueError):
    """An option that can't work, named with its value and with what would be right."""


@dataclass(frozen=True)
class BenchOptions:
    """What to run. None: what fits the suite and the model."""

    json_path: Path
    title: str | None = None
    suite: str = VIDEOFACTS
    dataset: str | None = None
    samples: int | None = None
    seeds: Sequence[int] = (1,)
    tasks: Sequence[str] = TASKS
    policies: Sequence[str] = ("ar", "strict")
    family: str = "qwen2_5_vl"
    model: str | None = None
    draft: DraftSettings = field(default_factory=DraftSettings)
    shape: str | None = None
    draft_shape: str | None = None
    dtype: str | None = None
    batch_size: int = 1
    max_tokens: int = 256
    min_tokens: int = 0
    num_frames: int | None = None
    video_key: str = "video"
    prompt_key: str = "prompt"
    engine_arguments: dict[str, Any] = field(default_factory=dict)
    restart: bool = False
    side_by_side: bool = False
    repeats: int = 1
    profile: bool = False


def run_bench(options: BenchOptions, console: Console, command: Sequence[str] = ()) -> Report:
    """Run, write JSON, Markdown, plots and answers, show a table. Raises ValueError for an option that can't work."""
    _check(options)
    pair = PAIRS[options.family]
    is_reference = options.model is None
    model = str(pair.target) if options.model is None else options.model
    draft = options.draft
    if is_reference and draft.model is None:
        draft = replace(draft, model=str(pair.draft))
    check_models(model, draft.model)
    draft = _shaped(draft, options)
    num_frames = options.num_frames or (pair.num_frames if is_reference else 32)
    samples = _samples(options, num_frames)
    engine = _engine_arguments(model, num_frames, options)
    settings = Settings(
        title=options.title,
        suite=options.dataset or options.suite,
        samples=len(samples),
        videos=len({s.video_name for s in samples}),
        seeds=[] if options.dataset else list(options.seeds),
        tasks=list(dict.fromkeys(s.task for s in samples)),
        policies=list(options.policies),
        model=model if options.model else f"{options.family}/target",
        draft=draft.model if options.draft.model or not is_reference else f"{options.family}/draft",
        shape=options.shape,
        draft_shape=options.draft_shape,
        dtype=str(engine["dtype"]),
        batch_size=options.batch_size,
        num_speculative_tokens=draft.num_speculative_tokens,
        pruning=draft.pruning,
        pruning_ratio=draft.pruning_ratio,
        more=options.draft.more,
        max_tokens=options.max_tokens,
        min_tokens=options.min_tokens,
        num_frames=num_frames,
        side_by_side=options.side_by_side,
        repeats=options.repeats,
        profile=options.profile,
        engine=engine,
    )
    options.json_path.parent.mkdir(parents=True, exist_ok=True)
    partial = options.json_path.with_suffix(".partial")
    if options.restart:
        partial.unlink(missing_ok=True)
    here = environment(command)
    # Policies are apart in the journal, so that one can be added to a run that was stopped.
    questions = repr([(s.name, s.question, s.version) for s in samples])
    compared = {
        **settings.model_dump(mode="json", exclude={"policies", "title"}),
        "versions": here.versions,
        "device": here.device,
        "cores": here.cores,
        "weights": _dates(model) + (_dates(draft.model) if draft.model else []),
        "questions": hashlib.sha256(questions.encode()).hexdigest()[:16],
    }
    journal = Journal(partial, compared)
    here.resumed = journal.resumed
    with _progress(console) as progress:
        bars = {p: progress.add_task(p, total=len(samples), state="waits") for p in options.policies}
        runs = run_policies(
            options.policies,
            samples,
            model,
            draft,
            options.batch_size,
            options.max_tokens,
            options.min_tokens,
            engine,
            journal,
            on_start=lambda p: progress.update(bars[p], state="engine starts"),
            on_answer=lambda p: progress.update(bars[p], advance=1, state=""),
            side_by_side=options.side_by_side,
            repeats=options.repeats,
            with_profile=options.profile,
        )
    report = summarise(runs, samples, settings, here)
    options.json_path.write_text(report.model_dump_json(indent=1) + "\n")
    options.json_path.with_suffix(".md").write_text(markdown(report))
    plot(report, options.json_path.with_suffix(".png"))
    pareto(report, options.json_path.with_suffix(".pareto.png"))
    plot_profile(report, options.json_path.with_suffix(".profile.png"))
    _write_answers(options.json_path.with_suffix(".answers.jsonl"), samples, runs)
    partial.unlink()
    console.print(_table(report), *profile(report), sep="\n")
    suffixes = (".json", ".md", ".png", ".pareto.png", ".profile.png", ".answers.jsonl")
    written = (path for path in map(options.json_path.with_suffix, suffixes) if path.exists())
    console.print(f"written: {', '.join(map(str, written))}")
    return report


def _shaped(draft: DraftSettings, options: BenchOptions) -> DraftSettings:
    """With the drafter in a larger shape, too, where one is asked for."""
    if options.draft_shape is None:
        return draft
    if options.draft_shape not in TEXT_SHAPES:
        raise BenchError(f"draft_shape={options.draft_shape!r}: must be one of {', '.join(TEXT_SHAPES)}")
    if options.shape is None:
        raise BenchError(f"draft_shape={options.draft_shape!r}: must be left out, or go with the target's shape")
    if draft.model is None:
        raise BenchError(f"draft_shape={options.draft_shape!r}: must go with draft, the model that has that shape")
    overrides = upscaled(draft.model, options.draft_shape)["hf_overrides"]
    return replace(draft, more={**draft.more, "draft_hf_overrides": overrides})


def _engine_arguments(model: str, num_frames: int, options: BenchOptions) -> dict[str, Any]:
    """Arguments of vLLM's engine that all policies share."""
    is_reference = options.model is None
    # Rounding differs between a step of one row and one of several; in float32 hardly ever enough to change a token.
    engine: dict[str, Any] = {"dtype": options.dtype or ("float32" if is_reference else "auto")}
    if options.shape is not None:
        arguments = upscaled(model, options.shape)
        engine |= {key: value for key, value in arguments.items() if key != "model"}
    engine |= options.engine_arguments
    if is_reference:
        from vllm_lvspec.reference.families import FAMILIES

        config = AutoConfig.from_pretrained(model)
        longest = FAMILIES[options.family].num_visual_tokens(num_frames) + _PROMPT_TOKENS + options.max_tokens
        if longest > _MOST_TOKENS:
            raise BenchError(
                f"num_frames={num_frames}, max_tokens={options.max_tokens}: {longest} tokens with the question; "
                f"must be at most {_MOST_TOKENS}"
            )
        shape = TEXT_SHAPES[options.shape] if options.shape else text_shape(config)
        engine = {"max_model_len": max(longest, 2048)} | engine
        if not isinstance(engine["max_model_len"], int) or engine["max_model_len"] < longest:
            raise BenchError(f"engine: max_model_len={engine['max_model_len']!r}: must be {longest} or more")
        size = kv_cache_bytes(shape, engine["dtype"], engine["max_model_len"], options.batch_size)
        engine = {"kv_cache_memory_bytes": size} | engine
    return engine


def kv_cache_bytes(shape: TextShape, dtype: str, max_model_len: int, batch_size: int) -> int:
    """What `batch_size` requests of `max_model_len` tokens and their drafts need, in blocks of up to 256 tokens."""
    tokens = batch_size * (max_model_len + 2 * LARGEST_BLOCK) + 2 * LARGEST_BLOCK
    per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    return tokens * per_token * (4 if dtype in ("float32", "float") else 2)


def _write_answers(path: Path, samples: Sequence[Sample], runs: dict[str, PolicyRun]) -> None:
    """One line a question: what every policy said."""
    with path.open("w") as file:
        for i, sample in enumerate(samples):
            said = {policy: run.answers[i].text for policy, run in runs.items()}
            asked = {"name": sample.name, "video": sample.video_name, "task": sample.task, "prompt": sample.question}
            file.write(json.dumps({**asked, "answers": said}, ensure_ascii=False) + "\n")


def _check(options: BenchOptions) -> None:
    if options.json_path.suffix != ".json":
        raise BenchError(f"json={str(options.json_path)!r}: must end in .json; other files go beside it")
    if options.suite != VIDEOFACTS:
        raise BenchError(f"suite={options.suite!r}: must be {VIDEOFACTS}; other data go into dataset")
    if options.family not in PAIRS:
        raise BenchError(f"family={options.family!r}: must be one of {', '.join(PAIRS)}")
    if not options.policies or len(set(options.policies)) < len(options.policies):
        raise BenchError(f"policies={','.join(options.policies)!r}: must name one or more, each once")
    if not 1 <= options.draft.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
        value = options.draft.num_speculative_tokens
        raise BenchError(f"num_speculative_tokens={value}: must be from 1 to {MAX_SPECULATIVE_TOKENS}")
    if options.dtype not in _DTYPES:
        raise BenchError(f"dtype={options.dtype!r}: must be one of {', '.join(d for d in _DTYPES if d)}")
    for policy in options.policies:
        speculative_config(policy, options.draft)
    if not 0 <= options.min_tokens <= options.max_tokens:
        raise BenchError(f"min_tokens={options.min_tokens}: must be from 0 to max_tokens={options.max_tokens}")
    if len(set(options.seeds)) < len(options.seeds) or not options.seeds:
        raise BenchError(f"seed={','.join(map(str, options.seeds))!r}: must be one or more, each once")
    said_by = {"model": "model", "dtype": "dtype", "max_num_seqs": "batch_size", "speculative_config": "policies"}
    if options.shape is not None:
        said_by |= {"hf_overrides": "shape", "load_format": "shape"}
    for key, option in said_by.items():
        if key in options.engine_arguments:
            raise BenchError(f"engine: {key}={options.engine_arguments[key]!r}: leave it out; {option} says it")
    for key in ("batch_size", "max_tokens", "num_frames", "samples", "repeats"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise BenchError(f"{key}={value}: must be 1 or more")


def check_models(model: str, draft: str | None) -> None:
    """Raises BenchError where target or drafter can't be found."""
    for key, name in (("model", model), ("draft", draft)):
        try:
            # The file alone: vLLM knows models that transformers does not.
            if name is not None and not PretrainedConfig.get_config_dict(name)[0]:
                raise OSError("no config.json in it")
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise BenchError(f"{key}={name!r}: must be a model's folder or its name on the hub: {why}") from None


def _samples(options: BenchOptions, num_frames: int) -> list[Sample]:
    if options.dataset is None:
        count = options.samples or 20
        return [s for seed in options.seeds for s in videofacts(count, seed, options.tasks, num_frames)]
    return dataset(options.dataset, options.samples, num_frames, options.video_key, options.prompt_key)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )  # fmt: skip
    return Progress(*columns, console=console)


def environment(command: Sequence[str]) -> Environment:
    """This machine, now, and what was asked of it: vLLM's variables that were set stand before the command."""
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
        command=" ".join([*_variables(), shlex.join(command or ["lvspec", *sys.argv[1:]])]),
        versions=versions,
        device=device,
        cores=len(os.sched_getaffinity(0)),
        resumed=False,
    )


def _variables() -> list[str]:
    """vLLM's, as they are set on a command line, but for what changes no figure or is a secret."""
    names = sorted(name for name in os.environ if name.startswith("VLLM_") and not _UNSAID.search(name))
    return [f"{name}={shlex.quote(os.environ[name])}" for name in names]


def _dates(model: str) -> list[float]:
    """When the weights in a folder were written, that answers of others are not taken up again; none for hub names."""
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


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """`key=value` each; raises BenchError where one is none."""
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise BenchError(f"set={text!r}: must be key=value")
        settings[key] = setting(value)
    return settings


def parse_numbers(key: str, text: str) -> list[int]:
    """Whole numbers between commas, of the option `key`; raises BenchError where one is none."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise BenchError(f"{key}={text!r}: must be a number, or several with commas between them") from None


def parse_engine_arguments(text: str) -> dict[str, Any]:
    """`--engine` as a dictionary; raises BenchError where it is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchError(f"engine={text!r}: not JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise BenchError(f"engine={text!r}: must be an object of vLLM's engine arguments")
    return value
