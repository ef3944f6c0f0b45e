"""Drafting: K tokens per step for all running requests, one batched forward per drafted token.

The drafter knows nothing of vLLM: requests come in as `DraftRequest`, the model is whatever `DraftModel` describes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from vllm_lvspec.draft.embeddings import EmbeddingCache, KeptEmbeddings
from vllm_lvspec.draft.pages import DraftSequence, PagePool
from vllm_lvspec.draft.pruning import Strategy, VisualGrid
from vllm_lvspec.kernels.advance_decode import advance_decode

# What is counted: requests and tokens drafted for, forwards of the model, and requests that could not be drafted for in
# a step because no room was left in their length, no page in the pool, or their visual embeddings can't be had.
COUNTS = (
    "drafted_requests", "drafted_tokens", "forwards", "skipped_length", "skipped_pool_full", "skipped_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class VisualItem:
    """One image or video in a prompt.

    `rows`: indices among the prompt's tokens that its embeddings replace, ascending, int64 `[num_embeddings]`.
    `payload` is what `DraftModel.encode` needs, or None where vLLM has stripped it.
    """

    identifier: str
    is_video: bool
    grid: VisualGrid
    rows: np.ndarray
    payload: Any


@dataclass(frozen=True)
class DraftRequest:
    """One running request: `token_ids [num_tokens]` are its prompt and all that was emitted, the newest token last."""

    req_id: str
    token_ids: np.ndarray
    num_prompt_tokens: int
    items: Sequence[VisualItem]
    prompt: Any  # what `DraftModel.prompt_positions` needs
    max_draft_tokens: int  # what is left of the request's length


@dataclass
class DraftBatch:
    """Inputs of one forward over `num_rows` requests.

    `token_ids [num_tokens]` int64, `positions [dims, num_tokens]` int64, `slots [num_tokens]` int64, `query_starts
    [num_rows + 1]` int32, `seq_lens [num_rows]` int32 (both also on the host), `block_table [num_rows, max_pages]`
    int32. `visual_mask [num_tokens]` (bool, on the host) marks the tokens that `visual` (rows in order) replaces; None
    where there is none.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_starts: torch.Tensor
    query_starts_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    max_seq_len: int
    visual_mask: torch.Tensor | None = None
    visual: list[torch.Tensor] = field(default_factory=list)


class DraftModel(Protocol):
    """What the drafter asks of a model and its KV cache."""

    device: torch.device
    pool: PagePool
    max_batch_tokens: int
    max_model_len: int

    def prompt_positions(self, prompt: Any, num_prompt_tokens: int) -> tuple[torch.Tensor, int]:
        """Positions of the whole prompt `[dims, num_prompt_tokens]`, and what is added to the index of later ones."""
        ...

    def encode(self, payload: Any) -> torch.Tensor:
        """Visual embeddings `[num_embeddings, width]` of one item."""
        ...

    def forward(self, batch: DraftBatch, logits_rows: torch.Tensor) -> torch.Tensor:
        """Write the batch into the cache; greedy next tokens `[len(logits_rows)]`, int64, after these rows."""
        ...

    def profile(self) -> None:
        """Run the largest forward once."""
        ...


@dataclass
class _Prompt:
    """What is kept of a prompt until it is in the cache, and its positions."""

    positions: np.ndarray  # [dims, num_kept]
    delta: int
    visual_mask: np.ndarray | None  # [num_kept]
    visual: torch.Tensor | None  # [sum(visual_mask), width]


