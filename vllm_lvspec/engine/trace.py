"""Token by token, why the last requests' answers are what they are. Only where the server was told to keep it."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_lvspec.device import upload
from vllm_lvspec.draft.request import VisualItem
from vllm_lvspec.kernels.relevance import VisualPages
from vllm_lvspec.verify.matches import closest
from vllm_lvspec.verify.policies import POLICIES
from vllm_lvspec.verify.rules import RequestRules
from vllm_lvspec.verify.verifier import Choices

NUM_CLOSEST = 3
MAX_TOKENS = 1 << 17  # of all traces together, about 100 MB; then finished ones are forgotten sooner
NUMBERED = re.compile(r"^(cmpl-.+)-\d+$|^(resp_.+)_\d+$")  # names of one prompt or turn of a request
RANDOM_ENDING = re.compile(r"-[0-9a-f]{8}$")  # that vLLM puts behind a request's name


@dataclass(frozen=True, slots=True)
class TracedToken:
    """One emitted token.

    `step`: of the request, from 0; `draft_id`: what was drafted at its place, None where nothing was; `target_id`:
    what the target would have said there; `relevance` and `is_anchor` of what was drafted, None where it was verified
    strictly; `closest`: the request's visual tokens that the state of what was drafted is most like, and the cosines.
    """

    token_id: int
    reason: str
    step: int
    target_id: int
    draft_id: int | None = None
    relevance: float | None = None
    is_anchor: bool | None = None
    closest: tuple[tuple[int, float], ...] = ()


@dataclass
class RequestTrace:
    """One request. `items`: what it sees, in the prompt's order, `grid` in frames, rows and columns of tokens; `kept`:
    those of its visual tokens that the drafter sees, None where it has drafted nothing; `is_cut`: whether tokens are
    missing, because there was no room for them."""

    request_id: str
    policy: str
    relaxation: float
    items: list[dict[str, Any]]
    kept: list[int] | None = None
    tokens: list[TracedToken] = field(default_factory=list)
    num_steps: int = 0
    is_finished: bool = False
    is_cut: bool = False

    def as_json(self) -> dict[str, Any]:
        rows = [{name: getattr(token, name) for name in TracedToken.__slots__} for token in self.tokens]
        return {**vars(self), "tokens": rows}


@dataclass
class _Chains:
    """What is known of a step's drafted tokens; `starts` of each request's. Of a batch where everybody is verified
    strictly, no more than what was drafted."""

    starts: list[int]
    draft_ids: Sequence[int]
    target_ids: Sequence[int] | None = None
    relevance: Sequence[float] | None = None
    closest: Sequence[Sequence[int]] | None = None  # visual tokens of each drafted one
    cosines: Sequence[Sequence[float]] | None = None


class Traces:
    """The traces of the running requests and of the last `num_kept` finished ones, bounded in tokens.

    Only the rank that `keeps` has them; all ranks look for the closest visual tokens together. `is_end(token, rules)`:
    whether a drafted token ends its request's chain; `threshold`: of relevance, as in the configuration.
    """

    def __init__(
        self,
        num_kept: int,
        keeps: bool = True,
        is_end: Callable[[int, RequestRules], bool] = lambda token, rules: False,
        threshold: float | None = None,
    ):
        self.num_kept = num_kept
        self.keeps = keeps
        self._is_end = is_end
        self._threshold = threshold
        self._traces: OrderedDict[str, RequestTrace] = OrderedDict()
        self._num_tokens = 0
        self._starts: list[int] = []
        self._coming: dict[str, torch.Tensor] = {}  # what is known of the step's chains, on its way to the host
        self._chains: _Chains | None = None

    def begin_step(self) -> None:
        self._coming, self._chains = {}, None

    def _note(self, **values: torch.Tensor) -> None:
        """They are there with the step's tokens, for which vLLM waits."""
        self._coming |= {name: value.to("cpu", non_blocking=True) for name, value in values.items()}

    def note_drafts(self, draft_ids: torch.Tensor, num_drafted: Sequence[int]) -> None:
        """What was drafted for the step's requests: `draft_ids [num_drafted]`, flat over requests."""
        self._starts = [0, *np.cumsum(num_drafted).tolist()]
        self._note(draft_ids=draft_ids)

    def note_choices(
        self,
        choices: Choices,
        relevance: torch.Tensor | None,
        queries: torch.Tensor | None,
        pages: VisualPages | None,
        visuals: Sequence[int],
        own: Sequence[np.ndarray],
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """What the verifier has seen of them. `visuals`: `pages.starts` on the host; `own`: for each request, which of
        its visual tokens' features this rank holds; `gather` joins float tensors of all ranks along the first
        dimension."""
        self._note(target_ids=choices.target_ids)
        if relevance is None or queries is None or pages is None:
            return
        self._note(relevance=relevance)
        cosines, places = closest(queries, self._starts, pages, visuals, NUM_CLOSEST)
        for r, mine in enumerate(own):
            rows = slice(self._starts[r], self._starts[r + 1])
            if len(mine) and rows.start < rows.stop:
                (names,) = upload([mine], places.device)
                places[rows] = torch.where(places[rows] < 0, -1, names[places[rows].clamp(min=0)])
        # Numbers of visual tokens are exact in float32, which is what vLLM's own kernels on CPUs can gather.
        every = gather(torch.stack([cosines, places.float()], dim=-1)[None])
        values, names = every.transpose(0, 1).flatten(1, 2).unbind(-1)
        best = values.topk(NUM_CLOSEST, dim=1)
        self._note(closest=names.gather(1, best.indices).long(), cosines=best.values)

    def request(self, req_id: str, make: Callable[[], RequestTrace]) -> RequestTrace:
        """The request's trace; a new one where there is none, or a finished one of another request of that name."""
        known = self._traces.get(req_id)
        if known is None or known.is_finished:
            self._drop(req_id)
            known = self._traces[req_id] = make()
        return known

    def add(
        self, request: RequestTrace, row: int, rules: RequestRules, token_ids: Sequence[int], reasons: Sequence[str]
    ) -> None:
        """Tokens of a step of the request in `row` of the batch, which was verified by `rules`, and why."""
        self._num_tokens += len(token_ids)
        self._forget()
        if self._num_tokens > MAX_TOKENS:
            self._num_tokens -= len(token_ids)
            request.is_cut = True
            return
        chain = self._chain_of(row, rules)
        for i, (token_id, reason) in enumerate(zip(token_ids, reasons, strict=True)):
            known = chain[i] if i < len(chain) else {}
            if reason == "target" or known.get("target_id") is None:
                known = {**known, "target_id": token_id}
            request.tokens.append(TracedToken(token_id=token_id, reason=reason, step=request.num_steps, **known))
        request.num_steps += 1

    def _chain_of(self, row: int, rules: RequestRules) -> list[dict[str, Any]]:
        """What `TracedToken` says of each of the request's drafted tokens."""
        if not self._coming:
            return []
        if self._chains is None:
            self._chains = _Chains(self._starts, **{name: value.tolist() for name, value in self._coming.items()})
        chains = self._chains
        places = range(chains.starts[row], chains.starts[row + 1])
        chain: list[dict[str, Any]] = [{"draft_id": chains.draft_ids[p]} for p in places]
        if chains.target_ids is not None:
            for known, p in zip(chain, places, strict=True):
                known["target_id"] = chains.target_ids[p]
        if rules.is_strict or chains.relevance is None or not rules.uses_relevance:
            return chain
        assert chains.closest is not None and chains.cosines is not None
        length = self._length([chains.draft_ids[p] for p in places], rules)
        relevance = [chains.relevance[p] for p in places[:length]]
        num_fillers = POLICIES[rules.policy].num_fillers(rules.relaxation, length)
        anchors = anchors_of(relevance, num_fillers, self._threshold)
        for known, p, value, is_anchor in zip(chain, places, relevance, anchors, strict=False):
            pairs = zip(chains.closest[p], chains.cosines[p], strict=True)
            known |= {
                "relevance": None if math.isnan(value) else value,
                "is_anchor": is_anchor,
                "closest": tuple((index, cosine) for index, cosine in pairs if index >= 0 and math.isfinite(cosine)),
            }
        return chain

    def _length(self, draft_ids: Sequence[int], rules: RequestRules) -> int:
        """Of a chain: it stops before padding and after an end token, as in the acceptance kernel."""
        for i, token in enumerate(draft_ids):
            if token < 0:
                return i
            if self._is_end(token, rules):
                return i + 1
        return len(draft_ids)

    def finish(self, req_id: str) -> None:
        if (trace := self._traces.get(req_id)) is not None:
            trace.is_finished = True
            self._traces.move_to_end(req_id)
            self._forget()

    def _forget(self) -> None:
        """Finished traces that are too many, or too long together; the oldest first."""
        finished = [name for name, trace in self._traces.items() if trace.is_finished]
        for i, name in enumerate(finished):
            if len(finished) - i <= self.num_kept and self._num_tokens <= MAX_TOKENS:
                break
            self._drop(name)

    def _drop(self, req_id: str) -> None:
        if (trace := self._traces.pop(req_id, None)) is not None:
            self._num_tokens -= len(trace.tokens)

    def of(self, request_id: str) -> list[dict[str, Any]]:
        """Traces of a request as clients know it, one for each of its choices; can be written as JSON.

        vLLM puts a choice's number before a client's name for a request, an endpoint's number of a prompt and a random
        ending behind it.
        """
        found = []
        for name, trace in self._traces.items():
            known = RANDOM_ENDING.sub("", name)
            names = {name, known, known.partition("_")[2] if re.match(r"\d+_", known) else known}
            names |= {NUMBERED.sub(r"\1\2", n) for n in names}
            if request_id in names:
                found.append(trace.as_json())
        return found


def anchors_of(relevance: Sequence[float], num_fillers: int, threshold: float | None = None) -> list[bool]:
    """Which tokens of a chain are anchors, as the acceptance kernel has it: by rank with ties, by `threshold`, and what
    is no number."""
    num_anchors = len(relevance) - num_fillers
    # As the policy rounds it, so that ties are ties.
    rounded = [math.inf if math.isnan(value) else round(value, 6) for value in relevance]
    return [
        value == math.inf
        or sum(other > value for other in rounded) < num_anchors
        or (threshold is not None and value >= threshold)
        for value in rounded
    ]


def described(item: VisualItem) -> dict[str, Any]:
    """What a trace says of an image or a video; tokens without a place in the grid are the last of `num_tokens`."""
    grid = [item.grid.time, item.grid.height, item.grid.width]
    return {"kind": "video" if item.is_video else "image", "grid": grid, "num_tokens": len(item.rows)}
