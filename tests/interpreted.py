"""Triton kernels in the interpreter, where no GPU is."""

import pytest
import triton.experimental.gluon  # takes functions of `triton.language` as they are compiled, so before they are not
import triton.language
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import vllm_lvspec.kernels.acceptance
import vllm_lvspec.kernels.advance_decode
import vllm_lvspec.kernels.attention_mass
import vllm_lvspec.kernels.copy_slots
import vllm_lvspec.kernels.decode_attention
import vllm_lvspec.kernels.greedy_head
import vllm_lvspec.kernels.mxfp4_matvec
import vllm_lvspec.kernels.relevance
import vllm_lvspec.kernels.silu_and_mul

KERNELS = [
    vllm_lvspec.kernels.acceptance,
    vllm_lvspec.kernels.advance_decode,
    vllm_lvspec.kernels.attention_mass,
    vllm_lvspec.kernels.copy_slots,
    vllm_lvspec.kernels.decode_attention,
    vllm_lvspec.kernels.greedy_head,
    vllm_lvspec.kernels.mxfp4_matvec,
    vllm_lvspec.kernels.relevance,
    vllm_lvspec.kernels.silu_and_mul,
]
MODULES = [*KERNELS, triton.language, triton.language.standard]  # whose sort is written in Triton itself


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this package's; `TRITON_INTERPRET` would have to be set before anything imports one, engines included."""
    for module in MODULES:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(value.fn))
