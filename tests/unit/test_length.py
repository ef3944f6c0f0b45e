"""What is known of costs and chances, and how far it says to draft."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from step_costs import FREE, RANDOM_COSTS

from vllm_lvspec.draft.length import (
    LEAST_GAIN,
    Acceptance,
    Answers,
    Corrections,
    DraftPlan,
    FixedChains,
    Load,
    Recalling,
    RequestHistory,
    RunningMean,
    StepCosts,
    expected_tokens,
    seconds_saved,
    smooth_costs,
)

# Costs ----------------------------------------------------------------------------------------------------------------


def test_costs_lie_on_lines_between_what_was_measured_and_go_on_behind_the_last():
    costs = StepCosts([1, 4, 8], [1.0, 1.3, 2.1], [0.1, 0.1, 0.3])
    assert [float(costs.of_target(rows)) for rows in (1, 2, 4, 6, 8)] == pytest.approx([1.0, 1.1, 1.3, 1.7, 2.1])
    assert float(costs.of_target(18)) == pytest.approx(2.1 + 10 * 0.2)
    assert costs.of_draft(np.array([1, 3, 6, 10])).tolist() == pytest.approx([0.1, 0.1, 0.2, 0.4])


def test_behind_a_single_measured_point_every_row_costs_as_much():
    # Measuring ends where a forward takes seconds; rows that were never measured are not free.
    costs = StepCosts([1], [1.5], [0.2])
    assert costs.of_target(np.array([1, 7, 900])).tolist() == pytest.approx([1.5, 10.5, 1350])
    assert float(costs.of_draft(12)) == pytest.approx(2.4)


def test_context_costs_by_the_token_whatever_the_rows():
    costs = StepCosts([1, 2], [1.0, 2.0], [0.1, 0.2], target_per_context=1e-3, draft_per_context=1e-4)
    assert float(costs.of_target(2, 5000.0)) == pytest.approx(7.0)
    assert costs.of_draft(np.array([1, 2]), np.array([1000.0, 3000.0])).tolist() == pytest.approx([0.2, 0.5])


@settings(deadline=None)
@given(RANDOM_COSTS, st.integers(1, 100), st.integers(1, 100))
def test_more_rows_never_cost_less(costs, few, more):
    few, more = sorted((few, more))
    assert costs.of_target(few) <= costs.of_target(more) + 1e-12
    assert costs.of_draft(few) <= costs.of_draft(more) + 1e-12


@settings(max_examples=100, deadline=None)
@given(RANDOM_COSTS, st.integers(1, 4000))
def test_costs_of_one_batch_are_those_of_several(costs, rows):
    for cost in (costs, replace(costs, rows=[3], target=[2.0], draft=[0.1])):
        assert cost.of_target(rows, 7.0) == pytest.approx(float(cost.of_target(np.array([rows]), 7.0)[0]))
        assert cost.of_draft(rows) == pytest.approx(float(cost.of_draft(np.array([rows]))[0]))


# What is learnt -------------------------------------------------------------------------------------------------------

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


@settings(max_examples=200, deadline=None)
@given(RANDOM_COSTS, st.integers(1, 64), st.integers(1, 12), st.floats(0, 1), st.floats(0, 5000), st.floats(0, 1e-3))
def test_seconds_saved_are_those_between_two_ways_to_the_same_tokens(costs, num, length, share, context, per_row):
    costs = replace(costs, target_per_row_context=per_row)
    tokens, many = 1 + share * length, 1000
    alone = many * costs.of_target(num, context)
    step = costs.of_target(num * (1 + length), context) + length * per_row * context
    for _ in range(length):
        step += costs.of_draft(num, context / 10)
    saved = seconds_saved(costs, Load(num, num, context, context, context / 10), length, tokens, length)
    assert many * num * saved == pytest.approx(alone - LEAST_GAIN * many / tokens * step)


@settings(max_examples=200, deadline=None)
@given(RANDOM_COSTS, st.integers(1, 64), st.data())
def test_requests_without_drafts_wait_for_those_with_them_and_emit_one_token_a_step(costs, num, data):
    costs = replace(costs, target_per_row_context=data.draw(st.floats(0, 1e-3)), first=data.draw(st.floats(0.5, 9)))
    drafting, length = data.draw(st.integers(1, num)), data.draw(st.integers(1, 12))
    share, context = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 500))
    verified, seen = context * drafting, context * drafting / 10
    load = Load(num, drafting, context * num, verified, seen)
    step = costs.of_target(num + drafting * length, context * num)
    step += (costs.first + length - 1) * costs.of_draft(drafting, seen)
    step += costs.target_per_row_context * length * verified
    emitted = (num - drafting) + drafting * (1 + share * length)
    alone = costs.of_target(num, context * num) / num
    saved = seconds_saved(costs, load, length, 1 + share * length, length)
    assert saved == pytest.approx(alone - LEAST_GAIN * step / emitted)
    # As many of the same kind as there are requests: all have drafts.
    grown = load.grown(num, num)
    assert seconds_saved(costs, grown, length, 2.0, length) == pytest.approx(
        seconds_saved(costs, Load(num, num, context * num, context * num, context * num / 10), length, 2.0, length)
    )


GRAPHS = StepCosts([1, 100], [1.0, 2.0], [0.1, 0.1], target_per_context=1e-4, pieces=[1.5, 2.1])  # 1.5 by the host


@pytest.mark.parametrize(
    ("num", "drafting", "context", "length", "step"),
    [
        pytest.param(1, 1, 0, 4, 1 + 4 / 99, id="one request has a graph of its own"),
        pytest.param(4, 4, 0, 10, 1 + 43 / 99, id="so have whole drafts"),
        pytest.param(4, 4, 0, 9, 1 + 43 / 99, id="others are padded"),
        pytest.param(16, 16, 0, 1, 1.5 + 0.6 * 31 / 99, id="or launched in pieces, where padding costs more"),
        pytest.param(4, 3, 0, 10, 1.5 + 0.6 * 33 / 99, id="as those of some requests are"),
        pytest.param(4, 3, 10_000, 10, 2 + 33 / 99, id="for which nobody waits who waits for the device"),
    ],
)
def test_a_step_that_is_no_graph_costs_what_its_launch_takes(num, drafting, context, length, step):
    load = Load(num, drafting, context, context * drafting / num, 0.0)
    alone = GRAPHS.of_target(num, context) / num
    saved = seconds_saved(GRAPHS, load, length, 3.0, 10)
    assert saved == pytest.approx(alone - LEAST_GAIN * (step + 0.1 * length) / (num + 2 * drafting))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(0, 3), st.integers(1, 10), st.floats(0, 9000))
def test_a_plan_foretells_what_is_foretold_of_its_lengths(num, num_others, length, context):
    costs = replace(GRAPHS, first=2.0, target_per_row_context=1e-6)
    own = np.full(num, context)
    plan = DraftPlan(costs, np.full(num, 0.5), own, own / 10, 10, num_others, num_others * context)
    for _ in range(length):
        plan.take(np.arange(num), np.full(num, 0.5))
    every = num + num_others
    load = Load(every, num, every * context, num * context, num * context / 10)
    alone = costs.of_target(every, every * context) / every
    saved = seconds_saved(costs, load, length, (plan.tokens - num_others) / num, 10)
    assert alone - LEAST_GAIN * plan.cost / plan.tokens == pytest.approx(saved)


def test_a_plan_has_no_more_rows_than_there_is_room_for():
    plan = DraftPlan(FREE, np.array([0.5, 0.9, 0.7]), np.zeros(3), np.zeros(3), 10, 1, 0.0, most_rows=9)
    active = np.arange(3)
    plan.take(active, np.ones(3))
    assert plan.going_on(active).tolist() == [1, 2]
    plan.take(np.array([1, 2]), np.ones(2))
    assert plan.going_on(np.array([1, 2])).tolist() == []


def test_costs_are_corrected_by_what_steps_of_about_as_many_requests_take():
    costs, corrections = StepCosts([1, 10], [1.0, 2.0], [0.1, 0.2], 0.01, 0.02, 0.03, prompt=5.0), Corrections()
    assert corrections.applied(costs, 5, 5) == costs
    for part, ratio in (("target", 3.0), ("draft", 7.0), ("first", 14.0)):
        told = [corrections.note(part, 4 + i % 4, ratio * 2.0, 2.0) for i in range(16)]
        assert told[:-1] == [None] * 15
        corrections.correct(part, 5, told[-1])
    corrected = corrections.applied(costs, 7, 7)
    assert corrected.target == pytest.approx([3.0, 6.0])
    assert corrected.draft == pytest.approx([0.7, 1.4])
    assert corrected.first == pytest.approx(2.0)
    assert corrected.target_per_context == pytest.approx(0.03)
    assert corrected.draft_per_context == pytest.approx(0.14)
    assert corrected.target_per_row_context == pytest.approx(0.09)
    assert corrected.prompt == 5.0
    assert corrections.applied(replace(costs, prompt=6.0), 7, 7) == replace(corrected, prompt=6.0)
    for others in (1, 3, 8, 64):  # of which nothing is known yet
        assert corrections.applied(costs, others, others) == corrected
    # What is foretold is what was corrected; one step that waited for something else changes nothing.
    told = [corrections.note("target", 4, 100.0 if i == 9 else 1.5, 1.0) for i in range(16)]
    corrections.correct("target", 4, told[-1])
    assert corrections.applied(costs, 4, 4).target == pytest.approx([4.5, 9.0])
    before = corrections.applied(costs, 4, 4)
    for _ in range(20_000):
        corrections.fade(1)
    faded = corrections.applied(costs, 4, 4)
    assert faded.target == before.target  # these are noted whether anything is drafted or not
    assert faded.draft == pytest.approx(costs.draft, rel=0.01)


def test_steps_of_which_a_part_is_done_while_the_drafter_runs_are_foretold_by_themselves():
    costs, corrections = StepCosts([1, 100], [1.0, 1.0], [0.01, 0.01]), Corrections()
    load = Load(1, 1, 0.0, 0.0, 0.0)

    def saved() -> float:
        return seconds_saved(corrections.applied(costs, 1, 1), load, 10, 2.0, 10)

    corrections.correct("verification", 1, 2.0)  # nothing else is known yet
    assert saved() == pytest.approx(2.0 - LEAST_GAIN * (2.0 + 0.1) / 2)
    corrections.correct("target", 1, 3.0 / 2.0)  # of which the host's part is not hidden
    assert corrections.factor("target", 1) == pytest.approx(3.0)
    assert saved() == pytest.approx(3.0 - LEAST_GAIN * (2.0 + 0.1) / 2)
    corrections.correct("draft", 1, 2.0)
    assert saved() == pytest.approx(3.0 - LEAST_GAIN * (2.0 + 0.1 + 0.1 * 0.9) / 2, abs=0.02)


def test_corrections_stay_within_reason():
    costs, corrections = StepCosts([1], [1.0], [0.1]), Corrections()
    for _ in range(10):
        corrections.correct("draft", 1, 1000.0)
        corrections.correct("target", 1, 0.001)
    assert 1 < corrections.applied(costs, 1, 1).draft[0] / 0.1 < 100
    assert 0.01 < corrections.applied(costs, 1, 1).target[0] < 1


def test_the_price_of_prompts_fades_while_none_is_read():
    costs = StepCosts([1], [1.0], [0.1], prompt=2.0)
    assert 1.99 < costs.faded(1).prompt < 2.0
    assert replace(costs.faded(1), prompt=2.0) == costs


# The plan of a step ---------------------------------------------------------------------------------------------------


def plan_of(costs, rates, target_context=None, draft_context=None, max_length=40) -> DraftPlan:
    rates = np.array(rates, dtype=float)
    nothing = np.zeros(len(rates))
    return DraftPlan(
        costs,
        rates,
        nothing if target_context is None else np.array(target_context, dtype=float),
        nothing if draft_context is None else np.array(draft_context, dtype=float),
        max_length,
    )


def best_saved(costs, rates, target_context=0.0, draft_context=0.0, max_length=40) -> float:
    """Seconds saved per token by drafts of the best length for all, each with as much in the caches."""
    num = len(rates)
    load = Load(num, num, num * target_context, num * target_context, num * draft_context)
    lengths, tokens = np.arange(1, max_length + 1), expected_tokens(np.array(rates), max_length)
    return max(seconds_saved(costs, load, lengths, tokens, max_length))


RATES = st.lists(st.floats(0, 0.99), min_size=1, max_size=6)


def speed_of(costs, rates, lengths, target_context=0.0, draft_context=None) -> float:
    """Expected tokens a second where request r drafts `lengths[r]` tokens, from first principles."""
    context = np.zeros(len(rates)) if draft_context is None else np.array(draft_context)
    tokens = sum(sum(rate**i for i in range(length + 1)) for rate, length in zip(rates, lengths, strict=True))
    seconds = costs.of_target(len(rates) + sum(lengths), target_context)
    seconds += costs.target_per_row_context * sum(lengths) * target_context / len(rates)  # as much of each
    for step in range(max(lengths)):
        drafting = [r for r, length in enumerate(lengths) if length > step]
        seconds += costs.of_draft(len(drafting), context[drafting].sum())
    return tokens / seconds


@settings(max_examples=200, deadline=None)
@given(RANDOM_COSTS, RATES, st.integers(1, 8), st.floats(0, 1000), st.floats(0, 1000))
def test_drafting_is_worth_it_where_a_length_for_all_promises_more_than_none(
    costs, rates, max_length, target_context, draft_context
):
    num = len(rates)
    contexts = [target_context] * num, [draft_context] * num
    speeds = [
        speed_of(costs, rates, [length] * num, num * target_context, contexts[1]) for length in range(max_length + 1)
    ]
    least = LEAST_GAIN * speeds[0]
    assume(abs(max(speeds[1:]) - least) > 1e-9)
    assert (best_saved(costs, rates, target_context, draft_context, max_length) > 0) == (max(speeds[1:]) > least)


def test_no_length_beyond_the_longest_is_hoped_for():
    # One drafted token gains too little to bother, two are enough.
    costs = StepCosts([1, 100], [1.0, 1.0], [0.9, 0.9])
    assert speed_of(costs, [0.99], [1]) < LEAST_GAIN < speed_of(costs, [0.99], [2])
    assert best_saved(costs, [0.99], max_length=1) <= 0 < best_saved(costs, [0.99], max_length=2)


@settings(max_examples=100, deadline=None)
@given(RANDOM_COSTS, RATES, st.data())
def test_a_plan_counts_tokens_and_seconds_as_they_come(costs, rates, data):
    context = data.draw(st.lists(st.integers(0, 900), min_size=len(rates), max_size=len(rates)))
    plan = plan_of(costs, rates, [100] * len(rates), context)
    lengths = np.zeros(len(rates), dtype=int)
    active = np.arange(len(rates))
    for _ in range(data.draw(st.integers(1, 4))):
        plan.take(active, np.array(rates)[active])
        lengths[active] += 1
        speed = speed_of(costs, rates, lengths.tolist(), 100.0 * len(rates), context)
        assert plan.tokens / plan.cost == pytest.approx(speed)
        active = active[data.draw(st.lists(st.booleans(), min_size=len(active), max_size=len(active)))]
        if not len(active):
            break


@settings(max_examples=100, deadline=None)
@given(RANDOM_COSTS, RATES, st.integers(1, 9), st.integers(1, 4))
def test_a_plan_counts_what_requests_without_drafts_cost_and_emit(costs, rates, num_others, length):
    costs = replace(costs, target_per_context=1e-4, target_per_row_context=1e-5, first=3.0)
    num = len(rates)
    plan = DraftPlan(costs, np.array(rates), np.full(num, 100.0), np.full(num, 10.0), 8, num_others, 70.0 * num_others)
    for _ in range(length):
        plan.take(np.arange(num), np.array(rates))
    context = 100.0 * num
    seconds = costs.of_target(num + num_others + num * length, context + 70.0 * num_others)
    seconds += (2 + length) * costs.of_draft(num, 10.0 * num) + length * costs.target_per_row_context * context
    assert plan.cost == pytest.approx(seconds)
    assert plan.tokens == pytest.approx(num_others + sum(sum(rate**i for i in range(length + 1)) for rate in rates))


def speed_with(plan: DraftPlan, requests) -> float:
    """Expected tokens a second if `requests` drafted one more token, and then nobody."""
    after = copy.deepcopy(plan)
    if len(requests):
        after.take(np.array(requests), plan.rates[list(requests)])
    return after.tokens / after.cost


def partial_plan(data, costs, rates, context) -> tuple[DraftPlan, np.ndarray]:
    """A plan in the middle of a step, and who may draft another token."""
    plan = plan_of(costs, rates, None, context)
    requests = np.arange(len(rates))
    for _ in range(data.draw(st.integers(0, 3))):
        chances = data.draw(st.lists(st.floats(0, 1), min_size=len(requests), max_size=len(requests)))
        plan.take(requests, np.array(chances))
        some = requests[data.draw(st.lists(st.booleans(), min_size=len(requests), max_size=len(requests)))]
        requests = some if len(some) else requests
    return plan, requests


@settings(max_examples=200, deadline=None)
@given(RANDOM_COSTS, RATES, st.integers(0, 900), st.data())
def test_of_all_groups_that_could_draft_one_more_token_the_one_of_most_tokens_a_second_does(
    costs, rates, context, data
):
    # With as much in the cache of everyone, only how many go on decides what it costs.
    plan, requests = partial_plan(data, costs, rates, [context] * len(rates))
    chosen = plan.going_on(requests).tolist()
    groups = itertools.chain.from_iterable(itertools.combinations(requests, n) for n in range(len(requests) + 1))
    best = max(speed_with(plan, group) for group in groups)
    assert speed_with(plan, chosen) == pytest.approx(best, rel=1e-9)
    assert chosen == [r for r in requests if r in chosen]  # in their order, and none of others


@settings(max_examples=200, deadline=None)
@given(RANDOM_COSTS, RATES, st.data())
def test_where_contexts_differ_those_of_the_best_chances_go_on_as_many_as_pay(costs, rates, data):
    context = data.draw(st.lists(st.integers(0, 900), min_size=len(rates), max_size=len(rates)))
    plan, requests = partial_plan(data, costs, rates, context)
    chosen = plan.going_on(requests).tolist()
    order = sorted(requests, key=lambda r: -plan.survival[r] * plan.rates[r])
    assert sorted(order[: len(chosen)]) == sorted(chosen)
    best = max(speed_with(plan, order[:n]) for n in range(len(order) + 1))
    assert speed_with(plan, chosen) == pytest.approx(best, rel=1e-9)


def test_nobody_goes_on_for_nothing():
    plan = plan_of(FREE, [0.5, 0.5])
    plan.take(np.arange(2), np.array([0.0, 0.7]))
    # The first can't be accepted any more: not even a free token is drafted for it.
    assert plan.going_on(np.arange(2)).tolist() == [1]
    plan.take(np.array([1]), np.array([0.0]))
    assert plan.going_on(np.array([1])).tolist() == []


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0, 0.99), st.floats(0, 1), st.floats(0, 1), st.integers(1, 12)
)  # fmt: skip
def test_one_request_is_drafted_for_as_far_as_is_best_where_costs_are_lines(rate, per_row, drafting, max_length):
    # Then speed over length has one hill, and to stop at the first step down is to stop at its top.
    costs = StepCosts([1, 101], [1.0, 1.0 + 100 * per_row], [drafting, drafting])
    plan = plan_of(costs, [rate], max_length=max_length)
    length, active = 1, np.array([0])
    plan.take(active, np.array([rate]))
    while length < max_length and len(plan.going_on(active)):
        plan.take(active, np.array([rate]))
        length += 1
    best = max(speed_of(costs, [rate], [n]) for n in range(1, max_length + 1))
    assert speed_of(costs, [rate], [length]) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("num_requests", [1, 8, 64])
def test_where_every_row_costs_as_much_as_another_nobody_drafts(num_requests):
    costs = StepCosts([1, 2, 1000], [0.02, 0.04, 20.0], [0.0, 0.0, 0.0])
    assert best_saved(costs, [0.99] * num_requests) <= 0


@pytest.mark.parametrize("num_requests", [1, 8, 64])
def test_where_rows_cost_nothing_everybody_with_good_chances_drafts_fully(num_requests):
    costs = StepCosts([1, 1000], [1.0, 1.0], [0.02, 0.02])
    plan = plan_of(costs, [0.95] * num_requests)
    assert best_saved(costs, [0.95] * num_requests) > 0
    everybody = np.arange(num_requests)
    for _ in range(10):
        plan.take(everybody, np.full(num_requests, 0.95))
        assert plan.going_on(everybody).tolist() == everybody.tolist()


def test_the_same_drafts_pay_for_few_requests_and_not_for_many():
    # Bound by memory up to 64 rows, by arithmetic beyond.
    costs = StepCosts([1, 64, 1024], [1.0, 1.0, 16.0], [0.1, 0.1, 1.6])
    worth = [best_saved(costs, [0.8] * num) > 0 for num in (1, 4, 16, 64, 256)]
    assert worth == sorted(worth, reverse=True)
    assert worth[0]
    assert not worth[-1]


def test_a_long_video_in_the_targets_cache_makes_drafts_worth_more_and_one_in_the_drafters_less():
    # Rows of drafts share one reading of the cache.
    costs = StepCosts([1, 101], [1.0, 51.0], [0.1, 0.1], target_per_context=1e-4, draft_per_context=1e-4)
    assert best_saved(costs, [0.6], 0, 0) <= 0
    assert best_saved(costs, [0.6], 50_000, 0) > 0
    assert best_saved(costs, [0.6], 50_000, 5_000) > 0
    assert best_saved(costs, [0.6], 50_000, 50_000) <= 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=9))
def test_smooth_costs_rise_ever_more_steeply_and_no_higher_than_what_was_measured(seconds):
    rows = [1 << i for i in range(len(seconds))]
    smooth = smooth_costs(rows, seconds)
    assert all(a <= b * (1 + 1e-9) for a, b in zip(smooth, seconds, strict=True))
    slopes = np.diff(smooth) / np.diff(rows)
    assert (slopes >= -1e-9).all()
    assert (np.diff(slopes) >= -1e-9).all()
    # And they touch it: at both ends of what never falls, and wherever that is such a curve already.
    assert smooth[0] == pytest.approx(min(seconds))
    assert smooth[-1] == pytest.approx(seconds[-1])
    assert smooth_costs(rows, smooth) == pytest.approx(smooth)


def test_a_stair_in_the_costs_does_not_end_drafts_that_pay_on_the_next_landing():
    rows, seconds = [1, 2, 4, 16], [1.0, 1.0, 2.0, 2.0]
    costs = StepCosts(rows, smooth_costs(rows, seconds), [0.02] * 4)
    plan = plan_of(costs, [0.95])
    assert best_saved(costs, [0.95]) > 0
    for _ in range(10):
        plan.take(np.array([0]), np.array([0.95]))
        assert plan.going_on(np.array([0])).tolist() == [0]


def test_what_is_left_is_tried_while_it_spares_more_than_it_costs():
    recalling = Recalling()
    assert recalling.share == 1 and recalling.pays(2.0) and not recalling.pays(4.0)
    for _ in range(40):  # three of four further tokens
        recalling.learn(True, 3, 4)
    assert recalling.share == pytest.approx(0.25, abs=0.1)
    for _ in range(300):
        recalling.learn(True, 0, 9)
    assert recalling.share > 0.9
    assert not recalling.pays(0.0)
    assert not recalling.pays(1.0)
    refused = 1
    while not recalling.pays(1.0):
        refused += 1
    assert 3 < refused < 200  # times may have changed
    recalling.learn(False, 0, 0)
    before = recalling.share
    recalling.fade(10**5)
    assert before < 1 and recalling.share == pytest.approx(1, abs=1e-6)
