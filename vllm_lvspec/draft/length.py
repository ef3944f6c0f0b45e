"""How far to draft: as long as another drafted token is worth its cost.

A chain of K tokens speeds decoding up by `T / (1 + K c + o)`, so a drafted token pays where the chance that it will be
accepted, over what it costs the drafter and the target, is above what a step yields on average. Chances come from the
drafter's own confidence and from what became of earlier drafts, costs from a table that was measured at the start.
Where drafts are of fixed length, the same costs say whether to draft at all.
"""

from __future__ import annotations

import bisect
import functools
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

# A confidence says as much about acceptance as its odds; bins are even in these.
_LOG_ODDS = np.linspace(-4.0, 8.0, 13)
_CONFIDENCES = 1 / (1 + np.exp(-_LOG_ODDS))
# Accepted and judged tokens that each bin starts with, so that the first drafts are neither none nor all.
_PRIOR_WEIGHT = 4.0
# And so many that the mean over all of them starts with, and the share of these that was accepted. It is not taken from
# the bins: what these start with, most of which hardly ever occur, would outweigh hundreds of tokens.
_FIRST_TOKENS = 8.0
_FIRST_RATE = 0.8
# Beyond so many judged tokens a bin forgets the oldest: what is asked for changes with the day.
_MEMORY = 512.0
# What is left of what was learned of bins and requests after a step in which nothing is drafted because it won't pay.
_FADING = 0.98
# How many judged tokens of its own outweigh what is known of other requests.
_REQUEST_WEIGHT = 16.0
# No draft at all is preferred to one that promises less than this over it: what is not in the table (metadata, copies,
# the longer way through the sampler) must be paid, too.
LEAST_GAIN = 1.05
# Of chains of fixed length: so many that were accepted whole are taken to have been before the first, so that it is
# tried; and of so many the past consists.
_FIRST_CHAINS = 8.0
_MOST_CHAINS = 256.0
# What is left after a step without drafts of what decides whether to draft at all. That is more: to try again costs
# more than a step, because the drafter has prompts to read.
_SLOW_FADING = 0.9997
# After so many steps costs are corrected by what these took, by so much at most.
_FEW_STEPS = 16
_MOST_CORRECTED = 16.0
# Of the target's steps without drafts and with them the ones stand for the others while these are not known.
_OTHER_PART = {"target": "verification", "verification": "target"}
# So many steps a decision not to draft stands.
_STEPS_OF_REST = 16
# And while no more of its requests have come or gone than this share.
_SHARE_CHANGED = 1 / 8
# A prompt is read where so many times its price is to be saved: near the point where drafting pays, it starts and stops
# with every correction.
PROMPT_MARGIN = 2.0
# Of so many tries of what is left of drafts the past consists, of the first few of which each is taken to have spared
# some forwards; and so many at least must be spared where trying costs nothing.
_TRIES = 64.0
_FIRST_TRIES = 4.0
_FIRST_SPARED = 3.0
_LEAST_SPARED = 0.1
# Of so many finished answers the length is remembered.
_MOST_ANSWERS = 64.0


