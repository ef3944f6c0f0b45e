"""A real engine that tests ask; in a module of its own, because workers import what they are sent functions from."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from vllm import LLM, RequestOutput, SamplingParams, envs
from vllm.compilation.monitor import set_cudagraph_capturing_enabled
from workload import Request

from vllm_lvspec.engine.placeholders import PADDING_TOKEN_ID
from vllm_lvspec.engine.runner import LVSpecGPUModelRunner

MAX_MODEL_LEN = 512
# Other drafts than the default ones, for tests of outputs that must not depend on them:
# LVSPEC_TEST_VIEW='{"pruning": "attention"}' pytest tests/engine/test_lossless.py
VIEW: dict[str, Any] = json.loads(os.environ.get("LVSPEC_TEST_VIEW", "{}"))
# By itself vLLM takes nine tenths of a GPU. Several engines share it here, of which none must look at what is free.
GPU_SHARE: dict[str, Any] = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2**29}


class Engine:
    """A real vLLM engine in float32, with or without the drafter."""

    newest: Engine

    def __init__(self, target: str, drafter: str | None, **options: Any):
        Engine.newest = self
        # As many drafted tokens in every step, so that what is asked of a test does not hang on how fast a machine is.
        settings: dict[str, Any] = {
            "method": "lvspec", "model": drafter, "policy": "strict", "only_if_faster": False,
            **(VIEW if drafter else {}), **options.pop("lvspec", {}),
        }  # fmt: skip
        self.has_drafter = settings["model"] is not None
        # vLLM reads its environment once an engine runs, but the next engine may be told something else.
        envs.disable_envs_cache()
        # In its process vLLM's V1 runner forbids graphs once it has recorded its own, and V2 does not allow them again.
        set_cudagraph_capturing_enabled(True)
        # One process instead of three starts in a third of the time. The tests of the server and of tensor parallelism
        # run all processes.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            if not torch.cuda.is_available():  # where it would outweigh the option
                patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
            if options.get("tensor_parallel_size", 1) == 2:
                patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
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
            **(GPU_SHARE if torch.cuda.is_available() else {"kv_cache_memory_bytes": 2**28}),
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


@contextmanager
def in_graphs_of_chains(engine: Engine) -> Iterator[Counter[str]]:
    """The target is said to have graphs of whole chains alone; counts what is scheduled in steps of decodes."""
    runner: LVSpecGPUModelRunner
    (runner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner)
    chain = 1 + runner.num_spec_tokens
    counts: Counter[str] = Counter()
    execute = runner.execute_model

    def watched(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if drafted := scheduler_output.scheduled_spec_decode_tokens:
            sizes = [scheduler_output.num_scheduled_tokens[name] for name in drafted]
            counts["padding"] += sum(tokens.count(PADDING_TOKEN_ID) for tokens in drafted.values())
            counts["steps"] += len(drafted) > 1
            counts["whole"] += len(drafted) > 1 and set(sizes) == {chain}
            assert all(tokens[0] != PADDING_TOKEN_ID for tokens in drafted.values())
        return execute(scheduler_output, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.cudagraph_dispatcher, "has_graph", lambda num_requests, tokens: tokens == chain)
        patch.setattr(runner, "execute_model", watched)
        yield counts


@contextmanager
def ragged(engine: Engine) -> Iterator[None]:
    """Drafts of one to eight tokens, whoever's and whenever."""
    runner: LVSpecGPUModelRunner
    (runner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner)
    make = runner.drafter._request

    def shorter(*args: Any) -> Any:
        request = make(*args)
        request.max_draft_tokens = min(request.max_draft_tokens, 1 + 5 * len(request.token_ids) % 8)
        return request

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.drafter, "_request", shorter)
        yield
