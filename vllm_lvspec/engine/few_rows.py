"""A drafter's layers where a step has few rows, as those of a drafted token have.

vLLM's kernels are made for batches: of a single row Marlin's read four-bit weights at two fifths of the memory's rate,
and its SwiGLU leaves all but one multiprocessor idle. The kernels of this package take over where there is one row of
the former and few of the latter, and vLLM's have all others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear.mxfp4.marlin import MarlinMxFp4LinearKernel
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_bias, marlin_repacked_nk
from vllm.platforms import current_platform

from vllm_lvspec.kernels.mxfp4_matvec import TILE, Matrix, launch_mxfp4_matvec
from vllm_lvspec.kernels.shared import Workspace
from vllm_lvspec.kernels.silu_and_mul import MOST_ROWS, silu_and_mul

logger = init_logger("vllm.lvspec")

_TOLERANCE = 0.01  # of the norm: sums are made in another order, and rounded once


class OneRowLinear:
    """Marlin's kernel of a linear layer, and where there is one row this package's, over the same weights."""

    def __init__(self, marlin: MarlinMxFp4LinearKernel, matrix: Matrix, workspace: Workspace):
        self.marlin = marlin
        self.matrix = matrix
        self.workspace = workspace
        self._without_bias = replace(matrix, bias=None)

    def apply_weights(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x [..., K]` times the layer's weights, `[..., N]`."""
        if x.numel() != x.shape[-1]:
            return self.marlin.apply_weights(layer, x, bias)
        matrix = self._without_bias if bias is None else self.matrix
        return launch_mxfp4_matvec(x.view(1, -1), matrix, self.workspace).view(*x.shape[:-1], -1)


class FewRowsSiluAndMul(nn.Module):
    """vLLM's SwiGLU, and where there are few rows this package's."""

    def __init__(self, plain: SiluAndMul):
        super().__init__()
        self.plain = plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 2 or len(x) > MOST_ROWS or x.stride(-1) != 1:
            return self.plain(x)
        return silu_and_mul(x)


def give_few_rows(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Have the layers on a GPU of a model in `dtype` computed by this package's kernels where they have few rows.

    Every product is tried first against Marlin's: how that has its weights in memory is its own matter. To be called
    before CUDA graphs are recorded, for what products share they have then.
    """
    if device.type != "cuda":
        return
    activated = [module for module in model.modules() if type(getattr(module, "act_fn", None)) is SiluAndMul]
    for module in activated:
        module.act_fn = FewRowsSiluAndMul(module.act_fn)
    if activated:
        _compile_silu_and_mul(dtype, device)
    if dtype != torch.bfloat16 or not current_platform.has_device_capability(80):
        return
    workspace = Workspace(device)
    found: dict[Any, OneRowLinear] = {
        module: kernel for module in model.modules() if (kernel := _one_row_linear(module, workspace)) is not None
    }
    for module, kernel in found.items():
        if not _does_the_same(module, kernel):
            logger.warning(
                "lvspec: this package's kernel for MXFP4 computes something else than Marlin's, so it rests."
            )
            return
    for each, kernel in found.items():
        each.quant_method.kernel = kernel


def _compile_silu_and_mul(dtype: torch.dtype, device: torch.device) -> None:
    """At the start and not under the first request; of all widths that 16 divides it is the same."""
    silu_and_mul(torch.zeros(1, 2 * 16, dtype=dtype, device=device))


def _one_row_linear(module: Any, workspace: Workspace) -> OneRowLinear | None:
    kernel = getattr(getattr(module, "quant_method", None), "kernel", None)
    if type(kernel) is not MarlinMxFp4LinearKernel:
        return None
    weight, scales, bias = module.weight, module.weight_scale, getattr(module, "bias", None)
    if marlin_repacked_nk(weight, num_bits=4) != (module.output_size_per_partition, module.input_size_per_partition):
        return None  # it is padded
    if bias is not None:
        permuted, bias = bias, torch.empty_like(bias)
        bias[marlin_permute_bias(torch.arange(len(bias), device=bias.device))] = permuted
    return OneRowLinear(kernel, Matrix(weight, scales, bias), workspace)


@torch.inference_mode()
def _does_the_same(module: Any, kernel: OneRowLinear) -> bool:
    """In every tile of columns, without the bias, which may be larger than all else, and with it."""
    device = module.weight.device
    generator = torch.Generator(device).manual_seed(0)  # all others' numbers stay as they are on all ranks
    x = torch.randn(1, kernel.matrix.shape[0], dtype=torch.bfloat16, device=device, generator=generator)
    same = True
    for bias in {None, getattr(module, "bias", None)}:
        wanted = kernel.marlin.apply_weights(module, x, bias).float().view(-1, TILE)
        found = kernel.apply_weights(module, x, bias).float().view(-1, TILE)
        same &= bool(((found - wanted).norm(dim=1) <= _TOLERANCE * wanted.norm(dim=1)).all())
    return same
