"""Triton kernels run in the interpreter where no GPU is; compiled ones are made for GPUs that are not here."""

import os
import sys
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()


def pytest_configure() -> None:
    if not HAS_GPU and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def compile_script() -> Path:
    return Path(__file__).parent / "compile_for.py"
