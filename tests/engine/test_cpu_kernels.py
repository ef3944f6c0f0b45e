"""vLLM's kernels for CPUs that are replaced, and why they are."""

import sys
from types import ModuleType

import pytest
import torch
from vllm.platforms import current_platform
from vllm.triton_utils.dispatcher import KernelOverride, register_kernels
from vllm.utils import cpu_triton_utils as stock
from vllm.v1.sample import rejection_sampler

from vllm_lvspec.engine.cpu_kernels import expand, rejection_random_sample, replace_cpu_kernels

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


LAUNCHERS = {"_expand": expand, "_rejection_random_sample": rejection_random_sample}


@pytest.fixture
def launched(monkeypatch):
    """`launched()`: the functions behind both kernels. They are again what they were in the end."""
    for name in LAUNCHERS:
        launcher = getattr(rejection_sampler, name)
        monkeypatch.setattr(launcher, "kernel", launcher.kernel)
    return lambda: {name: getattr(rejection_sampler, name).kernel.func for name in LAUNCHERS}


def test_they_are_replaced_once_and_stay_where_another_engine_has_vllm_replace_its_own(launched):
    current_platform.register_triton_kernel_overrides()
    replace_cpu_kernels()
    assert launched() == LAUNCHERS
    first = rejection_sampler._expand.kernel
    current_platform.register_triton_kernel_overrides()
    replace_cpu_kernels()
    assert launched() == LAUNCHERS and rejection_sampler._expand.kernel is first


def test_what_samples_launches_them():
    replace_cpu_kernels()
    output = rejection_sampler.expand_batch_to_tokens(
        torch.tensor([0.5, 0.0, 0.7]), torch.tensor([1, 3, 4], dtype=torch.int32), 4, 0, 1
    )
    assert output.tolist() == pytest.approx([0.5, 1, 1, 0.7])


def test_they_are_replaced_beside_what_vllms_own_registry_still_fails_at(launched, monkeypatch):
    """llvmlite has an object that says of every name, `__dict__` among them, that it has it, and gives a function."""
    beside = ModuleType("beside")
    beside.lib = type("Lib", (), {"__slots__": (), "__getattr__": lambda self, name: len})()
    monkeypatch.setitem(sys.modules, "beside", beside)
    with pytest.raises(AttributeError, match="'get'"):
        register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": stock._expand_kernel_impl})
    for name in LAUNCHERS:
        launcher = getattr(rejection_sampler, name)
        launcher.kernel = KernelOverride(launcher.kernel, stock._expand_kernel_impl)
    replace_cpu_kernels()
    assert launched() == LAUNCHERS