@dataclass(frozen=True)
class StepCosts:
    """Seconds of one forward over so many `rows` (ascending, tokens of all requests together), and more per token of
    context that all requests' attention reads in it; `target_per_row_context`: more per token of context and row beyond
    a request's first, which is nothing where attention waits for memory; `prompt`: of the drafter's with one request's
    prompt; `first`: times as long as a further drafted token the first one takes, with all that is done for drafts of
    any length; `verification`: times as long as by the others a step of the target with drafts takes, of which a part
    may be done while the drafter runs; `per_guess`: how much longer, of its forward for one token of a request, the
    drafter takes for each further one that it reads at once; `pieces`: instead of `target`, and no less, where a step
    that could be one graph
    is launched in pieces, None where there are no graphs."""

    rows: Sequence[int]
    target: Sequence[float]
    draft: Sequence[float]
    target_per_context: float = 0.0
    draft_per_context: float = 0.0
    target_per_row_context: float = 0.0
    prompt: float = 0.0
    first: float = 1.0
    verification: float = 1.0
    per_guess: float = 0.0
    pieces: Sequence[float] | None = None

    def faded(self, num_steps: int) -> StepCosts:
        """The price of prompts a little lower: it is not taken again while none is read."""
        return replace(self, prompt=_SLOW_FADING**num_steps * self.prompt)

    def scaled(self, target: float, verification: float, draft: float, first: float) -> StepCosts:
        """Of a machine that takes so many times as long for the target's part of a step, without drafts and with them,
        and for the drafter's further tokens and first ones."""
        return replace(
            self,
            target=[target * seconds for seconds in self.target],
            pieces=None if self.pieces is None else [target * seconds for seconds in self.pieces],
            draft=[draft * seconds for seconds in self.draft],
            target_per_context=target * self.target_per_context,
            draft_per_context=draft * self.draft_per_context,
            target_per_row_context=target * self.target_per_row_context,
            first=first / draft * self.first,
            verification=verification / target * self.verification,
        )

    def of_target(self, rows: float | np.ndarray, context: float | np.ndarray = 0.0) -> Any:
        return _interpolate(self.rows, self.target, rows) + self.target_per_context * context

    def of_verification(self, rows: float | np.ndarray, context: float, further: float | np.ndarray) -> Any:
        """As one graph, where there is one. `further`: tokens of context that rows beyond a request's first read."""
        return self.of_target(rows, context) + self.target_per_row_context * further

    def of_pieces(self, rows: float | np.ndarray, context: float, further: float | np.ndarray) -> Any:
        """In pieces, which the host launches; where the device takes longer for them, that is all one waits for."""
        seconds = self.of_verification(rows, context, further)
        return seconds if self.pieces is None else np.maximum(seconds, _interpolate(self.rows, self.pieces, rows))

    def bounds(self, load: Load, rows: float | np.ndarray, max_length: int) -> tuple[Any, float] | None:
        """Of what verification takes of drafts by their `rows`, the least, because the host must launch pieces, and the
        most, because padding would make a graph of them.

        A request by itself has a graph whatever its draft's length. Several have one where all drafts are of
        `max_length`, and none where some have no draft.
        """
        if self.pieces is None or load.num_requests < 2:
            return None
        least, most = _interpolate(self.rows, self.pieces, rows), math.inf
        if load.num_drafting == load.num_requests:
            every = load.num_requests * (1 + max_length)
            most = float(self.of_verification(every, load.target_context, max_length * load.verified_context))
        return least, most

    def of_draft(self, rows: float | np.ndarray, context: float | np.ndarray = 0.0) -> Any:
        return _interpolate(self.rows, self.draft, rows) + self.draft_per_context * context


@dataclass(frozen=True)
class Load:
    """A step's requests, of which `num_drafting` have drafts; and tokens in caches: the target's of all of them, and of
    those that have drafts, and the drafter's of these."""

    num_requests: float
    num_drafting: float
    target_context: float
    verified_context: float
    draft_context: float

    def grown(self, num_requests: float, num_drafting: float) -> Load:
        """So many requests of the same kind, of which so many have drafts; now it must not be none."""
        times = num_drafting / self.num_drafting
        context = self.verified_context / self.num_drafting * num_requests
        return Load(num_requests, num_drafting, context, times * self.verified_context, times * self.draft_context)


def further_context(num_requests: float, num_rows: float, context: float) -> float:
    """Tokens of context that rows beyond a request's first read, where all have as many rows of it and of `context`."""
    return (num_rows / num_requests - 1) * context


def seconds_saved(
    costs: StepCosts, load: Load, length: int | np.ndarray, tokens: float | np.ndarray, max_length: int
) -> Any:
    """By drafts of `length`, per emitted token of any request, where `tokens` are emitted in a step by each that has a
    draft; not above 0 where they don't pay. Of several lengths `[num_lengths]` it gives as many. `max_length`: of those
    that the target has graphs for."""
    num, drafting = load.num_requests, load.num_drafting
    alone = costs.of_target(num, load.target_context)
    step = (costs.first + length - 1) * costs.of_draft(drafting, load.draft_context)
    rows = num + drafting * length
    verified = costs.of_verification(rows, load.target_context, length * load.verified_context)
    if (bounds := costs.bounds(load, rows, max_length)) is not None:
        verified = np.clip(verified, *bounds)
    step += costs.verification * verified
    return alone / num - LEAST_GAIN * step / (num - drafting + drafting * tokens)


