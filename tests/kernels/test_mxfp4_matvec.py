import numpy as np
import ptx
import pytest
import torch
from mxfp4 import random_matrix

from vllm_lvspec.kernels.mxfp4_matvec import (
    _PRODUCTS,
    _PRODUCTS_OF_NORM,
    _SHRUNK_BY,
    Matrix,
    launch_mxfp4_matvec,
    mxfp4_matvec_reference,
    unpacked,
)
from vllm_lvspec.kernels.shared import Norm, Workspace


def on(matrix: Matrix, device: torch.device) -> Matrix:
    bias = None if matrix.bias is None else matrix.bias.to(device)
    return Matrix(matrix.weight.to(device), matrix.scales.to(device), bias)


def ways(device: torch.device) -> list[dict[str, bool]]:
    """What a device can be asked for."""
    if device.type != "cuda" or torch.version.hip is not None:
        return [{"asm": False}]
    overlapping = [{"asm": True, "overlaps": True}] if torch.cuda.get_device_capability()[0] >= 9 else []
    return [{"asm": False}, {"asm": True}, *overlapping]


def test_a_matrix_means_what_was_packed():
    matrix, dense = random_matrix(96, 128, seed=1)
    assert matrix.shape == (96, 128)
    assert torch.equal(unpacked(matrix), dense)


