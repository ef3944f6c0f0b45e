import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lvspec.draft.embeddings import EmbeddingCache, KeptEmbeddings
from vllm_lvspec.draft.pages import DraftSequence, PagePool


def test_a_pool_grows_all_or_nothing_and_takes_everything_back():
    pool = PagePool(num_pages=4, page_size=16)
    first: list[int] = []
    second: list[int] = []
    assert pool.grow(first, 33)
    assert len(first) == 3
    assert pool.grow(first, 48)
    assert len(first) == 3
    assert not pool.grow(second, 17)
    assert second == []
    assert pool.grow(second, 16)
    assert pool.num_free == 0
    assert not set(first) & set(second)
    pool.release(first)
    pool.release(second)
    assert first == second == []
    assert pool.num_free == 4


def test_a_pool_without_pages_is_refused():
    with pytest.raises(ValueError, match="num_pages=0"):
        PagePool(0, 16)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 90)), max_size=60))
def test_pages_are_never_owned_twice_and_never_lost(operations):
    pool = PagePool(12, 8)
    owners: dict[int, list[int]] = {i: [] for i in range(6)}
    for owner, tokens in operations:
        if tokens > 70:
            pool.release(owners[owner])
        else:
            pool.grow(owners[owner], tokens)
        owned = [page for pages in owners.values() for page in pages]
        assert len(owned) == len(set(owned))
        assert len(owned) + pool.num_free == 12


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 90)), max_size=80))
def test_pages_are_shared_found_while_they_hold_what_was_named_and_never_lost(operations):
    pool = PagePool(12, 8)
    owners: dict[int, list[int]] = {i: [] for i in range(6)}
    texts = {i: [bytes([i, page]) for page in range(5)] for i in range(4)}
    written: dict[int, bytes] = {}  # what a page holds, by the last of its owners to write it
    for owner, text, tokens in operations:
        pages, keys = owners[owner], texts[text]
        if tokens > 60:
            pool.release(pages)
        elif not pages:
            found = pool.find(keys)
            assert [written[page] for page in found] == keys[: len(found)]
            pool.share(found)
            pages += found
            if pool.grow(pages, max(tokens, 8 * len(found))):
                new = pages[len(found) :]
                assert not any(page in other for page in new for name, other in owners.items() if name != owner)
                num = min(len(pages), len(keys))
                written.update(zip(new, [*keys[len(found) :], *[b""] * 12], strict=False))
                pool.name(pages[:num], keys[:num])
            else:
                pool.release(pages)
        owned = {page for pages in owners.values() for page in pages}
        assert len(owned) + pool.num_free == 12
    for pages in owners.values():
        pool.release(pages)
    assert pool.num_free == 12
    pool.forget_keys()
    assert not any(pool.find(keys) for keys in texts.values())


def test_of_pages_without_owners_those_go_first_that_nobody_finds_then_ends_of_what_was_given_back_first():
    pool = PagePool(6, 8)
    first, second, other = [], [], []
    pool.grow(first, 16)
    pool.grow(second, 16)
    pool.grow(other, 16)
    pool.name(first, [b"a", b"b"])
    pool.name(second, [b"c", b"d"])
    expected = [*reversed(first), *reversed(second)]
    unknown = set(other)
    for pages in (first, other, second):
        pool.release(pages)
    taken: list[int] = []
    pool.grow(taken, 48)
    assert set(taken[:2]) == unknown and taken[2:] == expected
    assert not pool.find([b"a"]) and not pool.find([b"c"])


def _item(rows: int) -> KeptEmbeddings:
    return KeptEmbeddings(rows, torch.arange(rows), torch.zeros(rows, 4))


def test_the_least_recently_used_embeddings_go_first():
    size = _item(3).num_bytes
    cache = EmbeddingCache(2 * size)
    cache.put("a", _item(3))
    cache.put("b", _item(3))
    assert cache.get("a", 3) is not None
    cache.put("c", _item(3))
    assert cache.get("b", 3) is None
    assert cache.get("a", 3) is not None
    assert cache.get("c", 3) is not None
    assert cache.num_bytes == 2 * size


def test_an_item_of_another_size_under_the_same_identifier_is_not_taken_for_it():
    cache = EmbeddingCache(10**6)
    cache.put("a", _item(3))
    assert cache.get("a", 4) is None
    assert cache.get("a", 3) is not None


def test_embeddings_larger_than_the_bound_are_not_kept_and_evict_nothing():
    cache = EmbeddingCache(_item(3).num_bytes)
    cache.put("a", _item(3))
    cache.put("b", _item(30))
    assert cache.get("b", 3) is None
    assert cache.get("a", 3) is not None


def test_putting_an_item_again_counts_it_once():
    cache = EmbeddingCache(10**6)
    cache.put("a", _item(3))
    cache.put("a", _item(5))
    assert cache.num_bytes == _item(5).num_bytes
    assert len(cache) == 1
    cache.clear()
    assert cache.num_bytes == 0
    assert len(cache) == 0


def test_a_part_of_an_item_is_not_taken_for_the_whole():
    assert _item(3).is_whole
    part = KeptEmbeddings(3, torch.tensor([0, 2]), torch.zeros(2, 4))
    assert not part.is_whole
    # What it takes is what is kept of it, and it is found by the size of the whole.
    assert part.num_bytes == 2 * 4 * 4 + 2 * 8
    cache = EmbeddingCache(10**6)
    cache.put("a", part)
    assert cache.get("a", 2) is None
    assert cache.get("a", 3) is part


def test_a_sequence_knows_how_much_of_its_prompt_is_hidden():
    assert DraftSequence(10, kept=[0, 1, 9]).num_hidden == 7
    assert DraftSequence(3, kept=[0, 1, 2]).num_hidden == 0