def expected_tokens(rates: np.ndarray, max_length: int) -> np.ndarray:
    """What a step emits per request by length of the draft, from 1, `[max_length]`, where drafted tokens are accepted
    with `rates [num_requests]` if all before them are."""
    lengths = np.arange(1, max_length + 1)
    return 1 + (rates ** lengths[:, None]).mean(1).cumsum()


def smooth_costs(rows: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """The largest costs that never fall and rise ever more steeply with `rows`, and are nowhere above `seconds`.

    Times rise in stairs (graphs and tiles come in sizes) and with noise. A stair's first row looks as if it cost all of
    it, and whoever goes on row by row would stop before it; on a slope nobody does.
    """
    points: list[tuple[int, float]] = []
    for point in zip(rows, np.minimum.accumulate(seconds[::-1])[::-1].tolist(), strict=True):
        while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(points[-1], point):
            points.pop()
        points.append(point)
    return np.interp(rows, [x for x, _ in points], [y for _, y in points]).tolist()


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float | np.ndarray) -> Any:
    """Between the points, and on in a line behind the last."""
    if not isinstance(x, np.ndarray):  # in a fraction of the time, as it is asked in every step
        if x <= xs[0] or len(xs) == 1:
            return ys[0] if x <= xs[0] else ys[0] + (x - xs[0]) * ys[0] / xs[0]
        i = min(bisect.bisect_left(xs, x), len(xs) - 1)
        return ys[i] + (x - xs[i]) * (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
    slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]) if len(xs) > 1 else ys[-1] / xs[-1]
    return np.interp(x, xs, ys) + slope * np.maximum(np.subtract(x, xs[-1]), 0.0)


class Corrections:
    """How many times as long as foretold steps take, by the last few of about as many requests.

    A table that is measured at the start knows nothing of what steps do around their forwards, of caches that hold
    other requests' keys by then, or of what else the machine has got to do.
    """

    def __init__(self) -> None:
        self._factors: dict[tuple[str, int], float] = {}
        self._ratios: dict[tuple[str, int], list[float]] = defaultdict(list)
        # What `applied` was last asked and has answered, by sizes.
        self._applied: dict[tuple[int, int], tuple[StepCosts, StepCosts]] = {}

    def factor(self, part: str, num_requests: int) -> float:
        """How many times as long as by the table that part takes in steps of so many requests, or of those next to as
        many of which it is known. What is known of no step of the target without drafts is taken from those with them,
        and the other way round."""
        size = num_requests.bit_length()
        if part in _OTHER_PART and not any(p == part for p, _ in self._factors):
            part = _OTHER_PART[part]
        known = (abs(size - other) for p, other in self._factors if p == part)
        if (part, size) not in self._factors and (distance := min(known, default=None)) is not None:
            size += distance if (part, size + distance) in self._factors else -distance
        return self._factors.get((part, size), 1.0)

    def applied(self, costs: StepCosts, num_requests: int, num_drafting: int) -> StepCosts:
        """`costs` of steps of so many requests, of which so many have drafts."""
        sizes = num_requests.bit_length(), num_drafting.bit_length()
        before, corrected = self._applied.get(sizes, (None, costs))
        if before is not costs:
            drafter = (self.factor(part, num_drafting) for part in ("draft", "first"))
            target = (self.factor(part, num_requests) for part in ("target", "verification"))
            corrected = costs.scaled(*target, *drafter)
            self._applied[sizes] = costs, corrected
        return corrected

    def note(self, part: str, num_requests: int, seconds: float, foretold: float) -> float | None:
        """A step's target's or drafter's part took `seconds`: what `correct` is to be told, once in a while."""
        size = num_requests.bit_length()
        self._factors.setdefault((part, size), self.factor(part, num_requests))  # by which it was foretold
        ratios = self._ratios[part, size]
        ratios.append(seconds / foretold)
        if len(ratios) < _FEW_STEPS:
            return None
        factor = float(np.median(ratios))
        ratios.clear()
        return factor

    def correct(self, part: str, num_requests: int, factor: float) -> None:
        """Steps of so many requests take `factor` times as long as foretold, which was corrected before."""
        self._applied.clear()
        corrected = factor * self.factor(part, num_requests)
        self._factors[part, num_requests.bit_length()] = min(max(corrected, 1 / _MOST_CORRECTED), _MOST_CORRECTED)

    def fade(self, num_steps: int) -> None:
        """Go a little way back to the beginning: nothing is learned of drafting without it."""
        self._applied.clear()
        for key in self._factors:
            if key[0] != "target":
                self._factors[key] **= _SLOW_FADING**num_steps


