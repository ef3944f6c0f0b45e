import numpy as np
import pytest
import torch

from vllm_lvspec.kernels.decode_attention import (
    Heads,
    Rows,
    decode_attention_reference,
    launch_decode_attention,
)
from vllm_lvspec.kernels.shared import Norm, Workspace

PAGE = 16


def case(lengths: list[int], heads: Heads, dtype: torch.dtype, device: torch.device, seed: int = 0):
    """`lengths`: tokens of each row, the next one among them; pages lie in no order."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    most = -(-max(lengths) // PAGE)
    num_pages = most * len(lengths) + 3
    # In memory tokens come before heads, as FlashAttention has them.
    cache = random(num_pages, PAGE, heads.num_keys, 2 * heads.size).transpose(1, 2)
    table = torch.randperm(num_pages, generator=generator)[: most * len(lengths)].view(len(lengths), most)
    places = torch.tensor(lengths) - 1
    slots = table[torch.arange(len(lengths)), places // PAGE] * PAGE + places % PAGE
    angles = torch.rand(6000, heads.size // 2, generator=generator) * 6.3
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype).to(device)
    # Of a pruned video fewer tokens are in the cache than positions say.
    positions = torch.tensor(lengths) * 3 + 7
    rows = Rows(positions.to(device), slots.to(device), torch.tensor(lengths).int().to(device), table.int().to(device))
    qkv = random(len(lengths), (heads.num_queries + 2 * heads.num_keys) * heads.size)
    return qkv, cos_sin, cache, rows


def normed(heads: Heads, dtype: torch.dtype, device: torch.device) -> Heads:
    generator = torch.Generator().manual_seed(1)
    weights = [(1 + 0.3 * torch.randn(heads.size, generator=generator)).to(dtype).to(device) for _ in range(2)]
    norms = [Norm(weight, 0.2) for weight in weights]
    return Heads(heads.num_queries, heads.num_keys, heads.size, heads.scale, *norms)


def same(heads: Heads, case, num_splits: int, workspace: Workspace) -> None:
    qkv, cos_sin, cache, rows = case
    wanted_cache, found_cache = cache.clone(), cache.clone()
    wanted = decode_attention_reference(qkv, heads, cos_sin, wanted_cache, rows)
    for how in 2 * ways(qkv.device):  # what it counts by is as it was
        found = launch_decode_attention(qkv, heads, cos_sin, found_cache, rows, workspace, num_splits, **how)
        assert found.values.shape == wanted.shape and found.values.dtype == torch.float16
        tolerance = 2e-5 if qkv.dtype == torch.float32 else 1e-2
        assert (found.whole() - wanted.float()).norm() <= max(tolerance, 1e-3) * wanted.float().norm()
        assert not workspace.arrived.any()
    assert torch.allclose(found_cache.float(), wanted_cache.float(), rtol=2 * tolerance, atol=tolerance)
    # Nothing else was written.
    assert ((found_cache != cache).any(-1).sum() <= heads.num_keys * (rows.slots >= 0).sum()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "size"), [(28, 4, 128), (16, 2, 128), (4, 4, 64), (17, 1, 32), (6, 2, 32), (4, 2, 256)]
)
def test_the_kernel_does_what_its_reference_does(num_queries, num_keys, size, dtype, device):
    heads = Heads(num_queries, num_keys, size, size**-0.5)
    same(heads, case([300, 1, 33], heads, dtype, device), 8, Workspace(device))


def ways(device: torch.device) -> list[dict[str, bool]]:
    """What a device can be asked for."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability()[0] < 9:
        return [{}]
    return [{}, {"overlaps": True}]


def test_large_heads_are_joined_some_at_a_time(device):
    heads = Heads(7, 1, 256, 256**-0.5)
    same(heads, case([200], heads, torch.float32, device), 16, Workspace(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_context_of_many_blocks(num_splits, dtype, device):
    heads = Heads(14, 2, 64, 64**-0.5)
    same(heads, case([1700, 900], heads, dtype, device), num_splits, Workspace(device))


@pytest.mark.parametrize("num_splits", [1, 2, 5, 32])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 64, 65, 66, 129, 500])
def test_contexts_end_anywhere(length, num_splits, device):
    heads = Heads(4, 2, 32, 32**-0.5)
    same(heads, case([length], heads, torch.float32, device, seed=length), num_splits, Workspace(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_have_norms_where_a_model_has_them(dtype, device):
    heads = normed(Heads(8, 2, 64, 0.1), dtype, device)
    same(heads, case([80, 40], heads, dtype, device), 4, Workspace(device))


def test_a_row_without_a_slot_is_written_nowhere(device):
    heads = Heads(4, 2, 32, 0.2)
    qkv, cos_sin, cache, rows = case([20, 30, 1], heads, torch.float32, device)
    rows.slots[1:] = -1
    same(heads, (qkv, cos_sin, cache, rows), 3, Workspace(device))


def test_one_token_far_above_all_others_wins(device):
    """Scores of thousands, of either sign, in whatever part."""
    heads = Heads(2, 1, 32, 1.0)
    for best in (0, 40, 98, 99):
        qkv, cos_sin, cache, rows = case([100], heads, torch.float32, device, seed=best)
        cos_sin[:, :16], cos_sin[:, 16:] = 1, 0
        qkv[:, :64] = 30 * torch.sign(qkv[:, :64])
        qkv[:, 64:96] = -qkv[:, :32]
        where = rows.block_table[0, best // PAGE].long()
        if best < 99:
            cache[where, 0, best % PAGE, :32] = qkv[0, :32]
        else:
            qkv[:, 64:96] = qkv[:, :32]
        same(heads, (qkv, cos_sin, cache, rows), 4, Workspace(device))
        found = launch_decode_attention(qkv, heads, cos_sin, cache, rows, Workspace(device))
        wanted = qkv[0, 96:] if best == 99 else cache[where, 0, best % PAGE, 32:]
        assert np.allclose(found.whole()[0, :32].cpu(), wanted.cpu(), rtol=1e-3, atol=1e-5)


def test_what_others_have_left_is_no_part_of_it(device):
    """A workspace may hold anything where there are fewer splits than room for them."""
    heads = Heads(4, 2, 32, 0.2)
    workspace = Workspace(device)
    workspace.reserve(100_000, 8)
    workspace.parts.fill_(torch.nan)
    same(heads, case([30], heads, torch.float32, device), 5, workspace)


def test_a_workspace_grows_and_is_shared(device):
    workspace = Workspace(device)
    for lengths in ([5], [40, 9, 17], [12]):
        heads = Heads(4, 2, 32, 0.2)
        same(heads, case(lengths, heads, torch.float32, device), 4, workspace)
    assert len(workspace.parts) == 3 * 4 * 34 * 4 and len(workspace.arrived) == 6


@pytest.mark.parametrize("size", [16, 80])
def test_heads_of_other_sizes_are_refused(size):
    heads = Heads(2, 1, size, 1.0)
    args = case([3], heads, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"heads of {size}: must be a power of two, 32 or more"):
        launch_decode_attention(args[0], heads, *args[1:], Workspace(torch.device("cpu")))
