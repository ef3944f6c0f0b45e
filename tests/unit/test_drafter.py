"""The drafter's book-keeping, with a model that remembers what was written into which slot, and how far it goes."""

from __future__ import annotations

import functools
import random
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_costs import FREE, LOADED, RANDOM_COSTS

from vllm_lvspec.device import upload
from vllm_lvspec.draft import drafter as drafting
from vllm_lvspec.draft.batch import DraftBatch
from vllm_lvspec.draft.drafter import Drafter, DraftRequest, NextTokens, VisualItem
from vllm_lvspec.draft.length import DraftPlan, StepCosts
from vllm_lvspec.draft.pages import NO_SLOT, PagePool
from vllm_lvspec.draft.pruning import STRATEGIES, Strategy, VideoView, VisualGrid

VOCAB = 97
VISUAL = 50  # the placeholder's token


def digest(values: list) -> int:
    """The same in every run, which Python's own hashes of None and of strings are not."""
    return zlib.crc32(repr(values).encode())


class SlotModel:
    """Its next token is a hash of all (token, position, visual value) in the request's cache, read through the block
    table: whatever is stale, missing or in the wrong order changes it. So is the token's probability, unless
    `confidence` says it. With a few `words` alone drafts are often what was left of earlier ones."""

    copies = False
    device = torch.device("cpu")

    def __init__(
        self,
        num_pages=1000,
        page_size=4,
        max_batch_tokens=1000,
        max_model_len=200,
        confidence=None,
        tokens_at_once=1,
        words=VOCAB,
    ):
        self.tokens_at_once = tokens_at_once
        self.words = words
        self.pool = PagePool(num_pages, page_size)
        self.max_batch_tokens = max_batch_tokens
        self.max_model_len = max_model_len
        self.confidence = confidence or self.random_prob
        self.slots: dict[int, tuple] = {}
        self.batches: list[DraftBatch] = []
        self.asked_for_probs: list[bool] = []
        self.num_computed = 0
        self.encoded = 0

    def prompt_positions(self, prompt, num_prompt_tokens):
        return torch.stack([torch.arange(num_prompt_tokens), 2 * torch.arange(num_prompt_tokens)]), 5

    def encode(self, payload):
        self.encoded += 1
        seed, count = payload
        return torch.arange(count * 3, dtype=torch.float32).view(count, 3) + seed

    def profile(self):
        pass

    def copy(self, target_slots, slots):
        raise AssertionError("this model computes everything")

    def chain_tokens(self, num_requests, num_tokens):
        return num_tokens

    def forward(self, batch, with_probs=False):
        self.batches.append(batch)
        self.asked_for_probs.append(with_probs)
        self.num_computed += len(batch.token_ids)
        assert torch.equal(batch.seq_lens, batch.seq_lens_cpu)
        assert torch.equal(batch.query_starts, batch.query_starts_cpu)
        assert len(batch.token_ids) == batch.positions.shape[1] == len(batch.slots) == int(batch.query_starts[-1])
        assert len(batch.token_ids) <= self.max_batch_tokens
        lens = batch.query_starts.diff()
        assert lens.min() >= 1
        assert lens.max() == batch.max_query_len
        assert batch.seq_lens.max() <= batch.max_seq_len <= self.max_model_len
        written = batch.slots[batch.slots != NO_SLOT]
        assert len(written.unique()) == len(written) > 0
        visual = torch.cat(batch.visual) if batch.visual else torch.empty(0, 3)
        mask = (
            batch.visual_mask if batch.visual_mask is not None else torch.zeros(len(batch.token_ids), dtype=torch.bool)
        )
        assert int(mask.sum()) == len(visual)
        values = iter(visual[:, 0].tolist())
        for i, slot in enumerate(batch.slots.tolist()):
            value = next(values) if mask[i] else None
            if slot == NO_SLOT:
                continue
            self.slots[slot] = (int(batch.token_ids[i]), tuple(batch.positions[:, i].tolist()), value)
        tokens, probs = [], []
        starts = batch.query_starts.tolist()
        for row, (pages, length) in enumerate(zip(batch.block_table.tolist(), batch.seq_lens.tolist(), strict=True)):
            first, end = starts[row : row + 2]
            for place in range(first if batch.asks_all else end - 1, end):
                if int(batch.slots[place]) == NO_SLOT:  # nobody looks at what comes behind it
                    tokens.append(0)
                    probs.append(0.0)
                    continue
                entries = self.read(pages, length - (end - 1 - place))
                tokens.append(self.next_token(entries, self.words))
                probs.append(self.confidence(entries))
        return NextTokens(torch.tensor(tokens), torch.tensor(probs) if with_probs else None)

    def read(self, pages, length):
        size = self.pool.page_size
        return [self.slots[pages[e // size] * size + e % size] for e in range(length)]

    @staticmethod
    def next_token(entries, words=VOCAB) -> int:
        return digest(entries) % words

    @staticmethod
    def random_prob(entries) -> float:
        """Often near none or all."""
        log_odds = digest([1, *entries]) % 2001 / 100 - 8.005  # never between two bins
        return float(1 / (1 + np.exp(-log_odds)))


class Target:
    """The target's paged cache as the drafter may read it: entries name their request, place and token.

    Whatever else is in its pages is stale, and copying that is an error.
    """

    def __init__(self, block_size: int = 3, seed: int = 0):
        self.block_size = block_size
        self.cache: dict[int, tuple] = {}
        self.blocks: dict[str, list[int]] = {}
        self._free = list(range(2000))
        random.Random(seed).shuffle(self._free)

    def run(self, request: DraftRequest) -> DraftRequest:
        """The request after a step: all tokens but the newest are in the cache."""
        blocks = self.blocks.setdefault(request.req_id, [])
        while len(blocks) * self.block_size < len(request.token_ids) + 10:  # rejected drafts have been there
            blocks.append(self._free.pop())
        places = np.arange(len(blocks) * self.block_size)
        for place, slot in zip(places.tolist(), self.slots(request.req_id, places).tolist(), strict=True):
            is_there = place < len(request.token_ids) - 1
            self.cache[slot] = (
                ("target", request.req_id, place, int(request.token_ids[place])) if is_there else ("stale",)
            )
        return replace(request, target_slots=functools.partial(self.slots, request.req_id))

    def preempt(self, req_id: str) -> None:
        places = np.arange(len(self.blocks[req_id]) * self.block_size)
        self.cache.update(dict.fromkeys(self.slots(req_id, places).tolist(), ("stale",)))
        self._free[:0] = self.blocks.pop(req_id)

    def slots(self, req_id: str, places: np.ndarray) -> np.ndarray:
        assert places.dtype == np.int64
        blocks = np.array(self.blocks[req_id])
        return blocks[places // self.block_size] * self.block_size + places % self.block_size


class Unread(torch.Tensor):
    """What the host must not look at while there is more to launch."""

    log: list[str]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        looks = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.cpu, torch.Tensor.numpy)
        if func in looks or (func is torch.Tensor.to and not (kwargs or {}).get("non_blocking")):
            cls.log.append("read")
        return super().__torch_function__(func, types, args, kwargs)


class AheadModel(SlotModel):
    """On a device that the host is ahead of."""

    def forward(self, batch, with_probs=False):
        Unread.log.append("forward")
        found = super().forward(replace(batch, token_ids=batch.token_ids.as_subclass(torch.Tensor)), with_probs)
        return found._replace(token_ids=found.token_ids.as_subclass(Unread))


class CopyingModel(SlotModel):
    """The target as its own drafter."""

    copies = True

    def __init__(self, target: Target | None = None, **options):
        super().__init__(**options)
        self.target = target or Target()
        self.copied: list[tuple[str, int]] = []

    def copy(self, target_slots, slots):
        assert target_slots.dtype == slots.dtype == torch.int64
        assert target_slots.device.type == slots.device.type == "cpu"
        assert len(slots) == len(target_slots) == len(slots.unique()) > 0
        for source, slot in zip(target_slots.tolist(), slots.tolist(), strict=True):
            kind, req_id, place, _ = self.target.cache[source]
            assert kind == "target"
            self.copied.append((req_id, place))
            self.slots[slot] = self.target.cache[source]


def expected_entries(request: DraftRequest, kept: set[int], token_ids: list[int], copies: bool = False) -> list[tuple]:
    """What the cache should hold for `token_ids`, from first principles."""
    values = {}
    for item in request.items:
        if item.payload is not None:
            full = SlotModel().encode(item.payload)
            values.update({int(row): float(full[j, 0]) for j, row in enumerate(item.rows)})
    entries = []
    for i, token in enumerate(token_ids):
        if i < request.num_prompt_tokens and i not in kept:
            continue
        if copies and i < len(request.token_ids) - 1:
            entries.append(("target", request.req_id, i, token))
        elif i < request.num_prompt_tokens:
            entries.append((token, (i, 2 * i), values.get(i)))
        else:
            entries.append((token, (i + 5, i + 5), None))
    return entries


def make_request(
    req_id="a", prompt_len=20, items=((3, 8),), outputs=(1,), max_draft=100, payload=True, video=None
) -> DraftRequest:
    """`video`: what its items are called, by default after the request."""
    tokens = [(7 * i + 1) % VISUAL for i in range(prompt_len)]
    views = []
    for number, (start, count) in enumerate(items):
        tokens[start : start + count] = [VISUAL] * count
        views.append(
            VisualItem(
                identifier=f"{video or req_id}-{number}",
                is_video=True,
                grid=VisualGrid(2, 1, count // 2) if count % 2 == 0 else VisualGrid(1, 1, count),
                rows=np.arange(start, start + count),
                payload=(100 * number, count) if payload else None,
                seed=number,
            )
        )
    ids = np.array(tokens + list(outputs), dtype=np.int32)
    return DraftRequest(req_id, ids, prompt_len, views, None, max_draft)


def kept_tokens(request: DraftRequest, ratio=0.5, strategy="uniform", scores=None) -> set[int]:
    """Of the prompt, what the drafter should see."""
    kept = set(range(request.num_prompt_tokens))
    for item, score in zip(request.items, scores or [None] * len(request.items), strict=True):
        kept -= set(item.rows.tolist())
        embeddings = None if item.payload is None else SlotModel().encode(item.payload)
        indices = STRATEGIES[strategy].keep(VideoView(item.grid, item.seed, embeddings, score), ratio)
        kept |= set(item.rows[indices.numpy()].tolist())
    return kept


def oracle(
    request: DraftRequest,
    k: int,
    kept: set[int] | None = None,
    copies: bool = False,
    sees_tokens: bool = True,
    words: int = VOCAB,
) -> list[int]:
    """The drafts of a fresh cache, up to the first token that ends the request where one may look."""
    kept = kept_tokens(request) if kept is None else kept
    tokens = request.token_ids.tolist()
    drafts = []
    for _ in range(k):
        drafts.append(SlotModel.next_token(expected_entries(request, kept, tokens + drafts, copies), words))
        if sees_tokens and drafts[-1] in request.ends:
            break
    return drafts


class ProposingDrafter(Drafter):
    """Waits for its drafts."""

    def propose(self, requests, num_speculative_tokens) -> list[list[int]]:
        drafts = self.start(requests, num_speculative_tokens)
        self.finish(drafts)
        return drafts.tokens


def make_drafter(model=None, ratio=0.5, strategy="uniform", scores=None, costs=None) -> ProposingDrafter:
    chosen = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
    drafter = ProposingDrafter(
        model or SlotModel(), chosen, ratio, 10**6, scores, is_adaptive=True, only_if_faster=True
    )
    drafter.costs = costs
    return drafter


def extended(request: DraftRequest, more: list[int], num_verified: int = 0) -> DraftRequest:
    return replace(request, token_ids=np.append(request.token_ids, more).astype(np.int32), num_verified=num_verified)


def flat(size: int, *best: int) -> torch.Tensor:
    """Scores that ask for `best` before all others."""
    scores = torch.zeros(size)
    scores[list(best)] = torch.arange(len(best), 0, -1) + 10.0
    return scores


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
    drafter = make_drafter(model)
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
        drafter.costs = data.draw(st.sampled_from([FREE, LOADED]) | RANDOM_COSTS) if adaptive else None
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
        assert computed <= model.num_computed - num_computed <= computed + most_again
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
    drafter.recalls = False
    drafter.propose([rejected(cut, drafter._histories["a"].draft)], 6)
    assert drafter.counts["recalled_tokens"] == 0
    assert not any(batch.asks_all for batch in model.batches)


def test_what_is_never_drafted_again_is_tried_less_and_less_where_trying_costs_something():
    model = SlotModel(max_model_len=5000)
    drafter = fixed_drafter(model)
    free, dear = (StepCosts([1, 8], [1.0, 1.0], [0.1, 0.1], per_guess=more) for more in (0, 0.06))
    tried = {}
    request = make_request(max_draft=10**6)
    for name, costs in (("free", free), ("dear", dear)):
        drafter.costs = costs
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
    assert len(drafter._histories["a"].confidences) == 8


def test_prices_know_what_is_spared_and_forwards_are_foretold_as_they_are():
    costs = StepCosts([1, 8], [1.0, 1.0], [0.1, 0.1])
    drafter = fixed_drafter(Reciting())
    drafter.costs = costs
    request = make_request()
    for _ in range(12):
        (draft,) = drafter.propose([request], 8)
        request = rejected(request, draft)
    drafter.foretold_further = 0.0
    before = drafter.counts["forwards"]
    drafter.propose([request], 8)
    assert drafter.counts["forwards"] - before == 2  # six of seven further tokens were left of the last draft
    assert drafter.foretold_further == pytest.approx(0.1)
    now = drafter._costs_now(1, 1)
    assert 0.14 < now.draft[0] / 0.1 < 0.5 and now.first * now.draft[0] == pytest.approx(0.1)
    assert drafter._costs_now(4, 1).draft == now.draft  # others go without
    assert drafter._costs_now(2, 2).draft == drafter._costs_now(3, 3).draft == [0.1, 0.1]
    drafter.recalls = False
    assert drafter._costs_now(1, 1).draft == [0.1, 0.1]
    drafter.recalls = True
    drafter._doubt([request], 10**5)
    assert drafter._costs_now(1, 1).draft[0] == pytest.approx(0.1, rel=1e-3)


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


# How far --------------------------------------------------------------------------------------------------------------


def sure(entries) -> float:
    return 0.999


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
    drafter.costs = FREE
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
    drafter.costs = LOADED
    for token in range(steps_alone):
        assert drafter.propose([request], 6) == [[]]
        request = target.run(extended(request, [token]))
    drafter.costs = FREE
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
    judged, accepted = drafter.acceptance.judged.sum(), drafter.acceptance.accepted.sum()
    for _ in range(30):
        drafts = drafter.propose(requests, 5)
        # What was learnt of the last step stands before the next drafts; nothing of these is known yet.
        assert drafter.acceptance.judged.sum() == judged
        assert drafter.acceptance.accepted.sum() == pytest.approx(accepted)
        for i, draft in enumerate(drafts):
            num_verified = rng.randint(0, len(draft))
            num_accepted = rng.randint(0, num_verified)
            requests[i] = extended(requests[i], [*draft[:num_accepted], 3], num_verified)
            judged += min(num_accepted + 1, num_verified)
            accepted += num_accepted


def planned_lengths(drafter, requests, most: list[int], others: list[DraftRequest]) -> list[int]:
    """How far the drafter should have gone in its last step, by a plan that is told the same, for `requests` by falling
    `most`, in a batch with `others`."""
    factors = np.array([drafter._histories[r.req_id].factor for r in requests])
    probs = [
        [SlotModel.random_prob(e) for e in entries_of_drafts(r, length)]
        for r, length in zip(requests, most, strict=True)
    ]
    seen = [len(kept_tokens(r)) + len(r.token_ids) - r.num_prompt_tokens for r in requests]
    rates = np.clip(drafter.acceptance.mean() * factors, 0, 0.99)
    context = np.array([len(r.token_ids) for r in requests])
    others_context = sum(len(r.token_ids) for r in others)
    plan = DraftPlan(drafter.costs, rates, context, np.array(seen), max(most), len(others), others_context)
    lengths = np.zeros(len(requests), dtype=int)
    active = np.arange(len(requests))
    while len(active):
        chances = [drafter.acceptance.chances([probs[i][lengths[i]]])[0] * factors[i] for i in active]
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
        drafter.costs = StepCosts(
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
    judged = drafter.acceptance.judged.copy()
    drafter.propose([extended(request, [1, 2, 3], 4)], 4)
    assert (drafter.acceptance.judged == judged).all()
    assert drafter._histories["a"].expected == 0
    drafter.release("a")
    assert not drafter._histories


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
            rank.costs = costs
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(time, "perf_counter", clock)  # one rank may be slower than the other
                drafts.append(rank.propose(requests, 5))
        assert drafts[0] == drafts[1]
        assert ranks[0].counts == ranks[1].counts
        assert (ranks[0].acceptance.accepted == ranks[1].acceptance.accepted).all()
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
    drafter.costs = costs
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
    decide = drafter._paying

    def counted(requests, batch, wanted, max_length):
        decisions.append(len(wanted))
        return decide(requests, batch, wanted, max_length)

    monkeypatch.setattr(drafter, "_paying", counted)
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
    drafter.costs = FREE
    assert run_fixed(drafter, "a", 1, 0) == [[10]]


def test_what_was_learned_is_believed_less_by_as_many_steps_as_a_refusal_stood_for():
    costs = replace(AS_DEAR_AS_A_STEP, target=[1.0, 1.0], draft=[10.0, 10.0], prompt=1.0)
    drafters = [only_if_faster(SlotModel(max_model_len=10**6), costs) for _ in range(2)]
    for drafter in drafters:
        for _ in range(50):
            drafter.chains.learn(3, 10)
    once, always = drafters
    run_fixed(once, "a", 161, 0)
    for _ in range(161):
        always.refusal = None  # it is decided anew in every step
        run_fixed(always, "a", 1, 0)
    assert once.chains.tokens(10) == pytest.approx(always.chains.tokens(10))
    assert once.costs.prompt == pytest.approx(always.costs.prompt)
    assert once.costs.prompt < 1.0


def test_a_refusal_does_not_stand_for_newcomers():
    # Half a second is saved for every token, or a little less.
    drafter = only_if_faster(SlotModel(max_model_len=10**6), replace(AS_DEAR_AS_A_STEP, prompt=10.0))
    for _ in range(1000):
        drafter.chains.learn(3, 10)
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


def test_what_drafts_should_take_is_told_apart_by_first_and_further_tokens():
    costs = StepCosts([1, 1000], [1.0, 1.0], [0.1, 0.1], draft_per_context=1e-3, first=5.0)
    drafter = make_drafter(SlotModel(max_model_len=10**6), costs=costs)
    drafter.is_adaptive = drafter.only_if_faster = False
    requests = [make_request("a"), make_request("b", max_draft=3)]
    started = time.perf_counter()
    assert [len(draft) for draft in drafter.propose(requests, 4)] == [4, 3]
    seconds = time.perf_counter() - started
    a, b = (len(kept_tokens(request)) + len(request.token_ids) - request.num_prompt_tokens for request in requests)
    assert drafter.foretold_first == pytest.approx(5 * (0.1 + 1e-3 * (a + b)))
    assert drafter.foretold_further == pytest.approx(3 * 0.1 + 1e-3 * (3 * a + 2 * b))
    assert 0 < drafter.further_seconds < seconds


@pytest.mark.parametrize("sees_tokens", [True, False])
def test_adaptive_drafts_are_of_the_least_length_where_there_is_room_for_it(sees_tokens):
    # Nothing is likely to be accepted, and every row costs as much as another step.
    model = SlotModel(max_model_len=10**6, confidence=lambda entries: 0.1)
    drafter = make_drafter(model, costs=LOADED)
    drafter.only_if_faster, drafter.least_length, drafter.sees_tokens = False, 4, sees_tokens
    requests = [make_request("a"), make_request("b", max_draft=2)]
    assert [len(draft) for draft in drafter.propose(requests, 10)] == [4, 2]
    assert [len(draft) for draft in drafter.propose([make_request("c")], 3)] == [3]
    drafter.least_length = 1
    assert [len(draft) for draft in drafter.propose([make_request("d")], 10)] == [1]


def test_whether_adaptive_drafts_pay_is_asked_of_none_shorter_than_the_least():
    # One token pays, four don't.
    costs = StepCosts([1, 2, 3, 1000], [1.0, 1.1, 9.0, 999.0], [0.01] * 4)
    drafter = make_drafter(SlotModel(max_model_len=10**6), costs=costs)
    assert [len(draft) for draft in drafter.propose([make_request("a")], 10)] == [1]
    drafter.least_length = 4
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
    assert drafter.chains.tokens(10) == 11


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
    drafter.is_adaptive = adaptive
    before = drafter.acceptance.accepted.sum()
    for number in range(40):
        request = make_request(str(number), max_draft=10**6)
        request = replace(request, ends=frozenset(oracle(request, 4)[3:]))
        (draft,) = drafter.propose([request], 10)
        assert len(draft) <= 4
        request = replace(extended(request, draft if is_loose else [*draft, 7], len(draft)), is_done=True)
        assert drafter.propose([request], 10) == [[]]
        drafter.release(request.req_id)
    if adaptive:
        assert drafter.acceptance.accepted.sum() - before == pytest.approx(40 * 4)
    else:
        assert drafter.chains.tokens(10) == pytest.approx(1 + 10 * (8 + 40 * 0.4) / 48)


def test_a_prompt_is_read_where_what_is_left_of_the_answer_pays_for_it():
    # Three tokens a step for the price of two: half a second is saved for every token, or a little less.
    costs = replace(AS_DEAR_AS_A_STEP, prompt=10.0)
    drafter = only_if_faster(SlotModel(max_model_len=10**6), costs)
    for _ in range(1000):
        drafter.chains.learn(3, 10)
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
        drafter.costs = FREE
        request = make_request("a", 20)
        (draft,) = drafter.propose([request], 4)
        longer = replace(
            make_request("a", 30), token_ids=np.append(extended(request, draft).token_ids, range(1, 8)).astype(np.int32)
        )
        longer = replace(longer, num_prompt_tokens=30)
        (again,) = drafter.propose([longer], 4)
        assert len(again) == 4
        assert len(drafter.sequences["a"].kept) > len(kept_tokens(request))


def test_an_image_may_bear_the_name_of_a_video_that_was_pruned():
    drafter = make_drafter()
    video = make_request("a", video="x")
    drafter.propose([video], 2)
    image = replace(make_request("b", video="x"), items=[replace(video.items[0], is_video=False)])
    (draft,) = drafter.propose([image], 2)
    assert len(draft) == 2
    assert len(drafter.sequences["b"].kept) == image.num_prompt_tokens


def test_of_what_is_preempted_no_answers_length_is_learned():
    drafter = only_if_faster(SlotModel(max_model_len=10**6), replace(AS_DEAR_AS_A_STEP, prompt=10.0))
    for end in (None, 3):
        drafter.propose([make_request("a", max_draft=10**6)], 10)
        drafter.release("a", end)
        assert drafter.answers.tokens_left(10**6) == (10**6 if end is None else 3)
    drafter.release("who came and went while nothing was drafted", 5)
    assert drafter.answers.tokens_left(10**6) == 4


def test_a_refusal_is_for_about_the_same_requests_and_for_some_steps():
    drafter = only_if_faster(SlotModel(max_model_len=10**6), replace(AS_DEAR_AS_A_STEP, first=100.0))
    few = ["a", "b"]
    assert not drafter.rests(few)
    assert drafter.propose([make_request(name) for name in few], 10) == [[], []]
    assert not drafter.rests(["a"]) and not drafter.rests(["a", "c"]) and not drafter.rests(["a", "b", "c"])
    stood = [drafter.rests(few) for _ in range(20)]
    assert stood == [True] * 15 + [False] * 5
    assert drafter.counts["skipped_cost"] == 2 * 16
    drafter.refusal.num_steps = 1
    drafter.costs = replace(drafter.costs)
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
    drafter.most_rows = rows
    assert [len(draft) for draft in drafter.propose(requests, 4)] == lengths
    assert drafter.counts["skipped_cost"] == lengths.count(0)
    assert drafter.counts["prefills"] == 3 - lengths.count(0)


def test_who_has_drafts_goes_on_before_others_begin():
    drafter = make_drafter()
    first, second, third = (make_request(str(i)) for i in range(3))
    drafter.most_rows = 6
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
    drafter.most_rows = 4 + 8
    drafts = drafter.propose(requests, 8)
    assert [len(draft) for draft in drafts] == [8, 0, 0, 0]
    assert drafter.counts["skipped_cost"] == 3
    # And where what fits does not pay, the step's requests rest.
    drafter.costs = replace(costs, first=10**6)
    assert not any(drafter.propose([extended(requests[0], [*drafts[0], 1], 8), *requests[1:]], 8))
    assert drafter.rests([request.req_id for request in requests])


def test_who_cannot_be_drafted_for_takes_no_room():
    drafter = make_drafter()
    blind = [make_request(str(i)) for i in range(2)]
    for request in blind:
        request.items = [replace(item, payload=None) for item in request.items]
    other = make_request("2")
    drafter.most_rows = 3 + 8
    drafter.propose(blind, 4)
    assert [len(draft) for draft in drafter.propose([*blind, other], 4)] == [0, 0, 4]
    assert drafter.counts["skipped_embeddings"] == 4 and drafter.counts["skipped_cost"] == 0


@pytest.mark.parametrize("least", [1, 3])
def test_drafts_that_end_where_they_do_not_pay_share_the_room_among_them(least):
    drafter = make_drafter(SlotModel(max_model_len=10**6), costs=FREE)
    drafter.least_length = least
    requests = [make_request(str(i)) for i in range(3)]
    drafter.most_rows = 3 + 10
    lengths = [len(draft) for draft in drafter.propose(requests, 8)]
    assert sum(lengths) == 10 and min(lengths) >= least
    drafter.most_rows = 3 + least
    assert sorted(len(draft) for draft in drafter.propose([extended(r, [1]) for r in requests], 8)) == [0, 0, least]
    assert drafter.counts["skipped_cost"] == 2


def test_where_all_requests_of_lately_would_not_fit_those_who_would_are_thought_of():
    # Sixteen drafts are never verified together: eight are, and they pay.
    costs = StepCosts([1, 16 + 64, 16 + 65], [1.0, 1.0, 10**6], [0.01] * 3, prompt=1e-3)
    for rows, pays in ((16 + 64, True), (10**6, False)):
        drafter = only_if_faster(SlotModel(max_model_len=10**6), costs)
        drafter.most_rows, drafter._most_lately = rows, 16.0
        (draft,) = drafter.propose([make_request("a", max_draft=1000)], 8)
        assert bool(draft) == pays


def test_a_short_answer_keeps_no_room_from_a_long_one():
    # Of the two that have not been read one has room, and the short one would not pay.
    costs = StepCosts([1, 1000], [1.0, 1.0], [0.01, 0.01], prompt=10.0)
    drafter = only_if_faster(SlotModel(max_model_len=10**6), costs)
    drafter.most_rows = 2 + 10
    short, long = make_request("short", max_draft=15), make_request("long", max_draft=1000)
    assert [len(draft) for draft in drafter.propose([short, long], 10)] == [0, 10]


def test_prompts_that_the_target_reads_have_logits_too():
    drafter = make_drafter()
    drafter.most_rows = 3 * 5 + 2
    requests = [make_request(str(i)) for i in range(3)]
    for num_prefilling, lengths in ((2, [4, 4, 4]), (3, [4, 4, 0])):
        drafts = drafter.start(requests, 4, num_prefilling)
        drafter.finish(drafts)
        assert drafts.lengths == lengths


def test_who_has_ended_takes_no_room():
    drafter = make_drafter()
    requests = [make_request(str(i)) for i in range(3)]
    drafter.most_rows = 2 * 5
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
    drafter.costs = replace(costs, first=10**6)
    assert not any(drafter.propose([extended(request, [7], 0) for request in requests], 4))
    assert drafter.rests([request.req_id for request in requests])


def test_drafts_longer_than_fit_promise_nothing():
    # Drafts of eight tokens would pay for the first one's price, for which eight requests have no room.
    costs = StepCosts([1, 400], [1.0, 1.05], [0.02, 0.02], first=45.0)
    for rows, pays in ((10**6, True), (8 + 8, False)):
        drafter = make_drafter(SlotModel(max_model_len=10**6), costs=costs)
        drafter.most_rows = rows
        assert any(drafter.propose([make_request(str(i), max_draft=100) for i in range(8)], 8)) == pays
