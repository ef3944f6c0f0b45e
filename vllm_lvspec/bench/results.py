"""What a run is worth: figures with intervals, and the JSON that holds them.

Intervals are 95 % bootstrap over videos: the answers to one video stay together, and two policies are compared on the
same draws. Those of throughput are over batches, because what runs at once shares the wall clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vllm_lvspec.bench.run import Answer, PolicyRun
from vllm_lvspec.bench.samples import Sample
from vllm_lvspec.bench.videofacts.score import Score, totals

NUM_DRAWS = 2000
MIN_BATCHES = 5  # of fewer no interval is made
STRETCH = 50  # tokens
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
BASELINE = "ar"
Interval = tuple[float, float]


class StrictModel(BaseModel):
    """Has the fields that are named, and no others."""

    model_config = ConfigDict(extra="forbid")


class FactFigures(StrictModel):
    """Facts of one kind over all answers of a policy."""

    required: int = Field(description="facts that the answers had to state")
    right: int = Field(description="required facts that they state")
    wrong: int = Field(description="false facts that they state")
    precision: float | None = Field(description="right over right and wrong; null where nothing was said")
    recall: float | None = Field(description="right over required; null where nothing was required")


class Figures(StrictModel):
    """Figures of one policy, over all of its answers or those of one task."""

    answers: int = Field(description="number of answers")
    output_tokens: int = Field(description="tokens of all answers")
    target_steps: int = Field(description="target steps after those that gave each answer's first token")
    truncated: int = Field(description="answers that were cut at max_tokens")
    mean_accepted_length: float | None = Field(
        description="tokens per target verification step, the correcting or bonus token included, first tokens apart; "
        "null where no answer has a second token"
    )
    tokens_per_second: float | None = Field(
        description="decode speed of a request: tokens after the first over seconds from the first to the last; null "
        "where no answer has a second token"
    )
    first_token_seconds: float = Field(description="mean time from a request's arrival to its first token")
    fact_accuracy: float | None = Field(
        description="mean over answers of required facts stated over required facts and false ones; null without truth"
    )
    order_accuracy: float | None = Field(
        description="share of the answers asked for several events that tell all of them in their order"
    )
    retention: float | None = Field(description="fact_accuracy over that of ar in the same run; null without either")
    same_answers: float | None = Field(description="share of answers with the same tokens as ar's; null without ar")
    speedup: float | None = Field(description="tokens_per_second over that of ar in the same run; null without ar")
    first_token_over_ar: float | None = Field(
        description="first_token_seconds over that of ar in the same run; null without ar"
    )
    throughput_over_ar: float | None = Field(
        description="tokens of all answers, first ones included, per second of wall clock over that of ar in the same "
        "run; null without ar, and for a part of the answers at batch sizes above 1"
    )
    intervals: dict[str, Interval] = Field(description="95 % bootstrap intervals, by name of the figure")


class Stretch(StrictModel):
    """What is said between two places of the answers, sentence by sentence, by where a sentence begins."""

    begin: int = Field(description="first token, by the sentence's share of the text")
    end: int = Field(description="token behind the last")
    right: int = Field(description="true facts that are stated there, required or not")
    wrong: int = Field(description="false facts that are stated there")
    precision: float | None = Field(description="right over right and wrong; null where nothing was said")


class Bound(StrictModel):
    """The speedup `T / (1 + K c + o)` that a chain of K drafted tokens allows."""

    target_step_seconds: float = Field(description="ar's seconds per token, the engine's own work included: the unit")
    draft_cost: float = Field(
        description="c: seconds of one drafted token in the first rank's worker over target_step_seconds"
    )
    verify_overhead: float = Field(
        description="o: seconds of a target step over 1 + K rows in the first rank's worker over target_step_seconds, "
        "minus 1; below 0 where the engine's own work around a step costs more than the further rows"
    )
    verify_share: float = Field(
        description="what verification does beyond vLLM's own test, over the worker's seconds of a target step without "
        "it; by the host's clock"
    )
    speedup: float = Field(description="T / (1 + K c + o), T being mean_accepted_length, K drafted_length")


class Profile(StrictModel):
    """Where steps spend their time, in the first rank's worker."""

    steps: int = Field(description="that were looked at, over some questions that were asked again")
    seconds: dict[str, float] = Field(
        description="of each part, per step; what is between two steps of a kind is the part `scheduler and engine`. "
        "On GPUs the device is waited for between parts"
    )


