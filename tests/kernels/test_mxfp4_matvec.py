import numpy as np
import ptx
import pytest
import torch
from mxfp4 import random_matrix

from vllm_lvspec.kernels.mxfp4_matvec import (
    _PRODUCTS,
    _PRODUCTS_OF_SHRUNK,
    _SUMS_SMALLER_BY,
    How,
    Matrix,
    launch_mxfp4_add_norm,
    launch_mxfp4_matvec,
    launch_mxfp4_swiglu,
    launch_shrink,
    mxfp4_matvec_reference,
    unpacked,
)
from vllm_lvspec.kernels.shared import Norm, Shrunk, Workspace


def on(matrix: Matrix, device: torch.device) -> Matrix:
    bias = None if matrix.bias is None else matrix.bias.to(device)
    return Matrix(matrix.weight.to(device), matrix.scales.to(device), bias)


def ways(device: torch.device, num_loops: int = 1) -> list[How]:
    """What a device can be asked for."""
    if device.type != "cuda" or torch.version.hip is not None:
        return [How(num_loops, asm=False)]
    overlapping = [How(num_loops, overlaps=True, asm=True)] if torch.cuda.get_device_capability()[0] >= 9 else []
    return [How(num_loops, asm=False), How(num_loops, asm=True), *overlapping]


def shrink(x: torch.Tensor, device: torch.device) -> Shrunk:
    return Shrunk((x.float() / 16).half().to(device))


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found.float().cpu() - wanted).norm() <= 0.006 * wanted.norm())


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
            found = launch_mxfp4_matvec(x.to(device), matrix, workspace, how)
            assert near(found, wanted)
            assert not workspace.arrived.any()


def normed_row(height: int, seed: int) -> tuple[torch.Tensor, Norm, torch.Tensor]:
    """A row, a norm, and the row's norm."""
    generator = torch.Generator().manual_seed(seed)
    x = (20 * torch.randn(1, height, generator=generator)).bfloat16()
    norm = Norm((1 + 0.3 * torch.randn(height, generator=generator)).bfloat16(), 50.0)  # an eighth of mean squares
    return x, norm, torch.nn.functional.rms_norm(x.float(), (height,), norm.weight.float(), norm.eps)


def test_a_row_is_shrunk_as_products_take_it(device):
    x, norm, wanted = normed_row(96, seed=1)
    x[0, 2:5] = torch.tensor([-1e7, 1e7, torch.nan])
    norm.weight[2:5] = 1
    found = launch_shrink(x.to(device), Norm(norm.weight.to(device), norm.eps))
    assert found.values[0, 2:4].tolist() == [-65504, 65504]
    assert found.values[0, 4].isnan() and found.squares.isnan().all()
    x, norm, wanted = normed_row(96, seed=1)
    found = launch_shrink(x.to(device), Norm(norm.weight.to(device), norm.eps))
    assert torch.allclose(found.whole().cpu(), wanted, rtol=2e-3, atol=1e-5)
    for other in (x.float(), x[:, :64], x.repeat(2, 1)):
        with pytest.raises(ValueError, match="must be a row of 96 bfloat16"):
            launch_shrink(other, norm)


