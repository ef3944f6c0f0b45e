"""Triton kernels run in the interpreter where no GPU is; compiled ones are made for GPUs that are not here."""

import pytest
import torch
from interpreted import interpret

from vllm_lvspec.kernels.greedy_head import reads_e4m3


@pytest.fixture(autouse=True)
def _interpret_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        interpret(monkeypatch)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def has_e4m3(device: torch.device) -> bool:
    return reads_e4m3(device)
