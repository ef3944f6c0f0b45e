"""For whom is drafted, and how far."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_model import (
    VOCAB,
    CopyingModel,
    ProposingDrafter,
    SlotModel,
    Target,
    expected_entries,
    extended,
    kept_tokens,
    make_drafter,
    make_request,
    oracle,
    sure,
)
from step_costs import FREE, LOADED, RANDOM_COSTS

from vllm_lvspec.draft.costs import StepCosts
from vllm_lvspec.draft.drafter import Drafter
from vllm_lvspec.draft.plan import DraftPlan
from vllm_lvspec.draft.pruning import STRATEGIES
from vllm_lvspec.draft.request import DraftRequest

# How far --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [False, True])
def test_free_drafting_goes_to_the_full_length(copies):
    target = Target()
    model = CopyingModel(target, confidence=sure) if copies else SlotModel(confidence=sure)
    drafter = make_drafter(model, costs=FREE)
    requests = [target.run(make_request("short", max_draft=2)), target.run(make_request("long"))]
    assert drafter.propose(requests, 7) == [
        oracle(requests[0], 2, copies=copies),
        oracle(requests[1], 7, copies=copies),
    ]
    assert [len(b.seq_lens) for b in model.batches] == [2, 2, 1, 1, 1, 1, 1]
    assert all(model.asked_for_probs)


@pytest.mark.parametrize("copies", [False, True])
def test_where_drafting_never_pays_nothing_is_touched_and_later_drafts_are_right(copies):
    target = Target()
    model = CopyingModel(target, confidence=sure) if copies else SlotModel(confidence=sure)
    drafter = make_drafter(model, costs=LOADED)
    requests = [target.run(make_request(name)) for name in "ab"]
    for step in range(3):
        assert drafter.propose(requests, 5) == [[], []]
        assert drafter.counts["skipped_cost"] == 2 * (step + 1)
        requests = [target.run(extended(r, [step])) for r in requests]
    assert model.encoded == len(model.batches) == len(model.slots) == 0
    assert model.pool.num_free == model.pool.num_pages
    assert drafter.counts["prefills"] == drafter.counts["drafted_requests"] == 0
    drafter.payoff.costs = FREE
    assert drafter.propose(requests, 5) == [oracle(r, 5, copies=copies) for r in requests]
    assert drafter.counts["skipped_cost"] == 6


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("steps_alone", [1, 2, 5])
def test_drafts_after_steps_without_any_are_right_though_the_last_ones_were_refused(copies, steps_alone):
    target = Target()
    model = CopyingModel(target, confidence=sure) if copies else SlotModel(confidence=sure)
    drafter = make_drafter(model, costs=FREE)
    request = target.run(make_request())
    (draft,) = drafter.propose([request], 6)
    request = target.run(extended(request, [(draft[0] + 1) % VOCAB], 6))
    drafter.payoff.costs = LOADED
    for token in range(steps_alone):
        assert drafter.propose([request], 6) == [[]]
        request = target.run(extended(request, [token]))
    drafter.payoff.costs = FREE
    # What was drafted and refused lies where the target's tokens belong.
    assert drafter.propose([request], 6) == [oracle(request, 6, copies=copies)]


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("max_batch_tokens", [1000, 25])
def test_a_request_whose_drafts_are_unsure_leaves_and_the_sure_one_goes_on(copies, max_batch_tokens):
    # Every row costs the target a little, so that hopeless ones don't pay.
    costs = StepCosts([1, 1001], [1.0, 101.0], [0.0, 0.0])
    target = Target()
    options = {
        "confidence": lambda entries: 0.01 if 33 in entries[0] else 0.9999,
        "max_batch_tokens": max_batch_tokens,  # prompts may come in parts
    }
    model = CopyingModel(target, **options) if copies else SlotModel(**options)
    request = make_request("hopeless", prompt_len=22)
    request.token_ids[0] = 33
    requests = [target.run(request), target.run(make_request("sure"))]
    drafter = make_drafter(model, costs=costs)
    for step in range(3):
        drafts = drafter.propose(requests, 6)
        num_hopeless = len(drafts[0])
        assert num_hopeless == 1 if step == 0 else num_hopeless < 6  # it is trusted more as it is proven wrong
        assert drafts == [oracle(requests[0], num_hopeless, copies=copies), oracle(requests[1], 6, copies=copies)]
        assert [len(b.seq_lens) for b in model.batches[num_hopeless - 6 :]] == [1] * (6 - num_hopeless)
        # Every draft is accepted: who has left has less in the cache than who has gone on.
        requests = [target.run(extended(r, [*draft, 7], len(draft))) for r, draft in zip(requests, drafts, strict=True)]


def test_the_drafter_learns_from_what_became_of_its_drafts():
    rng = random.Random(0)
    drafter = make_drafter(SlotModel(confidence=sure, max_model_len=1000), costs=FREE)
    requests = [make_request("a"), make_request("b")]
    judged, accepted = drafter.payoff.acceptance.judged.sum(), drafter.payoff.acceptance.accepted.sum()
    for _ in range(30):
        drafts = drafter.propose(requests, 5)
        # What was learnt of the last step stands before the next drafts; nothing of these is known yet.
        assert drafter.payoff.acceptance.judged.sum() == judged
        assert drafter.payoff.acceptance.accepted.sum() == pytest.approx(accepted)
        for i, draft in enumerate(drafts):
            num_verified = rng.randint(0, len(draft))
            num_accepted = rng.randint(0, num_verified)
            requests[i] = extended(requests[i], [*draft[:num_accepted], 3], num_verified)
            judged += min(num_accepted + 1, num_verified)
            accepted += num_accepted


def planned_lengths(drafter, requests, most: list[int], others: list[DraftRequest]) -> list[int]:
    """How far the drafter should have gone in its last step, by a plan that is told the same, for `requests` by falling
    `most`, in a batch with `others`."""
    factors = np.array([drafter.payoff.histories[r.req_id].factor for r in requests])
    probs = [
        [SlotModel.random_prob(e) for e in entries_of_drafts(r, length)]
        for r, length in zip(requests, most, strict=True)
    ]
    seen = [len(kept_tokens(r)) + len(r.token_ids) - r.num_prompt_tokens for r in requests]
    rates = np.clip(drafter.payoff.acceptance.mean() * factors, 0, 0.99)
    context = np.array([len(r.token_ids) for r in requests])
    others_context = sum(len(r.token_ids) for r in others)
    plan = DraftPlan(drafter.payoff.costs, rates, context, np.array(seen), max(most), len(others), others_context)
    lengths = np.zeros(len(requests), dtype=int)
    active = np.arange(len(requests))
    while len(active):
        chances = [drafter.payoff.acceptance.chances([probs[i][lengths[i]]])[0] * factors[i] for i in active]
        lengths[active] += 1
        plan.take(active, np.clip(chances, 0, 1))
        active = active[[lengths[i] < most[i] for i in active]]
        active = plan.going_on(active) if len(active) else active
    return lengths.tolist()


def entries_of_drafts(request: DraftRequest, k: int) -> list[list[tuple]]:
    """What the cache holds when each of `k` tokens is drafted."""
    tokens, drafts = request.token_ids.tolist(), oracle(request, k)
    return [expected_entries(request, kept_tokens(request), tokens + drafts[:i]) for i in range(k)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_request_is_drafted_for_as_far_as_the_plan_goes(data):
    # The pool may be full, and prompts may come in parts: both change who stands where in a batch.
    num_pages, max_batch_tokens = data.draw(st.sampled_from([(9, 400), (1000, 400), (1000, 25), (1000, 5)]))
    drafter = make_drafter(SlotModel(num_pages, max_batch_tokens=max_batch_tokens))
    room = {"0": 6, "1": 3, "2": 6, "3": 1}
    requests = [make_request(name, 20 + int(name), max_draft=most) for name, most in room.items()]
    for _ in range(data.draw(st.integers(1, 6))):
        drafter.payoff.costs = StepCosts(
            [1, 101], [1.0, 1.0 + data.draw(st.floats(0, 30))], [0.0, data.draw(st.floats(0, 1))], 1e-4, 1e-5
        )
        drafts = drafter.propose(requests, 5)
        ready = [i for i, draft in enumerate(drafts) if draft]
        ready.sort(key=lambda i: -min(5, requests[i].max_draft_tokens))
        if ready:
            most = [min(5, requests[i].max_draft_tokens) for i in ready]
            others = [request for i, request in enumerate(requests) if i not in ready]
            planned = planned_lengths(drafter, [requests[i] for i in ready], most, others)
            assert [len(drafts[i]) for i in ready] == planned
        for i, draft in enumerate(drafts):
            accepted = data.draw(st.integers(0, len(draft)))
            requests[i] = extended(requests[i], [*draft[:accepted], 3], len(draft))


def test_a_request_whose_drafts_fail_is_soon_drafted_for_less_than_one_whose_drafts_hold():
    costs = StepCosts([1, 1001], [1.0, 1.0 + 1000 * 0.15], [0.02, 0.02])
    drafter = make_drafter(SlotModel(confidence=lambda entries: 0.9, max_model_len=2000), costs=costs)
    requests = [make_request("fails"), make_request("holds")]
    lens = []
    for _ in range(30):
        drafts = drafter.propose(requests, 8)
        lens.append([len(d) for d in drafts])
        requests = [
            extended(requests[0], [3], len(drafts[0])),
            extended(requests[1], [*drafts[1], 3], len(drafts[1])),
        ]
    assert lens[0][0] == lens[0][1]
    assert sum(fails for fails, _ in lens[-10:]) < 0.5 * sum(holds for _, holds in lens[-10:])


def test_a_released_request_has_no_past():
    drafter = make_drafter(SlotModel(confidence=sure), costs=FREE)
    request = make_request()
    drafter.propose([request], 4)
    drafter.release("a")
    judged = drafter.payoff.acceptance.judged.copy()
    drafter.propose([extended(request, [1, 2, 3], 4)], 4)
    assert (drafter.payoff.acceptance.judged == judged).all()
    assert drafter.payoff.histories["a"].expected == 0
    drafter.release("a")
    assert not drafter.payoff.histories


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_two_ranks_that_are_told_the_same_draft_the_same(data):
    ranks = [make_drafter(SlotModel(page_size=3)) for _ in range(2)]
    clocks = [time.perf_counter, lambda: random.random() * 1e6]
    costs = data.draw(RANDOM_COSTS)
    requests = [make_request(str(i)) for i in range(3)]
    for _ in range(data.draw(st.integers(1, 6))):
        drafts = []
        for rank, clock in zip(ranks, clocks, strict=True):
            rank.payoff.costs = costs
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(time, "perf_counter", clock)  # one rank may be slower than the other
                drafts.append(rank.propose(requests, 5))
        assert drafts[0] == drafts[1]
        assert ranks[0].counts == ranks[1].counts
        assert (ranks[0].payoff.acceptance.accepted == ranks[1].payoff.acceptance.accepted).all()
        for i, draft in enumerate(drafts[0]):
            accepted = data.draw(st.integers(0, len(draft)))
            requests[i] = extended(requests[i], [*draft[:accepted], 3], len(draft))


@pytest.mark.parametrize("drafting", [0.05, 0.08, 0.3])
def test_after_requests_that_were_drafted_for_badly_others_get_their_chance(drafting):
    drafter = make_drafter(
        SlotModel(confidence=lambda entries: 0.9), costs=StepCosts([1, 1000], [1.0, 1.0], [drafting] * 2)
    )
    lengths = []
    for number in range(8):
        request = make_request(str(number), max_draft=10**6)
        for _ in range(40):
            (draft,) = drafter.propose([request], 10)
            lengths.append(len(draft))
            request = extended(request, [(draft[0] if draft else 0) + 1], len(draft))  # always refused
        drafter.release(str(number))
    assert sum(length > 0 for length in lengths[-160:]) > 0, "it tries again now and then"
    assert sum(lengths[-160:]) < 0.5 * 10 * 160, "and does not insist"


# Whether at all -------------------------------------------------------------------------------------------------------


def only_if_faster(model=None, costs=None) -> Drafter:
    drafter = ProposingDrafter(model or SlotModel(), STRATEGIES["uniform"], 0.5, 10**6, only_if_faster=True)
    drafter.payoff.costs = costs
    return drafter


def run_fixed(drafter, names: str, num_steps: int, accepted: int, k: int = 10) -> list[list[int]]:
    """Lengths of the drafts of every step; of each, `accepted` tokens are, and nothing is released."""
    requests = [make_request(name, max_draft=10**6) for name in names]
    lengths = []
    for _ in range(num_steps):
        drafts = drafter.propose(requests, k)
        lengths.append([len(draft) for draft in drafts])
        requests = [
            extended(r, [*d[:accepted], (d[accepted] + 1) % VOCAB if d else 3], len(d))
            for r, d in zip(requests, drafts, strict=True)
        ]
    return lengths


# Ten tokens cost a step of the target, so that twice as many as that and a tenth must come of them.
AS_DEAR_AS_A_STEP = StepCosts([1, 1000], [1.0, 1.0], [0.1, 0.1])


@pytest.mark.parametrize(("accepted", "is_drafted"), [(0, False), (2, True), (5, True)])
def test_chains_are_drafted_whole_or_not_at_all_by_what_the_last_ones_brought(accepted, is_drafted):
    drafter = only_if_faster(SlotModel(max_model_len=10**6), AS_DEAR_AS_A_STEP)
    lengths = run_fixed(drafter, "ab", 200, accepted)
    assert lengths[0] == [10, 10], "nothing is known against it"
    assert set(map(tuple, lengths)) <= {(10, 10), (0, 0)}
    assert lengths[-1] == [10 * is_drafted] * 2
    assert (drafter.counts["skipped_cost"] > 0) == (not is_drafted)


def test_what_failed_is_tried_again_after_a_long_time():
    drafter = only_if_faster(SlotModel(max_model_len=10**6), AS_DEAR_AS_A_STEP)
    lengths = [length for (length,) in run_fixed(drafter, "a", 6000, 0)]
    assert sum(lengths[:100]) > 0
    assert 0 < sum(lengths[200:]) < 0.02 * 10 * 5800


def count_decisions(drafter, monkeypatch) -> list[int]:
    """Grows by a number of requests whenever it is decided anew whether they are drafted for."""
    decisions: list[int] = []
    decide = drafter.payoff._paying

    def counted(candidates, batch, max_length):
        decisions.append(len(candidates))
        return decide(candidates, batch, max_length)

    monkeypatch.setattr(drafter.payoff, "_paying", counted)
    return decisions


def test_a_refusal_stands_for_some_steps_and_then_it_is_decided_anew(monkeypatch):
    drafter = only_if_faster(SlotModel(max_model_len=10**6), LOADED)
    decisions = count_decisions(drafter, monkeypatch)
    assert run_fixed(drafter, "ab", 33, 0) == [[0, 0]] * 33
    assert decisions == [2, 2, 2]
    assert drafter.counts["skipped_cost"] == 66
    # Fewer requests may be another matter, and so are other costs.
    assert run_fixed(drafter, "a", 1, 0) == [[0]]
    assert decisions == [2, 2, 2, 1]
    drafter.payoff.costs = FREE
    assert run_fixed(drafter, "a", 1, 0) == [[10]]


def test_what_was_learned_is_believed_less_by_as_many_steps_as_a_refusal_stood_for():
    costs = replace(AS_DEAR_AS_A_STEP, target=[1.0, 1.0], draft=[10.0, 10.0], prompt=1.0)
    drafters = [only_if_faster(SlotModel(max_model_len=10**6), costs) for _ in range(2)]
    for drafter in drafters:
        for _ in range(50):
            drafter.payoff.chains.learn(3, 10)
    once, always = drafters
    run_fixed(once, "a", 161, 0)
    for _ in range(161):
        always.payoff.refusal = None  # it is decided anew in every step
        run_fixed(always, "a", 1, 0)
    assert once.payoff.chains.tokens(10) == pytest.approx(always.payoff.chains.tokens(10))
    assert once.payoff.costs.prompt == pytest.approx(always.payoff.costs.prompt)
    assert once.payoff.costs.prompt < 1.0


def test_a_refusal_does_not_stand_for_newcomers():
    # Half a second is saved for every token, or a little less.
    drafter = only_if_faster(SlotModel(max_model_len=10**6), replace(AS_DEAR_AS_A_STEP, prompt=10.0))
    for _ in range(1000):
        drafter.payoff.chains.learn(3, 10)
    assert drafter.propose([make_request("short", max_draft=10)], 10) == [[]]
    long = make_request("long", max_draft=100)
    assert [len(draft) for draft in drafter.propose([long], 10)] == [10]


# Up to 100 rows cost nothing; six requests have less, ten have more.
ROOM_FOR_SIX = StepCosts([1, 100, 101, 1100], [1.0, 1.0, 2.0, 1001.0], [0.01, 0.01, 0.01, 0.01])


def test_few_are_drafted_for_and_many_are_not():
    drafter = only_if_faster(SlotModel(max_model_len=10**6), ROOM_FOR_SIX)
    few, many = "abcdef", "ghijklmnop"
    assert run_fixed(drafter, few, 3, 5) == [[10] * 6] * 3
    for name in few:
        drafter.release(name)
    assert run_fixed(drafter, many, 3, 5) == [[0] * 10] * 3
    assert drafter.counts["skipped_cost"] == 30
    for name in many:
        drafter.release(name)
    assert run_fixed(drafter, few, 3, 5) == [[10] * 6] * 3


def test_whoever_is_drafted_for_goes_on_in_a_larger_batch_only_where_that_pays_there():
    drafter = only_if_faster(SlotModel(max_model_len=10**6), ROOM_FOR_SIX)
    few = "abcdef"
    assert run_fixed(drafter, few, 1, 5)[0] == [10] * 6
    # Four more find no room, and the six still have theirs.
    assert [length > 0 for length in run_fixed(drafter, "abcdefghij", 1, 5)[0]] == [True] * 6 + [False] * 4
    # In a batch of 94 drafts of the six cost as much as three more steps, in which all others would have said more.
    crowd = [*few, *(f"{i}" for i in range(88))]
    assert run_fixed(drafter, crowd, 1, 5) == [[0] * 94]
    assert [length > 0 for length in run_fixed(drafter, few, 1, 5)[0]] == [True] * 6


@pytest.mark.parametrize("sees_tokens", [True, False])
def test_adaptive_drafts_are_of_the_least_length_where_there_is_room_for_it(sees_tokens):
    # Nothing is likely to be accepted, and every row costs as much as another step.
    model = SlotModel(max_model_len=10**6, confidence=lambda entries: 0.1)
    drafter = make_drafter(model, costs=LOADED)
    drafter.payoff.only_if_faster, drafter.payoff.least_length, drafter.sees_tokens = False, 4, sees_tokens
    requests = [make_request("a"), make_request("b", max_draft=2)]
    assert [len(draft) for draft in drafter.propose(requests, 10)] == [4, 2]
    assert [len(draft) for draft in drafter.propose([make_request("c")], 3)] == [3]
    drafter.payoff.least_length = 1
    assert [len(draft) for draft in drafter.propose([make_request("d")], 10)] == [1]


def test_whether_adaptive_drafts_pay_is_asked_of_none_shorter_than_the_least():
    # One token pays, four don't.
    costs = StepCosts([1, 2, 3, 1000], [1.0, 1.1, 9.0, 999.0], [0.01] * 4)
    drafter = make_drafter(SlotModel(max_model_len=10**6), costs=costs)
    assert [len(draft) for draft in drafter.propose([make_request("a")], 10)] == [1]
    drafter.payoff.least_length = 4
    drafter.release("a")
    assert drafter.propose([make_request("b")], 10) == [[]]


def test_the_first_of_a_burst_are_not_drafted_for_where_it_would_not_pay_for_all_of_it():
    costs = replace(ROOM_FOR_SIX, prompt=0.01)
    calm, busy = (only_if_faster(SlotModel(max_model_len=10**6), costs) for _ in range(2))
    for i in range(100):
        run_fixed(busy, [f"{i}-{j}" for j in range(20)], 1, 5)
        for j in range(20):
            busy.release(f"{i}-{j}")
    assert busy.counts["prefills"] == 0
    assert run_fixed(busy, "ab", 1, 5) == [[0, 0]]
    assert run_fixed(calm, "ab", 1, 5) == [[10, 10]]
    # When it has been calm for a while, it is another matter.
    lengths = [run_fixed(busy, "ab", 1, 5)[0] for _ in range(600)]
    assert lengths[100] == [0, 0]
    assert lengths[-1] == [10, 10]


def test_only_chains_of_full_length_are_learnt_from():
    drafter = only_if_faster(SlotModel(max_model_len=10**6), FREE)
    request = make_request(max_draft=3)
    for _ in range(50):
        (draft,) = drafter.propose([request], 10)
        request = extended(request, [*draft[:1], 3], len(draft))
    assert len(draft) == 3
    assert drafter.payoff.chains.tokens(10) == 11


@pytest.mark.parametrize("sees_tokens", [True, False])
def test_ends_that_are_refused_are_learnt_from(sees_tokens):
    """The drafter wants to end, and the target goes on."""
    drafter = only_if_faster(SlotModel(max_model_len=10**6), AS_DEAR_AS_A_STEP)
    drafter.sees_tokens = sees_tokens
    request = make_request(max_draft=10**6)
    lengths = []
    for _ in range(200):
        request = replace(request, ends=frozenset(oracle(request, 1)))
        (draft,) = drafter.propose([request], 10)
        lengths.append(len(draft))
        request = extended(request, [(draft[0] if draft else 0) + 1], len(draft))
    assert lengths[0] == (1 if sees_tokens else 10)
    assert sum(length > 0 for length in lengths[100:]) <= 2


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("is_loose", [False, True])
def test_an_accepted_end_is_learnt_from_whether_a_token_stands_behind_it_or_not(is_loose, adaptive):
    drafter = only_if_faster(SlotModel(max_model_len=10**6), FREE)
    drafter.payoff.is_adaptive = adaptive
    before = drafter.payoff.acceptance.accepted.sum()
    for number in range(40):
        request = make_request(str(number), max_draft=10**6)
        request = replace(request, ends=frozenset(oracle(request, 4)[3:]))
        (draft,) = drafter.propose([request], 10)
        assert len(draft) <= 4
        request = replace(extended(request, draft if is_loose else [*draft, 7], len(draft)), is_done=True)
        assert drafter.propose([request], 10) == [[]]
        drafter.release(request.req_id)
    if adaptive:
        assert drafter.payoff.acceptance.accepted.sum() - before == pytest.approx(40 * 4)
    else:
        assert drafter.payoff.chains.tokens(10) == pytest.approx(1 + 10 * (8 + 40 * 0.4) / 48)


def test_a_prompt_is_read_where_what_is_left_of_the_answer_pays_for_it():
    # Three tokens a step for the price of two: half a second is saved for every token, or a little less.
    costs = replace(AS_DEAR_AS_A_STEP, prompt=10.0)
    drafter = only_if_faster(SlotModel(max_model_len=10**6), costs)
    for _ in range(1000):
        drafter.payoff.chains.learn(3, 10)
    long, short = make_request("long", max_draft=100), make_request("short", max_draft=10)
    drafts = drafter.propose([long, short], 10)
    assert [len(draft) for draft in drafts] == [10, 0]
    assert set(drafter.sequences) == {"long"}
    assert drafter.counts["skipped_cost"] == 1
    # What has been read is paid for.
    almost_done = replace(extended(long, [*drafts[0][:3], 3], 10), max_draft_tokens=10)
    assert [len(draft) for draft in drafter.propose([almost_done, short], 10)] == [10, 0]


def test_after_short_answers_none_is_expected_to_be_long():
    costs = replace(AS_DEAR_AS_A_STEP, prompt=10.0)
    drafter = only_if_faster(SlotModel(max_model_len=10**6), costs)
    drafted = []
    for number in range(20):
        drafted += [lengths[0] > 0 for lengths in run_fixed(drafter, str(number % 10), 1, 5)]
        request = make_request(str(number % 10), max_draft=10**6)
        drafter.propose([extended(request, [1, 2, 3])], 10)
        drafter.release(request.req_id, 3)
    assert drafted[0]
    assert not any(drafted[1:])
    # Answers get longer, though nobody drafts for them.
    for number in range(100):
        request = make_request(str(number % 10), max_draft=10**6)
        drafter.propose([extended(request, [1] * 150)], 10)
        drafter.release(request.req_id, 150)
    assert run_fixed(drafter, "a", 1, 5) == [[10]]


def test_a_session_that_goes_on_with_a_longer_prompt_is_drafted_for_as_before():
    for is_adaptive in (False, True):
        drafter = ProposingDrafter(
            SlotModel(confidence=sure), STRATEGIES["uniform"], 0.5, 10**6, is_adaptive=is_adaptive, only_if_faster=True
        )
        drafter.payoff.costs = FREE
        request = make_request("a", 20)
        (draft,) = drafter.propose([request], 4)
        longer = replace(
            make_request("a", 30), token_ids=np.append(extended(request, draft).token_ids, range(1, 8)).astype(np.int32)
        )
        longer = replace(longer, num_prompt_tokens=30)
        (again,) = drafter.propose([longer], 4)
        assert len(again) == 4
        assert len(drafter.sequences["a"].kept) > len(kept_tokens(request))


def test_of_what_is_preempted_no_answers_length_is_learned():
    drafter = only_if_faster(SlotModel(max_model_len=10**6), replace(AS_DEAR_AS_A_STEP, prompt=10.0))
    for end in (None, 3):
        drafter.propose([make_request("a", max_draft=10**6)], 10)
        drafter.release("a", end)
        assert drafter.payoff.answers.tokens_left(10**6) == (10**6 if end is None else 3)
    drafter.release("who came and went while nothing was drafted", 5)
    assert drafter.payoff.answers.tokens_left(10**6) == 4


def test_a_refusal_is_for_about_the_same_requests_and_for_some_steps():
    drafter = only_if_faster(SlotModel(max_model_len=10**6), replace(AS_DEAR_AS_A_STEP, first=100.0))
    few = ["a", "b"]
    assert not drafter.rests(few)
    assert drafter.propose([make_request(name) for name in few], 10) == [[], []]
    assert not drafter.rests(["a"]) and not drafter.rests(["a", "c"]) and not drafter.rests(["a", "b", "c"])
    stood = [drafter.rests(few) for _ in range(20)]
    assert stood == [True] * 15 + [False] * 5
    assert drafter.counts["skipped_cost"] == 2 * 16
    drafter.payoff.refusal.num_steps = 1
    drafter.payoff.costs = replace(drafter.payoff.costs)
    assert not drafter.rests(few)

    many = [str(number) for number in range(16)]
    drafter.propose([make_request(name) for name in many], 10)
    assert drafter.rests(many[1:]) and drafter.rests(many[2:]) and drafter.rests([*many[1:], "new"])
    assert not drafter.rests(many[3:]) and not drafter.rests([*many[1:], "new", "newer"])
    assert drafter.counts["skipped_cost"] == 2 * 16 + 16 + 15 + 14 + 16


@pytest.mark.parametrize(
    ("rows", "lengths"),
    [(100, [4, 4, 4]), (15, [4, 4, 4]), (14, [4, 4, 0]), (11, [4, 4, 0]), (10, [4, 0, 0]), (6, [0, 0, 0])],
)
def test_no_more_is_drafted_than_the_targets_logits_have_room_for(rows, lengths):
    drafter = make_drafter()
    requests = [make_request(str(i)) for i in range(3)]
    drafter.payoff.most_rows = rows
    assert [len(draft) for draft in drafter.propose(requests, 4)] == lengths
    assert drafter.counts["skipped_cost"] == lengths.count(0)
    assert drafter.counts["prefills"] == 3 - lengths.count(0)


def test_who_has_drafts_goes_on_before_others_begin():
    drafter = make_drafter()
    first, second, third = (make_request(str(i)) for i in range(3))
    drafter.payoff.most_rows = 6
    drafts = drafter.propose([third], 4)
    third = extended(third, [*drafts[0], 1], 4)
    assert [len(draft) for draft in drafter.propose([first, third], 4)] == [0, 4]
    drafter.release("2")
    assert [len(draft) for draft in drafter.propose([first, second], 4)] == [4, 0]


def test_what_fits_is_judged_and_not_what_was_wanted():
    # By itself each would pay; of four together none does, but only one has room.
    costs = StepCosts([1, 12, 13], [1.0, 1.0, 100.0], [0.01, 0.01, 0.01])
    drafter = only_if_faster(SlotModel(max_model_len=10**6), costs)
    requests = [make_request(str(i), max_draft=100) for i in range(4)]
    assert [len(draft) for draft in drafter.propose(requests, 8)] == [0] * 4
    drafter = only_if_faster(SlotModel(max_model_len=10**6), costs)
    drafter.payoff.most_rows = 4 + 8
    drafts = drafter.propose(requests, 8)
    assert [len(draft) for draft in drafts] == [8, 0, 0, 0]
    assert drafter.counts["skipped_cost"] == 3
    # And where what fits does not pay, the step's requests rest.
    drafter.payoff.costs = replace(costs, first=10**6)
    assert not any(drafter.propose([extended(requests[0], [*drafts[0], 1], 8), *requests[1:]], 8))
    assert drafter.rests([request.req_id for request in requests])


def test_who_cannot_be_drafted_for_takes_no_room():
    drafter = make_drafter()
    blind = [make_request(str(i)) for i in range(2)]
    for request in blind:
        request.items = [replace(item, payload=None) for item in request.items]
    other = make_request("2")
    drafter.payoff.most_rows = 3 + 8
    drafter.propose(blind, 4)
    assert [len(draft) for draft in drafter.propose([*blind, other], 4)] == [0, 0, 4]
    assert drafter.counts["skipped_embeddings"] == 4 and drafter.counts["skipped_cost"] == 0


@pytest.mark.parametrize("least", [1, 3])
def test_drafts_that_end_where_they_do_not_pay_share_the_room_among_them(least):
    drafter = make_drafter(SlotModel(max_model_len=10**6), costs=FREE)
    drafter.payoff.least_length = least
    requests = [make_request(str(i)) for i in range(3)]
    drafter.payoff.most_rows = 3 + 10
    lengths = [len(draft) for draft in drafter.propose(requests, 8)]
    assert sum(lengths) == 10 and min(lengths) >= least
    drafter.payoff.most_rows = 3 + least
    assert sorted(len(draft) for draft in drafter.propose([extended(r, [1]) for r in requests], 8)) == [0, 0, least]
    assert drafter.counts["skipped_cost"] == 2


def test_where_all_requests_of_lately_would_not_fit_those_who_would_are_thought_of():
    # Sixteen drafts are never verified together: eight are, and they pay.
    costs = StepCosts([1, 16 + 64, 16 + 65], [1.0, 1.0, 10**6], [0.01] * 3, prompt=1e-3)
    for rows, pays in ((16 + 64, True), (10**6, False)):
        drafter = only_if_faster(SlotModel(max_model_len=10**6), costs)
        drafter.payoff.most_rows, drafter.payoff._most_lately = rows, 16.0
        (draft,) = drafter.propose([make_request("a", max_draft=1000)], 8)
        assert bool(draft) == pays


def test_a_short_answer_keeps_no_room_from_a_long_one():
    # Of the two that have not been read one has room, and the short one would not pay.
    costs = StepCosts([1, 1000], [1.0, 1.0], [0.01, 0.01], prompt=10.0)
    drafter = only_if_faster(SlotModel(max_model_len=10**6), costs)
    drafter.payoff.most_rows = 2 + 10
    short, long = make_request("short", max_draft=15), make_request("long", max_draft=1000)
    assert [len(draft) for draft in drafter.propose([short, long], 10)] == [0, 10]


def test_prompts_that_the_target_reads_have_logits_too():
    drafter = make_drafter()
    drafter.payoff.most_rows = 3 * 5 + 2
    requests = [make_request(str(i)) for i in range(3)]
    for num_prefilling, lengths in ((2, [4, 4, 4]), (3, [4, 4, 0])):
        drafts = drafter.start(requests, 4, num_prefilling)
        drafter.finish(drafts)
        assert drafts.lengths == lengths


def test_who_has_ended_takes_no_room():
    drafter = make_drafter()
    requests = [make_request(str(i)) for i in range(3)]
    drafter.payoff.most_rows = 2 * 5
    for ended in (replace(requests[1], is_done=True), replace(requests[1], max_draft_tokens=-1)):
        assert [len(draft) for draft in drafter.propose([requests[0], ended, requests[2]], 4)] == [4, 0, 4]


@pytest.mark.parametrize("has_graphs", [True, False])
def test_the_step_of_somebodys_last_token_says_nothing_of_those_behind_it(has_graphs):
    # In pieces nothing pays, and without a draft for everybody there is no graph.
    costs = StepCosts([1, 160], [1.0, 1.4], [0.01, 0.01], pieces=[20.0, 20.0] if has_graphs else None)
    drafter = only_if_faster(SlotModel(max_model_len=10**6), costs)
    requests = [make_request(str(i), max_draft=100) for i in range(16)]
    assert all(map(len, drafter.propose(requests, 4)))
    requests = [extended(request, [7] * 5, 4) for request in requests]
    requests[3] = replace(requests[3], max_draft_tokens=0)
    drafts = drafter.propose(requests, 4)
    assert [len(draft) for draft in drafts] == ([0] * 16 if has_graphs else [4] * 3 + [0] + [4] * 12)
    requests = [extended(request, [7], 0) for request in requests]
    requests[3] = replace(requests[3], max_draft_tokens=-1)
    assert not drafter.rests([request.req_id for request in requests])
    drafts = drafter.propose(requests, 4)
    assert [len(draft) for draft in drafts] == [4] * 3 + [0] + [4] * 12
    # And who never is drafted for keeps the others' refusal standing.
    drafter.payoff.costs = replace(costs, first=10**6)
    assert not any(drafter.propose([extended(request, [7], 0) for request in requests], 4))
    assert drafter.rests([request.req_id for request in requests])


def test_drafts_longer_than_fit_promise_nothing():
    # Drafts of eight tokens would pay for the first one's price, for which eight requests have no room.
    costs = StepCosts([1, 400], [1.0, 1.05], [0.02, 0.02], first=45.0)
    for rows, pays in ((10**6, True), (8 + 8, False)):
        drafter = make_drafter(SlotModel(max_model_len=10**6), costs=costs)
        drafter.payoff.most_rows = rows
        assert any(drafter.propose([make_request(str(i), max_draft=100) for i in range(8)], 8)) == pays