@pytest.mark.parametrize(("height", "num_loops"), [(256, 1), (800, 1), (800, 3), (4480, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_of_a_norm_is_that_of_the_reference(height, num_loops, bias, device):
    """The norm's squares are in more parts than are added up at once, too."""
    matrix, dense = random_matrix(height, 256, seed=height, bias=bias)
    x, norm, normed = normed_row(height, seed=height)
    wanted = normed @ dense + (matrix.bias.float() if bias else 0)
    matrix = on(matrix, device)
    parts = x.float().square().view(-1, 32).sum(1).to(device)
    shrunk = Shrunk(shrink(x.float() * norm.weight.float(), device).values, parts, norm.eps)
    assert near(mxfp4_matvec_reference(shrunk, matrix), wanted)
    workspace = Workspace(device)
    for how in ways(device, num_loops):
        assert near(launch_mxfp4_matvec(shrunk, matrix, workspace, how), wanted)
        assert not workspace.arrived.any()


@pytest.mark.filterwarnings("ignore:overflow")  # in the interpreter's exp
@pytest.mark.parametrize(("height", "num_loops"), [(256, 1), (800, 3)])
def test_a_gate_is_that_of_the_reference(height, num_loops, device):
    matrix, dense = random_matrix(height, 256, seed=height)
    x, norm, normed = normed_row(height, seed=height)
    gate, up = (normed @ dense).chunk(2, dim=-1)
    wanted = torch.nn.functional.silu(gate) * up
    shrunk = launch_shrink(x.to(device), Norm(norm.weight.to(device), norm.eps))
    assert near(mxfp4_matvec_reference(shrunk, on(matrix, device), is_gated=True), wanted)
    workspace = Workspace(device)
    for how in ways(device, num_loops):
        found = launch_mxfp4_swiglu(shrunk, on(matrix, device), workspace, how)
        assert found.squares is None and near(found.whole(), wanted)
        found = launch_mxfp4_swiglu(normed.bfloat16().to(device), on(matrix, device), workspace, how)
        assert (found.whole().cpu() - wanted).norm() <= 0.02 * wanted.norm()
        assert not workspace.arrived.any()


@pytest.mark.parametrize(("height", "num_loops"), [(256, 1), (800, 3)])
def test_a_sum_and_its_norm_are_those_of_the_reference(height, num_loops, device):
    matrix, dense = random_matrix(height, 320, seed=height, bias=height == 256)
    x, _, _ = normed_row(height, seed=height)
    added, norm, _ = normed_row(320, seed=3)
    wanted = x.float() @ dense + added.float() + (0 if matrix.bias is None else matrix.bias.float())
    norm = Norm(norm.weight, 0.1 * float(wanted.square().mean()))
    asked = {"added": added.to(device), "norm": Norm(norm.weight.to(device), norm.eps)}
    workspace = Workspace(device)
    for how in ways(device, num_loops):
        found, normed = launch_mxfp4_add_norm(shrink(x, device), on(matrix, device), workspace, how, **asked)
        assert near(found, wanted) and len(normed.squares) == 5
        wanted_norm = torch.nn.functional.rms_norm(found.float().cpu(), (320,), norm.weight.float(), norm.eps)
        assert torch.allclose(normed.whole().cpu(), wanted_norm, rtol=2e-3, atol=1e-5)
        alone = launch_mxfp4_matvec(shrink(x, device), on(matrix, device), workspace, how, added=asked["added"])
        assert torch.equal(alone, found)
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


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 64),
        torch.zeros(1, 32).bfloat16(),
        torch.zeros(2, 64).bfloat16(),
        Shrunk(torch.zeros(1, 64).bfloat16()),
        Shrunk(torch.zeros(1, 32).half()),
    ],
)
def test_what_does_not_fit_is_refused(x):
    matrix, _ = random_matrix(64, 64, seed=8)
    with pytest.raises(ValueError, match="must be a row of 64, bfloat16 or shrunk"):
        launch_mxfp4_matvec(x, matrix, Workspace(torch.device("cpu")))


@pytest.mark.parametrize("added", [torch.zeros(1, 64), torch.zeros(64).bfloat16(), torch.zeros(1, 32).bfloat16()])
def test_what_can_t_be_added_is_refused(added):
    matrix, _ = random_matrix(64, 64, seed=8)
    with pytest.raises(ValueError, match=r"added .*: must be a row of 64 bfloat16"):
        launch_mxfp4_matvec(torch.zeros(1, 64).bfloat16(), matrix, Workspace(torch.device("cpu")), added=added)


def test_a_gate_that_ends_within_a_tile_or_has_a_bias_is_refused():
    x = torch.zeros(1, 32).bfloat16()
    for width, bias in ((64, False), (192, False), (128, True)):
        matrix, _ = random_matrix(32, width, seed=12, bias=bias)
        with pytest.raises(ValueError, match=f"of {width} columns: must be of a multiple of 128, without a bias"):
            launch_mxfp4_swiglu(x, matrix, Workspace(torch.device("cpu")))


@pytest.mark.parametrize("most", [1.0, 2e6])
@pytest.mark.parametrize("is_shrunk", [False, True])
def test_what_is_written_in_ptx_is_what_the_reference_computes(is_shrunk, most):
    """All lines of it, run on the host, for the words, vector and scales of a warp."""
    matrix, dense = random_matrix(32, 64, seed=9)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(10)).bfloat16()
    x[0, 5] = most
    lane = np.arange(32)
    words = matrix.weight.view(2, 32, 4).numpy()
    values = (x.float() / 16).clamp(max=65504).half() if is_shrunk else x
    memory = np.concatenate([np.full(4, 0x7F80, np.int32), values.view(torch.int32).numpy().flatten()])
    scales = matrix.scales.view(torch.int32)[0].numpy()
    inputs = [words[tile, :, word] for tile in range(2) for word in range(4)]
    inputs += [np.where(lane < 4, 16 + 4 * lane, 0)] * 4
    inputs += [scales[lane // 4 * 2 + half] for half in range(2)]
    asm = (_PRODUCTS_OF_SHRUNK if is_shrunk else _PRODUCTS).value
    sums = np.stack(ptx.run(asm, 8, inputs, memory))[:, ::4] * _SUMS_SMALLER_BY.value  # [half, word; r]
    found = sums.reshape(2, 4, 8).transpose(1, 0, 2).reshape(64)
    # What is more than float16 holds is the most that it does.
    assert np.allclose(found, (x.float().clamp(max=16 * 65504) @ dense)[0], rtol=1e-3, atol=1e-2 * most)
