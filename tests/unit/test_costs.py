"""What steps cost, and what drafts save."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_costs import GRAPHS, RANDOM_COSTS

from vllm_lvspec.draft.costs import LEAST_GAIN, Corrections, Load, StepCosts, seconds_saved, smooth_costs


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