class RunningMean:
    """Of what was noted, of which the oldest is forgotten beyond `memory` values; it begins with `weight` values of
    `start`, and goes back there when it fades. Without these it is infinite before the first."""

    def __init__(self, memory: float, start: float = math.inf, weight: float = 0.0):
        self.memory = memory
        self.start = start
        self.weight = weight
        self.total = start * weight if weight else 0.0
        self.count = weight

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else self.start

    def note(self, value: float, times: int = 1) -> None:
        self.total, self.count = self.total + value * times, self.count + times
        if self.count > self.memory:
            self.total, self.count = self.mean * self.memory, self.memory

    def fade(self, left: float) -> None:
        more = (1 - left) * self.weight
        self.total, self.count = left * self.total + more * self.start, left * self.count + more


@dataclass
class Refusal:
    """That drafting paid for nobody of the requests `req_ids` at these `costs`, as far as there was room for drafts.

    It stands for some steps of about the same requests, because to decide anew takes as long as a layer of a small
    model, and in a large batch there is often one that comes or goes. `num_steps` have gone without drafts by it.
    """

    costs: StepCosts
    req_ids: Sequence[str]
    num_steps: int = 1

    def stands(self, costs: StepCosts, req_ids: Sequence[str]) -> bool:
        """Whether the next step, of these requests, goes without drafts, too."""
        is_over = costs is not self.costs or self.num_steps == _STEPS_OF_REST or not self._is_about(req_ids)
        self.num_steps += not is_over
        return not is_over

    def _is_about(self, req_ids: Sequence[str]) -> bool:
        if req_ids == self.req_ids:
            return True
        return len(set(req_ids).symmetric_difference(self.req_ids)) <= _SHARE_CHANGED * len(self.req_ids)


class FixedChains:
    """What becomes of drafts of fixed length: the share of their tokens that is accepted."""

    def __init__(self) -> None:
        self._share = RunningMean(_MOST_CHAINS, 1.0, _FIRST_CHAINS)

    def tokens(self, length: int) -> float:
        """What a step emits for a request with `length` drafted tokens, the target's own among them."""
        return 1 + length * self._share.mean

    def learn(self, num_accepted: int, length: int) -> None:
        self._share.note(num_accepted / length)

    def fade(self, num_steps: int) -> None:
        """Go a little way back to the beginning: times may have changed."""
        self._share.fade(_SLOW_FADING**num_steps)


class Recalling:
    """Whether it pays to try what is left of rejected drafts, and what it spares."""

    def __init__(self) -> None:
        self._spared = RunningMean(_TRIES, _FIRST_SPARED, _FIRST_TRIES)  # forwards, by each try
        self._forwards = RunningMean(_TRIES, 1.0, _FIRST_TRIES)

    @property
    def share(self) -> float:
        """Of drafts' further tokens, those that took a forward."""
        return self._forwards.mean

    def pays(self, price: float) -> bool:
        """Whether a try spares more forwards than it costs; each time it does not, it is a little less sure of it."""
        if self._spared.mean > max(price, _LEAST_SPARED):
            return True
        self._spared.fade(_FADING)
        return False

    def learn(self, was_tried: bool, num_spared: int, num_further: int) -> None:
        """Of a step with so many further tokens, for so many of which it has spared the forward."""
        if was_tried:
            self._spared.note(num_spared)
        if num_further:
            self._forwards.note(1 - num_spared / num_further)

    def fade(self, num_steps: int) -> None:
        """Go a little way back to the beginning: times may have changed."""
        self._forwards.fade(_SLOW_FADING**num_steps)


