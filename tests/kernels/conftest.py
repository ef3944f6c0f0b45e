"""Triton kernels run in the interpreter where no GPU is; compiled ones are made for GPUs that are not here."""

import pytest
import torch
from interpreted import interpret


@pytest.fixture(autouse=True)
def _interpret_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        interpret(monkeypatch)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def has_e4m3(device: torch.device) -> bool:
    """Whether kernels on it can read numbers in e4m3."""
    return device.type == "cpu" or (torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9))
