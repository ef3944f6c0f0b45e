"""Drafting: K tokens per step for all running requests, one batched forward per drafted token.

The drafter knows nothing of vLLM: requests come in as `DraftRequest`, the model is whatever `DraftModel` describes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from vllm_lvspec.device import Clock, pinned, upload
from vllm_lvspec.draft.batch import DraftBatch, take_rows
from vllm_lvspec.draft.drafts import Drafted, Drafts
from vllm_lvspec.draft.embeddings import EmbeddingCache, KeptEmbeddings
from vllm_lvspec.draft.leftover import MOST_RECALLING, left_of
from vllm_lvspec.draft.pages import NO_SLOT, DraftSequence, PagePool
from vllm_lvspec.draft.payoff import Payoff
from vllm_lvspec.draft.plan import DraftPlan
from vllm_lvspec.draft.prefixes import SeenItem, page_keys
from vllm_lvspec.draft.pruning import STRATEGIES, Strategy, VideoView, budget
from vllm_lvspec.draft.request import Candidate, DraftRequest, VisualItem
from vllm_lvspec.kernels.advance_decode import advance_decode

# What is counted: requests and tokens drafted for, forwards of the model, tokens that were drafted without one because
# they were left of the draft before; prompts, and how many of the tokens that are seen of them were read, or found in
# pages of earlier ones; requests that could not be drafted for in a step because no room was left in their length, no
# page in the pool, their visual embeddings can't be had, or because drafting would not have paid or the target's logits
# have no room; and videos of which the strategy did not know what it looks at.
COUNTS = (
    "drafted_requests", "drafted_tokens", "forwards", "recalled_tokens", "prefills", "read_prompt_tokens",
    "found_prompt_tokens", "skipped_length", "skipped_pool_full", "skipped_embeddings", "skipped_cost",
    "pruned_uniformly",
)  # fmt: skip


class NextTokens(NamedTuple):
    """Greedy next tokens `[num_rows]` int64; their probabilities `[num_rows]` float32 where these were asked for."""

    token_ids: torch.Tensor
    probs: torch.Tensor | None

    def rows(self, rows: np.ndarray) -> NextTokens:
        """`rows` (ascending) of them."""
        return NextTokens(take_rows(self.token_ids, rows), None if self.probs is None else take_rows(self.probs, rows))


class DraftModel(Protocol):
    """What the drafter asks of a model and its KV cache.

    `copies`: whether it takes keys and values from the target's cache, by `copy`, instead of computing them.
    """

    copies: bool
    device: torch.device
    pool: PagePool
    max_batch_tokens: int
    max_model_len: int

    @property
    def tokens_at_once(self) -> int:
        """How many tokens of each request, as many of all, it reads in no more time than one."""
        ...

    def chain_tokens(self, num_requests: int, num_tokens: int) -> int | None:
        """How many tokens of each request it reads at once where `num_tokens` are there to be read, or more, behind
        which there is something that means nothing; None where it rather reads one after another."""
        ...

    def prompt_positions(self, prompt: Any, num_prompt_tokens: int) -> tuple[torch.Tensor, int]:
        """Positions of the whole prompt `[dims, num_prompt_tokens]`, and what is added to the index of later ones."""
        ...

    def encode(self, payload: Any) -> torch.Tensor:
        """Visual embeddings `[num_embeddings, width]` of one item."""
        ...

    def forward(self, batch: DraftBatch, with_probs: bool = False) -> NextTokens:
        """Write the batch into the cache; the next token of each request, or behind each token of the batch."""
        ...

    def of_first_rank(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, on the host; where several ranks draft, with those of the first one in them."""
        ...

    def copy(self, target_slots: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy keys and values from `target_slots [num_tokens]` (int64) of the target's cache to `slots` of its own."""
        ...

    def profile(self) -> None:
        """Run the largest forward once."""
        ...


@dataclass
class _Prompt:
    """What is kept of a prompt until it is in the cache, and its positions.

    `keys`: of the full pages that it takes. What is found in pages of an earlier one is not among `visual`.
    """

    positions: np.ndarray  # [dims, num_kept]
    delta: int
    keys: list[bytes] = field(default_factory=list)
    visual_mask: np.ndarray | None = None  # [num_kept]
    visual: torch.Tensor | None = None  # [sum(visual_mask), width]


@dataclass(frozen=True)
class _Seen:
    """What the drafter sees of a prompt that has not been begun: places `kept`, and of each item some `embeddings`
    where these are at hand."""

    num_prompt_tokens: int
    kept: np.ndarray
    prompt: _Prompt
    items: list[SeenItem]
    embeddings: list[KeptEmbeddings | None]


class Drafter:
    """Owns the drafter's sequences, their pages and the visual embeddings.

    `scores(req_id)`: the target's scores of each item's tokens, None for items where it has none; for strategies that
    ask the target. `finds_prefixes`: whether what was read of an earlier prompt is not read again where another begins
    with it. `settings` are those of `Payoff`, which decides who is drafted for and how far.
    """

    def __init__(
        self,
        model: DraftModel,
        strategy: Strategy,
        ratio: float,
        max_embedding_bytes: int,
        scores: Callable[[str], Sequence[torch.Tensor | None]] | None = None,
        finds_prefixes: bool = False,
        **settings: Any,
    ):
        self.model = model
        self.strategy = strategy
        self.ratio = ratio
        self.embeddings = EmbeddingCache(max_embedding_bytes)
        self.sequences: dict[str, DraftSequence] = {}
        self.payoff = Payoff(self.sequences, self._share_to_read, **settings)
        self.clock = Clock(model.device)
        self.prefill_seconds, self.prompts_read = 0.0, 0.0  # parts of prompts that were found do not count
        # What drafts should take by what is known of costs, prompts apart: their first tokens, and all further ones;
        # and what these have taken.
        self.foretold_first = self.foretold_further = self.further_seconds = 0.0
        self._scores = scores
        self._finds_prefixes = finds_prefixes and not model.copies
        self._prompts: dict[str, _Prompt] = {}
        self._looked: dict[str, _Seen] = {}  # at prompts that wait for pages, or for whom drafting may pay
        self._undraftable: set[str] = set()
        # To look at a drafted token before all are drafted would hold up a device that works by itself.
        self.sees_tokens = model.device.type == "cpu"
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))

    def release(self, req_id: str, num_emitted: int | None = None) -> None:
        """Forget a request that was preempted, or has ended; unknown ones are fine. `num_emitted`: of one that says how
        long answers are."""
        self._drop(req_id)
        self.payoff.release(req_id, num_emitted)
        self._undraftable.discard(req_id)

    def _drop(self, req_id: str) -> None:
        """Give back what the request holds of the cache."""
        sequence = self.sequences.pop(req_id, None)
        if sequence is not None:
            self.model.pool.release(sequence.pages)
        self._prompts.pop(req_id, None)
        self._looked.pop(req_id, None)

    @property
    def runs_ahead(self) -> bool:
        """Whether `start` comes back before the device is done."""
        return not (self.sees_tokens or self.payoff.plans)

    def rests(self, req_ids: Sequence[str]) -> bool:
        """As `Payoff.rests`; those who go without are counted."""
        rests = self.payoff.rests(req_ids)
        self.counts["skipped_cost"] += len(req_ids) * rests
        return rests

    def start(self, requests: Sequence[DraftRequest], num_speculative_tokens: int, num_prefilling: int = 0) -> Drafts:
        """Have at most `num_speculative_tokens` drafted for each request, none where it can't be drafted for.

        They must be finished before others are started. `num_prefilling`: requests beside these whose prompts the
        target is reading, and which may have logits in the next step, too.
        """
        drafts = Drafts([0] * len(requests))
        self._start(drafts, requests, num_speculative_tokens, self.payoff.most_rows - num_prefilling)
        drafts.end = self.clock.mark()
        return drafts

    def _start(
        self, drafts: Drafts, requests: Sequence[DraftRequest], num_speculative_tokens: int, most_rows: int
    ) -> None:
        if not any(request.num_verified for request in requests) and self.rests([r.req_id for r in requests]):
            return
        candidates: list[Candidate] = []
        for i, request in enumerate(requests):
            self._roll_back(request)
            room = self.model.max_model_len - len(request.token_ids)
            length = min(num_speculative_tokens, request.max_draft_tokens, room)
            if length < 1:
                self.counts["skipped_length"] += 1
            elif request.req_id in self._undraftable:
                self.counts["skipped_embeddings"] += 1
            else:
                candidates.append(Candidate(i, request, length))
        batch = [request for request in requests if request.goes_on]
        self.payoff.learn(candidates, len(batch), num_speculative_tokens)
        candidates = [candidate for candidate in candidates if not candidate.request.is_done]
        if not candidates:
            return
        chosen = self.payoff.choose(candidates, batch, num_speculative_tokens, most_rows - len(batch))
        self.counts["skipped_cost"] += len(candidates) - len(chosen)
        drafts.begin = self.clock.mark()
        ready = [candidate for candidate in chosen if self._prepare(candidate.request, candidate.length)]
        if not ready:
            return
        ready.sort(key=lambda candidate: -candidate.length)
        drafting = [candidate.request for candidate in ready]
        plan = self.payoff.plan(drafting, batch, num_speculative_tokens, most_rows)
        drafts.drafted = [
            Drafted(place, len(request.token_ids), self.payoff.history(request.req_id), request.ends)
            for place, request, _ in ready
        ]
        self._draft(drafts, drafting, [candidate.length for candidate in ready], plan)
        self.counts["drafted_requests"] += len(ready)
        self.counts["drafted_tokens"] += sum(drafts.lengths)

    def finish(self, drafts: Drafts) -> None:
        """Wait for the tokens of what was started last."""
        drafts.tokens = [[] for _ in drafts.lengths]
        self.clock.wait(drafts.end)
        if drafts.on_host is None:
            return
        self.further_seconds += self.clock.seconds(drafts.caught_up, drafts.end)
        if drafts.reads_prompts:
            self.prefill_seconds += self.clock.seconds(drafts.begin, drafts.caught_up)
        for row, members in zip(drafts.on_host.tolist(), drafts.members, strict=True):
            for token, i in zip(row, members, strict=False):
                drafts.tokens[drafts.drafted[i].request].append(token)
        for drafted in drafts.drafted:
            draft = drafts.tokens[drafted.request]
            until_end = (count for count, token in enumerate(draft, 1) if token in drafted.ends)
            drafted.history.num_until_end = next(until_end, None)
            drafted.history.draft, drafted.history.drafted_behind = draft, drafted.num_tokens

    def _roll_back(self, request: DraftRequest) -> None:
        """Forget what is not valid in the cache: drafted tokens that were rejected. The newest was never there.

        In every step, drafted for or not: later, the request's length will not tell what was rejected.
        """
        if (sequence := self.sequences.get(request.req_id)) is not None:
            sequence.num_cached = min(sequence.num_cached, len(request.token_ids) - sequence.num_hidden - 1)

    # Preparing a request ------------------------------------------------------------------------------------------

    def _prepare(self, request: DraftRequest, length: int) -> bool:
        """Have a sequence with pages for the request's tokens and `length - 1` drafted ones."""
        req_id = request.req_id
        sequence = self.sequences.get(req_id)
        if sequence is not None and sequence.num_prompt_tokens != request.num_prompt_tokens:
            self._drop(req_id)  # a streaming session has gone on with a longer prompt
            sequence = None
        if sequence is None:
            # Whoever waits for pages must not have its videos encoded and looked at in each step.
            least = self._least_entries(request) + length - 1
            if self.strategy.looks_at != "grid" and not self.model.pool.has_room(least):
                self.counts["skipped_pool_full"] += 1
                return False
            seen = self._look(request)
            if seen is None:
                return self._give_up(req_id)
            found = self.model.pool.find(seen.prompt.keys)
            num_entries = len(request.token_ids) - request.num_prompt_tokens + len(seen.kept)
            if not self.model.pool.has_room(num_entries + length - 1, found):
                self.counts["skipped_pool_full"] += 1
                return False
            sequence = self._begin(seen, found)
            if sequence is None:
                return self._give_up(req_id)
            self._looked.pop(req_id, None)
            self.sequences[req_id], self._prompts[req_id] = sequence, seen.prompt
        num_entries = len(request.token_ids) - sequence.num_hidden
        if not self.model.pool.grow(sequence.pages, num_entries + length - 1):
            self.counts["skipped_pool_full"] += 1
            return False
        return True

    def _least_entries(self, request: DraftRequest) -> int:
        """Of the request's tokens in the cache, whatever its videos are found to be."""
        videos = [len(item.rows) for item in request.items if item.is_video]
        return len(request.token_ids) - sum(count - budget(count, self.ratio) for count in videos if count)

    def _give_up(self, req_id: str) -> bool:
        """The request's visual embeddings can't be had; it is not drafted for until it is released."""
        self._drop(req_id)
        self._undraftable.add(req_id)
        self.counts["skipped_embeddings"] += 1
        return False

    def _look(self, request: DraftRequest) -> _Seen | None:
        """What the drafter sees of a prompt; None where what its strategy looks at can't be had."""
        known = self._looked.get(request.req_id)
        if known is not None and known.num_prompt_tokens == request.num_prompt_tokens:
            return known
        views = self._views(request)
        if views is None:
            return None
        visible = [(item, indices.numpy()) for item, (indices, _) in zip(request.items, views, strict=True)]
        mask = np.ones(request.num_prompt_tokens, dtype=bool)
        for item, indices in visible:
            mask[item.rows] = False
            mask[item.rows[indices]] = True
        kept = np.flatnonzero(mask)
        positions, delta = self.model.prompt_positions(request.prompt, request.num_prompt_tokens)
        prompt = _Prompt(positions.numpy()[:, kept], delta)
        items = [SeenItem(item, np.searchsorted(kept, item.rows[indices]), indices) for item, indices in visible]
        if self._finds_prefixes:
            size = self.model.pool.page_size
            prompt.keys = page_keys(request.token_ids[kept], prompt.positions, items, size, request.salt)
        seen = _Seen(request.num_prompt_tokens, kept, prompt, items, [known for _, known in views])
        if self.strategy.looks_at == "grid":  # and may be asked for again, before any embeddings are
            self._looked[request.req_id] = replace(seen, embeddings=[None] * len(items))
        return seen

    def _begin(self, seen: _Seen, found: list[int]) -> DraftSequence | None:
        """A sequence that also owns the pages that were `found`; None where embeddings of the rest can't be had."""
        num_cached, prompt = len(found) * self.model.pool.page_size, seen.prompt
        if seen.items and not self.model.copies:
            visual = self._visual(seen, num_cached)
            if visual is None:
                return None
            prompt.visual_mask = np.zeros(len(seen.kept), dtype=bool)
            for item in seen.items:
                prompt.visual_mask[item.entries[item.entries >= num_cached]] = True
            prompt.visual = torch.cat(visual) if visual else None
        self.model.pool.share(found)
        self.counts["prefills"] += 1
        if not self.model.copies:
            self.counts["found_prompt_tokens"] += num_cached
            self.counts["read_prompt_tokens"] += len(seen.kept) - num_cached
        self.prompts_read += 1 - num_cached / len(seen.kept)
        return DraftSequence(seen.num_prompt_tokens, seen.kept.tolist(), found, num_cached)

    def _share_to_read(self, request: DraftRequest) -> float:
        """Of a prompt that has not been begun, as far as that can be told without looking at its videos."""
        if not self._finds_prefixes or self.strategy.looks_at != "grid" or (seen := self._look(request)) is None:
            return 1.0
        return 1 - len(self.model.pool.find(seen.prompt.keys)) * self.model.pool.page_size / len(seen.kept)

    def _views(self, request: DraftRequest) -> list[tuple[torch.Tensor, KeptEmbeddings | None]] | None:
        """What is kept of each item, indices among its embeddings, and these embeddings where they are at hand; None
        where what the strategy looks at can't be had."""
        scores: Sequence[torch.Tensor | None] = [None] * len(request.items)
        if self.strategy.asks_target and self._scores is not None and any(item.is_video for item in request.items):
            scores = self._scores(request.req_id)
        views = []
        for item, score in zip(request.items, scores, strict=True):
            looks = item.is_video and self.strategy.looks_at == "embeddings"
            known = None
            if looks or not self.model.copies:
                known = self._embeddings_of(item) if looks else self._known_embeddings(item)
            if looks and known is None and not self.model.copies:
                return None
            views.append((self._kept_rows(item, score, known), known))
        return views

    def _visual(self, seen: _Seen, num_cached: int) -> list[torch.Tensor] | None:
        """Embeddings of what is seen of each item behind the first `num_cached` entries, in their order; None where
        they can't be had."""
        visual = {}
        for part, known in zip(seen.items, seen.embeddings, strict=True):
            indices = torch.from_numpy(part.indices[part.entries >= num_cached])
            if not len(indices):
                continue
            embeddings = known or self._embeddings_of(part.item)
            if embeddings is not None and not bool(torch.isin(indices, embeddings.indices).all()):
                embeddings = self._encode(part.item)  # these are of another one with the same name
            if embeddings is None:
                return None
            rows = torch.searchsorted(embeddings.indices, indices)
            visual[int(part.item.rows[0])] = _rows_of(embeddings.embeddings, rows)
        return [visual[row] for row in sorted(visual)]

    def _kept_rows(self, item: VisualItem, score: torch.Tensor | None, known: KeptEmbeddings | None) -> torch.Tensor:
        if not item.is_video:
            return torch.arange(len(item.rows))
        if known is not None and not known.is_whole:
            return known.indices  # the rest of it has not been kept
        embeddings = None if known is None else known.embeddings
        view = VideoView(item.grid, item.seed, embeddings, score)
        seen = {"grid": item.grid, "embeddings": embeddings, "attention": score, "similarity": score}
        if seen[self.strategy.looks_at] is None:
            self.counts["pruned_uniformly"] += 1
            return STRATEGIES["uniform"].keep(view, self.ratio)
        kept = self.strategy.keep(view, self.ratio)
        # What ranks have computed may be rounded otherwise, and what is seen decides which pages are found.
        return kept if self.strategy.looks_at == "grid" else self.model.of_first_rank(kept)

    def _known_embeddings(self, item: VisualItem) -> KeptEmbeddings | None:
        """The item's embeddings, or those of what every request sees of it, if they are kept."""
        known = self.embeddings.get(item.identifier, len(item.rows))
        # Clients name items, and an image may bear the name of a video that was pruned.
        return None if known is not None and not item.is_video and not known.is_whole else known

    def _embeddings_of(self, item: VisualItem) -> KeptEmbeddings | None:
        """The same, of an item that is encoded if need be; None where it can't be.

        Encoded one by one: the encoder's memory was profiled for one item, and only what may be needed of it stays.
        """
        known = self._known_embeddings(item)
        if known is not None:
            return known
        whole = self._encode(item)
        if whole is None:
            return None
        if self.strategy.asks_target:  # other questions see other parts of it
            found = whole
        else:
            indices = self._kept_rows(item, None, whole)
            found = KeptEmbeddings(whole.num_embeddings, indices, _rows_of(whole.embeddings, indices))
        self.embeddings.put(item.identifier, found)
        return found

    def _encode(self, item: VisualItem) -> KeptEmbeddings | None:
        if item.payload is None:
            return None
        full = self.model.encode(item.payload)
        return KeptEmbeddings(len(full), torch.arange(len(full)), full) if len(full) == len(item.rows) else None

    # Running the model --------------------------------------------------------------------------------------------

    def _draft(self, drafts: Drafts, requests: list[DraftRequest], lengths: list[int], plan: DraftPlan | None) -> None:
        """Start `drafts` of prepared `requests`, sorted by falling `lengths`, as far as `plan` goes; else `lengths`."""
        sequences = [self.sequences[r.req_id] for r in requests]
        drafts.reads_prompts = any(s.num_cached < len(s.kept) - 1 for s in sequences)
        guesses = self._guesses(requests, lengths) if self.payoff.recalls else None
        if guesses is None:
            at_hand = [self._catch_up(requests, plan is not None)]
        else:
            at_hand = self._recall(requests, sequences, *guesses, plan is not None)
        drafts.caught_up = self.clock.mark()
        newest, batch = at_hand[0], None
        drafted = [newest]
        active = np.arange(len(requests))
        drafts.members = [active]
        costs = self.payoff.corrected(len(requests), len(requests))
        contexts = self.payoff.contexts(requests)[1]
        if costs is not None:
            self.foretold_first += costs.first * float(costs.of_draft(len(contexts), contexts.sum()))
        for step in range(1, lengths[0]):
            ended = self._ended(requests, active, newest, plan is not None)
            going_on = active[[lengths[i] > step and not end for i, end in zip(active, ended, strict=True)]]
            if plan is not None:
                plan.take(active, self._note_chances(requests, active, newest))
                going_on = plan.going_on(going_on) if len(going_on) and step >= self.payoff.least_length else going_on
            if not len(going_on):
                break
            if step < len(at_hand):
                newest = at_hand[step].rows(going_on)
                self.counts["recalled_tokens"] += len(going_on)
            else:
                stays = np.searchsorted(active, going_on)
                token_ids = take_rows(newest.token_ids, stays)
                if batch is None:
                    staying = [requests[i] for i in going_on], [sequences[i] for i in going_on]
                    batch = self._decode_batch(*staying, token_ids, num_ahead=step - 1)
                else:
                    batch = batch.rows(stays)
                    batch.token_ids = token_ids
                    batch.max_seq_len += 1
                    batch.seq_lens_cpu = batch.seq_lens_cpu + 1
                    advance_decode(
                        batch.positions, batch.seq_lens, batch.slots, batch.block_table, self.model.pool.page_size
                    )
                newest = self.model.forward(batch, plan is not None)
                self.counts["forwards"] += 1
                if costs is not None:
                    self.foretold_further += float(costs.of_draft(len(going_on), contexts[going_on].sum()))
            active = going_on
            drafted.append(newest)
            drafts.members.append(active)
        else:
            if plan is not None:
                self._note_chances(requests, active, newest)
        num_spared = min(len(at_hand), len(drafted)) - 1
        self.payoff.learn_recall(len(requests), guesses is not None, num_spared, len(drafted) - 1)
        drafts.token_ids = _columns([d.token_ids for d in drafted])
        drafts.on_host = drafts.token_ids.to("cpu", non_blocking=True)  # one copy for all steps
        counts = np.bincount(np.concatenate(drafts.members)).tolist()
        for who, sequence, count in zip(drafts.drafted, sequences, counts, strict=True):
            drafts.lengths[who.request] = count
            # What the target has made of the newest token, with the whole video before it, will be better.
            sequence.num_cached += -1 if self.model.copies else count - 1

    def _ended(
        self, requests: list[DraftRequest], active: np.ndarray, newest: NextTokens, is_awaited: bool
    ) -> Sequence[bool]:
        """Whether the newest drafted token of each of `active` ends its request, as far as one may look."""
        if not (self.sees_tokens or is_awaited):
            return [False] * len(active)
        return [token in requests[i].ends for token, i in zip(newest.token_ids.tolist(), active, strict=True)]

    def _note_chances(self, requests: list[DraftRequest], active: np.ndarray, newest: NextTokens) -> np.ndarray:
        """Keep the confidences of the newest drafted tokens; the chances that these are accepted, `[num_active]`."""
        assert newest.probs is not None
        return self.payoff.note_chances([requests[i] for i in active], newest.probs.tolist())

    def _guesses(self, requests: list[DraftRequest], lengths: list[int]) -> tuple[np.ndarray, int] | None:
        """What is left of the last drafts of all `requests`, int64 `[num_requests, num_guessed]`, and how many tokens
        of each are read for it; None where it would not pay to ask what of it is drafted again."""
        if len(requests) > MOST_RECALLING:
            return None
        found = []
        for request in requests:
            history, sequence = self.payoff.history(request.req_id), self.sequences[request.req_id]
            num_missing = len(request.token_ids) - sequence.num_hidden - sequence.num_cached
            if not history.draft or (num_missing > 1 and not self.model.copies):
                return None
            left = left_of(history.draft, request.token_ids[history.drafted_behind :].tolist())
            if not left:
                return None
            found.append(left)
        num, most = len(requests), max(len(request.token_ids) for request in requests)
        # For a draft's last token there is no page, and behind the least that is left nothing is spared.
        wanted = min(min(map(len, found)), lengths[-1] - 1)
        each = self.model.chain_tokens(num, 1 + wanted) if wanted else None
        if each is None or num * each > self.model.max_batch_tokens or most + each > self.model.max_model_len:
            return None
        wanted = min(wanted, each - 1)
        if not self.payoff.pays_to_recall(num, each - 1):
            return None
        return np.array([left[:wanted] for left in found], dtype=np.int64), each

    def _recall(
        self,
        requests: list[DraftRequest],
        sequences: list[DraftSequence],
        guesses: np.ndarray,
        each: int,
        with_probs: bool,
    ) -> list[NextTokens]:
        """The first drafted tokens, and further ones while these are what was guessed for all `requests`; of each one
        `each` tokens are read.

        How many that are the host must know, and waits for it: no longer than for one forward.
        """
        if self.model.copies:
            self._copy(requests, sequences)
        num_guessed = guesses.shape[1]
        tokens = np.zeros((len(requests), each), dtype=np.int64)
        tokens[:, 0] = [request.token_ids[-1] for request in requests]
        tokens[:, 1 : 1 + num_guessed] = guesses
        batch = self._decode_batch(requests, sequences, tokens.flatten(), each, num_kept=1 + num_guessed)
        batch.asks_all = True
        found = self.model.forward(batch, with_probs)
        self.counts["forwards"] += 1
        for sequence in sequences:
            sequence.num_cached += 1
        on_host = found.token_ids.to("cpu", non_blocking=True)
        self.clock.wait(self.clock.mark())
        drafted = on_host.view(tokens.shape).numpy()
        num_right = int((drafted[:, :num_guessed] == guesses).cumprod(axis=1).sum(axis=1).min())
        ids, probs = (None if values is None else values.view(tokens.shape) for values in found)
        assert ids is not None
        return [NextTokens(ids[:, i], None if probs is None else probs[:, i]) for i in range(num_right + 1)]

    def _catch_up(self, requests: list[DraftRequest], with_probs: bool) -> NextTokens:
        """Put all tokens that are not cached yet into the cache; the first drafted tokens.

        One forward where the tokens fit into the model's batch, as they do unless long prompts arrive together.
        """
        if self.model.copies:
            self._copy(requests, [self.sequences[r.req_id] for r in requests])
        first: NextTokens | None = None
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
            batch = self._ragged_batch(requests, self._evened(requests, parts))
            found = self.model.forward(batch, with_probs)
            self.counts["forwards"] += 1
            waiting = [i for i in waiting if i not in {part[0] for part in parts}]
            done: list[tuple[int, int]] = []  # row of the batch, request
            for row, (i, _, end) in enumerate(parts):
                sequence = self.sequences[requests[i].req_id]
                sequence.num_cached = end
                if end >= len(sequence.kept):
                    prompt = self._prompts[requests[i].req_id]
                    prompt.visual = prompt.visual_mask = None  # in the cache now
                    self.model.pool.name(sequence.pages[: len(prompt.keys)], prompt.keys)
                    prompt.keys = []
                if end == len(requests[i].token_ids) - sequence.num_hidden:
                    done.append((row, i))
                else:
                    waiting.append(i)
            if [i for _, i in done] == [*range(len(requests))]:  # nearly always, and then in their own rows
                first = found
            elif done:
                if first is None:
                    probs = None if found.probs is None else found.probs.new_empty(len(requests))
                    first = NextTokens(found.token_ids.new_empty(len(requests)), probs)
                rows, targets = upload(list(np.array(done).T), self.model.device)
                first.token_ids[targets] = found.token_ids[rows]
                if first.probs is not None and found.probs is not None:
                    first.probs[targets] = found.probs[rows]
        assert first is not None
        return first

    def _evened(self, requests: list[DraftRequest], parts: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """`parts` with as many tokens each, where these are read at once: cached ones of the answer are read again."""
        most = max(end - begin for _, begin, end in parts)
        if not 1 < most <= self.model.tokens_at_once or most * len(parts) > self.model.max_batch_tokens:
            return parts
        evened = [(i, end - most, end) for i, _, end in parts]
        if any(begin < len(self.sequences[requests[i].req_id].kept) for i, begin, _ in evened):
            return parts  # visual embeddings of a prompt that has been read are gone
        return evened

    def _copy(self, requests: list[DraftRequest], sequences: list[DraftSequence]) -> None:
        """Take keys and values of all tokens but the newest from the target's cache."""
        sources, slots = [], []
        for request, sequence in zip(requests, sequences, strict=True):
            end = len(request.token_ids) - sequence.num_hidden - 1
            entries = np.arange(sequence.num_cached, end)
            if not len(entries):
                continue
            assert request.target_slots is not None
            kept = np.asarray(sequence.kept, dtype=np.int64)
            in_prompt = entries < len(kept)
            places = np.concatenate([kept[entries[in_prompt]], entries[~in_prompt] + sequence.num_hidden])
            sources.append(request.target_slots(places))
            slots.append(self._slots(sequence, entries))
            sequence.num_cached = end
        if sources:
            self.model.copy(*upload([np.concatenate(sources), np.concatenate(slots)], self.model.device))

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
        batch = self._batch(
            np.concatenate(positions, axis=1).astype(np.int64),
            np.concatenate(slots),
            lens,
            [end for _, _, end in parts],
            sequences,
            np.concatenate(token_ids).astype(np.int64),
        )
        if visual:
            batch.visual_mask, batch.visual = pinned(np.concatenate(masks), self.model.device), visual
        return batch

    def _decode_batch(
        self,
        requests: list[DraftRequest],
        sequences: list[DraftSequence],
        tokens: np.ndarray | torch.Tensor,
        each: int = 1,
        num_ahead: int = 0,
        num_kept: int | None = None,
    ) -> DraftBatch:
        """As many `tokens` of `each` request, behind all that `sequences` know to be cached and `num_ahead` more; of
        each one's only the first `num_kept` are written, or all."""
        entries = [s.num_cached + num_ahead + np.arange(each) for s in sequences]
        deltas = [s.num_hidden + self._prompts[r.req_id].delta for r, s in zip(requests, sequences, strict=True)]
        places = np.concatenate([e + delta for e, delta in zip(entries, deltas, strict=True)])
        dims = len(self._prompts[requests[0].req_id].positions)
        slots = np.full((len(sequences), each), NO_SLOT, dtype=np.int64)
        for row, sequence, own in zip(slots, sequences, entries, strict=True):
            row[:num_kept] = self._slots(sequence, own[:num_kept])
        ends = [s.num_cached + num_ahead + each for s in sequences]
        return self._batch(
            np.tile(places, (dims, 1)), slots.flatten(), [each] * len(sequences), ends, sequences, tokens
        )

    def _batch(
        self,
        positions: np.ndarray,
        slots: np.ndarray,
        lens: Sequence[int],
        ends: Sequence[int],
        sequences: Sequence[DraftSequence],
        tokens: np.ndarray | torch.Tensor,
    ) -> DraftBatch:
        """`lens` tokens of each of `sequences`, with which there are `ends` in its cache."""
        starts, seq_lens = np.cumsum([0, *lens], dtype=np.int32), np.array(ends, dtype=np.int32)
        arrays = [positions, slots, starts, seq_lens, self._block_table(sequences)]
        if isinstance(tokens, np.ndarray):
            arrays.append(tokens)
        there = upload(arrays, self.model.device)
        return DraftBatch(
            token_ids=there[-1] if isinstance(tokens, np.ndarray) else tokens,
            positions=there[0],
            slots=there[1],
            query_starts=there[2],
            query_starts_cpu=torch.from_numpy(starts),
            seq_lens=there[3],
            seq_lens_cpu=torch.from_numpy(seq_lens),
            block_table=there[4],
            max_query_len=max(lens),
            max_seq_len=max(ends),
            is_text=bool((positions == positions[:1]).all()),
        )

    def _slots(self, sequence: DraftSequence, entries: np.ndarray) -> np.ndarray:
        page_size = self.model.pool.page_size
        return np.asarray(sequence.pages, dtype=np.int64)[entries // page_size] * page_size + entries % page_size

    def _block_table(self, sequences: Sequence[DraftSequence]) -> np.ndarray:
        table = np.zeros((len(sequences), max(len(s.pages) for s in sequences)), dtype=np.int32)
        for row, sequence in enumerate(sequences):
            table[row, : len(sequence.pages)] = sequence.pages
        return table


def _rows_of(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A copy of `rows` (int64, on the host) of what may be on the device."""
    (there,) = upload([rows.numpy()], values.device)
    return values[there]


def _columns(tokens: Sequence[torch.Tensor]) -> torch.Tensor:
    """Drafted tokens `[num_tokens, num_requests]`, of which later rows may have fewer."""
    if len(tokens[-1]) == len(tokens[0]):
        return torch.stack(list(tokens))
    return pad_sequence(list(tokens)).T