class Answers:
    """How much there is to be won by reading a prompt for a request."""

    def __init__(self) -> None:
        self._length = RunningMean(_MOST_ANSWERS)

    def learn(self, num_tokens: int) -> None:
        """Of a request that has finished."""
        self._length.note(num_tokens)

    def tokens_left(self, most: int) -> float:
        """Expected of a request that has room for `most`. Who has said much will not have less to say."""
        return min(most, self._length.mean)


@dataclass
class RequestHistory:
    """Judged drafts of one request: how many tokens were accepted, and how many were expected to be."""

    accepted: float = 0.0
    expected: float = 0.0
    # Of the newest draft, which has not been judged: confidences, how many tokens the request had then, and more.
    confidences: Sequence[float] = field(default_factory=list)
    num_tokens: int = 0
    num_until_end: int | None = None  # its tokens up to the first that would end the answer
    # The newest draft, and behind how many of the request's tokens it was made.
    draft: Sequence[int] = ()
    drafted_behind: int = 0

    @property
    def factor(self) -> float:
        """What other requests' chances are multiplied by."""
        return (self.accepted + _REQUEST_WEIGHT) / (self.expected + _REQUEST_WEIGHT)

    def fade(self, num_steps: int) -> None:
        """Go a little way back to where nothing is known of the request."""
        left = _FADING**num_steps
        self.accepted, self.expected = self.accepted * left, self.expected * left


class Acceptance:
    """How often drafted tokens of so much confidence were accepted where all before them were."""

    def __init__(self) -> None:
        self.judged = np.full(len(_LOG_ODDS) + 1, _PRIOR_WEIGHT)
        middles = np.concatenate([[-5.0], (_LOG_ODDS[1:] + _LOG_ODDS[:-1]) / 2, [9.0]])
        self.accepted = self.judged / (1 + np.exp(-middles))
        self._prior = self.accepted.copy()
        self._rate = RunningMean(_MEMORY, _FIRST_RATE, _FIRST_TOKENS)

    def chances(self, confidences: Sequence[float] | np.ndarray) -> np.ndarray:
        """The share that was accepted, `[num_tokens]`, of tokens with these probabilities by the drafter."""
        bins = _bins(confidences)
        return self.accepted[bins] / self.judged[bins]

    def mean(self) -> float:
        """Of all tokens, by how often each confidence occurs."""
        return self._rate.mean

    def fade(self, num_steps: int) -> None:
        """Go a little way back to the beginning: times may have changed."""
        gone = 1 - _FADING**num_steps
        self.judged += gone * (_PRIOR_WEIGHT - self.judged)
        self.accepted += gone * (self._prior - self.accepted)
        self._rate.fade(_SLOW_FADING**num_steps)

    def learn(self, history: RequestHistory, num_accepted: int, num_verified: int) -> None:
        """Judge the request's newest draft, of which `num_verified` tokens were verified."""
        confidences = history.confidences[:num_verified]
        num_accepted = min(max(num_accepted, 0), len(confidences))
        history.confidences = []
        judged = confidences[: num_accepted + 1]  # nothing is known of those behind the first that was refused
        if not judged:
            return
        bins = _bins(judged)
        history.expected += float(self.chances(judged).sum())
        history.accepted += num_accepted
        outcomes = np.arange(len(judged)) < num_accepted
        self._rate.note(num_accepted / len(judged), len(judged))
        np.add.at(self.judged, bins, 1.0)
        np.add.at(self.accepted, bins, outcomes.astype(float))
        full = self.judged > _MEMORY
        self.accepted[full] *= _MEMORY / self.judged[full]
        self.judged[full] = _MEMORY


