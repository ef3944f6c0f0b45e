"""`lvspec bench-growth`: what a step costs with drafts and without, by length of video and answer, batch size and K.

What is accepted is measured where the bundled pair knows what it says: on captions of videos of the kind that it was
trained with. What a step costs does not hang on what is said, so that it can be measured over videos and answers of any
length, at the cost of targets and drafters of any shape. All lengths of drafts take turns, every few steps, within one
answer, so that they share the machine's good and bad minutes, and every prompt is read only once.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing import active_children, get_context
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from vllm_lvspec.bench.command import LARGEST_BLOCK, BenchError, environment, kv_cache_bytes
from vllm_lvspec.bench.lengths import SteeredDrafter, answer, give_shape, ratios
from vllm_lvspec.bench.results import Environment, Interval, StrictModel
from vllm_lvspec.bench.run import has_plugin, prompt_writer, running_engine, turned, within_reach
from vllm_lvspec.bench.samples import Sample, Video, videofacts
from vllm_lvspec.bench.videofacts.scene import video_item
from vllm_lvspec.config import MAX_SPECULATIVE_TOKENS, METHOD
from vllm_lvspec.reference import PAIRS
from vllm_lvspec.reference.upscale import TEXT_SHAPES, TextShape, text_shape, upscaled

logger = logging.getLogger("vllm.lvspec")

Result = TypeVar("Result")

MEASURED_STEPS = 4  # that follow each other with drafts of one length, behind one that counts for neither
TRACED_STEPS = 3  # likewise
STEP_TOKENS = 8192  # that vLLM schedules by itself on large GPUs
STEP_TOKENS_ON_CPUS = 4096
CYCLES = 5  # times that all lengths have their turn
CAPTION_TOKENS = 256  # at most, as `answer` asks for
_QUESTION_TOKENS = 64  # by which questions may differ in length


class Accepted(StrictModel):
    """Captions with drafts of K tokens, with 95 % bootstrap intervals over videos."""

    tokens_per_step: float = Field(description="T: tokens per target step, first tokens apart")
    tokens_per_step_interval: Interval
    speedup: float = Field(description="decode speed over that of the same engine without drafts, as it was measured")
    speedup_interval: Interval


class StepCost(StrictModel):
    """A step with drafts of K tokens, or without."""

    seconds: float = Field(description="median over turns of the mean of a turn's steps")
    over_none: float = Field(
        description="1 + K c + o: geometric mean over turns of the seconds over those of the turn without drafts"
    )
    over_none_interval: Interval = Field(description="95 % bootstrap over turns")
    speedup: float | None = Field(
        description="T / (1 + K c + o), of the decode speed without drafts; null without drafts"
    )
    speedup_over_alone: float | None = Field(
        description="the same over vLLM's own engine without this package, which ran at another time; null without it"
    )


class Point(StrictModel):
    """One length of video and answer, and one number of requests."""

    video: str = Field(description="frames x height x width, in pixels")
    prompt_tokens: int = Field(description="of each request; all but the question's few are visual")
    output_tokens: int = Field(description="of the shortest answer, at least, when the steps were measured")
    said_tokens: float = Field(description="of an answer on average over these steps")
    batch_size: int = Field(description="requests that all decode")
    alone_seconds: float | None = Field(description="of a step of vLLM's own engine; null where it was not asked")
    draft_prompt_seconds: float | None = Field(
        description="the drafter's for its view of a request's prompt; null for answers measured further on"
    )
    prompt_seconds: float | None = Field(
        description="from a request's arrival to its first token with the drafter's prompt; null likewise, and for "
        "several requests"
    )
    alone_prompt_seconds: float | None = Field(
        None, description="the same by vLLM's own engine; null likewise, and where it was not asked"
    )
    steps: dict[int, StepCost] = Field(description="by K; 0: without drafts")


class Measured(StrictModel):
    """One target with one drafter."""

    target: str = Field(description="shape, and quantisation behind a colon")
    drafter: str = Field(description="likewise; `own`: the bundled drafter as it is")
    draft_gib: float = Field(description="the drafter's weights per rank, as loaded")
    draft_graphs: bool | None = Field(
        None, description="whether the drafter's steps were CUDA graphs; null where that was not looked at"
    )
    token_seconds: dict[str, list[float]] | None = Field(
        None,
        description="of a drafted token behind 1,024 and 16,384 others, or as many as there may be, by whose layers; "
        "null where there is no choice",
    )
    draft_layers: str | None = Field(None, description="whose single tokens go through: `vLLM` or `lvspec`")
    accepted: dict[int, Accepted] = Field(description="by K")
    points: list[Point]

    @property
    def name(self) -> str:
        return f"{self.target} ← {self.drafter}"


class GrowthSettings(StrictModel):
    """What was asked for."""

    title: str | None = Field(description="what the run shows")
    family: str = Field(description="bundled pair")
    policy: str = Field(description="of the verifier, for what is accepted")
    dtype: str
    spec_tokens: list[int] = Field(description="values of K")
    samples: int = Field(description="captions whose drafts were counted")
    seed: int = Field(description="of their scenes")
    engine: dict[str, Any] = Field(description="more arguments of vLLM's engine")
    alone: bool = Field(description="whether vLLM's own engine was measured, too")
    vocabulary: int | None = Field(None, description="tokens that larger shapes know; null: the bundled pair's")


class GrowthReport(StrictModel):
    """The whole file."""

    environment: Environment
    settings: GrowthSettings
    measured: list[Measured]


class Model(NamedTuple):
    """What a text model costs: `32b`, `72b:mxfp4`, `own`."""

    shape: str | None
    quantization: str | None

    def __str__(self) -> str:
        return (self.shape or "own") + (f":{self.quantization}" if self.quantization else "")

    @classmethod
    def parse(cls, key: str, text: str) -> Model:
        """Raises BenchError, which names the option `key`."""
        shape, _, quantization = text.partition(":")
        if shape != "own" and shape not in TEXT_SHAPES:
            shapes = ", ".join(TEXT_SHAPES)
            raise BenchError(f"{key}={text!r}: must be own or one of {shapes}, maybe with :mxfp4 or the like behind")
        return cls(None if shape == "own" else shape, quantization or None)


class Size(NamedTuple):
    """A video's, in frames and pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """Raises BenchError."""
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
            raise BenchError(f"videos={text!r}: must be frames x height x width, like 64x448x672")
        return cls(*map(int, parts))