class Drafter:
    """Owns the drafter's sequences, their pages and the visual embeddings."""

    def __init__(self, model: DraftModel, prune: Strategy, ratio: float, max_embedding_bytes: int):
        self.model = model
        self.prune = prune
        self.ratio = ratio
        self.embeddings = EmbeddingCache(max_embedding_bytes)
        self.sequences: dict[str, DraftSequence] = {}
        self._prompts: dict[str, _Prompt] = {}
        self._undraftable: set[str] = set()
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))

    def release(self, req_id: str) -> None:
        """Forget a request that has finished, was aborted or preempted; unknown ones are fine."""
        sequence = self.sequences.pop(req_id, None)
        if sequence is not None:
            self.model.pool.release(sequence.pages)
        self._prompts.pop(req_id, None)
        self._undraftable.discard(req_id)

    def propose(self, requests: Sequence[DraftRequest], num_speculative_tokens: int) -> list[list[int]]:
        """Drafted tokens of each request, at most `num_speculative_tokens`; empty where it can't be drafted for."""
        drafts: list[list[int]] = [[] for _ in requests]
        ready: list[tuple[int, int]] = []  # draft length, index of the request
        for i, request in enumerate(requests):
            room = self.model.max_model_len - len(request.token_ids)
            length = min(num_speculative_tokens, request.max_draft_tokens, room)
            if length < 1:
                self.counts["skipped_length"] += 1
            elif self._prepare(request, length):
                ready.append((length, i))
        if not ready:
            return drafts
        ready.sort(key=lambda pair: -pair[0])
        lengths = [length for length, _ in ready]
        drafted = self._draft([requests[i] for _, i in ready], lengths)
        for (length, i), row in zip(ready, drafted, strict=True):
            drafts[i] = row[:length]
        self.counts["drafted_requests"] += len(ready)
        self.counts["drafted_tokens"] += sum(lengths)
        return drafts

    # Preparing a request ------------------------------------------------------------------------------------------

    def _prepare(self, request: DraftRequest, length: int) -> bool:
        """Have a sequence with pages for the request's tokens and `length - 1` drafted ones."""
        req_id = request.req_id
        sequence = self.sequences.get(req_id)
        if sequence is not None and sequence.num_prompt_tokens != request.num_prompt_tokens:
            self.release(req_id)  # a streaming session has gone on with a longer prompt
            sequence = None
        if req_id in self._undraftable:
            self.counts["skipped_embeddings"] += 1
            return False
        known: list[KeptEmbeddings | None] = []
        if sequence is None:
            known = [self.embeddings.get(item.identifier, len(item.rows)) for item in request.items]
            if any(hit is None and item.payload is None for hit, item in zip(known, request.items, strict=True)):
                return self._give_up(req_id)
            sequence = DraftSequence(request.num_prompt_tokens, self._kept_tokens(request, known))
        num_entries = len(request.token_ids) - sequence.num_hidden
        # The newest token was never in the cache, and drafted ones that were rejected are not valid there.
        sequence.num_cached = min(sequence.num_cached, num_entries - 1)
        if not self.model.pool.grow(sequence.pages, num_entries + length - 1):
            self.counts["skipped_pool_full"] += 1
            return False
        if req_id not in self.sequences:
            self.sequences[req_id] = sequence
            visual = self._encode_missing(request, known)
            if visual is None:
                return self._give_up(req_id)
            self._prompts[req_id] = self._build_prompt(request, sequence, visual)
        return True

    def _give_up(self, req_id: str) -> bool:
        """The request's visual embeddings can't be had; it is not drafted for until it is released."""
        self.release(req_id)
        self._undraftable.add(req_id)
        self.counts["skipped_embeddings"] += 1
        return False

    def _kept_rows(self, item: VisualItem) -> torch.Tensor:
        if not item.is_video:
            return torch.arange(len(item.rows))
        return self.prune(item.grid, self.ratio)

    def _kept_tokens(self, request: DraftRequest, known: list[KeptEmbeddings | None]) -> list[int]:
        mask = np.ones(request.num_prompt_tokens, dtype=bool)
        for item, hit in zip(request.items, known, strict=True):
            # An item without its pixels may have no grid either; what was kept of it is known with its embeddings.
            indices = self._kept_rows(item) if hit is None else hit.indices
            mask[item.rows] = False
            mask[item.rows[indices.numpy()]] = True
        return np.flatnonzero(mask).tolist()

    def _encode_missing(self, request: DraftRequest, known: list[KeptEmbeddings | None]) -> list[KeptEmbeddings] | None:
        """Kept embeddings of all items; None where the encoder does not give what the prompt has room for."""
        found = {item.identifier: hit for item, hit in zip(request.items, known, strict=True) if hit is not None}
        missing = {item.identifier: item for item in request.items if item.identifier not in found}
        for item in missing.values():
            # One by one: the encoder's memory was profiled for one item, and only what is kept of it stays.
            full = self.model.encode(item.payload)
            if len(full) != len(item.rows):
                return None
            indices = self._kept_rows(item)
            found[item.identifier] = KeptEmbeddings(len(full), indices, full[indices.to(full.device)].clone())
            self.embeddings.put(item.identifier, found[item.identifier])
        return [found[item.identifier] for item in request.items]

    def _build_prompt(self, request: DraftRequest, sequence: DraftSequence, visual: list[KeptEmbeddings]) -> _Prompt:
        positions, delta = self.model.prompt_positions(request.prompt, request.num_prompt_tokens)
        kept_positions = positions.numpy()[:, sequence.kept]
        if not visual:
            return _Prompt(kept_positions, delta, None, None)
        is_visual = np.zeros(request.num_prompt_tokens, dtype=bool)
        for item, embeddings in zip(request.items, visual, strict=True):
            is_visual[item.rows[embeddings.indices.numpy()]] = True
        order = np.argsort([item.rows[0] for item in request.items])
        rows = torch.cat([visual[i].embeddings for i in order])
        return _Prompt(kept_positions, delta, is_visual[sequence.kept], rows)

    # Running the model --------------------------------------------------------------------------------------------

    def _draft(self, requests: list[DraftRequest], lengths: list[int]) -> list[list[int]]:
        """Draft for prepared `requests`, sorted by falling `lengths`."""
        newest = self._catch_up(requests)
        drafted = [newest]
        sequences = [self.sequences[r.req_id] for r in requests]
        for step in range(1, lengths[0]):
            active = sum(length > step for length in lengths)
            if step == 1:
                batch = self._decode_batch(requests[:active], sequences[:active], newest[:active])
            else:
                batch = _first_rows(batch, active)
                batch.token_ids = newest[:active]
                batch.max_seq_len += 1
                batch.seq_lens_cpu = batch.seq_lens_cpu + 1
                advance_decode(
                    batch.positions, batch.seq_lens, batch.slots, batch.block_table, self.model.pool.page_size
                )
            newest = self.model.forward(batch, batch.query_starts_cpu[1:] - 1)
            self.counts["forwards"] += 1
            drafted.append(newest)
        for sequence, length in zip(sequences, lengths, strict=True):
            sequence.num_cached += length - 1
        columns = torch.nn.utils.rnn.pad_sequence(drafted)  # [num_requests, max_length]
        return columns.tolist()

    def _catch_up(self, requests: list[DraftRequest]) -> torch.Tensor:
        """Put all tokens that are not cached yet into the cache; the first drafted tokens `[num_requests]`.

        One forward where the tokens fit into the model's batch, as they do unless long prompts arrive together.
        """
        first = torch.empty(len(requests), dtype=torch.int64, device=self.model.device)
        waiting = list(range(len(requests)))
        while waiting:
            budget = self.model.max_batch_tokens
            parts: list[tuple[int, int, int]] = []  # request, first and end entry
            for i in waiting:
                sequence = self.sequences[requests[i].req_id]
                begin = sequence.num_cached
                end = min(len(requests[i].token_ids) - sequence.num_hidden, begin + budget)
                if end > begin:
                    parts.append((i, begin, end))
                    budget -= end - begin
            batch = self._ragged_batch(requests, parts)
            tokens = self.model.forward(batch, batch.query_starts_cpu[1:] - 1)
            self.counts["forwards"] += 1
            waiting = [i for i in waiting if i not in {part[0] for part in parts}]
            done: list[tuple[int, int]] = []  # row of the batch, request
            for row, (i, _, end) in enumerate(parts):
                sequence = self.sequences[requests[i].req_id]
                sequence.num_cached = end
                if end >= len(sequence.kept):
                    prompt = self._prompts[requests[i].req_id]
                    prompt.visual = prompt.visual_mask = None  # in the cache now
                if end == len(requests[i].token_ids) - sequence.num_hidden:
                    done.append((row, i))
                else:
                    waiting.append(i)
            if done:
                rows, targets = (torch.tensor(x, device=self.model.device) for x in zip(*done, strict=True))
                first[targets] = tokens[rows]
        return first

    def _ragged_batch(self, requests: list[DraftRequest], parts: list[tuple[int, int, int]]) -> DraftBatch:
        token_ids, positions, slots, masks, visual = [], [], [], [], []
        sequences = [self.sequences[requests[i].req_id] for i, _, _ in parts]
        for (i, begin, end), sequence in zip(parts, sequences, strict=True):
            request, prompt = requests[i], self._prompts[requests[i].req_id]
            num_kept = len(sequence.kept)
            split = min(max(num_kept, begin), end)
            later = np.arange(split, end) + sequence.num_hidden
            token_ids.append(np.concatenate([request.token_ids[sequence.kept[begin:split]], request.token_ids[later]]))
            dims = len(prompt.positions)
            text = np.broadcast_to(later + prompt.delta, (dims, len(later)))
            positions.append(np.concatenate([prompt.positions[:, begin:split], text], axis=1))
            slots.append(self._slots(sequence, np.arange(begin, end)))
            mask = np.zeros(end - begin, dtype=bool)
            if prompt.visual_mask is not None and prompt.visual is not None:
                mask[: split - begin] = prompt.visual_mask[begin:split]
                before = int(prompt.visual_mask[:begin].sum())
                if count := int(mask.sum()):
                    visual.append(prompt.visual[before : before + count])
            masks.append(mask)
        lens = [end - begin for _, begin, end in parts]
        starts = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32)
        ends = [end for _, _, end in parts]
        device = self.model.device
        return DraftBatch(
            token_ids=torch.from_numpy(np.concatenate(token_ids).astype(np.int64)).to(device),
            positions=torch.from_numpy(np.concatenate(positions, axis=1).astype(np.int64)).to(device),
            slots=torch.from_numpy(np.concatenate(slots)).to(device),
            query_starts=starts.to(device),
            query_starts_cpu=starts,
            seq_lens=torch.tensor(ends, dtype=torch.int32, device=device),
            seq_lens_cpu=torch.tensor(ends, dtype=torch.int32),
            block_table=self._block_table(sequences),
            max_query_len=max(lens),
            max_seq_len=max(ends),
            visual_mask=torch.from_numpy(np.concatenate(masks)) if visual else None,
            visual=visual,
        )

    def _decode_batch(
        self, requests: list[DraftRequest], sequences: list[DraftSequence], tokens: torch.Tensor
    ) -> DraftBatch:
        """One drafted token per request, right after what is cached."""
        device, count = self.model.device, len(sequences)
        places = [len(r.token_ids) + self._prompts[r.req_id].delta for r in requests]
        dims = len(self._prompts[requests[0].req_id].positions)
        starts = torch.arange(count + 1, dtype=torch.int32)
        lens = [s.num_cached + 1 for s in sequences]
        slots = [int(self._slots(s, np.array([s.num_cached]))[0]) for s in sequences]
        return DraftBatch(
            token_ids=tokens,
            positions=torch.tensor(places, device=device).repeat(dims, 1),
            slots=torch.tensor(slots, device=device),
            query_starts=starts.to(device),
            query_starts_cpu=starts,
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
            seq_lens_cpu=torch.tensor(lens, dtype=torch.int32),
            block_table=self._block_table(sequences),
            max_query_len=1,
            max_seq_len=max(lens),
        )

    def _slots(self, sequence: DraftSequence, entries: np.ndarray) -> np.ndarray:
        page_size = self.model.pool.page_size
        return np.asarray(sequence.pages, dtype=np.int64)[entries // page_size] * page_size + entries % page_size

    def _block_table(self, sequences: list[DraftSequence]) -> torch.Tensor:
        table = np.zeros((len(sequences), max(len(s.pages) for s in sequences)), dtype=np.int32)
        for row, sequence in enumerate(sequences):
            table[row, : len(sequence.pages)] = sequence.pages
        return torch.from_numpy(table).to(self.model.device)


def _first_rows(batch: DraftBatch, count: int) -> DraftBatch:
    """The first `count` requests of a batch with one token each."""
    return DraftBatch(
        token_ids=batch.token_ids[:count],
        positions=batch.positions[:, :count],
        slots=batch.slots[:count],
        query_starts=batch.query_starts[: count + 1],
        query_starts_cpu=batch.query_starts_cpu[: count + 1],
        seq_lens=batch.seq_lens[:count],
        seq_lens_cpu=batch.seq_lens_cpu[:count],
        block_table=batch.block_table[:count],
        max_query_len=1,
        max_seq_len=batch.max_seq_len,
    )
