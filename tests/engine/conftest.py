"""Engines shared by the tests of a run: starting one takes much longer than a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from vllm import LLM, RequestOutput, SamplingParams
from workload import Family, Request, generate_requests

from vllm_lvspec.reference import PAIRS

MAX_MODEL_LEN = 512


class Engine:
    """A real vLLM engine in float32, with or without the drafter."""

    newest: Engine

    def __init__(self, target: str, drafter: str | None, **options: Any):
        Engine.newest = self
        # As many drafted tokens in every step, so that what is asked of a test does not hang on how fast a machine is.
        settings: dict[str, Any] = {
            "method": "lvspec", "model": drafter, "policy": "strict", "draft_length": "fixed",
            **options.pop("lvspec", {}),
        }  # fmt: skip
        self.has_drafter = settings["model"] is not None
        # One process instead of three starts in a third of the time. The tests of the server and of tensor parallelism
        # run all processes.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            self.llm = LLM(target, **self._options(settings, options))

    def _options(self, settings: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        return {
            "dtype": "float32",
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": 8,
            "block_size": 32,
            "enforce_eager": True,
            "disable_log_stats": False,
            "limit_mm_per_prompt": {"video": 2, "image": 2},
            "speculative_config": settings if self.has_drafter else None,
            **options,
        }

    def run(self, requests: Sequence[Request], batch_sizes: Sequence[int] = (8,)) -> list[RequestOutput]:
        """Outputs in order; requests are sent in batches whose sizes go round `batch_sizes`."""
        outputs: list[RequestOutput] = []
        turn = 0
        while len(outputs) < len(requests):
            size = batch_sizes[turn % len(batch_sizes)]
            part = requests[len(outputs) : len(outputs) + size]
            outputs += self.llm.generate([r.inputs for r in part], [r.params for r in part], use_tqdm=False)
            turn += 1
        return outputs

    def run_and_abort(self, requests: Sequence[Request], max_tokens: int, before_step: int) -> None:
        """Greedy, together; until step `before_step` every second one aborts a request, running or waiting."""
        core = self.llm.llm_engine
        for i, request in enumerate(requests):
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            core.add_request(f"abort-{i}", request.inputs, params)
        steps = 0
        while core.has_unfinished_requests():
            core.step()
            steps += 1
            if steps % 2 == 0 and steps < before_step:
                core.abort_request([f"abort-{steps // 2 * 5 % len(requests)}"])
        assert steps > before_step

    def stats(self) -> dict[str, Any]:
        """The drafter's and the verifier's counts, the same on all ranks, once it has heard of all that finished."""
        # Workers hear of finished requests with the next step; this one asks for a single token and has no drafts.
        self.llm.generate("the", SamplingParams(max_tokens=1), use_tqdm=False)
        ranks = self.llm.collective_rpc("lvspec_stats")
        assert all(rank == ranks[0] for rank in ranks), "ranks disagree on what was drafted"
        assert ranks[0]["sequences"] == 0
        return ranks[0]

    def metric(self, name: str) -> float:
        assert Engine.newest is self, "vLLM starts its metrics afresh with every engine: ask the newest one"
        return sum(m.value for m in self.llm.get_metrics() if m.name == f"vllm:{name}")

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def engines(checkpoint: Callable[..., str]) -> Iterator[Callable[..., Engine]]:
    """`engines(family, drafter=seed or None, target=seed, **options)`: an engine; the last two stay up.

    With `pair` it is the family's bundled pair, which answers at more length; with `lvspec={"model": "self"}` the
    target drafts for itself.
    """
    running: dict[str, Engine] = {}

    def start(
        family: Family, drafter: int | None = None, target: int = 0, pair: bool = False, **options: Any
    ) -> Engine:
        key = repr((family.checkpoint, drafter, target, pair, sorted(options.items())))
        if key in running:
            running[key] = running.pop(key)
            return running[key]
        while len(running) > 1:
            running.pop(next(iter(running))).close()
        if pair:
            bundled = PAIRS[family.checkpoint]
            running[key] = Engine(str(bundled.target), str(bundled.draft), **{"max_model_len": 1024, **options})
            return running[key]
        # Drafters and targets of other seeds have other padded vocabularies, too.
        padded = {1: {"vocab_size": 1536}, 4: {"vocab_size": 1600}}
        path = None
        if drafter is not None:
            path = checkpoint(family.checkpoint, seed=drafter, **padded.get(drafter, {}))
        running[key] = Engine(checkpoint(family.checkpoint, seed=target, **padded.get(target, {})), path, **options)
        return running[key]

    yield start
    for engine in running.values():
        engine.close()


@pytest.fixture(scope="session")
def oracle(engines: Callable[..., Engine]) -> Callable[[Family, int, int], list[RequestOutput]]:
    """What vLLM without speculation answers to `generate_requests(family, count, seed)`."""
    answers: dict[tuple, list[RequestOutput]] = {}

    def ask(family: Family, count: int, seed: int) -> list[RequestOutput]:
        key = (family.checkpoint, count, seed)
        if key not in answers:
            answers[key] = engines(family).run(generate_requests(family, count, seed))
        return answers[key]

    return ask
