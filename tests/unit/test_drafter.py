"""The drafter's book-keeping, with a model that remembers what was written into which slot, and how far it goes."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_model import (
    VOCAB,
    AheadModel,
    CopyingModel,
    ProposingDrafter,
    SlotModel,
    Target,
    Unread,
    extended,
    flat,
    kept_tokens,
    make_drafter,
    make_request,
    oracle,
)
from step_costs import FREE, LOADED, RANDOM_COSTS

from vllm_lvspec.device import upload
from vllm_lvspec.draft import drafter as drafting
from vllm_lvspec.draft.costs import StepCosts
from vllm_lvspec.draft.pruning import STRATEGIES, Strategy, VisualGrid
from vllm_lvspec.draft.request import DraftRequest


def run_history(data, copies: bool, adaptive: bool) -> None:
    """Random requests are drafted for, accepted and rejected, released and left alone; every draft must be that of a
    fresh cache, and nothing may be computed or copied that was there."""
    target = Target(data.draw(st.sampled_from([1, 3, 16])), data.draw(st.integers(0, 9)))
    options = {
        "page_size": data.draw(st.sampled_from([1, 3, 16])),
        "max_batch_tokens": data.draw(st.sampled_from([4, 7, 400])),  # at least one per request, as in vLLM
        "num_pages": data.draw(st.sampled_from([30, 1000])),
        "words": data.draw(st.sampled_from([2, VOCAB])),
    }
    at_once = 1 if copies else data.draw(st.sampled_from([1, 2, 3]))
    model = CopyingModel(target, **options) if copies else SlotModel(**options, tokens_at_once=at_once)
    if data.draw(st.booleans()):  # as a graph of so many tokens has it
        model.chain_tokens = lambda num_requests, num_tokens: 7
    drafter = make_drafter(model, finds_prefixes=data.draw(st.booleans()))
    drafter.sees_tokens = data.draw(st.booleans())
    requests = {
        str(i): replace(
            make_request(str(i), items=data.draw(st.sampled_from([(), ((3, 8),), ((2, 5), (9, 6))]))),
            ends=frozenset(range(i, VOCAB, 4)) if data.draw(st.booleans()) else frozenset(),
        )
        for i in range(data.draw(st.sampled_from([1, 1, 2, 2, 4])))
    }
    cached = dict.fromkeys(requests, 0)  # tokens of the sequence that are right in the drafter's cache
    for _ in range(data.draw(st.integers(1, 7))):
        drafter.payoff.costs = data.draw(st.sampled_from([FREE, LOADED]) | RANDOM_COSTS) if adaptive else None
        k = data.draw(st.integers(1, 6))
        names = data.draw(st.lists(st.sampled_from(sorted(requests)), unique=True, min_size=1))
        requests.update({n: target.run(requests[n]) for n in names})
        before, num_computed, known = drafter.counts.copy(), model.num_computed, set(drafter.sequences)
        model.batches.clear()
        if copies:
            model.copied.clear()
        drafts = dict(zip(names, drafter.propose([requests[n] for n in names], k), strict=True))
        counted = drafter.counts - before

        copied, computed = [], 0
        for name, draft in drafts.items():
            request = requests[name]
            looks = adaptive or drafter.sees_tokens
            fresh = oracle(request, k, copies=copies, sees_tokens=looks, words=options["words"])
            assert draft == (fresh[: len(draft)] if adaptive else fresh if draft else [])
            if draft:
                kept, newest = kept_tokens(request), len(request.token_ids) - 1
                missing = [i for i in range(cached[name], newest) if i >= request.num_prompt_tokens or i in kept]
                copied += [(name, i) for i in missing]
                computed += len(draft) + (0 if copies else len(missing))
                cached[name] = newest if copies else newest + len(draft)
        # Where several tokens are read at once, some are read again so that all requests have as many.
        most_again = (at_once - 1) * sum(len(batch.seq_lens) for batch in model.batches)
        # And what was left of earlier drafts is read in vain where it is not drafted again.
        most_again += sum(len(batch.token_ids) for batch in model.batches if batch.asks_all)
        num_known = model.num_computed - num_computed + counted["found_prompt_tokens"]
        assert computed <= num_known <= computed + most_again
        if copies:
            assert sorted(model.copied) == sorted(copied)
            assert model.encoded == 0
        num_skipped = sum(not draft for draft in drafts.values())
        assert counted["skipped_pool_full"] + counted["skipped_cost"] == num_skipped
        if 0 < counted["skipped_cost"] < len(names):  # those whose prompt has been read may go on without the others
            assert {name for name, draft in drafts.items() if draft} <= known
        assert counted["drafted_requests"] == len(names) - num_skipped
        assert counted["drafted_tokens"] == sum(map(len, drafts.values()))
        if options["num_pages"] == 1000:
            assert counted["skipped_pool_full"] == 0

        for name, draft in drafts.items():
            num_verified = data.draw(st.integers(0, len(draft)))  # grammars and the end of a step's room cut drafts
            accepted = data.draw(st.integers(0, num_verified))
            wrong = data.draw(st.integers(0, VOCAB - 1))
            cached[name] = min(cached[name], len(requests[name].token_ids) + accepted)
            requests[name] = extended(requests[name], [*draft[:accepted], wrong], num_verified)
        if data.draw(st.booleans()):
            drafter.release(names[0])
            target.preempt(names[0])
            cached[names[0]] = 0
    for name in requests:
        drafter.release(name)
    assert model.pool.num_free == model.pool.num_pages
    assert not drafter.sequences


@pytest.mark.parametrize("lengths", [(6, 6), (6, 3)])
def test_nothing_waits_for_the_device_until_all_drafts_are_launched(monkeypatch, lengths):
    def logged(arrays, device):
        Unread.log.append("upload")
        return upload(arrays, device)

    monkeypatch.setattr(drafting, "upload", logged)
    drafter = make_drafter(AheadModel())
    drafter.sees_tokens = False
    requests = [make_request(str(i), max_draft=length) for i, length in enumerate(lengths)]
    for seen in (["upload"] * 4, []):  # which of each video's embeddings are kept, and which of these there are
        Unread.log = []
        started = drafter.start(requests, 6)
        assert drafter.runs_ahead
        assert started.lengths == list(lengths) and not started.tokens
        launched = [*seen, "upload", "forward", "upload", *["forward"] * 5]
        assert Unread.log == launched
        drafter.finish(started)
        assert Unread.log == [*launched, "read"]
        drafts = started.tokens
        assert drafts == [oracle(r, length) for r, length in zip(requests, lengths, strict=True)]
        requests = [
            replace(extended(r, [*draft, 3], len(draft)), max_draft_tokens=length)
            for r, draft, length in zip(requests, drafts, lengths, strict=True)
        ]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_drafts_are_those_of_a_fresh_cache_whatever_was_accepted_before(data):
    run_history(data, copies=False, adaptive=False)


class Reciting(SlotModel):
    """Says the same at a place whatever was said before it, so that it always drafts what was left of a draft."""

    chain: int | None = None  # tokens of a request that are read at once, where it must be so many, or none at all

    @staticmethod
    def next_token(entries, words=VOCAB):
        return 7 * entries[-1][1][0] % words

    def chain_tokens(self, num_requests, num_tokens):
        return num_tokens if self.chain is None else self.chain or None


def rejected(request: DraftRequest, draft: list[int], num_accepted: int = 1) -> DraftRequest:
    """Behind another token than the drafted one."""
    return extended(request, [*draft[:num_accepted], (draft[num_accepted] + 1) % VOCAB], len(draft))


def fixed_drafter(model: SlotModel) -> ProposingDrafter:
    return ProposingDrafter(model, STRATEGIES["uniform"], 0.5, 10**6)


@pytest.mark.parametrize("chain", [None, 4, 6, 8, 12, 0])
@pytest.mark.parametrize("num_requests", [1, 2, 3])
def test_what_is_left_of_a_draft_is_drafted_again_in_one_forward(num_requests, chain):
    model = Reciting()
    model.chain = chain
    drafter = fixed_drafter(model)
    requests = [make_request(str(i), prompt_len=20 + i) for i in range(num_requests)]
    drafts = drafter.propose(requests, 8)
    # Of the last one two tokens were accepted, so that less is left of its draft: what is left for all counts.
    requests = [rejected(r, d, 1 + (r is requests[-1])) for r, d in zip(requests, drafts, strict=True)]
    model.batches.clear()
    before = drafter.counts.copy()
    again = drafter.propose(requests, 8)
    counted = drafter.counts - before
    tried = num_requests < 3 and chain != 0
    num_left = min(5, chain - 1) if chain else 5
    expected = []
    for request in requests:
        start = len(request.token_ids) - 1 + 5
        expected.append([7 * place % VOCAB for place in range(start, start + 8)])
    assert again == expected
    assert counted["recalled_tokens"] == (num_left * num_requests if tried else 0)
    assert counted["forwards"] == (8 - num_left if tried else 8) == len(model.batches)
    assert model.batches[0].asks_all == tried
    # Behind what was drafted again the cache is as it would have been.
    requests = [extended(r, [*d, 1], 8) for r, d in zip(requests, again, strict=True)]
    model.batches.clear()
    drafter.propose(requests, 8)
    assert model.batches[0].query_starts.diff().tolist() == [2] * num_requests


def test_nothing_is_tried_again_where_no_draft_was_cut_or_all_was_left_behind():
    model = Reciting()
    drafter = fixed_drafter(model)
    request = make_request(max_draft=100)
    (draft,) = drafter.propose([request], 6)
    accepted = extended(request, [*draft, 3], 6)
    (draft,) = drafter.propose([accepted], 6)
    last = rejected(accepted, draft, 5)  # of which nothing is left
    (draft,) = drafter.propose([last], 6)
    elsewhere = extended(rejected(last, draft), [4, 5], 0)  # steps without drafts
    (draft,) = drafter.propose([elsewhere], 6)
    cut = rejected(elsewhere, draft, 1)
    drafter.propose([replace(cut, max_draft_tokens=1)], 6)  # no room for a second token
    drafter.propose([replace(cut, req_id="new")], 6)
    drafter.release("a")
    drafter.propose([cut], 6)  # after it was preempted
    drafter.payoff.recalls = False
    drafter.propose([rejected(cut, drafter.payoff.histories["a"].draft)], 6)
    assert drafter.counts["recalled_tokens"] == 0
    assert not any(batch.asks_all for batch in model.batches)


def test_what_is_never_drafted_again_is_tried_less_and_less_where_trying_costs_something():
    model = SlotModel(max_model_len=5000)
    drafter = fixed_drafter(model)
    free, dear = (StepCosts([1, 8], [1.0, 1.0], [0.1, 0.1], per_guess=more) for more in (0, 0.06))
    tried = {}
    request = make_request(max_draft=10**6)
    for name, costs in (("free", free), ("dear", dear)):
        drafter.payoff.costs = costs
        model.batches.clear()
        for _ in range(120):
            (draft,) = drafter.propose([request], 8)
            request = rejected(request, draft, 0)
        tried[name] = sum(batch.asks_all for batch in model.batches)
    assert 60 < tried["free"] < 120  # until it has never been of use for a long time
    assert 0 < tried["dear"] < 30


def test_drafts_that_end_where_they_no_longer_pay_are_drafted_again_likewise():
    model = Reciting(confidence=lambda entries: 0.99)
    drafter = make_drafter(model, costs=FREE)
    request = make_request()
    (draft,) = drafter.propose([request], 8)
    assert len(draft) == 8
    model.batches.clear()
    (again,) = drafter.propose([rejected(request, draft)], 8)
    assert len(again) == 8 and len(model.batches) == 2 and drafter.counts["recalled_tokens"] == 6
    assert len(drafter.payoff.histories["a"].confidences) == 8


def test_prices_know_what_is_spared_and_forwards_are_foretold_as_they_are():
    costs = StepCosts([1, 8], [1.0, 1.0], [0.1, 0.1])
    drafter = fixed_drafter(Reciting())
    drafter.payoff.costs = costs
    request = make_request()
    for _ in range(12):
        (draft,) = drafter.propose([request], 8)
        request = rejected(request, draft)
    drafter.foretold_further = 0.0
    before = drafter.counts["forwards"]
    drafter.propose([request], 8)
    assert drafter.counts["forwards"] - before == 2  # six of seven further tokens were left of the last draft
    assert drafter.foretold_further == pytest.approx(0.1)
    now = drafter.payoff.costs_of_drafts(1, 1)
    assert 0.14 < now.draft[0] / 0.1 < 0.5 and now.first * now.draft[0] == pytest.approx(0.1)
    assert drafter.payoff.costs_of_drafts(4, 1).draft == now.draft  # others go without
    assert drafter.payoff.costs_of_drafts(2, 2).draft == drafter.payoff.costs_of_drafts(3, 3).draft == [0.1, 0.1]
    drafter.payoff.recalls = False
    assert drafter.payoff.costs_of_drafts(1, 1).draft == [0.1, 0.1]
    drafter.payoff.recalls = True
    drafter.payoff._doubt([request], 10**5)
    assert drafter.payoff.costs_of_drafts(1, 1).draft[0] == pytest.approx(0.1, rel=1e-3)


def test_behind_a_graphs_tokens_there_is_no_place_at_the_end_of_the_longest_answer():
    model = Reciting(max_model_len=64)
    model.chain = 12
    drafter = fixed_drafter(model)
    request = make_request()
    tried = []
    while len(request.token_ids) + 8 <= model.max_model_len:
        model.batches.clear()
        (draft,) = drafter.propose([request], 8)
        tried.append((len(request.token_ids), any(batch.asks_all for batch in model.batches)))
        start = len(request.token_ids) - 1 + 5
        assert draft == [7 * place % VOCAB for place in range(start, start + 8)]
        request = rejected(request, draft)
    assert [is_tried for _, is_tried in tried] == [i > 0 and length + 12 <= 64 for i, (length, _) in enumerate(tried)]
    assert sum(is_tried for _, is_tried in tried) > 10 and not tried[-1][1]


def test_the_host_waits_once_to_learn_what_is_drafted_again():
    class Ahead(AheadModel, Reciting):
        pass

    drafter = fixed_drafter(Ahead())
    drafter.sees_tokens = False
    Unread.log = []
    request = make_request()
    (draft,) = drafter.propose([request], 5)
    Unread.log = []
    started = drafter.start([rejected(request, draft)], 5)
    assert Unread.log == ["forward", "read", "forward"]
    assert started.lengths == [5]
    drafter.finish(started)
    assert Unread.log == ["forward", "read", "forward", "read"]


def test_requests_are_read_as_many_tokens_of_each_where_that_costs_nothing():
    model = SlotModel(tokens_at_once=2)
    drafter = make_drafter(model)
    first, second = make_request("0"), make_request("1")
    for _ in range(2):  # prompts, then a part of each answer
        drafts = drafter.propose([first, second], 3)
        model.batches.clear()
        first, second = extended(first, [*drafts[0], 1], 3), extended(second, [*drafts[1][:1], 2], 3)
    expected = [oracle(first, 3), oracle(second, 3)]
    assert drafter.propose([first, second], 3) == expected
    # Of the first request two tokens were missing, its last drafted one and the target's; of the second only one.
    assert model.batches[0].query_starts.tolist() == [0, 2, 4]
    assert model.batches[0].max_query_len == 2


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_drafter_that_copies_has_all_but_the_newest_token_from_the_target_and_copies_it_once(data):
    run_history(data, copies=True, adaptive=False)


@pytest.mark.parametrize("copies", [False, True])
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_drafts_as_long_as_they_pay_are_beginnings_of_those_of_a_fresh_cache(copies, data):
    run_history(data, copies, adaptive=True)


def test_all_requests_share_one_forward_per_drafted_token():
    model = SlotModel()
    drafter = make_drafter(model)
    requests = [make_request(str(i)) for i in range(5)]
    drafter.propose(requests, 4)
    assert len(model.batches) == 4
    assert [len(b.seq_lens) for b in model.batches] == [5, 5, 5, 5]
    assert model.asked_for_probs == [False] * 4  # nobody looks at them


def test_requests_with_less_room_leave_the_batch_early_and_the_others_go_on():
    model = SlotModel()
    drafter = make_drafter(model)
    requests = [make_request("short", max_draft=2), make_request("long"), make_request("none", max_draft=0)]
    drafts = drafter.propose(requests, 5)
    assert [len(d) for d in drafts] == [2, 5, 0]
    assert [len(b.seq_lens) for b in model.batches] == [2, 2, 1, 1, 1]
    assert drafts[0] == oracle(requests[0], 2)
    assert drafts[1] == oracle(requests[1], 5)
    assert drafter.counts["skipped_length"] == 1


def test_nothing_is_drafted_behind_a_token_that_ends_the_request():
    model = SlotModel()
    drafter = make_drafter(model)
    requests = [make_request(name) for name in "abc"]
    whole = [oracle(r, 6) for r in requests]
    requests[0] = replace(requests[0], ends=frozenset({whole[0][2], VOCAB + 5}))
    requests[1] = replace(requests[1], ends=frozenset({whole[1][0]}))
    assert drafter.propose(requests, 6) == [whole[0][:3], whole[1][:1], whole[2]]
    assert drafter.counts["drafted_tokens"] == 10
    assert [len(batch.seq_lens) for batch in model.batches] == [3, 2, 2, 1, 1, 1]
    # The target thought otherwise: it goes on behind what was refused.
    requests = [extended(r, [5]) for r in requests]
    assert drafter.propose(requests, 4) == [oracle(r, 4) for r in requests]


def test_where_a_look_would_hold_up_the_device_drafts_have_their_full_length_and_need_no_graph_of_another_size():
    drafter = make_drafter()
    drafter.sees_tokens = False
    request = make_request()
    whole = oracle(request, 6)
    assert drafter.propose([replace(request, ends=frozenset(whole[:2]))], 6) == [whole]


def test_a_request_that_has_just_ended_is_not_drafted_for():
    drafter = make_drafter()
    requests = [make_request("a"), replace(make_request("b"), is_done=True)]
    assert drafter.propose(requests, 3) == [oracle(requests[0], 3), []]
    assert set(drafter.sequences) == {"a"}


def test_when_all_have_ended_no_forward_is_left_to_do():
    model = SlotModel()
    drafter = make_drafter(model)
    request = make_request()
    request = replace(request, ends=frozenset(oracle(request, 2)[1:]))
    assert drafter.propose([request], 10) == [oracle(request, 2)]
    assert len(model.batches) == 2


def test_a_request_at_the_drafters_own_length_limit_is_skipped_and_counted():
    drafter = make_drafter(SlotModel(max_model_len=23))
    assert drafter.propose([make_request(prompt_len=22)], 4) == [[]]
    assert drafter.counts["skipped_length"] == 1
    (draft,) = drafter.propose([make_request(prompt_len=20)], 4)
    assert len(draft) == 2


@pytest.mark.parametrize("costs", [None, FREE])
@pytest.mark.parametrize("copies", [False, True])
def test_a_full_pool_skips_a_request_until_others_are_done(copies, costs):
    target = Target()
    model = CopyingModel(target, num_pages=6, page_size=4) if copies else SlotModel(num_pages=6, page_size=4)
    drafter = make_drafter(model, costs=costs)
    first, second = target.run(make_request("first")), target.run(make_request("second"))
    drafts = drafter.propose([first, second], 3)
    assert len(drafts[0]) == 3
    assert drafts[1] == []
    assert drafter.counts["skipped_pool_full"] == 1
    assert model.encoded == (0 if copies else 1), "of who waits for pages nothing is encoded"
    drafter.release("first")
    second = target.run(extended(second, [4, 5, 6]))  # the target has gone on alone
    assert drafter.propose([second], 3) == [oracle(second, 3, copies=copies)]


def test_an_item_is_encoded_once_and_found_again_without_its_pixels():
    model = SlotModel()
    drafter = make_drafter(model)
    first = make_request("a")
    drafter.propose([first], 2)
    drafter.release("a")
    # Without its pixels the item's grid may be unknown.
    items = [replace(item, grid=VisualGrid(1, 1, 8), payload=None) for item in first.items]
    assert drafter.propose([replace(first, items=items)], 2) == [oracle(first, 2)]
    assert model.encoded == 1


def test_a_request_whose_embeddings_are_gone_is_skipped_counted_and_holds_no_pages():
    model = SlotModel()
    drafter = make_drafter(model)
    assert drafter.propose([make_request(payload=False)], 3) == [[]]
    assert drafter.propose([make_request(payload=False)], 3) == [[]]
    assert drafter.counts["skipped_embeddings"] == 2
    assert model.pool.num_free == model.pool.num_pages
    # Another try after it was preempted may find them.
    drafter.release("a")
    assert drafter.propose([make_request()], 1) == [oracle(make_request(), 1)]


def test_an_encoder_that_gives_another_number_of_embeddings_costs_only_the_drafts():
    model = SlotModel()
    model.encode = lambda payload: torch.zeros(1, 3)
    drafter = make_drafter(model)
    assert drafter.propose([make_request()], 3) == [[]]
    assert drafter.counts["skipped_embeddings"] == 1


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("costs", [None, FREE])
def test_a_session_that_goes_on_with_a_longer_prompt_starts_afresh(copies, costs):
    target = Target()
    drafter = make_drafter(CopyingModel(target) if copies else SlotModel(), costs=costs)
    drafter.propose([target.run(make_request("s", prompt_len=20))], 3)
    longer = target.run(make_request("s", prompt_len=30, outputs=(2, 3)))
    assert drafter.propose([longer], 3) == [oracle(longer, 3, copies=copies)]


def test_releasing_an_unknown_request_is_fine():
    make_drafter().release("nobody")


@pytest.mark.parametrize("ratio", [0.0, 0.9])
def test_images_are_seen_whole_and_videos_pruned(ratio):
    request = make_request(items=((3, 10),))
    image = replace(request.items[0], identifier="i", is_video=False)
    model = SlotModel()
    drafter = make_drafter(model, ratio)
    drafter.propose([request], 1)
    drafter.propose([replace(request, req_id="b", items=[image])], 1)
    seen = [int(b.visual_mask.sum()) for b in model.batches]
    assert seen == [10 if ratio == 0 else 1, 10]


def test_items_may_be_named_in_another_order_than_they_stand_in():
    request = make_request(items=((2, 5), (9, 6)))
    turned = replace(request, items=request.items[::-1])
    assert make_drafter().propose([turned], 4) == [oracle(request, 4)]


# The target as its own drafter ----------------------------------------------------------------------------------------


def test_a_drafter_that_copies_computes_one_token_per_drafted_one_and_needs_no_pixels():
    target = Target()
    model = CopyingModel(target)
    drafter = make_drafter(model)
    requests = [target.run(make_request(name, payload=False)) for name in "ab"]
    drafts = drafter.propose(requests, 4)
    assert drafts == [oracle(r, 4, copies=True) for r in requests]
    assert [len(b.token_ids) for b in model.batches] == [2, 2, 2, 2]
    assert all(b.visual_mask is None and not b.visual for b in model.batches)
    assert drafter.counts["skipped_embeddings"] == model.encoded == 0
    # Only what it sees of the video was copied, and the whole text; the newest token was not.
    assert {place for req_id, place in model.copied if req_id == "a"} == kept_tokens(requests[0])


def test_tokens_that_were_accepted_are_copied_again_although_the_drafter_had_computed_them():
    target = Target()
    model = CopyingModel(target)
    drafter = make_drafter(model)
    request = target.run(make_request())  # its newest token stands at 20
    (draft,) = drafter.propose([request], 5)
    request = target.run(extended(request, [*draft[:3], 9], 5))
    model.copied.clear()
    assert drafter.propose([request], 2) == [oracle(request, 2, copies=True)]
    # The newest token of last time and the accepted ones: the target has read them with the whole video before them.
    assert sorted(model.copied) == [("a", 20), ("a", 21), ("a", 22), ("a", 23)]


def test_more_requests_than_fit_into_a_batch_are_copied_at_once_and_caught_up_in_turns():
    target = Target()
    model = CopyingModel(target, max_batch_tokens=2)
    drafter = make_drafter(model)
    requests = [target.run(make_request(str(i), prompt_len=20 + i)) for i in range(5)]
    drafts = drafter.propose(requests, 1)
    assert drafts == [oracle(r, 1, copies=True) for r in requests]
    assert [len(b.token_ids) for b in model.batches] == [2, 2, 1]


@pytest.mark.parametrize("has_pixels", [True, False])
def test_a_drafter_that_copies_is_asked_for_embeddings_only_where_the_strategy_looks_at_them(has_pixels):
    target = Target()
    model = CopyingModel(target)
    drafter = make_drafter(model, 0.75, "redundancy")
    request = make_request(items=((2, 5), (9, 6)), payload=has_pixels)
    image = replace(request.items[1], is_video=False)
    request = target.run(replace(request, items=[request.items[0], image]))
    strategy = "redundancy" if has_pixels else "uniform"
    kept = kept_tokens(replace(request, items=request.items[:1]), 0.75, strategy)
    assert drafter.propose([request], 3) == [oracle(request, 3, kept, copies=True)]
    assert model.encoded == (1 if has_pixels else 0)
    assert drafter.counts["pruned_uniformly"] == (0 if has_pixels else 1)
    assert drafter.counts["skipped_embeddings"] == 0


# What strategies look at ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("strategy", ["attention", "similarity"])
def test_two_questions_see_other_parts_of_the_same_video_from_one_encoding(strategy, copies):
    target = Target()
    model = CopyingModel(target) if copies else SlotModel()
    scores = {"a": [flat(32, 1)], "b": [flat(32, 31)]}
    drafter = make_drafter(model, 0.75, strategy, scores.__getitem__)
    requests = [target.run(make_request(name, 40, ((3, 32),), video="same")) for name in "ab"]
    kept = [kept_tokens(r, 0.75, strategy, scores[r.req_id]) for r in requests]
    assert 3 + 1 in kept[0] - kept[1]
    assert 3 + 31 in kept[1] - kept[0]
    drafts = drafter.propose(requests, 3)
    assert drafts == [oracle(r, 3, k, copies) for r, k in zip(requests, kept, strict=True)]
    assert model.encoded == (0 if copies else 1)
    assert drafter.counts["pruned_uniformly"] == 0


def test_a_question_about_a_video_that_was_seen_needs_no_pixels():
    model = SlotModel()
    scores = {"a": [flat(32, 1)], "b": [flat(32, 31)]}
    drafter = make_drafter(model, 0.75, "attention", scores.__getitem__)
    drafter.propose([make_request("a", 40, ((3, 32),), video="same")], 1)
    drafter.release("a")
    whole = make_request("b", 40, ((3, 32),), video="same")
    items = [replace(item, grid=VisualGrid(1, 1, 32), payload=None) for item in whole.items]
    kept = kept_tokens(whole, 0.75, "attention", scores["b"])
    assert drafter.propose([replace(whole, items=items)], 3) == [oracle(whole, 3, kept)]
    assert model.encoded == 1


def test_the_target_is_asked_once_per_request_and_every_item_gets_its_own_scores():
    asked = []
    scores = [flat(20, 4), flat(24, 0)]

    def ask(req_id):
        asked.append(req_id)
        return scores

    drafter = make_drafter(SlotModel(), 0.8, "attention", ask)
    request = make_request("a", 60, ((2, 20), (30, 24)))
    kept = kept_tokens(request, 0.8, "attention", scores)
    assert {2 + 4, 30 + 0} <= kept
    assert not {2 + 4, 30 + 0} <= kept_tokens(request, 0.8)
    for more in ([], [5], [6]):
        request = extended(request, more)
        assert drafter.propose([request], 2) == [oracle(request, 2, kept)]
    assert asked == ["a"]


def test_items_that_the_target_has_no_scores_of_are_pruned_uniformly_and_counted():
    scores = [None, flat(24, 23)]
    drafter = make_drafter(SlotModel(), 0.5, "attention", lambda req_id: scores)
    request = make_request("a", 60, ((2, 20), (30, 24)))
    first, second = (replace(request, items=[item]) for item in request.items)
    kept = kept_tokens(first) & kept_tokens(second, 0.5, "attention", scores[1:])
    assert drafter.propose([request], 3) == [oracle(request, 3, kept)]
    assert drafter.counts["pruned_uniformly"] == 1


def test_without_a_target_to_ask_everything_is_pruned_uniformly():
    drafter = make_drafter(SlotModel(), 0.5, "similarity")
    request = make_request(items=((2, 5), (9, 6)))
    assert drafter.propose([request], 3) == [oracle(request, 3)]
    assert drafter.counts["pruned_uniformly"] == 2


@pytest.mark.parametrize("strategy", ["uniform", "random", "redundancy", "none"])
def test_strategies_that_do_not_look_at_scores_ask_nobody(strategy):
    drafter = make_drafter(SlotModel(), 0.5, strategy, None)
    drafter._scores = pytest.fail
    request = make_request(items=((2, 5), (9, 6)))
    kept = kept_tokens(request, 0.5, strategy)
    assert drafter.propose([request], 3) == [oracle(request, 3, kept)]
    assert drafter.counts["pruned_uniformly"] == 0


@pytest.mark.parametrize("strategy", ["attention", "redundancy"])
def test_images_are_whole_whatever_the_strategy_looks_at(strategy):
    request = make_request("a", 60, ((2, 20), (30, 24)))
    image = replace(request.items[0], is_video=False)
    drafter = make_drafter(SlotModel(), 0.8, strategy, lambda req_id: [None, flat(24, 3)])
    kept = kept_tokens(replace(request, items=request.items[1:]), 0.8, strategy, [flat(24, 3)])
    mixed = replace(request, items=[image, request.items[1]])
    assert drafter.propose([mixed], 3) == [oracle(mixed, 3, kept)]
    assert drafter.counts["pruned_uniformly"] == 0


def test_images_alone_ask_nobody():
    drafter = make_drafter(SlotModel(), 0.8, "attention", pytest.fail)
    request = make_request()
    request = replace(request, items=[replace(item, is_video=False) for item in request.items])
    assert drafter.propose([request], 2) == [oracle(request, 2, set(range(20)))]


@pytest.mark.parametrize("copies", [False, True])
def test_a_strategy_that_looks_at_embeddings_gets_them_with_the_grid_the_seed_and_the_ratio(copies):
    seen = []

    def keep(view, ratio):
        seen.append((view, ratio))
        return torch.tensor([0, view.grid.num_tokens - 1])

    target = Target()
    model = CopyingModel(target) if copies else SlotModel()
    drafter = make_drafter(model, 0.7, Strategy(keep, looks_at="embeddings"))
    request = target.run(make_request(items=((2, 5), (9, 6))))
    kept = set(range(20)) - {3, 4, 5} - {10, 11, 12, 13}
    assert drafter.propose([request], 2) == [oracle(request, 2, kept, copies)]
    for (view, ratio), item in zip(seen, request.items, strict=True):
        assert ratio == 0.7
        assert (view.grid, view.seed, view.scores) == (item.grid, item.seed, None)
        assert torch.equal(view.embeddings, SlotModel().encode(item.payload))


def test_strategies_that_ask_nobody_keep_only_what_every_request_sees_of_a_video():
    sizes = {}
    for strategy in ("uniform", "redundancy", "attention"):
        drafter = make_drafter(SlotModel(), 0.75, strategy, lambda req_id: [flat(8, 0)])
        drafter.propose([make_request()], 1)
        sizes[strategy] = drafter.embeddings.num_bytes
    assert sizes["uniform"] == sizes["redundancy"] == sizes["attention"] / 4


def test_what_drafts_should_take_is_told_apart_by_first_and_further_tokens():
    costs = StepCosts([1, 1000], [1.0, 1.0], [0.1, 0.1], draft_per_context=1e-3, first=5.0)
    drafter = make_drafter(SlotModel(max_model_len=10**6), costs=costs)
    drafter.payoff.is_adaptive = drafter.payoff.only_if_faster = False
    requests = [make_request("a"), make_request("b", max_draft=3)]
    started = time.perf_counter()
    assert [len(draft) for draft in drafter.propose(requests, 4)] == [4, 3]
    seconds = time.perf_counter() - started
    a, b = (len(kept_tokens(request)) + len(request.token_ids) - request.num_prompt_tokens for request in requests)
    assert drafter.foretold_first == pytest.approx(5 * (0.1 + 1e-3 * (a + b)))
    assert drafter.foretold_further == pytest.approx(3 * 0.1 + 1e-3 * (3 * a + 2 * b))
    assert 0 < drafter.further_seconds < drafter.further_seconds + drafter.prefill_seconds < seconds


def test_an_image_may_bear_the_name_of_a_video_that_was_pruned():
    drafter = make_drafter()
    video = make_request("a", video="x")
    drafter.propose([video], 2)
    image = replace(make_request("b", video="x"), items=[replace(video.items[0], is_video=False)])
    (draft,) = drafter.propose([image], 2)
    assert len(draft) == 2
    assert len(drafter.sequences["b"].kept) == image.num_prompt_tokens
