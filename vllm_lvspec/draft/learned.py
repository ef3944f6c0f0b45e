"""What is learned of drafts and answers as they come, and forgotten again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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
FADING = 0.98
# How many judged tokens of its own outweigh what is known of other requests.
_REQUEST_WEIGHT = 16.0
# Of chains of fixed length: so many that were accepted whole are taken to have been before the first, so that it is
# tried; and of so many the past consists.
_FIRST_CHAINS = 8.0
_MOST_CHAINS = 256.0
# What is left after a step without drafts of what decides whether to draft at all. That is more: to try again costs
# more than a step, because the drafter has prompts to read.
SLOW_FADING = 0.9997
# Of so many finished answers the length is remembered.
_MOST_ANSWERS = 64.0


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
        self._share.fade(SLOW_FADING**num_steps)


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
        left = FADING**num_steps
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
        gone = 1 - FADING**num_steps
        self.judged += gone * (_PRIOR_WEIGHT - self.judged)
        self.accepted += gone * (self._prior - self.accepted)
        self._rate.fade(SLOW_FADING**num_steps)

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
