"""For whom drafting pays in a step, and how far.

What a step costs is known from a table that is corrected as steps go by, and what drafts bring from those before. Where
drafts are of fixed length, that says whether to draft at all.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_lvspec.draft.costs import Corrections, Load, StepCosts, expected_tokens, seconds_saved
from vllm_lvspec.draft.learned import Acceptance, Answers, FixedChains, RequestHistory
from vllm_lvspec.draft.leftover import MOST_RECALLING, Recalling
from vllm_lvspec.draft.pages import DraftSequence
from vllm_lvspec.draft.plan import DraftPlan
from vllm_lvspec.draft.request import Candidate, DraftRequest

# So many steps a decision not to draft stands.
_STEPS_OF_REST = 16
# And while no more of its requests have come or gone than this share.
_SHARE_CHANGED = 1 / 8
# A prompt is read where so many times its price is to be saved: near the point where drafting pays, it starts and stops
# with every correction.
_PROMPT_MARGIN = 2.0
# What is left of the most requests of a step after another one: a burst is expected again for some hundred steps.
_MOST_LEFT = 0.998


@dataclass
class Refusal:
    """That drafting paid for nobody of the requests `req_ids` at these `costs`, as far as there was room for drafts.

    It stands for some steps of about the same requests, because to decide anew takes as long as a layer of a small
    model, and in a large batch there is often one that comes or goes. `num_steps` have gone without drafts by it.
    """

    costs: StepCosts
    req_ids: Sequence[str]
    num_steps: int = 1

    def stands(self, costs: StepCosts, req_ids: Sequence[str]) -> bool:
        """Whether the next step, of these requests, goes without drafts, too."""
        is_over = costs is not self.costs or self.num_steps == _STEPS_OF_REST or not self._is_about(req_ids)
        self.num_steps += not is_over
        return not is_over

    def _is_about(self, req_ids: Sequence[str]) -> bool:
        if req_ids == self.req_ids:
            return True
        return len(set(req_ids).symmetric_difference(self.req_ids)) <= _SHARE_CHANGED * len(self.req_ids)


class Payoff:
    """Decides who is drafted for, and goes on learning for that.

    Once `costs` are known, drafts are only as long as they pay, but of `least_length` where there is room
    (`is_adaptive`), and where none pays there are none (`only_if_faster`). The target has room for `most_rows` of
    logits in a step, one of each request and one of each drafted token. `sequences`: what the drafter has read, by
    request; `share_to_read`: how much of another one's prompt it would have to.
    """

    def __init__(
        self,
        sequences: Mapping[str, DraftSequence],
        share_to_read: Callable[[DraftRequest], float] = lambda request: 1.0,
        *,
        is_adaptive: bool = False,
        only_if_faster: bool = False,
        least_length: int = 1,
        most_rows: int = sys.maxsize,
    ):
        self.is_adaptive = is_adaptive
        self.only_if_faster = only_if_faster
        self.least_length = least_length
        self.most_rows = most_rows
        self.costs: StepCosts | None = None
        self.corrections = Corrections()
        self.acceptance = Acceptance()
        self.chains = FixedChains()
        self.answers = Answers()
        self.recalls = True  # what is left of drafts
        self.recalling = {num: Recalling() for num in range(1, MOST_RECALLING + 1)}  # requests that are drafted for
        self.histories: dict[str, RequestHistory] = {}
        self.refusal: Refusal | None = None  # to draft, while it stands
        self._sequences = sequences
        self._share_to_read = share_to_read
        self._most_lately = 0.0  # requests that went on behind a step

    def history(self, req_id: str) -> RequestHistory:
        """What became of the request's drafts."""
        if (history := self.histories.get(req_id)) is None:
            history = self.histories[req_id] = RequestHistory()
        return history

    def release(self, req_id: str, num_emitted: int | None = None) -> None:
        """Forget a request. `num_emitted`: of one that says how long answers are."""
        self.histories.pop(req_id, None)
        if num_emitted:
            self.answers.learn(num_emitted)

    @property
    def plans(self) -> bool:
        """Whether drafts end where another token would not pay."""
        return self.is_adaptive and self.costs is not None

    def corrected(self, num_requests: int, num_drafting: int) -> StepCosts | None:
        """Costs of steps of so many requests, of which so many have drafts; each token at its own price."""
        return None if self.costs is None else self.corrections.applied(self.costs, num_requests, num_drafting)

    # For whom -----------------------------------------------------------------------------------------------------

    def rests(self, req_ids: Sequence[str]) -> bool:
        """Whether a step of these requests, of which nothing was verified, goes without drafts by the last decision.

        Can be asked before it is known what they are, which takes longer.
        """
        if self.refusal is None or self.costs is None or not self.only_if_faster:
            return False
        if not self.refusal.stands(self.costs, req_ids):
            return False
        self._note_requests(len(req_ids))
        return True

    def choose(
        self, candidates: list[Candidate], batch: Sequence[DraftRequest], max_length: int, room: int
    ) -> list[Candidate]:
        """Those of `candidates` for whom it pays to draft in a step of the requests `batch`, and for whose drafts the
        target's logits have `room`."""
        chosen = self._fitting(candidates, room)
        if self.costs is not None and self.only_if_faster:
            chosen = self._paying(chosen, batch, max_length)
        return chosen

    def _fitting(self, candidates: list[Candidate], room: int) -> list[Candidate]:
        """Those for whose drafts there is `room`.

        Whose prompts have been read come first, then those of whose answers most is to come.
        """
        # How much longer drafts become that end where they no longer pay is seen to while they are made.
        most = self.least_length if self.plans else sys.maxsize
        if sum(min(candidate.length, most) for candidate in candidates) <= room:
            return candidates

        def rank(candidate: Candidate) -> float:
            return -math.inf if self._has_read(candidate.request) else -self._tokens_left(candidate.request)

        chosen = []
        for candidate in sorted(candidates, key=rank):
            if (needed := min(candidate.length, most)) <= room:
                room -= needed
                chosen.append(candidate)
        return chosen

    def _paying(
        self, candidates: Sequence[Candidate], batch: Sequence[DraftRequest], max_length: int
    ) -> list[Candidate]:
        """Those who get what is left of all answers sooner with drafts, with prompts to be read first.

        Whose prompt has been read drafts on where that pays for these few, in a `batch` where others may go without.
        """
        known = [candidate for candidate in candidates if self._has_read(candidate.request)]
        saved = self._seconds_saved(batch, known, max_length) if known else 0.0
        chosen = known if saved > 0 else []
        if len(known) < len(candidates):
            joining = self._joining(batch, candidates, max(saved, 0.0), max_length)
            if joining:
                joined = [c for c in candidates if self._has_read(c.request) or c.request.req_id in joining]
                chosen = joined if self._seconds_saved(batch, joined, max_length) > max(saved, 0.0) else chosen
        num_steps = 1 if self.refusal is None else self.refusal.num_steps
        self.refusal = None
        if not chosen:
            costs = self._doubt([candidate.request for candidate in candidates], num_steps)
            # A request's last token has no draft, for which one step in pieces may not pay, and those behind it may.
            if costs.pieces is None or all(request.max_draft_tokens for request in batch):
                self.refusal = Refusal(costs, [request.req_id for request in batch])
        return chosen

    def _joining(
        self, batch: Sequence[DraftRequest], candidates: Sequence[Candidate], saved: float, max_length: int
    ) -> set[str]:
        """Which of `candidates` it pays to read the prompt for, where drafts of those whose prompts have been read save
        so many seconds per token already."""
        assert self.costs is not None
        new = [candidate.request for candidate in candidates if not self._has_read(candidate.request)]
        # What their drafts save is saved by all requests.
        gain = (self._seconds_saved(batch, candidates, max_length) - saved) * len(batch) / len(new)
        price = _PROMPT_MARGIN * self.costs.prompt
        # And it must not end when as many requests are here as lately: prompts of a burst come one after another.
        if price and self._most_lately > len(batch):
            gain = min(gain, self._seconds_saved(batch, candidates, max_length, self._most_lately))
        savings = [(request, gain * self._tokens_left(request)) for request in new]
        # What is to be read is only looked for where it decides.
        return {r.req_id for r, saved in savings if saved > price or 0 < saved > price * self._share_to_read(r)}

    def _seconds_saved(
        self,
        batch: Sequence[DraftRequest],
        drafting: Sequence[Candidate],
        max_length: int,
        num_requests: float | None = None,
    ) -> float:
        """Per emitted token, where those `drafting` of a `batch` have drafts of the best length; or where there are
        `num_requests` like these, of which as many have drafts as there is room for."""
        requests = [candidate.request for candidate in drafting]
        whole = float(sum(len(request.token_ids) for request in batch))
        target, draft = self.contexts(requests)
        load = Load(len(batch), len(requests), whole, float(target.sum()), float(draft.sum()))
        least = min(self.least_length, max_length) if self.is_adaptive else max_length
        if num_requests is not None:
            most = max(1, int(self.most_rows - num_requests) // least)
            load = load.grown(num_requests, min(num_requests, most))
        if self.is_adaptive:
            most = int((self.most_rows - load.num_requests) // load.num_drafting)
            most = min(max(most, least), max_length)
            length: Any = np.arange(least, most + 1)
            tokens: Any = expected_tokens(self._rates(requests), most)[least - 1 :]
        else:
            length, tokens = max_length, self.chains.tokens(max_length)
        costs = self.costs_of_drafts(int(load.num_requests), int(load.num_drafting))
        return float(np.max(seconds_saved(costs, load, length, tokens, max_length)))

    def costs_of_drafts(self, num_requests: int, num_drafting: int) -> StepCosts:
        """Of drafts as a whole, of which some tokens need no forward."""
        assert self.costs is not None
        costs = self.corrections.applied(self.costs, num_requests, num_drafting)
        recalling = self.recalling.get(num_drafting) if self.recalls else None
        return costs if recalling is None else costs.scaled(1.0, 1.0, recalling.share, 1.0)

    def contexts(self, requests: Sequence[DraftRequest]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens in the target's and in the drafter's cache, `[num_requests]` each."""
        target = np.array([len(r.token_ids) for r in requests], dtype=float)
        # A request that is not drafted for yet is taken for one of which nothing is hidden.
        hidden = [s.num_hidden if (s := self._sequences.get(r.req_id)) else 0 for r in requests]
        return target, target - hidden

    def _has_read(self, request: DraftRequest) -> bool:
        return request.req_id in self._sequences

    def _tokens_left(self, request: DraftRequest) -> float:
        return self.answers.tokens_left(request.max_draft_tokens + 1)

    def _note_requests(self, num_requests: int) -> None:
        self._most_lately = max(num_requests, _MOST_LEFT * self._most_lately)

    # How far ------------------------------------------------------------------------------------------------------

    def plan(
        self, requests: Sequence[DraftRequest], batch: Sequence[DraftRequest], max_length: int, most_rows: int
    ) -> DraftPlan | None:
        """What is known of the chances of `requests`, and what drafting for them costs in a `batch` with others; None
        where drafts have their full length."""
        if not self.plans:
            return None
        names = {request.req_id for request in requests}
        others = [request for request in batch if request.req_id not in names]
        # Each token at its own price: which of them need no forward is known behind the first one.
        costs = self.corrected(len(requests) + len(others), len(requests))
        assert costs is not None
        others_context = float(sum(len(request.token_ids) for request in others))
        contexts = self.contexts(requests)
        rates = self._rates(requests)
        return DraftPlan(costs, rates, *contexts, max_length, len(others), others_context, most_rows)

    def _rates(self, requests: Sequence[DraftRequest]) -> np.ndarray:
        """Each one's mean chance that a drafted token is accepted, `[num_requests]`."""
        factors = np.array([self.history(request.req_id).factor for request in requests])
        return np.clip(self.acceptance.mean() * factors, 0, 0.99)

    def note_chances(self, requests: Sequence[DraftRequest], probs: Sequence[float]) -> np.ndarray:
        """Keep the drafter's confidences, one newest token of each request; the chances that these are accepted,
        `[num_requests]`."""
        factors = np.empty(len(requests))
        for row, request in enumerate(requests):
            history = self.history(request.req_id)
            history.confidences = [*history.confidences, probs[row]]
            factors[row] = history.factor
        return np.clip(self.acceptance.chances(probs) * factors, 0, 1)

    def pays_to_recall(self, num_requests: int, num_further: int) -> bool:
        """Whether to try what is left of the drafts of so many requests, for which as many tokens more are read."""
        price = 0.0 if self.costs is None else self.costs.per_guess * num_further
        return self.recalling[num_requests].pays(price)

    # Learning -----------------------------------------------------------------------------------------------------

    def learn(self, candidates: Sequence[Candidate], num_requests: int, max_length: int) -> None:
        """From what became of the last drafts of all who could be drafted for in a step of so many requests."""
        if self.costs is None or not candidates:
            return
        self._note_requests(num_requests)
        for candidate in candidates:
            self._judge(candidate.request, max_length)

    def _judge(self, request: DraftRequest, max_length: int) -> None:
        history = self.history(request.req_id)
        num_tokens = len(request.token_ids)
        # Every step emits one token more than it accepts, but for one in which a loose policy accepts the end.
        num_accepted = num_tokens - history.num_tokens - 1
        num_accepted += request.is_done and request.num_verified > 0 and history.num_until_end == num_accepted + 1
        if self.is_adaptive:
            self.acceptance.learn(history, num_accepted, request.num_verified)
        elif history.num_tokens and request.num_verified in (max_length, history.num_until_end):
            self.chains.learn(num_accepted, max_length)
        history.num_tokens = num_tokens

    def learn_recall(self, num_requests: int, was_tried: bool, num_spared: int, num_further: int) -> None:
        """From a step's drafts of so many further tokens, for so many of which it has spared the forward."""
        if self.recalls and num_requests in self.recalling:
            self.recalling[num_requests].learn(was_tried, num_spared, num_further)

    def _doubt(self, requests: Sequence[DraftRequest], num_steps: int) -> StepCosts:
        """Nothing is learned of drafts that aren't made, so what was learned before is believed less and less. Returns
        the costs from now on."""
        assert self.costs is not None
        self.acceptance.fade(num_steps)
        self.chains.fade(num_steps)
        for recalling in self.recalling.values():
            recalling.fade(num_steps)
        self.corrections.fade(num_steps)
        if self.is_adaptive:
            for request in requests:
                self.history(request.req_id).fade(num_steps)
        self.costs = self.costs.faded(num_steps)
        return self.costs
