"""`lvspec bench-serve`: vLLM's own load generator against servers with and without speculation.

All servers run at once and are loaded in turn, so that they share the machine's good and bad minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.table import Table

from vllm_lvspec.bench.command import BenchError, check_models, environment, kv_cache_bytes
from vllm_lvspec.bench.peers import DraftSettings, speculative_config
from vllm_lvspec.bench.results import BASELINE, Environment, Interval, StrictModel
from vllm_lvspec.bench.run import turned
from vllm_lvspec.bench.samples import Sample, videofacts
from vllm_lvspec.bench.videofacts.scene import write_mp4
from vllm_lvspec.reference import PAIRS
from vllm_lvspec.reference.upscale import TEXT_SHAPES, text_shape, upscaled
from vllm_lvspec.serving import serve

_MODEL = "bench"  # by which all servers call it
_MAX_MODEL_LEN = 2048
_NUM_DRAWS = 2000
_MOST_TOKENS = 1024  # vLLM's load generator leaves questions out that come to more than twice as many with the answer
MIN_ROUNDS = 5  # of fewer no interval is made


class Served(StrictModel):
    """One server under one load, over all rounds."""

    requests: int = Field(description="that were answered")
    failed: int = Field(description="requests that were not")
    output_tokens: int = Field(description="of all answers")
    output_tokens_per_second: float = Field(description="throughput as the load generator has it: median over rounds")
    first_token_seconds: float = Field(description="median over requests of the time to the first token")
    token_seconds: float | None = Field(
        description="median over requests of the time per further token: from the first to the last over their number; "
        "null where no answer has a second token"
    )
    throughput_over_ar: float | None = Field(
        description="output_tokens_per_second over that of ar: geometric mean of the rounds' ratios; null without ar"
    )
    first_token_over_ar: float | None = Field(
        description="median over requests of first_token_seconds over ar's; null without ar"
    )
    speedup: float | None = Field(
        description="median over requests of ar's token_seconds over this server's; null without ar, and where no "
        "answer has a second token"
    )
    intervals: dict[str, Interval] = Field(
        description="95 % bootstrap intervals of the ratios: over requests; for throughput over rounds, if there are "
        f"{MIN_ROUNDS} or more"
    )


class ServedSettings(StrictModel):
    """What was asked for."""

    title: str | None = Field(description="what the run shows")
    model: str = Field(description="target")
    draft: str | None = Field(description="drafter; null: the plugin's choice")
    shape: str | None = Field(description="larger shape at whose cost the target was served")
    dtype: str = Field(description="weights and activations")
    policies: list[str] = Field(description="a server each")
    samples: int = Field(description="requests of a round")
    seed: int = Field(description="of the suite's scenes")
    task: str = Field(description="kind of questions")
    max_tokens: int = Field(description="per answer")
    concurrency: list[int] = Field(description="requests at once, at most")
    rounds: int = Field(description="times that every server had every load, in turn")
    server: list[str] = Field(description="more arguments of all servers")


class ServedReport(StrictModel):
    """The whole file. `loads`: by requests at once, then by policy."""

    environment: Environment
    settings: ServedSettings
    loads: dict[int, dict[str, Served]]


@dataclass(frozen=True)
class ServeOptions:
    """What to serve and how to load it."""

    json_path: Path
    title: str | None = None
    policies: Sequence[str] = ("ar", "lvspec")
    samples: int = 16
    seed: int = 1
    task: str = "caption"
    family: str = "qwen2_5_vl"
    model: str | None = None
    draft: DraftSettings = field(default_factory=DraftSettings)
    shape: str | None = None
    dtype: str | None = None
    max_tokens: int = 256
    concurrency: Sequence[int] = (1, 8)
    rounds: int = 3
    server_arguments: Sequence[str] = ()


def run_served(options: ServeOptions, console: Console, command: Sequence[str] = ()) -> ServedReport:
    """Serve, load, write the JSON, show a table. Raises ValueError for an option that can't work."""
    _check(options)
    is_reference = options.model is None
    pair = PAIRS[options.family]
    model = options.model or str(pair.target)
    check_models(model, options.draft.model)
    arguments = _server_arguments(model, options)
    speculation = {p: _speculation(p, options, pair.draft if is_reference else None) for p in options.policies}
    samples = videofacts(options.samples, options.seed, (options.task,))
    report = ServedReport(
        environment=environment(command),
        settings=ServedSettings(
            title=options.title,
            model=options.model or f"{options.family}/target",
            draft=options.draft.model or (f"{options.family}/draft" if is_reference else None),
            shape=options.shape,
            dtype=options.dtype or ("float32" if is_reference else "auto"),
            policies=list(options.policies),
            samples=options.samples,
            seed=options.seed,
            task=options.task,
            max_tokens=options.max_tokens,
            concurrency=list(options.concurrency),
            rounds=options.rounds,
            server=list(options.server_arguments),
        ),
        loads={},
    )
    options.json_path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="lvspec-") as folder, ExitStack() as stack, console.status("") as status:
        dataset = _write_dataset(Path(folder), samples)
        urls = {}
        for policy in options.policies:
            media = ["--allowed-local-media-path", folder]
            waiting = partial(_show, status.update, policy)
            server = serve(model, *arguments, *media, *speculation[policy], on_wait=waiting)
            urls[policy] = stack.enter_context(server).url
        for at_once in options.concurrency:
            rounds: dict[str, list[dict[str, Any]]] = {policy: [] for policy in options.policies}
            for number in range(options.rounds):
                for policy in turned(options.policies, number):
                    status.update(f"{policy}: {at_once} at once, round {number + 1} of {options.rounds}")
                    out = Path(folder) / f"{policy}-{at_once}-{number}.json"
                    rounds[policy].append(_load(urls[policy], model, dataset, at_once, options, out))
            report.loads[at_once] = _compare(rounds)
            options.json_path.write_text(report.model_dump_json(indent=1) + "\n")
    console.print(_table(report))
    console.print(f"written: {options.json_path}")
    return report


