import pytest
import torch

from vllm_lvspec.kernels import greedy_head
from vllm_lvspec.kernels.greedy_head import Head, greedy_head_reference, in_eight_bits, launch_greedy_head
from vllm_lvspec.kernels.shared import Norm, Workspace


def case(num_tokens: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(shape, generator=generator) for shape in ((num_tokens, width), (1, width)))
    norm = Norm((1 + 0.3 * torch.randn(width, generator=generator)).to(dtype).to(device), 1e-6)
    return (3 * x).to(dtype).to(device), Head((0.1 * weight).to(dtype).to(device)), norm


def same(x, head: Head, num_tokens: int, norm: Norm | None, workspace: Workspace) -> None:
    wanted, probs = greedy_head_reference(x, head, num_tokens, norm)
    for _ in range(2):  # what it counts by is as it was
        found, found_probs = launch_greedy_head(x, head, num_tokens, workspace, norm)
        assert found.dtype == torch.int64 and found.shape == found_probs.shape == (1,)
        assert torch.equal(found, wanted)
        assert torch.allclose(found_probs, probs, rtol=1e-3)
        assert not workspace.arrived.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("num_tokens", "width"), [(1500, 64), (33, 256), (200, 896), (97, 300), (1, 16)])
def test_the_kernel_does_what_its_reference_does(num_tokens, width, has_norm, dtype, device, has_e4m3):
    x, head, norm = case(num_tokens, width, dtype, device, seed=width)
    workspace = Workspace(device)
    same(x, head, num_tokens, norm if has_norm else None, workspace)
    if has_e4m3:
        same(x, in_eight_bits(head), num_tokens, norm if has_norm else None, workspace)


@pytest.mark.parametrize("place", [0, 31, 32, 70, 98, 99])
def test_the_best_may_be_anywhere_and_what_pads_a_vocabulary_is_none(place, device):
    x, head, _ = case(128, 64, torch.float32, device, seed=place)
    head.weight[place] = x[0]
    head.weight[100:] = 5 * x[0]
    found, _ = launch_greedy_head(x, head, 100, Workspace(device))
    assert found.tolist() == [place]
    same(x, head, 100, None, Workspace(device))


def test_of_equal_ones_it_is_the_first(device, monkeypatch):
    monkeypatch.setattr(greedy_head, "_BLOCK_P", 2)  # of more programs than are looked at together
    x, head, _ = case(300, 32, torch.float32, device)
    for places in ([40, 41, 250], [7, 290], [100, 130, 131], [64, 96]):
        changed = Head(head.weight.clone())
        changed.weight[places] = x[0]
        found, probs = launch_greedy_head(x, changed, 300, Workspace(device))
        assert found.tolist() == places[:1] and abs(probs.item() - 1 / len(places)) < 1e-3


def test_logits_far_from_nothing_are_compared_all_the_same(device):
    x, head, _ = case(200, 32, torch.float32, device)
    for sign in (1, -1):
        far = Head(sign * head.weight.abs() * 1e4)
        same(x.abs(), far, 200, None, Workspace(device))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_no_number_is_a_token_all_the_same(device, has_e4m3):
    x, head, _ = case(70, 32, torch.float32, device)
    for rows in (slice(None), slice(0, 40), slice(69, 70)):
        broken = Head(head.weight.clone())
        broken.weight[rows] = float("nan")
        for each in (broken, in_eight_bits(broken))[: 1 + has_e4m3]:
            found, prob = launch_greedy_head(x, each, 70, Workspace(device))
            assert 0 <= found.item() < 70 and (rows != slice(None) or prob.isnan())


def test_what_eight_bits_leave_out_decides_between_the_best(device, has_e4m3):
    """Of four tokens that are nearly alike, each of another program's."""
    if not has_e4m3:
        pytest.skip("its kernels can't read e4m3")
    num_wrong = 0
    for seed in range(20):
        x, head, _ = case(200, 64, torch.float32, device, seed=seed)
        places = torch.tensor([3, 40, 77, 199], device=device)
        generator = torch.Generator().manual_seed(seed)
        head.weight[places] = x + 0.05 * torch.randn(4, 64, generator=generator).to(device)
        rounded = in_eight_bits(head)
        wanted, _ = greedy_head_reference(x, head, 200)
        found, _ = launch_greedy_head(x, rounded, 200, Workspace(device))
        assert torch.equal(found, wanted)
        num_wrong += int((x @ (rounded.weight.float() * rounded.scales[:, None]).T).argmax() != wanted)
        same(x, rounded, 200, None, Workspace(device))
    assert num_wrong > 5


@pytest.mark.parametrize("block", [2, 4])
def test_where_more_programs_are_looked_at_in_one_place(block, device, has_e4m3, monkeypatch):
    monkeypatch.setattr(greedy_head, "_BLOCK_P", block)
    for seed in range(8):
        x, head, norm = case(300, 32, torch.float32, device, seed=seed)
        for each in (head, in_eight_bits(head))[: 1 + has_e4m3]:
            same(x, each, 300, norm, Workspace(device))


def test_who_is_sure_is_as_sure_in_eight_bits(device, has_e4m3):
    if not has_e4m3:
        pytest.skip("its kernels can't read e4m3")
    for seed in range(20):
        x, head, _ = case(500, 64, torch.float32, device, seed=seed)
        head.weight[50] = x[0] * (12 / x.square().sum())
        _, wanted = greedy_head_reference(x, head, 500)
        _, prob = launch_greedy_head(x, in_eight_bits(head), 500, Workspace(device))
        assert wanted > 0.5 and abs(prob - wanted) < 0.02


def test_eight_bits_hold_what_e4m3_has(device, monkeypatch):
    monkeypatch.setattr(greedy_head, "_ROWS_AT_ONCE", 3)
    _, head, _ = case(10, 64, torch.float32, device)
    head.weight[4] = 0
    head.weight[5] *= 1e-6
    rounded = in_eight_bits(head)
    assert rounded.weight.dtype == torch.float8_e4m3fn and rounded.num_bytes == 10 * 64 + 40
    values = rounded.weight.float() * rounded.scales[:, None]
    largest = head.weight.abs().amax(1, keepdim=True)
    # Half a step of three bits, and half of what is the least there is.
    assert ((values - head.weight).abs() <= head.weight.abs() / 16 + largest / 448 * 2**-10 * 1.001).all()
    assert (values.abs().amax(1, keepdim=True) - largest).abs().max() <= 1e-6 * largest.max()


def test_what_does_not_fit_is_refused():
    x, head, _ = case(10, 32, torch.float32, torch.device("cpu"))
    for wrong in ((x[:, :16], 10), (x.repeat(2, 1), 10), (x, 11), (x, 0)):
        with pytest.raises(ValueError, match="must be a row of 32, and 1 to 10 tokens"):
            launch_greedy_head(wrong[0], head, wrong[1], Workspace(torch.device("cpu")))
    with pytest.raises(ValueError, match="what it was made of, or neither"):
        Head(head.weight, torch.ones(10))
