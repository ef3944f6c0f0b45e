"""What steps cost, and what drafts save.

A table of what forwards take is measured at the start, and corrected by what steps take. A chain of K tokens speeds
decoding up by `T / (1 + K c + o)`: the same costs say whether drafts pay.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vllm_lvspec.draft.learned import SLOW_FADING

# No draft at all is preferred to one that promises less than this over it: what is not in the table (metadata, copies,
# the longer way through the sampler) must be paid, too.
LEAST_GAIN = 1.05
# After so many steps costs are corrected by what these took, by so much at most.
_FEW_STEPS = 16
_MOST_CORRECTED = 16.0
# Of the target's steps without drafts and with them the ones stand for the others while these are not known.
_OTHER_PART = {"target": "verification", "verification": "target"}


@dataclass(frozen=True)
class StepCosts:
    """Seconds of one forward over so many `rows` (ascending, tokens of all requests together), and more per token of
    context that all requests' attention reads in it; `target_per_row_context`: more per token of context and row beyond
    a request's first, which is nothing where attention waits for memory; `prompt`: of the drafter's with one request's
    prompt; `first`: times as long as a further drafted token the first one takes, with all that is done for drafts of
    any length; `verification`: times as long as by the others a step of the target with drafts takes, of which a part
    may be done while the drafter runs; `per_guess`: how much longer, of its forward for one token of a request, the
    drafter takes for each further one that it reads at once; `pieces`: instead of `target`, and no less, where a step
    that could be one graph is launched in pieces, None where there are no graphs."""

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
        return replace(self, prompt=SLOW_FADING**num_steps * self.prompt)

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
                self._factors[key] **= SLOW_FADING**num_steps
