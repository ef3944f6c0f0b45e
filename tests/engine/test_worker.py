"""What a worker does between loading and serving, in which order."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_lvspec.engine.worker import LVSpecGPUWorker


def test_all_is_compiled_before_vllm_watches_for_it(monkeypatch):
    log: list[tuple[str, bool]] = []

    def noted(name: str) -> Any:
        return lambda *args: log.append((name, torch.is_inference_mode_enabled()))

    monkeypatch.setattr(Worker, "_maybe_activate_jit_monitor", noted("vLLM watches"))
    worker = object.__new__(LVSpecGPUWorker)
    worker.model_runner = SimpleNamespace(warm_up=noted("warm up"), measure_costs=noted("measure"))
    worker._maybe_activate_jit_monitor()
    assert log == [("warm up", True), ("measure", True), ("vLLM watches", False)]


def test_vllm_watches_at_the_end_of_its_own_warm_up():
    source = inspect.getsource(Worker.compile_or_warm_up_model)
    assert source.count("self._maybe_activate_jit_monitor()") == 1
    assert source.index("capture_model()") < source.index("self._maybe_activate_jit_monitor()")


@pytest.mark.parametrize("name", ["warm_up", "measure_costs"])
def test_vllms_runner_has_no_method_of_that_name(name):
    assert not hasattr(GPUModelRunner, name)