@dataclass(frozen=True)
class GrowthOptions:
    """What to measure. `videos`, `batch_sizes` and `output_tokens` are gone through one at a time, from the first of
    each."""

    json_path: Path
    title: str | None = None
    family: str = "qwen2_5_vl"
    policy: str = "lvspec"
    targets: Sequence[Model] = (Model("0.5b", None),)
    drafters: Sequence[Model] = (Model(None, None),)
    spec_tokens: Sequence[int] = (10,)
    videos: Sequence[Size] = (Size(24, 112, 112),)
    batch_sizes: Sequence[int] = (1,)
    output_tokens: Sequence[int] = (16,)
    samples: int = 8
    seed: int = 1
    dtype: str = "float32"
    engine_arguments: dict[str, Any] = field(default_factory=dict)
    alone: bool = True
    minutes: float | None = None
    vocabulary: int | None = None
    traces: Path | None = None

    def shape(self, name: str) -> TextShape:
        """That of a larger text model."""
        return replace(TEXT_SHAPES[name], vocab_size=self.vocabulary)


class _Alone(NamedTuple):
    """Of vLLM's own engine: seconds of a step, and to the first token of a single request."""

    step_seconds: float
    prompt_seconds: float


@dataclass(frozen=True)
class _Place:
    """Where steps are measured: at one video and batch size, at some lengths of the answer (ascending)."""

    video: Size
    batch_size: int
    output_tokens: tuple[int, ...]


