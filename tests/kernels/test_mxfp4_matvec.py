import numpy as np
import ptx
import pytest
import torch
from mxfp4 import random_matrix

from vllm_lvspec.kernels.mxfp4_matvec import (
    _PRODUCTS,
    _SHRUNK_BY,
    Matrix,
    Workspace,
    launch_mxfp4_matvec,
    mxfp4_matvec_reference,
    unpacked,
)


def on(matrix: Matrix, device: torch.device) -> Matrix:
    bias = None if matrix.bias is None else matrix.bias.to(device)
    return Matrix(matrix.weight.to(device), matrix.scales.to(device), bias)


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
    for asm in [False, True] if device.type == "cuda" and torch.version.hip is None else [False]:
        for _ in range(2):  # what it counts by is as it was
            found = launch_mxfp4_matvec(x.to(device), matrix, workspace, asm=asm).float().cpu()
            assert (found - wanted).norm() <= 0.006 * wanted.norm()
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
    assert len(workspace.parts) == 2 * 192 and len(workspace.arrived) == 3


@pytest.mark.parametrize("x", [torch.zeros(1, 64), torch.zeros(1, 32).bfloat16(), torch.zeros(2, 64).bfloat16()])
def test_what_does_not_fit_is_refused(x):
    matrix, _ = random_matrix(64, 64, seed=8)
    with pytest.raises(ValueError, match="must be a row of 64 bfloat16"):
        launch_mxfp4_matvec(x, matrix, Workspace(torch.device("cpu")))


def test_what_is_written_in_ptx_is_what_the_reference_computes():
    """All lines of it, run on the host, for the words, vector and scales of a warp."""
    matrix, dense = random_matrix(32, 64, seed=9)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(10)).bfloat16()
    lane = np.arange(32)
    words = matrix.weight.view(2, 32, 4).numpy()
    memory = np.concatenate([np.full(4, 0x7F80, np.int32), x.view(torch.int32).numpy().flatten()])
    scales = matrix.scales.view(torch.int32)[0].numpy()
    inputs = [words[tile, :, word] for tile in range(2) for word in range(4)]
    inputs += [np.where(lane < 4, 16 + 4 * lane, 0)] * 4
    inputs += [scales[lane // 4 * 2 + half] for half in range(2)]
    sums = np.stack(ptx.run(_PRODUCTS.value, 8, inputs, memory))[:, ::4] * _SHRUNK_BY.value  # [half, word; r]
    found = sums.reshape(2, 4, 8).transpose(1, 0, 2).reshape(64)
    assert np.allclose(found, (x.float() @ dense)[0], rtol=1e-3, atol=1e-2)
