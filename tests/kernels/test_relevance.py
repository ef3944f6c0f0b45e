import pytest
import torch
import torch.nn.functional as F

from vllm_lvspec.kernels.relevance import launch_relevance, relevance, relevance_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def starts_of(counts: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(counts, dtype=torch.int32).cumsum(0), (1, 0)).int()


def make_batch(num_queries, num_visual, width, block_size, dtype, device, seed=0):
    """Requests with `num_queries[r]` drafted tokens whose visual tokens lie somewhere in scattered blocks."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [n + int(torch.randint(0, 40, (1,), generator=generator)) for n in num_visual]
    num_blocks = [-(-n // block_size) + 1 for n in lengths]
    blocks = torch.randperm(sum(num_blocks) + 3, generator=generator).int()
    table = torch.full((len(lengths), max(num_blocks) + 2), -1, dtype=torch.int32)
    positions, used = [], 0
    for r, (length, visual) in enumerate(zip(lengths, num_visual, strict=True)):
        table[r, : num_blocks[r]] = blocks[used : used + num_blocks[r]]
        used += num_blocks[r]
        positions.append(torch.randperm(length, generator=generator)[:visual].sort().values.int())
    features = torch.randn(len(blocks), block_size, width + 8, generator=generator).to(dtype)[..., :width]
    queries = torch.randn(sum(num_queries), width, generator=generator).to(dtype)
    batch = queries, starts_of(num_queries), features, table, torch.cat(positions), starts_of(num_visual)
    return [t.to(device) for t in batch]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_queries", "num_visual", "width", "block_size", "top_n"),
    [
        ([1], [1], 16, 16, 1),
        ([10], [192], 64, 16, 10),
        ([5, 0, 12], [7, 50, 130], 123, 32, 3),
        ([32, 3], [300, 64], 96, 256, 10),
        ([17, 1, 4, 9], [65, 0, 128, 3], 80, 48, 1),
        ([3, 2], [40, 70], 33, 16, 40),  # larger lists are slow to sort in the interpreter
    ],
)
def test_the_kernel_does_what_its_reference_does(num_queries, num_visual, width, block_size, top_n, dtype, device):
    batch = make_batch(num_queries, num_visual, width, block_size, dtype, device)
    found = launch_relevance(*batch, top_n, max(num_queries), num_splits=2)
    wanted = relevance_reference(*batch, top_n)
    assert torch.allclose(found, wanted, atol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("top_n", [1, 10, 1000])
def test_the_reference_is_the_mean_of_the_largest_cosines(top_n):
    queries, starts, features, table, positions, visuals = make_batch([3, 2], [40, 9], 24, 16, torch.float32, "cpu")
    wanted = []
    for q in range(5):
        r = int(q >= 3)
        cosines = []
        for p in positions[visuals[r] : visuals[r + 1]].tolist():
            feature = features[table[r, p // 16], p % 16]
            cosines.append(float(queries[q] @ feature / queries[q].norm() / feature.norm()))
        best = sorted(cosines, reverse=True)[:top_n]
        wanted.append(sum(best) / len(best))
    found = relevance_reference(queries, starts, features, table, positions, visuals, top_n)
    assert torch.allclose(found, torch.tensor(wanted), atol=1e-6)


@pytest.mark.parametrize("launch", [True, False])
def test_what_is_no_number_and_what_sees_nothing_has_no_relevance(launch, device):
    batch = make_batch([2, 2, 2], [40, 0, 40], 32, 16, torch.float32, device)
    queries, _, features, table, positions, visuals = batch
    queries[0, 3] = float("nan")
    features[table[2, positions[visuals[2]] // 16], positions[visuals[2]] % 16, 5] = float("nan")
    found = launch_relevance(*batch, 10, 2) if launch else relevance_reference(*batch, 10)
    assert found.isnan().tolist() == [True, False, True, True, True, True]


@pytest.mark.parametrize("launch", [True, False])
def test_a_state_of_zeros_is_like_nothing(launch, device):
    batch = make_batch([2], [40], 32, 16, torch.float32, device)
    batch[0][0] = 0
    found = launch_relevance(*batch, 3, 2) if launch else relevance_reference(*batch, 3)
    assert found[0] == 0
    assert found[1] > 0


def test_no_queries_no_relevance(device):
    batch = make_batch([0, 0], [4, 5], 32, 16, torch.float32, device)
    assert relevance(*batch, 3, 0).shape == launch_relevance(*batch, 3, 0).shape == (0,)


def test_shapes_and_counts_that_cannot_be_are_refused():
    batch = make_batch([2], [40], 32, 16, torch.float32, "cpu")
    with pytest.raises(ValueError, match="shapes differ"):
        relevance(batch[0][:, :8], *batch[1:], 3, 2)
    with pytest.raises(ValueError, match="top_n=0"):
        relevance(*batch, 0, 2)