class PolicyResult(Figures):
    """One policy."""

    wall_seconds: float = Field(
        description="seconds for all answers, prompts included; starting and reading videos apart"
    )
    throughput: float = Field(description="output_tokens over wall_seconds")
    reasons: dict[str, int] = Field(
        description="how many tokens were emitted for which reason: exact (drafted, and the target's choice), loose "
        "(drafted, and a filler), shift (drafted, and the target's choice at a neighbouring place), target (the "
        "target's own, first tokens included); for peers without the plugin worked out from steps"
    )
    facts: dict[str, FactFigures] = Field(description="by kind of fact; empty without truth")
    tasks: dict[str, Figures] = Field(description="the same figures by task")
    seeds: dict[str, Figures] = Field(description="the same figures by seed; empty for datasets")
    stretches: list[Stretch] = Field(
        description="true and false statements by place in the answer; empty without truth"
    )
    relevance: dict[str, float] | None = Field(
        description="quantiles of the drafted tokens' relevance, which as anchor_threshold would leave that share "
        "fillers; null where none was computed"
    )
    drafted_length: float | None = Field(
        description="tokens drafted per request and step, over steps in which nothing was prefilled; null for peers "
        "that are not ours"
    )
    draft_prefill_seconds: float | None = Field(
        description="the drafter's seconds per answer for its view of the prompt: encoding, choosing, and reading what "
        "is kept or copying it; by the device's clock; null for peers that are not ours"
    )
    scoring_seconds: float | None = Field(
        description="the target's seconds per answer for scores of visual tokens, where the strategy asks for them; by "
        "the host's clock; null for peers that are not ours"
    )
    profile: dict[str, Profile] | None = Field(
        description="by kind of step: decode, in which nothing is prefilled, and prompt; null where none was asked "
        "for, and for peers that are not ours"
    )
    bound: Bound | None = Field(description="null at batch sizes above 1, without ar, and for peers that are not ours")


class Environment(StrictModel):
    """Where and with what a run was made."""

    date: str = Field(description="start, UTC, ISO 8601")
    command: str = Field(description="the command line, with the variables of vLLM that were set")
    versions: dict[str, str] = Field(description="vllm_lvspec, vllm, torch, transformers, triton, python")
    device: str = Field(description="GPU's name, or CPU's")
    cores: int = Field(description="CPU cores that the process may use")
    resumed: bool = Field(description="whether answers come from an earlier run that was stopped")


class Settings(StrictModel):
    """What was asked for."""

    title: str | None = Field(description="what the run shows")
    suite: str = Field(description="videofacts, or the dataset's name")
    samples: int = Field(description="number of questions")
    videos: int = Field(description="number of videos")
    seeds: list[int] = Field(description="of the suite's scenes; empty for datasets")
    tasks: list[str] = Field(description="kinds of questions")
    policies: list[str] = Field(description="as asked for; ngram ran last")
    model: str = Field(description="target")
    draft: str | None = Field(description="drafter; null: the plugin's choice")
    shape: str | None = Field(description="larger shape at whose cost the target was served")
    draft_shape: str | None = Field(description="larger shape at whose cost the drafter ran")
    dtype: str = Field(description="weights and activations")
    batch_size: int = Field(description="requests running at once")
    num_speculative_tokens: int = Field(description="K")
    pruning: str = Field(description="the drafter's view of the video")
    pruning_ratio: float = Field(description="share of a video's tokens that the drafter does not see")
    more: dict[str, Any] = Field(description="further settings of the plugin's policies")
    max_tokens: int = Field(description="per answer")
    min_tokens: int = Field(description="per answer")
    num_frames: int = Field(description="frames of a video")
    side_by_side: bool = Field(
        description="whether all policies were asked in turn, group of questions by group, rather than one after "
        "another"
    )
    repeats: int = Field(description="answers to each question by each policy, of which the one of median time counts")
    profile: bool = Field(description="whether some questions were asked again to see where steps spend their time")
    engine: dict[str, Any] = Field(description="arguments of vLLM's engine")


