"""Prompts that begin as earlier ones did are read from there on; the model sees whatever is wrong in its cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from slot_model import (
    CopyingModel,
    SlotModel,
    Target,
    extended,
    flat,
    kept_tokens,
    make_drafter,
    make_request,
    oracle,
)

from vllm_lvspec.draft.costs import StepCosts
from vllm_lvspec.draft.prefixes import SeenItem, page_keys
from vllm_lvspec.draft.pruning import VisualGrid
from vllm_lvspec.draft.request import VisualItem

K = 4


def asks(req_id: str, question: int = 0, prompt_len: int = 40, **options):
    """About the same video; `question` changes the prompt's last tokens."""
    request = make_request(req_id, prompt_len, items=((3, 24),), video="video", **options)
    tokens = request.token_ids.copy()
    tokens[prompt_len - 5 : prompt_len] += question
    return replace(request, token_ids=tokens)


def test_another_question_about_a_video_is_read_from_where_it_differs():
    model = SlotModel(page_size=4)
    drafter = make_drafter(model, finds_prefixes=True)
    first, second = asks("first"), asks("second", question=3)
    assert drafter.propose([first], K) == [oracle(first, K)]
    num_kept = len(kept_tokens(first))
    assert drafter.counts["read_prompt_tokens"] == num_kept == 28 and drafter.counts["found_prompt_tokens"] == 0
    model.batches.clear()
    assert drafter.propose([second], K) == [oracle(second, K)]
    assert drafter.counts["found_prompt_tokens"] == 20 and drafter.counts["read_prompt_tokens"] == 28 + 8
    assert len(model.batches[0].token_ids) == 8 + 1 and not model.batches[0].visual
    assert model.encoded == 1
    # Both go on, each in pages of its own behind those that they share.
    shared = set(drafter.sequences["first"].pages) & set(drafter.sequences["second"].pages)
    assert len(shared) == 5
    again = [extended(first, [1], K), extended(second, [3], K)]
    assert drafter.propose(again, K) == [oracle(request, K) for request in again]
    for request in again:
        drafter.release(request.req_id)
    assert model.pool.num_free == model.pool.num_pages


@pytest.mark.parametrize("strategy", ["uniform", "redundancy", "similarity"])
def test_a_prompt_that_was_read_is_found_when_it_comes_again(strategy):
    model, score = SlotModel(page_size=4), flat(24, 20, 21, 22)
    drafter = make_drafter(model, strategy=strategy, scores=lambda req_id: [score], finds_prefixes=True)
    kept = kept_tokens(asks("a"), strategy=strategy, scores=[score])
    for turn, name in enumerate("aba"):
        request = asks(name)
        assert drafter.propose([request], K) == [oracle(request, K, kept)]
        assert drafter.counts["found_prompt_tokens"] == turn * 28
        drafter.release(name)
    assert model.encoded == 1


def test_what_another_question_sees_of_a_video_is_found_as_far_as_it_is_the_same():
    model, scores = SlotModel(page_size=4), {"a": flat(24, 20, 21, 22), "b": flat(24, 1, 2, 3)}
    drafter = make_drafter(model, strategy="similarity", scores=lambda req_id: [scores[req_id]], finds_prefixes=True)
    for name, score in scores.items():
        request = asks(name)
        kept = kept_tokens(request, strategy="similarity", scores=[score])
        assert drafter.propose([request], K) == [oracle(request, K, kept)]
    assert drafter.counts["found_prompt_tokens"] == 4, "three tokens of text and the video's first"


def test_a_part_of_a_video_that_is_found_needs_no_embeddings_and_the_rest_does():
    model = SlotModel(page_size=4)
    drafter = make_drafter(model, finds_prefixes=True)
    drafter.propose([asks("first")], K)
    drafter.embeddings.clear()
    gone = asks("gone", question=1, payload=False)
    expected = oracle(replace(gone, items=asks("gone").items), K)
    assert drafter.propose([gone], K) == [expected], "vLLM has stripped its pixels, but it is in the cache"
    # Of the video's twelve entries nine are found: somebody else has the page with the others.
    drafter.release("first")
    drafter.release("gone")
    pages = model.pool.find(list(model.pool._pages))
    held: list[int] = []
    assert model.pool.grow(held, 4 * (model.pool.num_pages - 3))
    assert len(set(pages) - set(held)) == 3
    model.pool.release(held)
    assert drafter.propose([replace(gone, req_id="later")], K) == [[]]
    assert drafter.counts["skipped_embeddings"] == 1 and model.pool.num_free == model.pool.num_pages
    encoded = model.encoded
    partly = asks("partly", question=2)
    before = drafter.counts["found_prompt_tokens"]
    assert drafter.propose([partly], K) == [oracle(partly, K)]
    assert drafter.counts["found_prompt_tokens"] == before + 12 and model.encoded == encoded + 1
    assert [len(visual) for visual in model.batches[-K].visual] == [3]


def test_room_is_asked_for_beside_what_is_found_and_shared():
    model = SlotModel(page_size=4, num_pages=14)
    drafter = make_drafter(model, finds_prefixes=True)
    assert drafter.propose([asks("first")], K) == [oracle(asks("first"), K)]
    assert model.pool.num_free == 6
    longer = asks("longer", prompt_len=64)  # of whose fourteen pages seven are found
    assert drafter.propose([longer], K) == [[]] and drafter.counts["skipped_pool_full"] == 1
    assert model.pool.num_free == 6 and model.encoded == 1
    second = asks("second", question=1)  # of whose eight pages five are found
    assert drafter.propose([second], K) == [oracle(second, K)]
    assert model.pool.num_free == 3
    for name in ("first", "second", "longer"):
        drafter.release(name)
    assert model.pool.num_free == model.pool.num_pages and not drafter._looked