@pytest.mark.parametrize(
    ("height", "width", "has_bias"),
    [
        (32, 64, False),
        (256, 192, True),
        (352, 128, False),  # the last part has fewer groups
        (4640, 64, True),  # more parts than are added up at once
    ],
)
def test_the_kernel_does_what_its_reference_does(height, width, has_bias, device):
    matrix, dense = random_matrix(height, width, seed=height + width, bias=has_bias)
    matrix = on(matrix, device)
    x = torch.randn(1, height, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = x.float() @ dense + (0 if matrix.bias is None else matrix.bias.float().cpu())
    assert torch.allclose(mxfp4_matvec_reference(x.to(device), matrix).float().cpu(), wanted, rtol=0.01, atol=0.05)
    workspace = Workspace(device)
    for how in ways(device):
        for _ in range(2):  # what it counts by is as it was
            found = launch_mxfp4_matvec(x.to(device), matrix, workspace, **how).float().cpu()
            assert (found - wanted).norm() <= 0.006 * wanted.norm()
            assert not workspace.arrived.any()


@pytest.mark.filterwarnings("ignore:overflow")  # in the interpreter's exp
@pytest.mark.parametrize(("height", "num_loops"), [(256, 1), (800, 1), (800, 3), (2560, 2)])
@pytest.mark.parametrize("asked", [("norm",), ("added",), ("is_gated",), ("norm", "is_gated"), ("norm", "bias"), ()])
def test_norm_gate_sum_and_loops_are_those_of_the_reference(asked, height, num_loops, device):
    generator = torch.Generator().manual_seed(height)
    matrix, dense = random_matrix(height, 256, seed=height, bias="bias" in asked)
    matrix = on(matrix, device)
    x = (20 * torch.randn(1, height, generator=generator)).bfloat16()
    norm = Norm((1 + 0.3 * torch.randn(height, generator=generator)).bfloat16().to(device), 1e-6)
    added = torch.randn(1, 128 if "is_gated" in asked else 256, generator=generator).bfloat16()
    wanted = x.float()
    if "norm" in asked:
        wanted = torch.nn.functional.rms_norm(wanted, (height,), norm.weight.float().cpu(), norm.eps)
    wanted = wanted @ dense
    if "bias" in asked:
        wanted += matrix.bias.float().cpu()
    if "is_gated" in asked:
        wanted = torch.nn.functional.silu(wanted[:, :128]) * wanted[:, 128:]
    if "added" in asked:
        wanted += added.float()
    said = {"norm": norm if "norm" in asked else None, "is_gated": "is_gated" in asked}
    said["added"] = added.to(device) if "added" in asked else None
    workspace = Workspace(device)
    reference = mxfp4_matvec_reference(x.to(device), matrix, **said)
    assert (reference.float().cpu() - wanted).norm() <= 0.006 * wanted.norm()
    for how in ways(device):
        found = launch_mxfp4_matvec(x.to(device), matrix, workspace, **said, num_loops=num_loops, **how)
        assert (found.float().cpu() - wanted).norm() <= 0.006 * wanted.norm()
        assert not workspace.arrived.any()


def test_the_smallest_and_the_largest_weights_are_exact(device):
    """One row of weights at a time: what bfloat16 can hold, is."""
    matrix, dense = random_matrix(64, 64, seed=3, scales=(7, 247))
    for k in (0, 1, 8, 9, 17, 40, 63):
        x = torch.zeros(1, 64, dtype=torch.bfloat16)
        x[0, k] = 0.75
        found = launch_mxfp4_matvec(x.to(device), on(matrix, device), Workspace(device)).cpu()
        assert torch.equal(found[0].float(), 0.75 * dense[k])


def test_a_row_is_taken_from_where_it_is(device):
    """A part of a larger tensor, as layers hand it over."""
    matrix, _ = random_matrix(64, 64, seed=4)
    whole = torch.randn(1, 160, generator=torch.Generator().manual_seed(5)).bfloat16().to(device)
    x, matrix = whole[:, 64:128], on(matrix, device)
    found = launch_mxfp4_matvec(x, matrix, Workspace(device)).float()
    assert torch.allclose(found, mxfp4_matvec_reference(x, matrix).float(), rtol=0.02, atol=0.1)


def test_a_workspace_grows_and_is_shared(device):
    small, _ = random_matrix(64, 64, seed=6)
    large, _ = random_matrix(512, 192, seed=7)
    workspace = Workspace(device)
    for matrix in (small, large, small):
        x = torch.ones(1, matrix.shape[0], dtype=torch.bfloat16, device=device)
        found = launch_mxfp4_matvec(x, on(matrix, device), workspace).float()
        assert torch.allclose(found, mxfp4_matvec_reference(x, on(matrix, device)).float(), rtol=0.02, atol=0.1)
    assert len(workspace.parts) == 2 * (192 + 3) and len(workspace.arrived) == 3


@pytest.mark.parametrize("x", [torch.zeros(1, 64), torch.zeros(1, 32).bfloat16(), torch.zeros(2, 64).bfloat16()])
def test_what_does_not_fit_is_refused(x):
    matrix, _ = random_matrix(64, 64, seed=8)
    with pytest.raises(ValueError, match="must be a row of 64 bfloat16"):
        launch_mxfp4_matvec(x, matrix, Workspace(torch.device("cpu")))


def test_a_gate_that_ends_within_a_tile_or_has_a_bias_is_refused():
    x = torch.zeros(1, 32).bfloat16()
    for width, bias in ((64, False), (192, False), (128, True)):
        matrix, _ = random_matrix(32, width, seed=12, bias=bias)
        with pytest.raises(ValueError, match=f"of {width} columns: must be of a multiple of 128, without a bias"):
            launch_mxfp4_matvec(x, matrix, Workspace(torch.device("cpu")), is_gated=True)


@pytest.mark.parametrize("most", [1.0, 2e6])
@pytest.mark.parametrize("has_norm", [False, True])
def test_what_is_written_in_ptx_is_what_the_reference_computes(has_norm, most):
    """All lines of it, run on the host, for the words, vector and scales of a warp."""
    matrix, dense = random_matrix(32, 64, seed=9)
    generator = torch.Generator().manual_seed(10)
    x, norm = torch.randn(1, 32, generator=generator).bfloat16(), torch.randn(1, 32, generator=generator).bfloat16()
    x[0, 5], norm[0, 5] = most, 1.0
    lane = np.arange(32)
    words = matrix.weight.view(2, 32, 4).numpy()
    vectors = [each.view(torch.int32).numpy().flatten() for each in (x, norm)]
    memory = np.concatenate([np.full(4, 0x7F80, np.int32), *vectors])
    scales = matrix.scales.view(torch.int32)[0].numpy()
    inputs = [words[tile, :, word] for tile in range(2) for word in range(4)]
    for vector in range(1 + has_norm):
        inputs += [np.where(lane < 4, 16 + 64 * vector + 4 * lane, 0)] * 4
    inputs += [scales[lane // 4 * 2 + half] for half in range(2)]
    asm = (_PRODUCTS_OF_NORM if has_norm else _PRODUCTS).value
    sums = np.stack(ptx.run(asm, 8, inputs, memory))[:, ::4] * _SHRUNK_BY.value  # [half, word; r]
    found = sums.reshape(2, 4, 8).transpose(1, 0, 2).reshape(64)
    multiplied = x.float() * norm.float() if has_norm else x.float()
    # What is more than float16 holds is the most that it does.
    assert np.allclose(found, (multiplied.clamp(max=16 * 65504) @ dense)[0], rtol=1e-3, atol=1e-2 * most)
