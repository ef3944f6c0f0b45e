"""The drafter's book-keeping, with a model that remembers what was written into which slot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lvspec.draft.drafter import DraftBatch, Drafter, DraftRequest, VisualItem
from vllm_lvspec.draft.pages import PagePool
from vllm_lvspec.draft.pruning import STRATEGIES, VisualGrid

VOCAB = 97
VISUAL = 50  # the placeholder's token


class SlotModel:
    """Its next token is a hash of all (token, position, visual value) in the request's cache, read through the block
    table: whatever is stale, missing or in the wrong order changes it."""

    device = torch.device("cpu")

    def __init__(self, num_pages=1000, page_size=4, max_batch_tokens=1000, max_model_len=200):
        self.pool = PagePool(num_pages, page_size)
        self.max_batch_tokens = max_batch_tokens
        self.max_model_len = max_model_len
        self.slots: dict[int, tuple] = {}
        self.batches: list[DraftBatch] = []
        self.encoded = 0

    def prompt_positions(self, prompt, num_prompt_tokens):
        return torch.stack([torch.arange(num_prompt_tokens), 2 * torch.arange(num_prompt_tokens)]), 5

    def encode(self, payload):
        self.encoded += 1
        seed, count = payload
        return torch.arange(count * 3, dtype=torch.float32).view(count, 3) + seed

    def profile(self):
        pass

    def forward(self, batch, logits_rows):
        self.batches.append(batch)
        assert torch.equal(batch.seq_lens, batch.seq_lens_cpu)
        assert len(batch.token_ids) <= self.max_batch_tokens
        visual = torch.cat(batch.visual) if batch.visual else torch.empty(0, 3)
        mask = (
            batch.visual_mask if batch.visual_mask is not None else torch.zeros(len(batch.token_ids), dtype=torch.bool)
        )
        assert int(mask.sum()) == len(visual)
        values = iter(visual[:, 0].tolist())
        for i, slot in enumerate(batch.slots.tolist()):
            value = next(values) if mask[i] else None
            self.slots[slot] = (int(batch.token_ids[i]), tuple(batch.positions[:, i].tolist()), value)
        tokens = []
        for row in logits_rows.tolist():
            request = int((batch.query_starts[1:] <= row).sum())
            length = int(batch.seq_lens[request]) - (int(batch.query_starts[request + 1]) - 1 - row)
            tokens.append(self.next_token(self.read(batch.block_table[request].tolist(), length)))
        return torch.tensor(tokens)

    def read(self, pages, length):
        size = self.pool.page_size
        return [self.slots[pages[e // size] * size + e % size] for e in range(length)]

    @staticmethod
    def next_token(entries) -> int:
        return hash(tuple(entries)) % VOCAB


def expected_entries(request: DraftRequest, kept: set[int], token_ids: list[int]) -> list[tuple]:
    """What the cache should hold for `token_ids`, from first principles."""
    values = {}
    for item in request.items:
        full = SlotModel().encode(item.payload)
        values.update({int(row): float(full[j, 0]) for j, row in enumerate(item.rows)})
    entries = []
    for i, token in enumerate(token_ids):
        if i < request.num_prompt_tokens:
            if i in kept:
                entries.append((token, (i, 2 * i), values.get(i)))
        else:
            entries.append((token, (i + 5, i + 5), None))
    return entries


def make_request(req_id="a", prompt_len=20, items=((3, 8),), outputs=(1,), max_draft=100, payload=True) -> DraftRequest:
    tokens = [(7 * i + 1) % VISUAL for i in range(prompt_len)]
    views = []
    for number, (start, count) in enumerate(items):
        tokens[start : start + count] = [VISUAL] * count
        views.append(
            VisualItem(
                identifier=f"{req_id}-{number}",
                is_video=True,
                grid=VisualGrid(2, 1, count // 2) if count % 2 == 0 else VisualGrid(1, 1, count),
                rows=np.arange(start, start + count),
                payload=(100 * number, count) if payload else None,
            )
        )
    ids = np.array(tokens + list(outputs), dtype=np.int32)
    return DraftRequest(req_id, ids, prompt_len, views, None, max_draft)


def oracle(request: DraftRequest, ratio: float, k: int) -> list[int]:
    kept = set(range(request.num_prompt_tokens))
    for item in request.items:
        kept -= set(item.rows.tolist())
        kept |= set(item.rows[STRATEGIES["uniform"](item.grid, ratio).numpy()].tolist())
    tokens = request.token_ids.tolist()
    drafts = []
    for _ in range(k):
        drafts.append(SlotModel.next_token(expected_entries(request, kept, tokens + drafts)))
    return drafts


def make_drafter(model=None, ratio=0.5) -> Drafter:
    return Drafter(model or SlotModel(), STRATEGIES["uniform"], ratio, 10**6)


def extended(request: DraftRequest, more: list[int]) -> DraftRequest:
    return DraftRequest(
        request.req_id, np.append(request.token_ids, more).astype(np.int32), request.num_prompt_tokens, request.items,
        request.prompt, request.max_draft_tokens,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_drafts_are_those_of_a_fresh_cache_whatever_was_accepted_before(data):
    model = SlotModel(
        page_size=data.draw(st.sampled_from([1, 3, 16])), max_batch_tokens=data.draw(st.sampled_from([7, 400]))
    )
    drafter = make_drafter(model)
    requests = {
        str(i): make_request(str(i), items=data.draw(st.sampled_from([(), ((3, 8),), ((2, 5), (9, 6))])))
        for i in range(data.draw(st.integers(1, 4)))
    }
    for _ in range(data.draw(st.integers(1, 6))):
        k = data.draw(st.integers(1, 6))
        names = data.draw(st.lists(st.sampled_from(sorted(requests)), unique=True, min_size=1))
        drafts = drafter.propose([requests[n] for n in names], k)
        for name, draft in zip(names, drafts, strict=True):
            assert draft == oracle(requests[name], 0.5, k)
            accepted = data.draw(st.integers(0, k))
            wrong = data.draw(st.integers(0, VOCAB - 1))
            requests[name] = extended(requests[name], [*draft[:accepted], wrong])
        if data.draw(st.booleans()):
            drafter.release(names[0])
    for name in requests:
        drafter.release(name)
    assert model.pool.num_free == model.pool.num_pages


def test_all_requests_share_one_forward_per_drafted_token():
    model = SlotModel()
    drafter = make_drafter(model)
    requests = [make_request(str(i)) for i in range(5)]
    drafter.propose(requests, 4)
    assert len(model.batches) == 4
    assert [len(b.seq_lens) for b in model.batches] == [5, 5, 5, 5]


def test_requests_with_less_room_leave_the_batch_early_and_the_others_go_on():
    model = SlotModel()
    drafter = make_drafter(model)
    requests = [make_request("short", max_draft=2), make_request("long"), make_request("none", max_draft=0)]
    drafts = drafter.propose(requests, 5)
    assert [len(d) for d in drafts] == [2, 5, 0]
    assert [len(b.seq_lens) for b in model.batches] == [2, 2, 1, 1, 1]
    assert drafts[0] == oracle(requests[0], 0.5, 2)
    assert drafts[1] == oracle(requests[1], 0.5, 5)
    assert drafter.counts["skipped_length"] == 1


def test_a_request_at_the_drafters_own_length_limit_is_skipped_and_counted():
    drafter = make_drafter(SlotModel(max_model_len=23))
    assert drafter.propose([make_request(prompt_len=22)], 4) == [[]]
    assert drafter.counts["skipped_length"] == 1
    (draft,) = drafter.propose([make_request(prompt_len=20)], 4)
    assert len(draft) == 2


def test_a_full_pool_skips_a_request_until_others_are_done():
    model = SlotModel(num_pages=6, page_size=4)
    drafter = make_drafter(model)
    first, second = make_request("first"), make_request("second")
    drafts = drafter.propose([first, second], 3)
    assert len(drafts[0]) == 3
    assert drafts[1] == []
    assert drafter.counts["skipped_pool_full"] == 1
    drafter.release("first")
    second = extended(second, [4, 5, 6])  # the target has gone on alone
    assert drafter.propose([second], 3) == [oracle(second, 0.5, 3)]


def test_an_item_is_encoded_once_and_found_again_without_its_pixels():
    model = SlotModel()
    drafter = make_drafter(model)
    first = make_request("a")
    drafter.propose([first], 2)
    drafter.release("a")
    full = make_request("a", payload=False)
    # Without its pixels the item's grid may be unknown.
    items = [VisualItem(i.identifier, True, VisualGrid(1, 1, 8), i.rows, None) for i in full.items]
    stripped = DraftRequest("a", full.token_ids, 20, items, None, 100)
    assert drafter.propose([stripped], 2) == [oracle(first, 0.5, 2)]
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
    assert drafter.propose([make_request()], 1) == [oracle(make_request(), 0.5, 1)]


def test_an_encoder_that_gives_another_number_of_embeddings_costs_only_the_drafts():
    model = SlotModel()
    model.encode = lambda payload: torch.zeros(1, 3)
    drafter = make_drafter(model)
    assert drafter.propose([make_request()], 3) == [[]]
    assert drafter.counts["skipped_embeddings"] == 1


def test_a_session_that_goes_on_with_a_longer_prompt_starts_afresh():
    drafter = make_drafter()
    drafter.propose([make_request("s", prompt_len=20)], 3)
    longer = make_request("s", prompt_len=30, outputs=(2, 3))
    assert drafter.propose([longer], 3) == [oracle(longer, 0.5, 3)]


def test_releasing_an_unknown_request_is_fine():
    make_drafter().release("nobody")


@pytest.mark.parametrize("ratio", [0.0, 0.9])
def test_images_are_seen_whole_and_videos_pruned(ratio):
    request = make_request(items=((3, 10),))
    image = VisualItem("i", False, request.items[0].grid, request.items[0].rows, request.items[0].payload)
    model = SlotModel()
    drafter = make_drafter(model, ratio)
    drafter.propose([request], 1)
    drafter.propose([DraftRequest("b", request.token_ids, 20, [image], None, 9)], 1)
    seen = [int(b.visual_mask.sum()) for b in model.batches]
    assert seen == [10 if ratio == 0 else 1, 10]