def _bins(confidences: Sequence[float] | np.ndarray) -> np.ndarray:
    return _CONFIDENCES.searchsorted(confidences)


class DraftPlan:
    """One step's drafting for a batch: who drafts another token.

    `rates [num_requests]`: each request's mean chance that a drafted token is accepted. `target_context`,
    `draft_context [num_requests]`: tokens in the target's and the drafter's cache. `num_others`: requests of the step
    that have no drafts, with `others_context` tokens in the target's cache. `most_rows`: that the step has room for.
    """

    def __init__(
        self,
        costs: StepCosts,
        rates: np.ndarray,
        target_context: np.ndarray,
        draft_context: np.ndarray,
        max_length: int,
        num_others: int = 0,
        others_context: float = 0.0,
        most_rows: int = sys.maxsize,
    ):
        self.costs = costs
        self.rates = rates
        self.target_context = target_context
        self.draft_context = draft_context
        self.survival = np.ones(len(rates))  # the chance that all that was drafted so far will be accepted
        self.rows = len(rates) + num_others
        self.most_rows = most_rows
        self.max_length = max_length
        self.tokens = float(self.rows)  # expected from this step; each request gets one of the target's own
        own = float(target_context.sum())
        self.load = Load(self.rows, len(rates), own + others_context, own, float(draft_context.sum()))
        self._drafted = 0.0  # seconds
        self._further = 0.0  # tokens of context that drafted tokens read
        self._verified = float(costs.of_target(self.rows, self.load.target_context))

    @property
    def cost(self) -> float:
        """Seconds that this step takes."""
        return self._drafted + self._verified

    # What a forward costs by its number of rows: it is asked for every token, if any is drafted.
    @functools.cached_property
    def _draft(self) -> np.ndarray:
        return self.costs.of_draft(np.arange(len(self.rates) + 1))

    @functools.cached_property
    def _target(self) -> tuple[np.ndarray, tuple[np.ndarray, float] | None]:
        """With all contexts, and its bounds."""
        rows = np.arange(self.load.num_requests + len(self.rates) * self.max_length + 1)
        bounds = self.costs.bounds(self.load, rows, self.max_length)
        return self.costs.of_target(rows, self.load.target_context), bounds

    def _verification(self, rows: int | slice, further: float | np.ndarray) -> Any:
        target, bounds = self._target
        seconds = target[rows] + self.costs.target_per_row_context * further
        if bounds is None:
            return seconds
        least, most = bounds
        return np.minimum(np.maximum(seconds, least[rows]), most)

    def take(self, requests: np.ndarray, chances: np.ndarray) -> None:
        """Count one drafted token, accepted with `chances`, for each of `requests` (indices)."""
        self.survival[requests] *= chances
        self.tokens += float(self.survival[requests].sum())
        drafting = self._draft[len(requests)] + self.costs.draft_per_context * self.draft_context[requests].sum()
        is_first = self.rows == self.load.num_requests
        self._drafted += self.costs.first * drafting if is_first else drafting
        self._further += self.target_context[requests].sum()
        self.rows += len(requests)
        self._verified = self._verification(self.rows, self._further)

    def going_on(self, requests: np.ndarray) -> np.ndarray:
        """Those of `requests` (indices, in their order) for whom another token raises the step's tokens a second."""
        gains = self.survival[requests] * self.rates[requests]
        num = min(len(requests), self.most_rows - self.rows)
        if num < 1:
            return requests[:0]
        order = np.argsort(-gains, kind="stable")[:num]
        ordered = requests[order]
        tokens = self.tokens + gains[order].cumsum()
        drafting = self._draft[1 : num + 1] + self.costs.draft_per_context * self.draft_context[ordered].cumsum()
        further = self._further + self.target_context[ordered].cumsum()
        verifying = self._verification(slice(self.rows + 1, self.rows + num + 1), further)
        rates = tokens / (self._drafted + drafting + verifying)
        best = int(rates.argmax())
        chosen = best + 1 if rates[best] > self.tokens / self.cost else 0
        return requests if chosen == len(requests) else requests[np.sort(order[:chosen])]
