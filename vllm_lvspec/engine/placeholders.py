"""Drafts of which the scheduler knows the lengths alone, because the device is still at them.

To plan a step, how many tokens each request has drafted is enough. The tokens go into the target's inputs on the
device, so that the host makes that step ready, and launches it, while the drafter is running.

vLLM has placeholders of its own, for which there is no draft: it fills up a request that begins with one token, as one
does whose prompt is cached. They are taken for padding (`scheduler`).

Padding behind drafts makes a batch one that vLLM has recorded as a CUDA graph: as many tokens of each request as of all
others. The target runs over it, and nobody looks at what comes of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID

from vllm_lvspec.device import upload
from vllm_lvspec.draft.drafts import Drafts

PADDING_TOKEN_ID = -2  # vLLM reads token 0 for whatever is below


def padded(drafts: Sequence[list[int]], length: int) -> list[list[int]]:
    """`drafts` with padding behind them, of `length` all but for those that are none."""
    return [draft and draft + [PADDING_TOKEN_ID] * (length - len(draft)) for draft in drafts]


def num_drafted(tokens: Sequence[int]) -> int:
    """How many of the tokens that are scheduled behind a request's newest one were drafted."""
    if not tokens or tokens[-1] != PADDING_TOKEN_ID:
        return len(tokens)
    return tokens.index(PADDING_TOKEN_ID)


def without_padding(step: SchedulerOutput) -> SchedulerOutput:
    """`step` as if nothing but drafts had been scheduled behind requests' newest tokens; the scheduler's own stays."""
    drafts = step.scheduled_spec_decode_tokens
    if all(num_drafted(tokens) == len(tokens) for tokens in drafts.values()):
        return step
    drafts = {req_id: tokens[: num_drafted(tokens)] for req_id, tokens in drafts.items()}
    return replace(step, scheduled_spec_decode_tokens=drafts)


class Placeholders:
    """The newest draft of each request that was given the scheduler as placeholders.

    Most are verified in the next step; one for which that has no room waits for a later one.
    """

    def __init__(self) -> None:
        self._drafts: dict[str, tuple[Drafts, int]] = {}  # and in which column

    def put(self, req_ids: Sequence[str], drafts: Drafts) -> list[list[int]]:
        """What to tell the scheduler of `drafts` for these requests."""
        self._drafts.update({req_ids[i]: (drafts, column) for i, column in drafts.columns().items()})
        return [[PLACEHOLDER_TOKEN_ID] * length for length in drafts.lengths]

    def forget(self, req_id: str) -> None:
        self._drafts.pop(req_id, None)

    def fill_inputs(
        self,
        input_ids: torch.Tensor,
        req_ids: Sequence[str],
        scheduled: Mapping[str, Sequence[int]],
        ends: np.ndarray,
    ) -> None:
        """Put drafted tokens into `input_ids` (int32, on the device) of a step's batch.

        `scheduled`: drafted tokens of a request and padding, which are the last of its tokens in the batch, before
        `ends` `[num_requests]`; more may have been drafted.
        """
        found: dict[int, tuple[Drafts, list[np.ndarray], list[np.ndarray]]] = {}
        for req_id, end in zip(req_ids, ends.tolist(), strict=True):
            tokens = scheduled.get(req_id, ())
            if (draft := self._draft(req_id, tokens)) is not None:
                drafts, column = draft
                assert drafts.token_ids is not None
                _, to, taken = found.setdefault(id(drafts), (drafts, [], []))
                begin, count = end - len(tokens), num_drafted(tokens)
                to.append(np.arange(begin, begin + count))
                taken.append(np.arange(count) * drafts.token_ids.shape[1] + column)
        for drafts, to, taken in found.values():  # nearly always one
            assert drafts.token_ids is not None
            places, sources = upload([np.concatenate(to), np.concatenate(taken)], input_ids.device)
            input_ids.index_copy_(0, places, drafts.token_ids.flatten()[sources].to(input_ids.dtype))

    def fill_lists(self, req_ids: Sequence[str], scheduled: Sequence[list[int]]) -> None:
        """Put them into vLLM's lists of the tokens that are verified, too; the drafts must be finished."""
        for req_id, tokens in zip(req_ids, scheduled, strict=False):
            if (draft := self._draft(req_id, tokens)) is not None:
                drafts, column = draft
                tokens[:] = drafts.tokens[drafts.drafted[column].request][: len(tokens)]

    def _draft(self, req_id: str, scheduled: Sequence[int]) -> tuple[Drafts, int] | None:
        """What the `scheduled` tokens of a request stand for, where they stand for anything."""
        return self._drafts.get(req_id) if scheduled and scheduled[0] == PLACEHOLDER_TOKEN_ID else None
