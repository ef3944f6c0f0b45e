"""Runs peers in turn on the same questions, and keeps every answer, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_lvspec.bench.peers import DraftSettings, speculative_config
from vllm_lvspec.bench.samples import Sample

NUM_WARM_UP = 2  # first requests of an engine are slower; these are asked and forgotten
_WARM_UP_TOKENS = 32
NUM_PROFILED = 8  # questions, or as many as run at once, that are asked again for a profile
PREPARED_BYTES = 1 << 30  # of frames that are read before questions about them are asked


@dataclass(frozen=True)
class Answer:
    """What one peer said to one sample, and what it took.

    `steps`: target steps after the one that gave the first token. Seconds count from the request's arrival. `reasons`:
    how many tokens were emitted for which reason, None where the plugin is not in it.
    """

    policy: str
    sample: str
    token_ids: list[int]
    text: str
    steps: int
    first_token_seconds: float
    last_token_seconds: float
    finish_reason: str
    wall_seconds: float  # since the answer before it, of any request
    reasons: dict[str, int] | None = None


@dataclass(frozen=True)
class StepTimes:
    """Seconds on the first rank, over steps in which nothing was prefilled."""

    steps: float = 0
    target_seconds: float = 0.0  # forward and verification
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0  # part of target_seconds: what verification does beyond vLLM's own test
    requests: float = 0  # of all these steps
    drafted_tokens: float = 0
    prefill_seconds: float = 0.0  # of the drafter over all prompts
    scoring_seconds: float = 0.0  # of the target over all prompts, where the strategy asks it
    prompts: float = 0


# Of each kind of step (`decode`, `prompt`): how many there were (`steps`), and seconds of each part (`seconds`).
StepParts = dict[str, dict[str, Any]]


@dataclass
class PolicyRun:
    """`times`, `relevance`: of the part that was run to its end; None where the plugin is not in it.

    `relevance`: how many drafted tokens had which relevance, in even steps from -1 to 1, and how many had none.
    `profile`: of some questions that were asked again.
    """

    answers: list[Answer]
    times: StepTimes | None
    relevance: list[int] | None = None
    profile: StepParts | None = None

    @property
    def wall_seconds(self) -> float:
        """Of answering, engine start and warm-up apart."""
        return sum(answer.wall_seconds for answer in self.answers)


class JournalError(ValueError):
    """Answers of a stopped run that was another one."""


class Journal:
    """Answers and times in a file, one a line; its first line says for which settings.

    `times`: those of the part that was run to its end, where a run was stopped in between. Raises JournalError, which
    names the settings that differ, where the file holds answers to other ones.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.answers: dict[str, dict[str, Answer]] = defaultdict(dict)
        self.times: dict[str, dict[str, float]] = {}
        self.relevance: dict[str, list[int]] = {}
        self.profiles: dict[str, StepParts | None] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        try:
            before = json.loads(lines[0]) if lines else settings
        except json.JSONDecodeError:
            before = None
        if not isinstance(before, dict):
            raise JournalError(f"{path}: must be a stopped run's answers; it is another file")
        if len(lines) > 1 and before != settings:
            keys = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
            differing = "; ".join(f"{key}={settings.get(key)!r}, there {before.get(key)!r}" for key in keys)
            raise JournalError(
                f"{path}: {len(lines) - 1} answers of a stopped run with other settings: {differing}. Repeat that run, "
                "choose another json, or throw them away with restart"
            )
        kept = [json.dumps(settings)]
        for line in lines[1:]:
            try:
                self._take(json.loads(line))
            except (ValueError, TypeError, KeyError):
                break  # the last line of a run that was killed
            kept.append(line)
        self.resumed = len(kept) > 1
        path.write_text("\n".join(kept) + "\n")

    def add(self, entry: dict[str, Any]) -> None:
        """Take and write an answer or a policy's times."""
        self._take(entry)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _take(self, entry: dict[str, Any]) -> None:
        if "profile" in entry:
            self.profiles[entry["policy"]] = entry["profile"]
        elif "sample" in entry:
            self.answers[entry["policy"]][entry["sample"]] = Answer(**entry)
        else:
            self.times[entry["policy"]] = entry["times"]
            self.relevance[entry["policy"]] = entry["relevance"]


