"""Triton kernels run in the interpreter where no GPU is; compiled ones are made for GPUs that are not here."""

import pytest
import torch
import triton.experimental.gluon  # takes functions of `triton.language` as they are compiled, so before they are not
import triton.language
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import vllm_lvspec.kernels.acceptance
import vllm_lvspec.kernels.advance_decode
import vllm_lvspec.kernels.attention_mass
import vllm_lvspec.kernels.copy_slots
import vllm_lvspec.kernels.mxfp4_matvec
import vllm_lvspec.kernels.relevance
import vllm_lvspec.kernels.silu_and_mul

KERNELS = [
    vllm_lvspec.kernels.acceptance,
    vllm_lvspec.kernels.advance_decode,
    vllm_lvspec.kernels.attention_mass,
    vllm_lvspec.kernels.copy_slots,
    vllm_lvspec.kernels.mxfp4_matvec,
    vllm_lvspec.kernels.relevance,
    vllm_lvspec.kernels.silu_and_mul,
]
MODULES = [*KERNELS, triton.language, triton.language.standard]  # whose sort is written in Triton itself


@pytest.fixture(autouse=True)
def _interpret_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # `TRITON_INTERPRET` would have to be set before anything imports a kernel, engines of other tests included.
    if torch.cuda.is_available():
        return
    for module in MODULES:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(value.fn))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
