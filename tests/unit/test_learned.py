"""What is learned of drafts and answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lvspec.draft.learned import Acceptance, Answers, FixedChains, RequestHistory, RunningMean

CONFIDENCES = [1 / (1 + np.exp(-x)) for x in (-6, *np.arange(-3.5, 8), 10)]  # one of every bin


def drafted(confidences, num_tokens=10) -> RequestHistory:
    return RequestHistory(confidences=list(confidences), num_tokens=num_tokens)


def outcomes_of(acceptance: Acceptance, history: RequestHistory, num_tokens: int, num_verified: int) -> list:
    """What learning adds, `(judged, accepted)` of every bin that changes, by falling confidence."""
    judged, accepted = acceptance.judged.copy(), acceptance.accepted.copy()
    acceptance.learn(history, num_tokens - history.num_tokens - 1, num_verified)
    judged, accepted = acceptance.judged - judged, acceptance.accepted - accepted
    return [(round(judged[i], 6), round(accepted[i], 6)) for i in reversed(np.flatnonzero(judged))]


def test_before_anything_is_learnt_chances_follow_the_drafters_own_confidence():
    chances = Acceptance().chances(CONFIDENCES)
    assert (np.diff(chances) > 0).all()
    assert np.abs(chances - np.array(CONFIDENCES)).max() < 0.15
    assert 0.7 < Acceptance().mean() < 0.9


@pytest.mark.parametrize(
    ("num_tokens", "num_verified", "outcomes"),
    [
        # Ten tokens before; the first number is how many there are after the step, which adds one of the target's own.
        (11, 3, [(1, 0)]),  # the first was refused: nothing is known of the others
        (12, 3, [(1, 1), (1, 0)]),
        (13, 3, [(1, 1), (1, 1), (1, 0)]),
        (14, 3, [(1, 1), (1, 1), (1, 1)]),  # all were accepted
        (13, 2, [(1, 1), (1, 1)]),  # only two were verified, and both accepted
        (12, 2, [(1, 1), (1, 0)]),
        (12, 1, [(1, 1)]),
        (11, 1, [(1, 0)]),
        (11, 0, []),  # the step had no room for drafts
        (10, 3, [(1, 0)]),
        (30, 3, [(1, 1), (1, 1), (1, 1)]),
        (14, 9, [(1, 1), (1, 1), (1, 1)]),
    ],
)
def test_drafted_tokens_are_judged_up_to_the_first_that_was_refused(num_tokens, num_verified, outcomes):
    acceptance, history = Acceptance(), drafted([0.99, 0.9, 0.5])
    expected = acceptance.chances([0.99, 0.9, 0.5])[: len(outcomes)].sum()
    assert outcomes_of(acceptance, history, num_tokens, num_verified) == outcomes
    assert history.accepted == sum(accepted for _, accepted in outcomes)
    assert history.expected == pytest.approx(expected)
    # A draft is judged once.
    assert outcomes_of(acceptance, history, num_tokens + 5, 3) == []


def test_impossible_and_certain_confidences_are_judged_like_any_other():
    acceptance = Acceptance()
    assert outcomes_of(acceptance, drafted([1.0, 0.0]), 12, 2) == [(1, 1), (1, 0)]
    assert acceptance.chances([0.0, 1.0]).tolist() == acceptance.chances([1e-7, 1 - 1e-7]).tolist()


def test_chances_become_the_shares_that_were_accepted_and_rise_with_confidence():
    acceptance = Acceptance()
    shares = np.linspace(0.05, 0.95, len(CONFIDENCES))  # the drafter is not what it thinks it is
    for i in range(400):
        for confidence, share in zip(CONFIDENCES, shares, strict=True):
            accepted = int((i + 1) * share) - int(i * share)
            acceptance.learn(drafted([confidence]), accepted, 1)
    chances = acceptance.chances(CONFIDENCES)
    assert (np.diff(chances) > 0).all()
    assert np.abs(chances - shares).max() < 0.02
    assert acceptance.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("num_accepted", "low", "high"), [(4, 0.95, 1.0), (0, 0.0, 0.4)])
def test_few_drafts_tell_how_much_is_accepted_on_average(num_accepted, low, high):
    acceptance = Acceptance()
    for _ in range(10):
        acceptance.learn(drafted([0.9, 0.99, 0.999, 0.95]), num_accepted, 4)
    assert low < acceptance.mean() < high


def test_old_days_are_forgotten():
    acceptance = Acceptance()
    for _ in range(300):
        acceptance.learn(drafted([0.9] * 10), 10, 10)
    assert acceptance.judged.max() == 512
    assert acceptance.chances([0.9])[0] > 0.97
    others = acceptance.chances([0.5, 0.999])
    for _ in range(1500):
        acceptance.learn(drafted([0.9]), 0, 1)
    assert acceptance.chances([0.9])[0] < 0.1
    assert (acceptance.chances([0.5, 0.999]) == others).all()
    assert acceptance.judged.max() == 512


@settings(deadline=None)
@given(st.lists(st.tuples(st.lists(st.floats(0, 1), max_size=8), st.integers(0, 9), st.integers(0, 9)), max_size=80))
def test_chances_stay_chances_whatever_is_learnt(drafts):
    acceptance, history = Acceptance(), RequestHistory()
    for confidences, emitted, num_verified in drafts:
        history.confidences = confidences
        acceptance.learn(history, emitted - 1, num_verified)
    chances = acceptance.chances(CONFIDENCES)
    assert ((chances > 0) & (chances < 1)).all()
    assert 0 < acceptance.mean() < 1
    assert (acceptance.judged <= 512).all()
    num_judged = sum(min(len(confidences), num_verified) for confidences, _, num_verified in drafts)
    assert 0 <= history.accepted <= num_judged
    assert 0 <= history.expected <= num_judged
    assert history.factor > 0


def test_a_requests_own_past_outweighs_that_of_others_slowly():
    acceptance = Acceptance()
    good, bad, new = RequestHistory(), RequestHistory(), RequestHistory()
    assert new.factor == 1
    factors = []
    for _ in range(200):
        good.confidences, good.num_tokens = [0.9], 10
        acceptance.learn(good, 1, 1)
        bad.confidences, bad.num_tokens = [0.9], 10
        acceptance.learn(bad, 0, 1)
        factors.append(bad.factor)
    assert factors[0] > 0.9  # one token says little
    assert factors[-1] < 0.25
    assert good.factor > 1.5
    assert acceptance.chances([0.9])[0] * good.factor == pytest.approx(1, abs=0.25)


# Drafts of fixed length -----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-10, 10), max_size=20), st.floats(-10, 10), st.integers(1, 5))
def test_a_running_mean_is_that_of_its_first_values_and_of_what_was_noted(values, start, weight):
    mean = RunningMean(1000, start, weight)
    for value in values:
        mean.note(value)
    assert mean.mean == pytest.approx(np.mean([start] * weight + values), abs=1e-9)


def test_a_running_mean_without_any_value_is_infinite_and_forgets_the_oldest():
    mean = RunningMean(10)
    assert mean.mean == float("inf")
    mean.note(3)
    assert mean.mean == 3
    for _ in range(100):
        mean.note(5)
    assert mean.mean == pytest.approx(5, abs=1e-3)
    assert mean.count == 10


def test_a_running_mean_that_fades_goes_back_to_where_it_began():
    mean = RunningMean(100, 1.0, 4)
    for _ in range(50):
        mean.note(0.0)
    before = mean.mean
    means = []
    for _ in range(400):
        mean.fade(0.98)
        means.append(mean.mean)
    assert before < means[0] < means[-1] == pytest.approx(1.0, abs=0.01)
    assert np.all(np.diff(means) > 0)
    assert mean.count == pytest.approx(4, abs=0.1)


def test_chains_of_fixed_length_are_thought_well_of_until_they_fail():
    chains = FixedChains()
    assert chains.tokens(10) == 11
    for _ in range(100):
        chains.learn(2, 10)
    assert 3 < chains.tokens(10) < 4
    assert 1.5 < chains.tokens(4) < 2.5  # the same share of another length
    lasting = chains.tokens(10)
    for _ in range(100):
        chains.fade(1)
    assert lasting < chains.tokens(10) < 1.1 * lasting  # not soon again
    for _ in range(30_000):
        chains.fade(1)
    assert chains.tokens(10) > 10


def test_much_is_left_of_an_answer_until_others_were_short():
    answers = Answers()
    assert answers.tokens_left(1000) == 1000
    for length in (4, 6, 5):
        answers.learn(length)
    assert answers.tokens_left(1000) == 5
    assert answers.tokens_left(3) == 3
