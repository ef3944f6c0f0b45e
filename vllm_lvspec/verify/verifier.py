"""From what the target says of a step's drafted tokens to what is emitted: relevance, policies, acceptance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_lvspec.config import LVSpecConfig
from vllm_lvspec.device import upload
from vllm_lvspec.kernels.acceptance import Accepted, Chains, accept
from vllm_lvspec.kernels.relevance import FEW_SPLITS, FULL_GPU, VisualPages, mean_of_top, top_cosines
from vllm_lvspec.verify.policies import POLICIES, Evidence
from vllm_lvspec.verify.rules import RequestRules, batch_rules

STEPS_COUNTED_AT_ONCE = 64
NUM_BINS = 200  # of cosines from -1 to 1; one more counts what has no relevance


@dataclass(frozen=True)
class Choices:
    """What the target says of drafted tokens, flat over requests.

    `draft_ids`, `target_ids [num_drafted]` (the target's choice: its argmax, or by vLLM's rejection test the drafted or
    the recovered token), `bonus_ids [num_requests]`, `starts [num_requests + 1]` int32, `exact [num_drafted]` bool,
    `logits [num_drafted, vocab_size]` float32 after all processors, `places [num_drafted]` int64: where each drafted
    token would stand in its sequence.
    """

    draft_ids: torch.Tensor
    target_ids: torch.Tensor
    bonus_ids: torch.Tensor
    starts: torch.Tensor
    exact: torch.Tensor
    logits: torch.Tensor
    places: torch.Tensor


class Verifier:
    """Applies the requests' rules. `gather` joins what all ranks have found along the first dimension."""

    def __init__(
        self,
        config: LVSpecConfig,
        kinds: torch.Tensor,
        gather: Callable[[torch.Tensor], torch.Tensor] = lambda tops: tops,
    ):
        self.config = config
        self.kinds = kinds
        self.gather = gather
        self._relevance_counts = torch.zeros(NUM_BINS + 1, dtype=torch.int64, device=kinds.device)
        self._uncounted: list[torch.Tensor] = []
        self._rules: tuple | None = None

    def warm_up(self, pages: VisualPages | None) -> None:
        """Compile what a step may need, here and not under the first request; nothing is counted.

        `pages`: of one request, on all ranks alike; None where relevance is not asked for.
        """
        top_n, device = self.config.anchor_top_n, self.kinds.device
        most = self.config.num_speculative_tokens
        rules = RequestRules(self.config.policy, self.config.relaxation)
        for length in sorted({most, *(2**i - 1 for i in range(1, most.bit_length()))}):
            ids = torch.zeros(length, dtype=torch.int32, device=device)
            starts = torch.tensor([0, length], dtype=torch.int32, device=device)
            relevance = None
            if pages is not None:
                queries = pages.features.new_zeros(length, pages.features[0, 0].numel())
                relevance = mean_of_top(self.gather(top_cosines(queries, starts, pages, top_n, length)), top_n)
            logits = torch.zeros(length, len(self.kinds), device=device)
            self.verify(Choices(ids, ids, ids[:1], starts, ids == 0, logits, ids.long()), [rules], length, relevance)
        if pages is not None:  # many requests have other shares of their visual tokens
            count = FULL_GPU // FEW_SPLITS
            each = torch.arange(count + 1, dtype=torch.int32, device=device)
            many = replace(
                pages,
                block_table=pages.block_table.repeat(count, 1),
                positions=pages.positions.repeat(count),
                starts=each * len(pages.positions),
            )
            queries = pages.features.new_zeros(count, pages.features[0, 0].numel())
            mean_of_top(self.gather(top_cosines(queries, each, many, top_n, 1)), top_n)

    def relevance(
        self, queries: torch.Tensor, starts: torch.Tensor, pages: VisualPages, max_drafted: int
    ) -> torch.Tensor:
        """A_s of drafted tokens whose states are `queries`: `[num_drafted]`, float32 (LVSpec, arXiv 2604.05650)."""
        tops = self.gather(top_cosines(queries, starts, pages, self.config.anchor_top_n, max_drafted))
        relevance = mean_of_top(tops, self.config.anchor_top_n)
        self._uncounted.append(relevance)
        if len(self._uncounted) == STEPS_COUNTED_AT_ONCE:
            self._count()
        return relevance

    @property
    def relevance_counts(self) -> torch.Tensor:
        """How many drafted tokens had which relevance, by bins; the last counts those that had none."""
        self._count()
        return self._relevance_counts

    def _count(self) -> None:
        if self._uncounted:
            relevance = torch.cat(self._uncounted)
            self._uncounted.clear()
            bins = ((relevance + 1) * (NUM_BINS / 2)).clamp(0, NUM_BINS - 1)
            bins = torch.where(relevance.isnan(), float(NUM_BINS), bins).long()
            self._relevance_counts.index_add_(0, bins, torch.ones_like(bins))

    def verify(
        self,
        choices: Choices,
        requests: Sequence[RequestRules],
        max_drafted: int,
        relevance: torch.Tensor | None,
    ) -> Accepted:
        """What is emitted, and why. `relevance [num_drafted]`, or None where nobody's policy asks for it."""
        if relevance is None:
            relevance = torch.full_like(choices.exact, float("nan"), dtype=torch.float32)
        evidence = Evidence(
            logits=choices.logits,
            exact=choices.exact,
            relevance=relevance,
            starts=choices.starts,
            places=choices.places,
        )
        # Padding has no logit of its own; it is never free.
        drafted = choices.logits.gather(1, choices.draft_ids.long().clamp(min=0)[:, None])[:, 0]
        chains = Chains(
            draft_ids=choices.draft_ids,
            target_ids=choices.target_ids,
            bonus_ids=choices.bonus_ids,
            starts=choices.starts,
            exact=choices.exact,
            relevance=self._scores(evidence, requests),
            relative_probs=(drafted - choices.logits.amax(1)).exp(),
        )
        key = (tuple(requests), max_drafted)
        if self._rules is None or self._rules[0] != key:
            self._rules = (key, batch_rules(requests, self.config, self.kinds, max_drafted))
        return accept(chains, self._rules[1])

    def _scores(self, evidence: Evidence, requests: Sequence[RequestRules]) -> torch.Tensor:
        """Each request's drafted tokens by its own policy; strict ones by any: all of their tokens are anchors."""
        names = sorted({r.policy for r in requests if not r.is_strict})
        scores = evidence.relevance
        for i, name in enumerate(names):
            score = POLICIES[name].score
            assert score is not None
            found = score(evidence, self.config)
            if i == 0:
                scores = found
            else:
                (mine,) = upload([np.array([r.policy == name for r in requests])], found.device)
                scores = torch.where(mine[evidence.requests], found, scores)
        return scores
