"""A drafter's model whose next token follows from its whole cache, and what its drafts should be."""

from __future__ import annotations

import functools
import random
import zlib
from dataclasses import replace

import numpy as np
import torch

from vllm_lvspec.draft.batch import DraftBatch
from vllm_lvspec.draft.drafter import Drafter, NextTokens
from vllm_lvspec.draft.pages import NO_SLOT, PagePool
from vllm_lvspec.draft.pruning import STRATEGIES, VideoView, VisualGrid
from vllm_lvspec.draft.request import DraftRequest, VisualItem

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

    def of_first_rank(self, values):
        return values

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


def make_drafter(
    model=None, ratio=0.5, strategy="uniform", scores=None, costs=None, finds_prefixes=False
) -> ProposingDrafter:
    chosen = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
    drafter = ProposingDrafter(
        model or SlotModel(), chosen, ratio, 10**6, scores, finds_prefixes, is_adaptive=True, only_if_faster=True
    )
    drafter.payoff.costs = costs
    return drafter


def extended(request: DraftRequest, more: list[int], num_verified: int = 0) -> DraftRequest:
    return replace(request, token_ids=np.append(request.token_ids, more).astype(np.int32), num_verified=num_verified)


def flat(size: int, *best: int) -> torch.Tensor:
    """Scores that ask for `best` before all others."""
    scores = torch.zeros(size)
    scores[list(best)] = torch.arange(len(best), 0, -1) + 10.0
    return scores


def sure(entries) -> float:
    return 0.999
