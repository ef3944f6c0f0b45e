"""Where the time of steps goes, part by part, on one rank.

While a profile runs, methods of the runner and of what hangs on it are replaced by ones that look at the clock. Without
one there is nothing of it in their way.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch

from vllm_lvspec.engine.runner import only_decodes

DECODE, PROMPT = "decode", "prompt"  # steps in which nothing is prefilled, and others
ENGINE = "scheduler and engine"
_INPUTS = "inputs"
_ENCODER, _TARGET, _LOGITS = "visual encoder", "target", "target: logits"
_SAMPLING = "sampling"
_VERIFICATION = "verification"
_SCORES = "scores for pruning"
_DECISIONS = "drafter: for whom, how far"
_BATCHES = "drafter: its batches"
_FIRST_BATCH = "drafter: its first batch"
_VIDEOS = "drafter: videos"
_FIRST = "drafter: prompts, first tokens"
_FURTHER = "drafter: further tokens"

# The target's own, which are the same with and without drafts.
FORWARDS = frozenset({_ENCODER, _TARGET, _LOGITS})


@dataclass(frozen=True)
class Part:
    """Time in `method` of what the runner has at `path` is of the part `name`, but for other parts within it.

    `within`: what it is instead within other parts.
    """

    name: str
    path: str
    method: str
    within: Mapping[str, str] = field(default_factory=dict)


# `self` drafts with the target's own model.
_OF_DRAFTER = {_FIRST: _FIRST, _FURTHER: _FURTHER}
PARTS = (
    Part(_INPUTS, "", "execute_model"),
    Part(_ENCODER, "", "_execute_mm_encoder"),
    Part(_TARGET, "", "_model_forward"),
    Part(_LOGITS, "model", "compute_logits", _OF_DRAFTER),
    Part(_SAMPLING, "", "sample_tokens"),
    *(Part(_VERIFICATION, "verification", method) for method in ("begin_step", "batch", "accept", "count")),
    *(Part(_SCORES, "scores", method) for method in ("begin_forward", "_add_attention", "add_similarity", "of")),
    Part(_DECISIONS, "", "take_draft_token_ids"),
    Part(_BATCHES, "drafter.drafter", "_draft"),
    *(Part(_FIRST_BATCH, "drafter.drafter", method) for method in ("_catch_up", "_recall")),
    Part(_VIDEOS, "drafter.drafter", "_prepare"),
    Part("drafter: keys and values copied", "drafter.drafter", "_copy"),
    Part(_FURTHER, "drafter.drafter.model", "forward", {_FIRST_BATCH: _FIRST}),
)


class StepProfile:
    """Seconds by part of one rank's steps, from `start` to `stop`. `runner` is the model runner.

    `num_steps`: by kind of step; `seconds`: by kind and part. What lies between a step and the next of its kind is the
    engine's. On GPUs the device is waited for between the parts, which makes steps longer than they are without it.
    """

    def __init__(self, runner: Any):
        self.num_steps = {DECODE: 0, PROMPT: 0}
        self.seconds: dict[str, dict[str, float]] = {kind: defaultdict(float) for kind in self.num_steps}
        self._runner = runner
        self._of_step: dict[str, float] = defaultdict(float)
        self._parts: list[str] = []  # in which the clock is, the innermost last
        self._last = 0.0  # when it was looked at
        self._kind: str | None = None  # of the step that runs
        self._replaced: list[tuple[Any, str, Any]] = []  # and what the object itself had by that name

    def start(self) -> None:
        self._last, self._kind = time.perf_counter(), None
        for part in PARTS:
            if part.path.split(".")[0] not in ("", *vars(self._runner)):
                continue  # of vLLM's own runner
            owner = attrgetter(part.path)(self._runner) if part.path else self._runner
            self._replaced.append((owner, part.method, vars(owner).get(part.method)))
            setattr(owner, part.method, self._watched(part, getattr(owner, part.method)))

    def stop(self) -> None:
        """Put everything back; the last step counts no more, because its end is not known."""
        for owner, method, before in reversed(self._replaced):
            if before is None:
                delattr(owner, method)
            else:
                setattr(owner, method, before)
        self._replaced = []

    def _watched(self, part: Part, method: Callable[..., Any]) -> Callable[..., Any]:
        begins_step = not part.path and part.method == "execute_model"

        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._look()
            if begins_step:
                self._begin_step(args[0])
            inner = self._parts[-1] if self._parts else ""
            self._parts.append(part.within.get(inner, part.name))
            try:
                return method(*args, **kwargs)
            finally:
                self._look()
                self._parts.pop()

        return watched

    def _look(self) -> None:
        """At the clock: what has passed is of the innermost part."""
        if self._runner.device.type == "cuda":
            torch.cuda.synchronize(self._runner.device)
        now = time.perf_counter()
        self._of_step[self._parts[-1] if self._parts else ENGINE] += now - self._last
        self._last = now

    def _begin_step(self, scheduler_output: Any) -> None:
        """Count the step before, now that it is over."""
        kind = None
        if scheduler_output.total_num_scheduled_tokens:
            kind = DECODE if only_decodes(scheduler_output) else PROMPT
        if self._kind is not None:
            if kind != self._kind:  # the engine may have waited for requests
                self._of_step.pop(ENGINE, None)
            self.num_steps[self._kind] += 1
            for name, seconds in self._of_step.items():
                self.seconds[self._kind][name] += seconds
        self._kind, self._of_step = kind, defaultdict(float)