class Report(StrictModel):
    """The whole file."""

    environment: Environment
    settings: Settings
    policies: dict[str, PolicyResult]


class _Sums:
    """Per-video sums of one policy, from which figures and their draws are made."""

    def __init__(self, answers: Sequence[Answer], samples: Sequence[Sample], scores: Sequence[Score | None]):
        videos = {name: i for i, name in enumerate(dict.fromkeys(s.video_name for s in samples))}
        self.rows = np.array([videos[s.video_name] for s in samples])

        def by_video(values: Sequence[float]) -> np.ndarray:
            return np.bincount(self.rows, np.asarray(values, float), len(videos))

        self.tokens = by_video([max(len(a.token_ids) - 1, 0) for a in answers])
        self.steps = by_video([a.steps for a in answers])
        self.seconds = by_video([a.last_token_seconds - a.first_token_seconds for a in answers])
        self.answers = by_video([1.0 for _ in answers])
        self.first_token_seconds = by_video([a.first_token_seconds for a in answers])
        self.accuracy = by_video([0.0 if s is None else s.accuracy for s in scores])
        self.scored = by_video([float(s is not None) for s in scores])
        self.in_order = by_video([float(bool(s and s.order_right)) for s in scores])
        self.ordered = by_video([float(s is not None and s.order_right is not None) for s in scores])


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below