def test_videos_of_one_name_and_other_shapes_are_seen_each_by_its_own():
    for finds_prefixes in (False, True):
        for first in (VisualGrid(1, 1, 24), VisualGrid(4, 2, 3)):
            for second in (VisualGrid(24, 1, 1), VisualGrid(2, 3, 4)):
                request = make_request("a", 60, items=((3, 24), (30, 24)))
                items = [
                    replace(item, identifier="video", grid=grid, payload=(7, 24))
                    for item, grid in zip(request.items, (first, second), strict=True)
                ]
                request = replace(request, items=items)
                drafter = make_drafter(SlotModel(page_size=4), finds_prefixes=finds_prefixes)
                assert drafter.propose([request], K) == [oracle(request, K)]


def test_a_prompt_costs_what_of_it_has_to_be_read():
    dear = StepCosts([1, 8], [1.0, 1.0], [0.01, 0.01], prompt=1000.0)
    drafter = make_drafter(SlotModel(page_size=4), finds_prefixes=True)
    drafter.propose([asks("first")], K)
    assert drafter.prompts_read == 1
    drafter.payoff.costs = dear
    other = make_request("other", 40, items=((3, 24),))
    assert drafter.propose([other], K) == [[]] and drafter.counts["skipped_cost"] == 1
    again = asks("again")
    (draft,) = drafter.propose([again], K)
    assert draft and draft == oracle(again, K)[: len(draft)]
    assert drafter.prompts_read == 1
    partly = asks("partly", question=2)
    assert drafter._share_to_read(partly) == pytest.approx(8 / 28)
    drafter.payoff.costs = None
    drafter.propose([partly], K)
    assert drafter.prompts_read == pytest.approx(1 + 8 / 28)


def test_salts_tell_requests_apart_and_drafters_that_copy_or_are_told_not_to_find_nothing():
    for salts, num_found in (((None, None), 28), (("x", "x"), 28), (("x", "y"), 0), ((None, "x"), 0)):
        drafter = make_drafter(SlotModel(page_size=4), finds_prefixes=True)
        for name, salt in zip("ab", salts, strict=True):
            drafter.propose([replace(asks(name), salt=salt)], K)
        assert drafter.counts["found_prompt_tokens"] == num_found, salts
    drafter = make_drafter(SlotModel(page_size=4))
    for name in "ab":
        drafter.propose([asks(name)], K)
    assert drafter.counts["found_prompt_tokens"] == 0
    target = Target()
    drafter = make_drafter(CopyingModel(target, page_size=4), finds_prefixes=True)
    for name in "ab":
        drafter.propose([target.run(asks(name))], K)
    assert drafter.counts["found_prompt_tokens"] == 0


@pytest.mark.parametrize("strategy", ["redundancy", "similarity"])
def test_what_is_seen_is_what_the_first_rank_has_chosen(strategy):
    model, score = SlotModel(page_size=4), flat(24, 20, 21, 22)
    first = torch.arange(0, 24, 2)
    model.of_first_rank = lambda values: values.copy_(first)
    drafter = make_drafter(model, strategy=strategy, scores=lambda req_id: [score], finds_prefixes=True)
    kept = set(range(40)) - set(range(3, 27)) | {3 + index for index in first.tolist()}
    for name in "ab":
        request = asks(name)
        assert drafter.propose([request], K) == [oracle(request, K, kept)]
    assert drafter.counts["found_prompt_tokens"] == 28


def test_keys_follow_from_all_that_keys_and_values_follow_from():
    tokens, positions = np.arange(20), np.arange(40).reshape(2, 20)
    item = VisualItem("name", True, VisualGrid(1, 2, 4), np.arange(2, 10), None)
    seen = SeenItem(item, np.array([2, 3, 4]), np.array([0, 3, 5]))
    keys = page_keys(tokens, positions, [seen], 4)
    assert len(set(keys)) == len(keys) == 5 and keys == page_keys(tokens, positions, [seen], 4)
    assert len(page_keys(tokens[:19], positions[:, :19], [seen], 4)) == 4

    def num_alike(tokens=tokens, positions=positions, seen=seen, salt=None):
        return sum(a == b for a, b in zip(keys, page_keys(tokens, positions, [seen], 4, salt), strict=True))

    assert num_alike(tokens=np.where(tokens == 9, 0, tokens)) == 2
    assert num_alike(positions=np.where(positions == 25, 0, positions)) == 1
    assert num_alike(seen=replace(seen, item=replace(item, identifier="other"))) == 0
    assert num_alike(seen=replace(seen, item=replace(item, is_video=False))) == 0
    assert num_alike(seen=replace(seen, item=replace(item, rows=np.arange(2, 11)))) == 0
    assert num_alike(seen=replace(seen, indices=np.array([0, 3, 6]))) == 1
    assert num_alike(salt="") == num_alike(salt="x") == 0
    assert torch.equal(torch.from_numpy(tokens), torch.arange(20))