def run_growth(options: GrowthOptions, console: Console, command: Sequence[str] = ()) -> GrowthReport:
    """Measure, write JSON and plots, show a table. Raises ValueError for an option that can't work.

    File and plots are written anew behind every engine; once `minutes` have passed, no further one is started. Where
    one fails, the others are measured before that is raised.
    """
    _check(options)
    here = environment(command)
    report = GrowthReport(
        environment=here,
        settings=GrowthSettings(
            title=options.title,
            family=options.family,
            policy=options.policy,
            dtype=options.dtype,
            spec_tokens=list(options.spec_tokens),
            samples=options.samples,
            seed=options.seed,
            engine=options.engine_arguments,
            alone=options.alone,
            vocabulary=options.vocabulary,
        ),
        measured=[],
    )
    options.json_path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    failed: list[str] = []

    def is_over() -> bool:
        passed = time.perf_counter() - started
        return bool(report.measured) and options.minutes is not None and passed > 60 * options.minutes

    def attempt(name: str, measure: Callable[..., Result], *arguments: Any) -> Result | None:
        try:
            return _in_own_process(measure, options, *arguments)
        except Exception as error:  # whatever one model can't do
            failed.append(f"{name}: {' '.join(str(error).split()) or type(error).__name__}")
            console.print(failed[-1], markup=False)
            return None

    for target in options.targets:
        alone: dict[tuple[Size, int, int], _Alone] = {}
        for number, drafter in enumerate(options.drafters):
            if options.alone and number == 0 and not is_over():
                name = f"{target}: vLLM without this package"
                console.print(f"{name} ...")
                alone = attempt(name, _measure_alone, target) or {}
            name = f"{target} ← {drafter}"
            if is_over():
                console.print(f"{name}: left out, because {options.minutes:g} minutes have passed")
                continue
            console.print(f"{name} ...")
            if (measured := attempt(name, _measure, target, drafter, alone)) is None:
                continue
            report.measured.append(measured)
            options.json_path.write_text(report.model_dump_json(indent=1) + "\n")
            plot(report, options.json_path.with_suffix(".png"))
            console.print(*tables(measured), sep="\n")
    if report.measured:
        console.print(f"written: {options.json_path}, {options.json_path.with_suffix('.png')}")
    if failed:
        raise BenchError(f"not measured: {'; '.join(failed)}")
    return report


def _check(options: GrowthOptions) -> None:
    if options.json_path.suffix != ".json":
        raise BenchError(f"json={str(options.json_path)!r}: must end in .json; plots go beside it")
    if options.family not in PAIRS:
        raise BenchError(f"family={options.family!r}: must be one of {', '.join(PAIRS)}")
    for key in ("spec_tokens", "batch_sizes", "output_tokens"):
        values = getattr(options, key)
        if not values or min(values) < 1 or len(set(values)) < len(values):
            raise BenchError(f"{key}={','.join(map(str, values))!r}: must be one or more, each 1 or more, each once")
    if len(set(options.videos)) < len(options.videos):
        raise BenchError(f"videos={','.join(map(str, options.videos))!r}: must be one or more, each once")
    if max(options.spec_tokens) > MAX_SPECULATIVE_TOKENS:
        raise BenchError(f"spec_tokens={max(options.spec_tokens)}: must be at most {MAX_SPECULATIVE_TOKENS}")
    if options.vocabulary is not None:
        least = AutoConfig.from_pretrained(PAIRS[options.family].target).get_text_config().vocab_size
        if options.vocabulary < least:
            raise BenchError(f"vocabulary={options.vocabulary}: must be {least}, the bundled pair's, or more")
    if options.samples < 2:
        raise BenchError(f"samples={options.samples}: must be 2 or more; an interval is made over them")


def _places(options: GrowthOptions) -> Iterator[_Place]:
    first = (min(options.output_tokens),)
    yield _Place(options.videos[0], 1, tuple(sorted(options.output_tokens)))
    for video in options.videos[1:]:
        yield _Place(video, 1, first)
    for batch_size in options.batch_sizes:
        if batch_size > 1:
            yield _Place(options.videos[0], batch_size, first)


# Engines -------------------------------------------------------------------------------------------------------------


def _arguments(options: GrowthOptions, target: Model) -> tuple[str, dict[str, Any], int]:
    """Model, arguments of its engine, and requests at once."""
    from vllm.platforms import current_platform

    path = str(PAIRS[options.family].target)
    budget = max(options.output_tokens) + _steps_of_a_place(options) * (1 + max(options.spec_tokens))
    captions = _num_prompt_tokens(options.family, options.seed, None) + _QUESTION_TOKENS + CAPTION_TOKENS
    lengths = {
        place: _num_prompt_tokens(options.family, options.seed, place.video) + _QUESTION_TOKENS + budget
        for place in _places(options)
    }
    longest = max(captions, *lengths.values())
    arguments: dict[str, Any] = {"dtype": options.dtype, "max_model_len": longest}
    # A video is encoded in one step, for which vLLM has no more room by itself.
    if longest > (STEP_TOKENS_ON_CPUS if current_platform.is_cpu() else STEP_TOKENS):
        arguments["max_num_batched_tokens"] = longest
    shape = text_shape(AutoConfig.from_pretrained(path))
    if target.shape is not None:
        shape = options.shape(target.shape)
        arguments |= upscaled(path, shape)
        path = arguments.pop("model")
    if target.quantization is not None:
        arguments["quantization"] = target.quantization
    most = max(place.batch_size for place in lengths)
    # As if it were one request with the tokens of all.
    together = max(place.batch_size * (length + 2 * LARGEST_BLOCK) for place, length in lengths.items())
    arguments["kv_cache_memory_bytes"] = kv_cache_bytes(shape, options.dtype, together, 1)
    return path, {**arguments, **options.engine_arguments}, most


