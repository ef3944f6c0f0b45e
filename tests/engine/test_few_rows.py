"""Which of a drafter's layers this package's kernels take over, and for how many rows; without a GPU, by references."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mxfp4 import random_matrix, stored_scales
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear.mxfp4.marlin import MarlinMxFp4LinearKernel
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_bias, marlin_permute_scales
from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import mxfp4_marlin_process_scales

from vllm_lvspec.engine import few_rows
from vllm_lvspec.engine.few_rows import FewRowsSiluAndMul, OneRowLinear, give_few_rows
from vllm_lvspec.kernels.mxfp4_matvec import mxfp4_matvec_reference
from vllm_lvspec.kernels.silu_and_mul import MOST_ROWS, silu_and_mul_reference

CUDA = torch.device("cuda")


class Marlin(MarlinMxFp4LinearKernel):
    """Stands for vLLM's, which it must be of the very type of; `by`: the factor by which it is wrong."""

    def __init__(self, dense: torch.Tensor, bias: torch.Tensor | None, by: float = 1.0):
        self.dense, self.bias, self.by = dense, bias, by
        self.asked: list[int] = []

    def apply_weights(self, layer, x, bias=None):
        self.asked.append(x.numel() // x.shape[-1])
        out = x.float() @ self.dense * self.by
        return (out if bias is None else out + self.bias.float()).to(x.dtype)


@pytest.fixture
def launched(monkeypatch) -> list[int]:
    """Rows of what this package's kernels were asked for; their references answer."""
    rows: list[int] = []

    def matvec(x, matrix, workspace):
        rows.append(len(x))
        return mxfp4_matvec_reference(x, matrix)

    def silu(x):
        rows.append(len(x))
        return silu_and_mul_reference(x)

    monkeypatch.setattr(few_rows, "MarlinMxFp4LinearKernel", Marlin)
    monkeypatch.setattr(few_rows, "Workspace", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(few_rows, "launch_mxfp4_matvec", matvec)
    monkeypatch.setattr(few_rows, "silu_and_mul", silu)
    monkeypatch.setattr(few_rows.current_platform, "has_device_capability", lambda capability: True, raising=False)
    monkeypatch.setattr(few_rows, "_compile_silu_and_mul", lambda dtype, device: None)
    return rows


def linear(height: int, width: int, bias: bool = False, by: float = 1.0, padded: int = 0) -> nn.Module:
    """A layer as vLLM leaves it once its weights are loaded."""
    matrix, dense = random_matrix(height, width, seed=height, bias=bias)
    layer = nn.Module()
    layer.weight, layer.weight_scale = matrix.weight, matrix.scales
    layer.bias = marlin_permute_bias(matrix.bias) if bias else None
    layer.input_size_per_partition, layer.output_size_per_partition = height, width - padded
    layer.quant_method = SimpleNamespace(kernel=Marlin(dense, matrix.bias, by))
    return layer


def test_scales_are_where_vllm_puts_them():
    exponents = torch.randint(1, 255, (6, 192), generator=torch.Generator().manual_seed(11)).to(torch.uint8)
    scales = exponents.view(torch.float8_e8m0fnu).to(torch.bfloat16)
    stored = mxfp4_marlin_process_scales(marlin_permute_scales(scales, size_k=192, size_n=192, group_size=32))
    assert torch.equal(stored.view(torch.uint8), stored_scales(exponents))


def test_one_row_is_this_packages_and_more_are_marlins(launched):
    model = nn.ModuleList([linear(64, 128, bias=True), linear(128, 64)])
    marlin = [layer.quant_method.kernel for layer in model]
    give_few_rows(model, torch.bfloat16, CUDA)
    assert launched == [1, 1, 1]  # each is tried, the first with its bias and without
    for layer, plain in zip(model, marlin, strict=True):
        kernel = layer.quant_method.kernel
        assert type(kernel) is OneRowLinear and kernel.marlin is plain
        assert kernel.workspace is model[0].quant_method.kernel.workspace
        launched.clear(), plain.asked.clear()
        x = torch.randn(1, layer.input_size_per_partition).bfloat16()
        for row in (x, x[0], x[None]):
            # On ranks other than the first the bias is left out.
            for bias in (layer.bias, None):
                found = kernel.apply_weights(layer, row, bias)
                assert torch.allclose(found, plain.apply_weights(layer, row, bias), rtol=0.02, atol=0.05)
        assert launched == [1] * 6
        launched.clear(), plain.asked.clear()
        kernel.apply_weights(layer, torch.zeros(2, layer.input_size_per_partition).bfloat16(), layer.bias)
        assert not launched and plain.asked == [2]


def test_all_layers_stay_marlins_where_one_would_compute_something_else(launched, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(few_rows.logger, "warning", warnings.append)
    model = nn.ModuleList([linear(64, 64), linear(128, 64, by=1.05)])
    give_few_rows(model, torch.bfloat16, CUDA)
    assert all(type(layer.quant_method.kernel) is Marlin for layer in model)
    assert len(warnings) == 1 and "computes something else than Marlin's" in warnings[0]


def test_what_is_padded_or_no_marlins_and_other_devices_and_dtypes_stay_as_they_are(launched, monkeypatch):
    other = nn.Module()
    other.quant_method = SimpleNamespace(kernel=object())
    model = nn.ModuleList([linear(64, 128, padded=32), other, nn.Linear(4, 4)])
    kernels = [layer.quant_method.kernel for layer in model[:2]]
    give_few_rows(model, torch.bfloat16, CUDA)
    assert [layer.quant_method.kernel for layer in model[:2]] == kernels and not launched
    quantised = nn.ModuleList([linear(64, 64)])
    give_few_rows(quantised, torch.bfloat16, torch.device("cpu"))
    give_few_rows(quantised, torch.float16, CUDA)
    monkeypatch.setattr(few_rows.current_platform, "has_device_capability", lambda capability: capability < 80)
    give_few_rows(quantised, torch.bfloat16, CUDA)
    assert type(quantised[0].quant_method.kernel) is Marlin and not launched


def test_swiglu_of_few_rows_is_this_packages_and_other_activations_are_vllms(launched):
    layers = nn.ModuleList(nn.Module() for _ in range(2))
    with set_current_vllm_config(VllmConfig()):
        layers[0].act_fn, layers[1].act_fn = SiluAndMul(compile_native=False), GeluAndMul()
    give_few_rows(layers, torch.float32, CUDA)
    assert type(layers[0].act_fn) is FewRowsSiluAndMul and type(layers[1].act_fn) is GeluAndMul
    for x in (torch.randn(3, 16), torch.randn(2, 3, 16), torch.randn(MOST_ROWS + 1, 16)):
        assert torch.allclose(layers[0].act_fn(x), silu_and_mul_reference(x))
    assert launched == [3]
