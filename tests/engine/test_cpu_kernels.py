"""vLLM's kernels for CPUs that are replaced, and why they are."""

import pytest
import torch
from vllm.platforms import current_platform
from vllm.utils import cpu_triton_utils as stock
from vllm.v1.sample import rejection_sampler

from vllm_lvspec.engine import cpu_kernels
from vllm_lvspec.engine.cpu_kernels import expand, register_cpu_kernels, rejection_random_sample

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="replaced on CPUs only")


@pytest.fixture(autouse=True, scope="module")
def _load_extension():
    current_platform.import_kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_every_drafted_token_gets_its_requests_value(dtype):
    values = torch.tensor([0, 5, 7, 2], dtype=dtype)
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    output = torch.full((6,), -1, dtype=dtype)
    expand(output, values, ends, 0, 1)
    assert output.tolist() == [1, 1, 7, 7, 7, 2]


def test_fractions_are_kept():
    output = torch.zeros(3)
    expand(output, torch.tensor([0.5, 0.7]), torch.tensor([1, 3]), 0, 1)
    assert output.tolist() == pytest.approx([0.5, 0.7, 0.7])


def test_vllms_own_version_still_writes_nothing_else_this_replacement_can_go():
    output = torch.full((3,), -1.0)
    stock._expand_kernel_impl(output, torch.tensor([0.5, 0.7]), torch.tensor([1, 3], dtype=torch.int32), 0, 1)
    assert output.tolist() == [-1.0, -1.0, -1.0]


def sample(kernel, drafts: list[int], uniform: list[float], before: float = 9.0) -> list[int]:
    """One request with three drafted tokens; the row before its probabilities is full of `before`."""
    memory = torch.full((4, 8), before)
    probs = memory[1:]
    probs.copy_(torch.full((3, 8), 0.125))
    output = torch.full((1, 4), -1, dtype=torch.int32)
    kernel(
        output, torch.tensor([3], dtype=torch.int32), torch.tensor(drafts, dtype=torch.int32), None, probs,
        torch.tensor([[7]], dtype=torch.int32), torch.tensor([4, 5, 6], dtype=torch.int32),
        torch.tensor(uniform, dtype=torch.float64), torch.tensor([False]), 3, 8, None, True, False,
    )  # fmt: skip
    return output[0].tolist()


def test_padding_is_rejected_whatever_lies_in_memory():
    assert sample(rejection_random_sample, [-1, -1, -1], [0.0, 0.0, 0.0]) == [4, -1, -1, -1]
    assert sample(rejection_random_sample, [1, -1, 2], [0.01, 0.0, 0.0]) == [1, 5, -1, -1]


def test_drafted_tokens_are_accepted_by_their_probability():
    assert sample(rejection_random_sample, [1, 2, 3], [0.1, 0.12, 0.124]) == [1, 2, 3, 7]
    assert sample(rejection_random_sample, [1, 2, 3], [0.1, 0.2, 0.1]) == [1, 5, -1, -1]


def test_vllms_own_version_still_accepts_padding_else_this_replacement_can_go():
    assert sample(stock._rejection_random_sample_kernel_impl, [-1, -1, -1], [0.5, 0.5, 0.5])[0] == -1


def test_they_are_replaced_once_and_again_only_where_vllm_has_put_its_own_back(monkeypatch):
    register_cpu_kernels()
    assert rejection_sampler.expand_kernel.func is expand
    registered = []
    monkeypatch.setattr(cpu_kernels, "register_kernels", registered.append)
    register_cpu_kernels()
    assert not registered
    monkeypatch.setattr(rejection_sampler, "expand_kernel", object())
    register_cpu_kernels()
    assert len(registered) == 1
