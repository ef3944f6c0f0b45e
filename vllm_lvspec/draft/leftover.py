"""What is left of a draft that was rejected, as a guess at the next one.

The target mostly says another word where the drafter's was, and behind it the drafter would draft the rest anew, one
forward for each token. Whether it would, one forward over all of it tells: drafts are verified by the drafter as
answers are by the target, so that they stay what they would have been (of rejected tokens as candidates for later
drafts: Ouroboros, arXiv 2402.13720).
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_lvspec.draft.learned import FADING, SLOW_FADING, RunningMean

# Of no more requests at once it is tried: a forward is spared where all of them draft a token or more of what is left.
MOST_RECALLING = 2
# Of so many tries of what is left of drafts the past consists, of the first few of which each is taken to have spared
# some forwards; and so many at least must be spared where trying costs nothing.
_TRIES = 64.0
_FIRST_TRIES = 4.0
_FIRST_SPARED = 3.0
_LEAST_SPARED = 0.1


def left_of(draft: Sequence[int], said: Sequence[int]) -> list[int]:
    """Tokens of `draft` that may follow again behind `said`, all that was said since; none where that is no part of it
    with at most one other token behind.

    A word that the draft has further on was left out before it.
    """
    num_accepted = 0
    for token, drafted in zip(said, draft, strict=False):
        if token != drafted:
            break
        num_accepted += 1
    if num_accepted == len(said):  # of a draft that was not verified to its end
        return list(draft[num_accepted:])
    if num_accepted + 1 < len(said):
        return []
    rest = list(draft[num_accepted + 1 :])
    newest = said[num_accepted]
    return rest[rest.index(newest) + 1 :] if newest in rest else rest


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
        self._spared.fade(FADING)
        return False

    def learn(self, was_tried: bool, num_spared: int, num_further: int) -> None:
        """Of a step with so many further tokens, for so many of which it has spared the forward."""
        if was_tried:
            self._spared.note(num_spared)
        if num_further:
            self._forwards.note(1 - num_spared / num_further)

    def fade(self, num_steps: int) -> None:
        """Go a little way back to the beginning: times may have changed."""
        self._forwards.fade(SLOW_FADING**num_steps)