@cache
def _num_prompt_tokens(family: str, seed: int, size: Size | None) -> int:
    """Of a question about a video of this size, or of the suite's, by the checkpoint's own processor."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(str(PAIRS[family].target))
    (sample,) = videofacts(1, seed, ("caption",), PAIRS[family].num_frames)
    content = [{"type": "video"}, {"type": "text", "text": sample.question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    frames = sample.load_video()[0] if size is None else np.zeros((*size, 3), np.uint8)
    return len(processor(text=[text], videos=[frames])["input_ids"][0])


def _steps_of_a_place(options: GrowthOptions) -> int:
    return (MEASURED_STEPS + 1) * CYCLES * (1 + len(options.spec_tokens)) * len(options.output_tokens) + 1


def _measure_alone(options: GrowthOptions, target: Model) -> dict[tuple[Size, int, int], _Alone]:
    """Of vLLM's own engine, with the runner and the scheduler that it has by default."""
    model, arguments, most = _arguments(options, target)
    found = {}
    with running_engine(model, None, most, arguments) as llm:
        for place in _places(options):
            walked = _walk(llm, place, options, None)
            for mark, (_, turns) in walked.marks.items():
                found[place.video, place.batch_size, mark] = _Alone(float(np.median(turns[0])), walked.prompt_seconds)
        _trace(llm, options, None, f"{target}")
    return found


def _measure(
    options: GrowthOptions, target: Model, drafter: Model, alone: dict[tuple[Size, int, int], _Alone]
) -> Measured:
    from vllm.platforms import current_platform

    model, arguments, most = _arguments(options, target)
    draft = str(PAIRS[options.family].draft)
    config: dict[str, Any] = {
        "method": METHOD, "model": draft, "policy": options.policy, "only_if_faster": False,
        "num_speculative_tokens": max(options.spec_tokens), "draft_quantization": drafter.quantization,
    }  # fmt: skip
    if current_platform.is_cuda_alike() and len(options.spec_tokens) > 1:
        config["draft_length"] = "adaptive"  # under which a request's drafts of any length have a CUDA graph
    if drafter.shape is not None:
        give_shape(options.shape(drafter.shape), config, arguments)
    with running_engine(model, config, most, arguments) as llm:
        steered = SteeredDrafter(llm)
        payoff = steered.drafter.payoff
        payoff.is_adaptive, payoff.costs = False, None
        accepted = _accepted(llm, steered, options)
        # What is left of drafts hangs on what is said, which further on means nothing.
        payoff.recalls = False
        points = []
        for place in _places(options):
            walked = _walk(llm, place, options, steered)
            for number, (mark, (said, turns)) in enumerate(walked.marks.items()):
                by_itself = alone.get((place.video, place.batch_size, mark))
                seconds = None if by_itself is None else by_itself.step_seconds
                is_first = number == 0 and place.batch_size == 1
                points.append(
                    Point(
                        video=str(place.video),
                        prompt_tokens=walked.prompt_tokens,
                        output_tokens=mark,
                        said_tokens=said,
                        batch_size=place.batch_size,
                        alone_seconds=seconds,
                        draft_prompt_seconds=walked.draft_seconds if number == 0 else None,
                        prompt_seconds=walked.prompt_seconds if is_first else None,
                        alone_prompt_seconds=by_itself.prompt_seconds if is_first and by_itself else None,
                        steps=_step_costs(turns, accepted, seconds),
                    )
                )
        _trace(llm, options, steered, f"{target}-{drafter}")
        return Measured(
            target=str(target),
            drafter=str(drafter),
            draft_gib=steered.drafter.model.num_weight_bytes / 2**30,
            draft_graphs=steered.drafter.model.graphs is not None,
            token_seconds=steered.drafter.model.token_seconds,
            draft_layers="vLLM" if steered.drafter.model.one_token is None else "lvspec",
            accepted=accepted,
            points=points,
        )


