"""Engines shared by the tests of a run: starting one takes much longer than a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import Engine
from vllm import RequestOutput
from workload import Family, generate_requests

from vllm_lvspec.reference import PAIRS


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
        # Drafters and targets of other seeds have other padded vocabularies, too, or a visual encoder that two ranks
        # can't share.
        padded = {1: {"vocab_size": 1536}, 4: {"vocab_size": 1600}, 5: {"vision_mlp": 63}}
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
        known = answers.setdefault((family.checkpoint, seed), [])
        if len(known) < count:  # the first ones are the same, however many there are
            known += engines(family).run(generate_requests(family, count, seed)[len(known) :])
        return known[:count]

    return ask
