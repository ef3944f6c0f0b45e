"""How far a step's drafts go."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from step_costs import FREE, GRAPHS, RANDOM_COSTS

from vllm_lvspec.draft.costs import LEAST_GAIN, Load, StepCosts, expected_tokens, seconds_saved, smooth_costs
from vllm_lvspec.draft.plan import DraftPlan


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


def test_a_stair_in_the_costs_does_not_end_drafts_that_pay_on_the_next_landing():
    rows, seconds = [1, 2, 4, 16], [1.0, 1.0, 2.0, 2.0]
    costs = StepCosts(rows, smooth_costs(rows, seconds), [0.02] * 4)
    plan = plan_of(costs, [0.95])
    assert best_saved(costs, [0.95]) > 0
    for _ in range(10):
        plan.take(np.array([0]), np.array([0.95]))
        assert plan.going_on(np.array([0])).tolist() == [0]
