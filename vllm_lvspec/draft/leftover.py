"""What is left of a draft that was rejected, as a guess at the next one.

The target mostly says another word where the drafter's was, and behind it the drafter would draft the rest anew, one
forward for each token. Whether it would, one forward over all of it tells: drafts are verified by the drafter as
answers are by the target, so that they stay what they would have been (of rejected tokens as candidates for later
drafts: Ouroboros, arXiv 2402.13720).
"""

from __future__ import annotations

from collections.abc import Sequence

# Of no more requests at once it is tried: a forward is spared where all of them draft a token or more of what is left.
MOST_RECALLING = 2


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