def _check(options: ServeOptions) -> None:
    if options.json_path.suffix != ".json":
        raise BenchError(f"json={str(options.json_path)!r}: must end in .json")
    if options.family not in PAIRS:
        raise BenchError(f"family={options.family!r}: must be one of {', '.join(PAIRS)}")
    if not options.policies or len(set(options.policies)) < len(options.policies):
        raise BenchError(f"policies={','.join(options.policies)!r}: must name one or more, each once")
    for key in ("samples", "max_tokens", "rounds"):
        if getattr(options, key) < 1:
            raise BenchError(f"{key}={getattr(options, key)}: must be 1 or more")
    if options.max_tokens > _MOST_TOKENS:
        raise BenchError(f"max_tokens={options.max_tokens}: must be at most {_MOST_TOKENS}")
    if not options.concurrency or min(options.concurrency) < 1:
        given = ",".join(map(str, options.concurrency))
        raise BenchError(f"concurrency={given!r}: must be one or more, each 1 or more")
    if options.shape is not None and options.shape not in TEXT_SHAPES:
        raise BenchError(f"shape={options.shape!r}: must be one of {', '.join(TEXT_SHAPES)}")


def _server_arguments(model: str, options: ServeOptions) -> list[str]:
    """What all servers share."""
    arguments = ["--served-model-name", _MODEL, "--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    if options.shape is not None:
        shaped = upscaled(model, options.shape)
        arguments += ["--load-format", shaped["load_format"], "--hf-overrides", json.dumps(shaped["hf_overrides"])]
    if options.model is None:
        from transformers import AutoConfig

        shape = TEXT_SHAPES[options.shape] if options.shape else text_shape(AutoConfig.from_pretrained(model))
        most = max(options.concurrency)
        size = kv_cache_bytes(shape, options.dtype or "float32", _MAX_MODEL_LEN, most)
        arguments += [
            "--dtype", options.dtype or "float32", "--max-model-len", str(_MAX_MODEL_LEN), "--max-num-seqs", str(most),
            "--kv-cache-memory-bytes", str(size), *PAIRS[options.family].server_arguments,
        ]  # fmt: skip
    elif options.dtype is not None:
        arguments += ["--dtype", options.dtype]
    return [*arguments, *options.server_arguments]


def _speculation(policy: str, options: ServeOptions, partner: Path | None) -> list[str]:
    # As a server has it whose operator says no more: what does not pay is left off.
    settings = replace(options.draft, more={"only_if_faster": True, **options.draft.more})
    if settings.model is None and partner is not None:
        settings = replace(settings, model=str(partner))
    config = speculative_config(policy, settings)
    return [] if config is None else ["--speculative-config", json.dumps(config)]


def _show(update: Callable[[str], None], policy: str, seconds: float) -> None:
    update(f"{policy}: the server starts ({seconds:.0f} s)")


def _write_dataset(folder: Path, samples: Sequence[Sample]) -> Path:
    """Videos and questions as the load generator reads them (ShareGPT's way). What answers are there does not count."""
    entries = []
    for sample in samples:
        frames, about = sample.load_video()
        video = folder / f"{sample.name}.mp4"
        write_mp4(str(video), frames, about["fps"])
        turns = [{"from": "human", "value": sample.question}, {"from": "gpt", "value": sample.question}]
        entries.append({"video": str(video), "conversations": turns})
    path = folder / "questions.json"
    path.write_text(json.dumps(entries))
    return path


def _load(url: str, model: str, dataset: Path, at_once: int, options: ServeOptions, out: Path) -> dict[str, Any]:
    """Run `vllm bench serve` once; its figures, request by request. Raises BenchError where it or all requests fail."""
    command = [
        str(Path(sys.executable).with_name("vllm")), "bench", "serve",
        "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", url,
        "--model", model, "--served-model-name", _MODEL,
        "--dataset-name", "sharegpt", "--dataset-path", str(dataset), "--disable-shuffle", "--no-oversample",
        "--num-prompts", str(options.samples), "--sharegpt-output-len", str(options.max_tokens),
        "--max-concurrency", str(at_once), "--num-warmups", str(min(at_once, options.samples)), "--temperature", "0",
        "--save-result", "--save-detailed", "--result-dir", str(out.parent), "--result-filename", out.name,
        "--disable-tqdm",
    ]  # fmt: skip
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if ended.returncode or not out.exists():
        last = "\n".join((ended.stdout + ended.stderr).splitlines()[-20:])
        raise BenchError(f"vllm bench serve ended with status {ended.returncode}:\n{last}")
    found = json.loads(out.read_text())
    if len(found["ttfts"]) != options.samples:
        raise BenchError(f"vllm bench serve sent {len(found['ttfts'])} requests of {options.samples}")
    if not found["completed"]:
        raise BenchError(f"none of {options.samples} requests was answered: {found['errors'][0]}")
    return found


# What it comes to ---------------------------------------------------------------------------------------------------


def _compare(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Served]:
    """Of every policy, from what the load generator wrote in each round."""
    seen = {policy: _requests(each) for policy, each in rounds.items()}
    return {policy: _served(rounds, seen, policy) for policy in rounds}


def _requests(rounds: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds to the first token and per further one `[num_rounds, num_requests]`, nan of those that failed."""
    first = np.array([each["ttfts"] for each in rounds], dtype=float)
    further = np.array([[sum(gaps) for gaps in each["itls"]] for each in rounds])
    lengths = np.array([each["output_lens"] for each in rounds], dtype=float)
    failed = np.array([[bool(error) for error in each["errors"]] for each in rounds])
    first[failed] = np.nan
    per_token = np.where(failed | (lengths < 2), np.nan, further / np.maximum(lengths - 1, 1))
    return first, per_token


def _served(
    rounds: dict[str, list[dict[str, Any]]],
    seen: dict[str, tuple[np.ndarray, np.ndarray]],
    policy: str,
) -> Served:
    own, (first, per_token) = rounds[policy], seen[policy]
    intervals: dict[str, Interval] = {}

    def middle(name: str, ratios: np.ndarray) -> float | None:
        """Median over requests of the median over rounds; None where no request has one."""
        by_request = np.nanmedian(ratios[:, np.isfinite(ratios).any(axis=0)], axis=0)
        if not len(by_request):
            return None
        intervals[name] = _interval(by_request, np.median)
        return float(np.median(by_request))

    throughput = first_token = speedup = None
    if BASELINE in rounds:
        base_first, base_per_token = seen[BASELINE]
        first_token = middle("first_token_over_ar", first / base_first)
        speedup = middle("speedup", base_per_token / per_token)
        pairs = zip(own, rounds[BASELINE], strict=True)
        logs = np.log([a["output_throughput"] / b["output_throughput"] for a, b in pairs])
        if len(logs) >= MIN_ROUNDS:
            low, high = np.exp(_interval(logs, np.mean))
            intervals["throughput_over_ar"] = float(low), float(high)
        throughput = float(np.exp(logs.mean()))
    return Served(
        requests=sum(each["completed"] for each in own),
        failed=sum(each["failed"] for each in own),
        output_tokens=sum(each["total_output_tokens"] for each in own),
        output_tokens_per_second=float(np.median([each["output_throughput"] for each in own])),
        first_token_seconds=float(np.nanmedian(first)),
        token_seconds=float(np.nanmedian(per_token)) if np.isfinite(per_token).any() else None,
        throughput_over_ar=throughput,
        first_token_over_ar=first_token,
        speedup=speedup,
        intervals=intervals,
    )


def _interval(values: np.ndarray, mean: Callable[..., Any]) -> Interval:
    draws = np.random.default_rng(0).integers(0, len(values), (_NUM_DRAWS, len(values)))
    low, high = np.percentile(mean(values[draws], axis=1), [2.5, 97.5])
    return float(low), float(high)


def shown(policy: str, served: Served) -> list[str]:
    """A row of the table: the policy, and how many requests failed where some did; ratios to ar with their intervals, a
    dash where there is none."""
    failed = f" ({served.failed} failed)" if served.failed else ""
    names = ("throughput_over_ar", "first_token_over_ar", "speedup")
    return [policy + failed, *(_figure(getattr(served, name), served.intervals.get(name)) for name in names)]


def _table(report: ServedReport) -> Table:
    settings = report.settings
    title = f"{settings.samples} requests ({settings.task}) in each of {settings.rounds} rounds, {settings.dtype}"
    headings = "at once", "policy", "throughput over ar", "time to first token over ar", "decode speed over ar"
    table = Table(*headings, title=title)
    for at_once, servers in report.loads.items():
        for policy, served in servers.items():
            table.add_row(str(at_once), *shown(policy, served))
    return table


def _figure(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if interval is None else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