def _in_own_process(measure: Callable[..., Result], *arguments: Any) -> Result:
    """What vLLM keeps of an engine, on a GPU most of its memory, is gone when the next one starts."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_sent, measure, *arguments).result()
        except KeyboardInterrupt:  # of which the other process may not have heard
            for process in active_children():
                process.terminate()
            raise


def _sent(measure: Callable[..., Result], *arguments: Any) -> Result:
    try:
        with within_reach():
            return measure(*arguments)
    except ValidationError as error:  # which can't be sent to another process
        raise BenchError(" ".join(str(error).split())) from None


# What is measured ----------------------------------------------------------------------------------------------------


def _accepted(llm: Any, steered: SteeredDrafter, options: GrowthOptions) -> dict[int, Accepted]:
    """Captions in every length of drafts and without, in turn; the first of all is not counted."""
    num_frames = PAIRS[options.family].num_frames
    samples = videofacts(1 + options.samples, options.seed, ("caption",), num_frames=num_frames)
    write = prompt_writer(llm)
    found = defaultdict(list)
    lengths = [0, *options.spec_tokens]
    for number, sample in enumerate(samples):
        inputs = write(sample)
        for length in map(int, turned([str(length) for length in lengths], number)):
            steered.set_length(length)
            measured = answer(llm.llm_engine, [f"{sample.name}-{length}"], [inputs])
            if number:
                found[length].append(measured)
    speeds = {length: np.array([m.decoded / m.decode_seconds for m in each]) for length, each in found.items()}
    return {
        length: Accepted(
            **_with_interval("tokens_per_step", [(m.decoded, m.steps) for m in found[length]]),
            **dict(zip(("speedup", "speedup_interval"), _split(ratios(speeds[length], speeds[0])), strict=True)),
        )
        for length in options.spec_tokens
    }


def _split(found: tuple[float, float, float]) -> tuple[float, Interval]:
    return found[0], (found[1], found[2])


def _with_interval(name: str, parts: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Ratio of sums, and its 95 % bootstrap interval."""
    above, below = np.array(parts, dtype=float).T
    rows = np.random.default_rng(0).integers(0, len(above), (2000, len(above)))
    low, high = np.percentile(above[rows].sum(1) / below[rows].sum(1), [2.5, 97.5])
    return {name: float(above.sum() / below.sum()), f"{name}_interval": (float(low), float(high))}


@dataclass(frozen=True)
class _Walked:
    """`marks`: by the answer's least length its mean length, and seconds per step of every turn by length of drafts."""

    prompt_tokens: int
    prompt_seconds: float
    draft_seconds: float | None
    marks: dict[int, tuple[float, dict[int, list[float]]]]


def _walk(llm: Any, place: _Place, options: GrowthOptions, steered: SteeredDrafter | None) -> _Walked:
    """Answers without end, with drafts as long as can be from mark to mark, where all lengths have their turns."""
    core = llm.llm_engine
    lengths = [0] if steered is None else [0, *options.spec_tokens]

    def set_length(length: int) -> None:
        if steered is not None:
            steered.set_length(length)

    def count_drafted() -> int:
        return 0 if steered is None else steered.drafter.counts["drafted_tokens"]

    inputs = _prompts(llm, place, options)
    before = _draft_seconds(llm)
    set_length(max(lengths))
    started = time.perf_counter()
    names = _ask(core, inputs)
    told: dict[str, int] = {}
    prompt_tokens = 0

    def step() -> None:
        nonlocal prompt_tokens
        while not (outputs := core.step()):  # vLLM's own engine schedules a step ahead, and reports nothing at first
            pass
        for output in outputs:
            if output.finished:
                raise BenchError(
                    f"{place.video}, {place.batch_size} at once: an answer ended; max_model_len must be more"
                )
            told[output.request_id] = len(output.outputs[0].token_ids)
            prompt_tokens = len(output.prompt_token_ids)

    while len(told) < len(names):
        step()
    if steered is not None:  # the device may still be at the drafter's part
        llm.collective_rpc(_finish_drafts)
    prompt_seconds = time.perf_counter() - started
    marks: dict[int, tuple[float, dict[int, list[float]]]] = {}
    for mark in place.output_tokens:
        set_length(max(lengths))
        while min(told.values()) < mark:
            step()
        turns: dict[int, list[float]] = defaultdict(list)
        begin = sum(told.values())
        for cycle in range(CYCLES):
            for length in map(int, turned([str(length) for length in lengths], cycle)):
                set_length(length)
                step()  # verifies what was drafted before
                drafted = count_drafted()
                begun = time.perf_counter()
                for _ in range(MEASURED_STEPS):
                    step()
                turns[length].append((time.perf_counter() - begun) / MEASURED_STEPS)
                if count_drafted() - drafted != MEASURED_STEPS * length * len(names):
                    raise BenchError(
                        f"{place.video}, {place.batch_size} at once: not all requests had drafts of {length} tokens; "
                        "there must be room for all in the drafter's cache"
                    )
        marks[mark] = (begin + sum(told.values())) / 2 / len(names), dict(turns)
    after = _draft_seconds(llm)
    _end(core, names)
    drafting = None if before is None or after is None else (after - before) / len(names)
    return _Walked(prompt_tokens, prompt_seconds, drafting, marks)