def figures(
    answers: Sequence[Answer], samples: Sequence[Sample], baseline: Sequence[Answer] | None, batch_size: int = 1
) -> Figures:
    """Figures of `answers` to `samples`, compared with those of `baseline`; all three in the same order.

    Of requests that ran at once the wall clock's seconds are of all together, so that throughput is drawn by batches.
    """
    scores = [s.score(a.text) if s.score else None for a, s in zip(answers, samples, strict=True)]
    own = _Sums(answers, samples, scores)
    base = None
    same = None
    if baseline is not None:
        base_scores = [s.score(a.text) if s.score else None for a, s in zip(baseline, samples, strict=True)]
        base = _Sums(baseline, samples, base_scores)
        same = sum(a.token_ids == b.token_ids for a, b in zip(answers, baseline, strict=True)) / len(answers)
    num_videos = len(own.tokens)
    together = np.arange(len(answers)) // batch_size if batch_size > 1 else own.rows
    intervals: dict[str, Interval] = {}

    def estimate(
        name: str, compute: Callable[[np.ndarray], np.ndarray], count: int = num_videos, least: int = 1
    ) -> float | None:
        value = float(compute(np.arange(count)[None])[0])
        if not np.isfinite(value):
            return None
        if count < least:
            return value
        draws = compute(np.random.default_rng(0).integers(0, count, (NUM_DRAWS, count)))
        low, high = np.percentile(draws[np.isfinite(draws)], [2.5, 97.5])
        intervals[name] = (float(low), float(high))
        return value

    def total(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return values[rows].sum(1)

    def accuracy(sums: _Sums, rows: np.ndarray) -> np.ndarray:
        return _ratio(total(sums.accuracy, rows), total(sums.scored, rows))

    def speed(sums: _Sums, rows: np.ndarray) -> np.ndarray:
        return _ratio(total(sums.tokens, rows), total(sums.seconds, rows))

    def throughput(rows: np.ndarray) -> np.ndarray:
        speeds = []
        for each in (answers, baseline or answers):
            tokens = np.bincount(together, [len(a.token_ids) for a in each])
            seconds = np.bincount(together, [a.wall_seconds for a in each])
            speeds.append(_ratio(total(tokens, rows), total(seconds, rows)))
        return _ratio(*speeds)

    def first_token(sums: _Sums, rows: np.ndarray) -> np.ndarray:
        return _ratio(total(sums.first_token_seconds, rows), total(sums.answers, rows))

    def compared(name: str, compute: Callable[[_Sums, np.ndarray], np.ndarray]) -> float | None:
        return None if base is None else estimate(name, lambda r: _ratio(compute(own, r), compute(base, r)))

    return Figures(
        answers=len(answers),
        output_tokens=sum(len(a.token_ids) for a in answers),
        target_steps=sum(a.steps for a in answers),
        truncated=sum(a.finish_reason == "length" for a in answers),
        mean_accepted_length=estimate(
            "mean_accepted_length", lambda r: _ratio(total(own.tokens, r), total(own.steps, r))
        ),
        tokens_per_second=estimate("tokens_per_second", lambda r: speed(own, r)),
        first_token_seconds=_mean([a.first_token_seconds for a in answers]),
        fact_accuracy=estimate("fact_accuracy", lambda r: accuracy(own, r)),
        order_accuracy=estimate("order_accuracy", lambda r: _ratio(total(own.in_order, r), total(own.ordered, r))),
        retention=compared("retention", accuracy),
        same_answers=same,
        speedup=compared("speedup", speed),
        first_token_over_ar=compared("first_token_over_ar", first_token),
        throughput_over_ar=None
        if base is None
        else estimate("throughput_over_ar", throughput, together.max() + 1, MIN_BATCHES if batch_size > 1 else 1),
        intervals=intervals,
    )


def fact_figures(answers: Sequence[Answer], samples: Sequence[Sample]) -> dict[str, FactFigures]:
    """Figures of the facts in `answers`, by kind."""
    scores = [s.score(a.text) for a, s in zip(answers, samples, strict=True) if s.score]
    return {
        kind: FactFigures(
            **counts,
            precision=_share(counts["right"], counts["right"] + counts["wrong"]),
            recall=_share(counts["right"], counts["required"]),
        )
        for kind, counts in totals(scores).items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _bound(run: PolicyRun, figures: Figures, baseline: Figures) -> Bound | None:
    times = run.times
    if times is None or not times.steps or not baseline.tokens_per_second or not figures.mean_accepted_length:
        return None
    unit = 1 / baseline.tokens_per_second
    draft = times.draft_seconds / times.steps / unit
    overhead = times.target_seconds / times.steps / unit - 1
    return Bound(
        target_step_seconds=unit,
        draft_cost=draft / (times.drafted_tokens / times.steps) if times.drafted_tokens else 0.0,
        verify_overhead=overhead,
        verify_share=times.verify_seconds / (times.target_seconds - times.verify_seconds),
        speedup=figures.mean_accepted_length / (1 + draft + overhead),
    )


def summarise(
    runs: dict[str, PolicyRun], samples: Sequence[Sample], settings: Settings, environment: Environment
) -> Report:
    """All figures of a run; `runs[policy].answers` stand in the order of `samples`."""
    baseline = runs[BASELINE].answers if BASELINE in runs else None
    base = None if baseline is None else figures(baseline, samples, baseline, settings.batch_size)
    policies = {}
    for name, run in runs.items():
        own = figures(run.answers, samples, baseline, settings.batch_size)
        bound = None
        if base is not None and settings.batch_size == 1:
            bound = _bound(run, own, base)
        policies[name] = PolicyResult(
            **own.model_dump(),
            wall_seconds=run.wall_seconds,
            throughput=own.output_tokens / run.wall_seconds if run.wall_seconds else 0.0,
            reasons=_reasons(run.answers, own),
            facts=fact_figures(run.answers, samples),
            tasks=_figures_by([s.task for s in samples], run.answers, samples, baseline, settings.batch_size),
            seeds=_figures_by([s.group for s in samples], run.answers, samples, baseline, settings.batch_size),
            stretches=_stretches(run.answers, samples),
            relevance=None if run.relevance is None else _quantiles(run.relevance),
            **_drafting(run),
            profile=_profiles(run),
            bound=bound,
        )
    return Report(environment=environment, settings=settings, policies=policies)


def _figures_by(
    groups: Sequence[str],
    answers: Sequence[Answer],
    samples: Sequence[Sample],
    baseline: Sequence[Answer] | None,
    batch_size: int,
) -> dict[str, Figures]:
    """Figures of each group's answers; samples of no group are left out."""
    result = {}
    for group in dict.fromkeys(g for g in groups if g):
        rows = [i for i, g in enumerate(groups) if g == group]
        part = None if baseline is None else [baseline[i] for i in rows]
        found = figures([answers[i] for i in rows], [samples[i] for i in rows], part, batch_size)
        if batch_size > 1:  # the wall clock's seconds are of all that ran at once
            found.throughput_over_ar = None
            found.intervals.pop("throughput_over_ar", None)
        result[group] = found
    return result


def _drafting(run: PolicyRun) -> dict[str, float | None]:
    times = run.times
    if times is None:
        return dict.fromkeys(("drafted_length", "draft_prefill_seconds", "scoring_seconds"))
    return {
        "drafted_length": times.drafted_tokens / times.requests if times.requests else None,
        "draft_prefill_seconds": times.prefill_seconds / times.prompts if times.prompts else None,
        "scoring_seconds": times.scoring_seconds / times.prompts if times.prompts else None,
    }


def _profiles(run: PolicyRun) -> dict[str, Profile] | None:
    if run.profile is None:
        return None
    return {
        kind: Profile(steps=seen["steps"], seconds={part: s / seen["steps"] for part, s in seen["seconds"].items()})
        for kind, seen in run.profile.items()
        if seen["steps"]
    }


def _stretches(answers: Sequence[Answer], samples: Sequence[Sample]) -> list[Stretch]:
    right, wrong = Counter[int](), Counter[int]()
    for answer, sample in zip(answers, samples, strict=True):
        if sample.claims is None or not answer.text:
            continue
        for claim in sample.claims(answer.text):
            stretch = int(claim.begin / len(answer.text) * len(answer.token_ids)) // STRETCH
            right[stretch] += claim.right
            wrong[stretch] += claim.wrong
    return [
        Stretch(
            begin=i * STRETCH,
            end=(i + 1) * STRETCH,
            right=right[i],
            wrong=wrong[i],
            precision=_share(right[i], right[i] + wrong[i]),
        )
        for i in sorted(right | wrong)
    ]


def _quantiles(counts: Sequence[int]) -> dict[str, float] | None:
    """`counts` in even steps from -1 to 1; the last counts what is left out."""
    cumulated = np.cumsum(counts[:-1])
    if not cumulated[-1]:
        return None
    places = np.searchsorted(cumulated, [share * cumulated[-1] for share in QUANTILES])
    return {
        f"{share:g}": float(-1 + 2 * (place + 1) / len(cumulated))
        for share, place in zip(QUANTILES, places, strict=True)
    }


def _reasons(answers: Sequence[Answer], figures: Figures) -> dict[str, int]:
    """As the plugin counted; else from steps, each of which emits one token of the target's own."""
    if answers and all(a.reasons is not None for a in answers):
        return dict(sum((Counter(a.reasons) for a in answers), start=Counter()))
    exact = max(figures.output_tokens - figures.answers - figures.target_steps, 0)
    return {"exact": exact, "target": figures.output_tokens - exact}


def json_schema() -> dict[str, Any]:
    """The schema of the JSON file."""
    return Report.model_json_schema()
