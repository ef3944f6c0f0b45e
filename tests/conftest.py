"""Small checkpoints, made once per test run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# Threads of Intel's OpenMP spin while they wait, so engines of tests that run at once get cores of their own.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))[
        int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    ]
    if cores:
        os.sched_setaffinity(0, cores)
        os.environ["OMP_NUM_THREADS"] = str(len(cores))


@pytest.fixture(autouse=True, scope="module")
def _same_environment() -> Iterator[None]:
    """No module's engines run as another module has asked for, whichever share a process."""
    from vllm import envs

    def asked() -> list[str | None]:  # others are vLLM's own to set
        return [os.environ.get(name) for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER")]

    envs.disable_envs_cache()
    before = asked()
    yield
    assert asked() == before


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`checkpoint("qwen2_5_vl", seed=1)`: the path of a checkpoint with random weights of that family."""
    import checkpoints

    made: dict[tuple, str] = {}
    root: Path = tmp_path_factory.mktemp("checkpoints")

    def make(family: str, **options: int) -> str:
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = getattr(checkpoints, family)(root / "-".join(str(part) for part in key), **options)
        return made[key]

    return make