def run_policies(
    policies: Sequence[str],
    samples: Sequence[Sample],
    model: str,
    draft: DraftSettings,
    batch_size: int,
    max_tokens: int,
    min_tokens: int,
    engine_arguments: dict[str, Any],
    journal: Journal,
    on_start: Callable[[str], None] = lambda policy: None,
    on_answer: Callable[[str], None] = lambda policy: None,
    side_by_side: bool = False,
    repeats: int = 1,
    with_profile: bool = False,
) -> dict[str, PolicyRun]:
    """Ask all `samples` of every policy, one engine after another, or of all engines in turn (`side_by_side`).

    Each group of questions that are asked together is asked `repeats` times, of which the one of median time is kept.
    `with_profile`: then some are asked again.
    """
    # vLLM 0.32 starts no engine for CPUs in a process in which there were n-gram drafts: theirs is the last.
    starting = sorted(policies, key=lambda policy: policy.partition(":")[0] == "ngram")
    for together in [starting] if side_by_side else [[policy] for policy in starting]:
        with ExitStack() as stack:
            engines = {}
            for policy in together:
                for _ in journal.answers[policy]:
                    on_answer(policy)
                is_answered = len(journal.answers[policy]) == len(samples)
                if not is_answered or (with_profile and policy not in journal.profiles):
                    on_start(policy)
                    running = running_engine(model, speculative_config(policy, draft), batch_size, engine_arguments)
                    llm = stack.enter_context(running)
                    engines[policy] = _Engine(llm, prompt_writer(llm), batch_size, max_tokens, min_tokens)
                    engines[policy].warm_up(samples)
            asked = [policy for policy in engines if len(journal.answers[policy]) < len(samples)]
            before = {policy: _counters(engines[policy].llm) for policy in asked}
            num_asked = {policy: repeats * (len(samples) - len(journal.answers[policy])) for policy in asked}
            size = batch_size if side_by_side or repeats > 1 else len(samples)
            for number, group in enumerate(batched(samples, size)):
                for policy in turned(asked, number):
                    waiting = [sample for sample in group if sample.name not in journal.answers[policy]]
                    for answer in engines[policy].ask(policy, waiting, repeats):
                        journal.add(asdict(answer))
                        on_answer(policy)
            for policy in asked:
                if (then := before[policy]) is not None and (now := _counters(engines[policy].llm)) is not None:
                    times = {k: v - then[0][k] for k, v in now[0].items()} | {"prompts": num_asked[policy]}
                    relevance = [b - a for a, b in zip(then[1], now[1], strict=True)]
                    journal.add({"policy": policy, "times": times, "relevance": relevance})
            for policy, engine in engines.items() if with_profile else ():
                profile = engine.profile(samples) if has_plugin(engine.llm) else None
                journal.add({"policy": policy, "profile": profile})
    results = {}
    for policy in policies:
        measured = StepTimes(**journal.times[policy]) if policy in journal.times else None
        answers = [journal.answers[policy][sample.name] for sample in samples]
        results[policy] = PolicyRun(answers, measured, journal.relevance.get(policy), journal.profiles.get(policy))
    return results


