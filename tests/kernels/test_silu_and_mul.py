import pytest
import torch

from vllm_lvspec.kernels.silu_and_mul import launch_silu_and_mul, silu_and_mul_reference


@pytest.mark.parametrize("num_rows", [1, 2, 7])
@pytest.mark.parametrize("width", [8, 1000, 2048, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernel_does_what_its_reference_does(num_rows, width, dtype, device):
    x = torch.randn(num_rows, 2 * width + 5, generator=torch.Generator().manual_seed(width)).to(dtype).to(device)
    x = 4 * x[:, : 2 * width]
    found, wanted = launch_silu_and_mul(x), silu_and_mul_reference(x)
    assert found.dtype == dtype and found.shape == (num_rows, width)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-6}[dtype]
    assert torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:overflow")  # in the interpreter's exp
def test_what_is_far_from_nothing_stays_a_number(device):
    x = torch.tensor([[-200.0, 200.0, -90.0, 0.0, 3.0, 3.0, 3.0, 3.0]], device=device)
    assert torch.equal(launch_silu_and_mul(x), torch.tensor([[0.0, 600.0, 0.0, 0.0]], device=device))