def _prompts(llm: Any, place: _Place, options: GrowthOptions) -> list[dict[str, Any]]:
    write = prompt_writer(llm)
    samples = videofacts(place.batch_size, options.seed + 1, ("caption",))
    return [write(replace(sample, load_video=partial(_sized, sample, place.video))) for sample in samples]


def _ask(core: Any, prompts: Sequence[dict[str, Any]]) -> list[str]:
    """For answers without end; the requests' names."""
    from vllm import SamplingParams

    names = [f"growth-{i}" for i in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        room = core.model_config.max_model_len
        core.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=room, ignore_eos=True))
    return names


def _end(core: Any, names: list[str]) -> None:
    core.abort_request(names)
    while core.has_unfinished_requests():
        core.step()


def _trace(llm: Any, options: GrowthOptions, steered: SteeredDrafter | None, name: str) -> None:
    """Where traces are asked for: one for Perfetto and for `bench.kernel_times`."""
    if options.traces is None:
        return
    try:
        options.traces.mkdir(parents=True, exist_ok=True)
        _trace_steps(llm, options, steered, options.traces / f"{name}.json.gz")
    except Exception as error:  # whatever a profiler can't do: all has been measured, and must not be lost
        logger.warning("lvspec: no trace of %s: %r", name, error)


def _trace_steps(llm: Any, options: GrowthOptions, steered: SteeredDrafter | None, path: Path) -> None:
    """A few steps of a request about the first video, with drafts of each length and without, as PyTorch's profiler
    sees them."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    core = llm.llm_engine
    lengths = [0] if steered is None else [0, *options.spec_tokens]
    names = _ask(core, _prompts(llm, next(_places(options)), options))
    while not core.step():  # vLLM's own engine schedules a step ahead, and reports nothing at first
        pass
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as traced:
        for length in lengths:
            if steered is not None:
                steered.set_length(length)
            for number in range(1 + TRACED_STEPS):
                with record_function(f"K {length}, step {number}"):  # the first one verifies what was drafted before
                    core.step()
    _end(core, names)
    traced.export_chrome_trace(str(path))


def _sized(sample: Sample, size: Size) -> Video:
    """The sample's video in `size`: frames repeated or left out, pixels likewise."""
    frames, _ = sample.load_video()
    picks = [np.arange(new) * old // new for new, old in zip(size, frames.shape, strict=False)]
    return video_item(frames[np.ix_(*picks)])


def _finish_drafts(worker: Any) -> None:
    worker.model_runner.drafter.finish()


def _draft_seconds(llm: Any) -> float | None:
    """The drafter's over all prompts; None without one."""
    if not has_plugin(llm):
        return None
    return llm.collective_rpc("lvspec_step_times")[0]["prefill_seconds"]


def _step_costs(
    turns: dict[int, list[float]], accepted: dict[int, Accepted], alone: float | None
) -> dict[int, StepCost]:
    costs = {}
    none = np.array(turns[0])
    for length, seconds in turns.items():
        over, interval = _split(ratios(np.array(seconds), none))
        per_step = accepted[length].tokens_per_step if length else 1.0
        costs[length] = StepCost(
            seconds=float(np.median(seconds)),
            over_none=over,
            over_none_interval=interval,
            speedup=per_step / over if length else None,
            speedup_over_alone=None if alone is None else per_step * alone / float(np.median(seconds)),
        )
    return dict(sorted(costs.items()))


# What is shown -------------------------------------------------------------------------------------------------------


def tables(measured: Measured) -> list[Table]:
    """What was accepted, and what steps cost."""
    accepted = Table("K", "tokens per step", "decode speed over no drafts", title=f"{measured.name}: captions")
    for length, row in accepted_rows(measured).items():
        accepted.add_row(str(length), *row)
    costs = Table(*COST_HEADINGS, title=f"{measured.name}: steps")
    for row in cost_rows(measured):
        costs.add_row(*row)
    return [accepted, costs]


COST_HEADINGS = ("prompt", "output", "batch", "K", "step over one without drafts", "T over it", "over vLLM alone")


def accepted_rows(measured: Measured) -> dict[int, list[str]]:
    """By K: tokens per step and speed, with intervals."""
    return {
        length: [
            _figure(seen.tokens_per_step, seen.tokens_per_step_interval),
            _figure(seen.speedup, seen.speedup_interval),
        ]
        for length, seen in measured.accepted.items()
    }


def cost_rows(measured: Measured) -> list[list[str]]:
    """A row for each point and K, under `COST_HEADINGS`."""
    rows = []
    for point in measured.points:
        for length, cost in point.steps.items():
            if not length:
                continue
            over_alone = "–" if cost.speedup_over_alone is None else f"{cost.speedup_over_alone:.2f}"
            rows.append(
                [
                    *map(str, (point.prompt_tokens, round(point.said_tokens), point.batch_size, length)),
                    _figure(cost.over_none, cost.over_none_interval),
                    f"{cost.speedup:.2f}",
                    over_alone,
                ]
            )
    return rows


def _figure(value: float, interval: Interval) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


# What is gone through, and what its places are labelled with.
_PANELS = (
    ("video", "prompt_tokens", "tokens of the prompt"),
    ("batch_size", "batch_size", "requests"),
    ("output_tokens", "said_tokens", "tokens said"),
)


def plot(report: GrowthReport, path: Path) -> None:
    """T / (1 + K c + o) over what was gone through, a line for each K, and over K, as a PNG; a row for each engine."""
    import matplotlib
    import torch

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(report.measured)
    figure, axes = pyplot.subplots(count, 4, figsize=(15, 3.2 * count), layout="constrained", squeeze=False)
    for row, measured in zip(axes, report.measured, strict=True):
        first = measured.points[0]
        # On GPUs steps without drafts run faster in vLLM's own engine, whose full CUDA graphs are made for them.
        knows_alone = all(point.alone_seconds is not None for point in measured.points)
        over = "speedup_over_alone" if torch.cuda.is_available() and knows_alone else "speedup"
        for axis, (gone_through, key, label) in zip(row, _PANELS, strict=False):
            fixed = [name for name, *_ in _PANELS if name != gone_through]
            points = [p for p in measured.points if all(getattr(p, name) == getattr(first, name) for name in fixed)]
            points.sort(key=attrgetter(key))
            for length in measured.accepted:
                places = [getattr(point, key) for point in points]
                axis.plot(places, [getattr(point.steps[length], over) for point in points], "o-", label=f"K = {length}")
            axis.set_xscale("log", base=2)
            axis.set_xticks(places, [f"{place:.0f}" for place in places])
            axis.set_xlabel(label, fontsize="small")
        lengths = sorted(measured.accepted)
        row[3].plot(
            lengths, [getattr(first.steps[length], over) for length in lengths], "o-", label="T / (1 + K c + o)"
        )
        seen = [measured.accepted[length] for length in lengths]
        errors = np.array([[s.speedup - s.speedup_interval[0], s.speedup_interval[1] - s.speedup] for s in seen]).T
        row[3].errorbar(
            lengths,
            [s.speedup for s in seen],
            np.maximum(errors, 0),
            fmt="s",
            capsize=2,
            label="captions, over no drafts",
        )
        row[3].set_xlabel("K", fontsize="small")
        row[3].set_xticks(lengths)
        for axis in row:
            axis.axhline(1, color="grey", linewidth=0.8, zorder=0)
            axis.set_ylim(bottom=0)
        without = "no drafts" if over == "speedup" else "vLLM alone"
        row[0].set_ylabel(f"{measured.name}\nspeed over {without}", fontsize="small")
        row[0].legend(fontsize="x-small")
        row[3].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