def batched(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    """Groups of `size`, the last of what is left."""
    return (samples[i : i + size] for i in range(0, len(samples), size))


def turned(names: Sequence[str], number: int) -> list[str]:
    """In another order for each number, so that nobody is always the first."""
    first = number % max(1, len(names))
    return [*names[first:], *names[:first]]


@dataclass(frozen=True)
class _Engine:
    """One policy's, and how it is asked."""

    llm: Any
    prompt: Callable[[Sample], dict[str, Any]]
    batch_size: int
    max_tokens: int
    min_tokens: int

    def warm_up(self, samples: Sequence[Sample]) -> None:
        chosen = samples[: NUM_WARM_UP * self.batch_size]
        for _ in _ask(self.llm, "", chosen, self.prompt, self.batch_size, _WARM_UP_TOKENS, 0):
            pass

    def ask(self, policy: str, samples: Sequence[Sample], repeats: int = 1) -> Iterator[Answer]:
        """Answers as they come; of several times those of median time, when all have come."""
        how = self.prompt, self.batch_size, self.max_tokens, self.min_tokens
        if repeats == 1:
            yield from _ask(self.llm, policy, samples, *how)
            return
        given = [list(_ask(self.llm, policy, samples, *how)) for _ in range(repeats)]
        given.sort(key=lambda answers: sum(answer.wall_seconds for answer in answers))
        yield from given[repeats // 2]

    def profile(self, samples: Sequence[Sample]) -> StepParts:
        """Of the first rank, while some of `samples` are asked once more."""
        self.llm.collective_rpc("lvspec_start_profile")
        for _ in self.ask("", samples[: max(NUM_PROFILED, self.batch_size)]):
            pass
        return self.llm.collective_rpc("lvspec_stop_profile")[0]


@contextmanager
def within_reach(**variables: str) -> Iterator[None]:
    """Engines that start in here run in this process, with `variables` in its environment, which is then set back.

    Engines that start behind it have processes of their own again: not all that vLLM can run may share one.
    """
    from vllm import envs

    variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    before = {name: os.environ.get(name) for name in variables}
    envs.disable_envs_cache()  # an engine's before, since which vLLM does not look any more
    os.environ.update(variables)
    try:
        yield
    finally:
        envs.disable_envs_cache()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def running_engine(
    model: str, speculative_config: dict[str, Any] | None, batch_size: int, arguments: dict[str, Any]
) -> Iterator[Any]:
    """An engine that keeps nothing of one question for the next, shut down in the end."""
    from vllm import LLM

    llm = LLM(
        model,
        **{
            "max_num_seqs": batch_size,
            "speculative_config": speculative_config,
            # Every answer pays for its own prompt and video.
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0,
            "limit_mm_per_prompt": {"video": 1, "image": 0},
            **arguments,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def prompt_writer(llm: Any) -> Callable[[Sample], dict[str, Any]]:
    """From a sample to vLLM's inputs, by the model's own chat template."""
    from transformers import AutoProcessor

    config = llm.llm_engine.model_config
    processor = AutoProcessor.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)

    def write(sample: Sample) -> dict[str, Any]:
        content = [{"type": "video"}, {"type": "text", "text": sample.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return {"prompt": text, "multi_modal_data": {"video": [sample.load_video()]}}

    return write


def has_plugin(llm: Any) -> bool:
    """Whether an engine has this package's drafter."""
    from vllm_lvspec.engine.arguments import lvspec_settings

    return lvspec_settings(llm.llm_engine.vllm_config) is not None


def _counters(llm: Any) -> tuple[dict[str, float], list[int]] | None:
    """Step times and relevance since the engine's start, or None for an engine without the plugin."""
    if not has_plugin(llm):
        return None
    return llm.collective_rpc("lvspec_step_times")[0], llm.collective_rpc("lvspec_stats")[0]["relevance_counts"]


def _with_reasons(llm: Any, answers: Sequence[Answer]) -> list[Answer]:
    """Of requests that have finished lately. vLLM's own names for them are longer by a dash and some letters."""
    if not answers or not has_plugin(llm):
        return list(answers)
    reasons: dict[str, dict[str, int]] = {}
    for name, counts in llm.collective_rpc("lvspec_reasons")[0].items():
        reasons[name] = reasons[name.rpartition("-")[0]] = counts
    return [replace(answer, reasons=reasons[answer.sample]) for answer in answers]


def _prepared(
    waiting: Iterator[Sample], prompt: Callable[[Sample], dict[str, Any]], batch_size: int
) -> deque[tuple[Sample, dict[str, Any]]]:
    """The next inputs, with as many videos as fit into `PREPARED_BYTES`; of whole batches, which run at once anyway."""
    ready: deque[tuple[Sample, dict[str, Any]]] = deque()
    num_bytes = 0
    while num_bytes < PREPARED_BYTES or len(ready) % batch_size:
        if (sample := next(waiting, None)) is None:
            break
        inputs = prompt(sample)
        num_bytes += sum(frames.nbytes for frames, _ in inputs["multi_modal_data"]["video"])
        ready.append((sample, inputs))
    return ready


def _ask(
    llm: Any,
    policy: str,
    samples: Sequence[Sample],
    prompt: Callable[[Sample], dict[str, Any]],
    batch_size: int,
    max_tokens: int,
    min_tokens: int,
) -> Iterator[Answer]:
    """Keep `batch_size` requests running; greedy.

    The engine is stepped by hand: it reports once a step, so that a request's reports after its first are its target
    steps, whatever the method, with nothing to be worked out from counters.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    waiting = iter(samples)
    ready: deque[tuple[Sample, dict[str, Any]]] = deque()
    running: dict[str, tuple[Sample, float, float, int]] = {}
    finished: list[Answer] = []
    before = 0.0
    while True:
        # The engine goes on by itself in its own process, so that the clock may stand still only where nothing runs; to
        # ask for reasons more often than has to be would be in the way.
        if not running or len(finished) >= batch_size:
            yield from _with_reasons(llm, finished)
            finished.clear()
        if not running:
            if not ready:
                ready = _prepared(waiting, prompt, batch_size)
            before = time.perf_counter()
        while ready and len(running) < batch_size:
            sample, inputs = ready.popleft()
            arrived = time.perf_counter()
            params = SamplingParams(temperature=0, max_tokens=max_tokens, min_tokens=min_tokens)
            engine.add_request(sample.name, inputs, params)
            running[sample.name] = (sample, arrived, 0.0, -1)
        if not running:
            return
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            sample, arrived, first, steps = running[output.request_id]
            first, steps = first or now, steps + 1
            running[output.request_id] = (sample, arrived, first, steps)
            if output.finished:
                del running[output.request_id]
                completion = output.outputs[0]
                answer = Answer(
                    policy=policy,
                    sample=sample.name,
                    token_ids=list(completion.token_ids),
                    text=completion.text,
                    steps=steps,
                    first_token_seconds=first - arrived,
                    last_token_seconds=now - arrived,
                    finish_reason=str(completion.finish_reason),
                    wall_seconds=now - before,
                )
                finished.append(answer)
                before = now
