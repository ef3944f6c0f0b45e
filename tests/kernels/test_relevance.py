from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vllm_lvspec.kernels.relevance import (
    VisualPages,
    launch_mean_of_top,
    launch_top_cosines,
    mean_of_top,
    mean_of_top_reference,
    top_cosines,
    top_cosines_reference,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def starts_of(counts: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(counts, dtype=torch.int32).cumsum(0), (1, 0)).int()


def make_batch(num_queries, num_visual, heads, head_size, block_size, dtype, device, seed=0):
    """Requests with `num_queries[r]` drafted tokens whose visual tokens lie somewhere in scattered blocks.

    Features lie in memory as values do in vLLM's caches: block, head, slot, and in each slot something before them.
    """
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
    cache = torch.randn(len(blocks), heads, block_size, head_size + 8, generator=generator).to(dtype)
    queries = torch.randn(sum(num_queries), heads * head_size, generator=generator).to(dtype)
    pages = VisualPages(
        cache.to(device)[..., 8:].transpose(1, 2),
        table.to(device),
        torch.cat(positions).to(device),
        starts_of(num_visual).to(device),
    )
    return queries.to(device), starts_of(num_queries).to(device), pages


def launched(queries, starts, pages, top_n, max_queries, num_splits=2):
    return launch_mean_of_top(launch_top_cosines(queries, starts, pages, top_n, max_queries, num_splits), top_n)


def in_torch(queries, starts, pages, top_n, max_queries=0):
    return mean_of_top_reference(top_cosines_reference(queries, starts, pages, top_n), top_n)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_queries", "num_visual", "heads", "head_size", "block_size", "top_n"),
    [
        ([1], [1], 1, 16, 16, 1),
        ([10], [192], 1, 64, 16, 10),
        ([5, 0, 12], [7, 50, 130], 1, 123, 32, 3),
        ([32, 3], [300, 64], 3, 32, 256, 10),
        ([17, 1, 4, 9], [65, 0, 128, 3], 2, 40, 48, 1),
        ([3, 2], [40, 70], 1, 33, 16, 40),  # larger lists are slow to sort in the interpreter
    ],
)
def test_the_kernels_do_what_their_references_do(
    num_queries, num_visual, heads, head_size, block_size, top_n, dtype, device
):
    batch = make_batch(num_queries, num_visual, heads, head_size, block_size, dtype, device)
    found = launched(*batch, top_n, max(num_queries))
    assert torch.allclose(found, in_torch(*batch, top_n), atol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("top_n", [1, 10, 1000])
def test_the_reference_is_the_mean_of_the_largest_cosines(top_n):
    queries, starts, pages = make_batch([3, 2], [40, 9], 2, 12, 16, torch.float32, "cpu")
    wanted = []
    for q in range(5):
        r = int(q >= 3)
        cosines = []
        for p in pages.positions[pages.starts[r] : pages.starts[r + 1]].tolist():
            feature = pages.features[pages.block_table[r, p // 16], p % 16].flatten()
            cosines.append(float(queries[q] @ feature / queries[q].norm() / feature.norm()))
        best = sorted(cosines, reverse=True)[:top_n]
        wanted.append(sum(best) / len(best))
    assert torch.allclose(in_torch(queries, starts, pages, top_n), torch.tensor(wanted), atol=1e-6)


@pytest.mark.parametrize("launch", [True, False])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_that_hold_a_share_each_find_together_what_one_finds_alone(launch, num_ranks, device):
    queries, starts, pages = make_batch([4, 3], [61, 40], 1, 24, 48, torch.float32, device)
    whole = (launched if launch else in_torch)(queries, starts, pages, 10, 4)
    tops = []
    for rank in range(num_ranks):
        rows = [(pages.starts[r], pages.starts[r + 1]) for r in range(2)]
        own = [p[p % num_ranks == rank] // num_ranks for p in (pages.positions[a:b] for a, b in rows)]
        share = VisualPages(
            pages.features[:, rank::num_ranks],
            pages.block_table,
            torch.cat(own),
            starts_of([len(p) for p in own]).to(device),
        )
        if launch:
            tops.append(launch_top_cosines(queries, starts, share, 10, 4, num_splits=2))
        else:
            tops.append(top_cosines_reference(queries, starts, share, 10))
    joined = (launch_mean_of_top if launch else mean_of_top_reference)(torch.cat(tops), 10)
    assert torch.allclose(joined, whole, atol=1e-6)


@pytest.mark.parametrize(("num_shares", "expected"), [(1, 128), (2, 64), (3, 32), (8, 16), (200, 1)])
def test_ranks_that_share_a_requests_tokens_cut_them_into_as_many_parts_together(num_shares, expected, device):
    queries, starts, pages = make_batch([2], [40], 1, 16, 16, torch.float32, device)
    assert launch_top_cosines(queries, starts, replace(pages, num_shares=num_shares), 3, 2).shape[0] == expected


@pytest.mark.parametrize("find", [launched, in_torch])
def test_what_is_no_number_and_what_sees_nothing_has_no_relevance(find, device):
    queries, starts, pages = make_batch([2, 2, 2], [40, 0, 40], 1, 32, 16, torch.float32, device)
    queries[0, 3] = float("nan")
    position = pages.positions[pages.starts[2]]
    pages.features[pages.block_table[2, position // 16], position % 16, 0, 5] = float("nan")
    assert find(queries, starts, pages, 10, 2).isnan().tolist() == [True, False, True, True, True, True]


@pytest.mark.parametrize("find", [launched, in_torch])
def test_a_state_of_zeros_is_like_nothing(find, device):
    queries, starts, pages = make_batch([2], [40], 1, 32, 16, torch.float32, device)
    queries[0] = 0
    found = find(queries, starts, pages, 3, 2)
    assert found[0] == 0
    assert found[1] > 0


def test_no_queries_no_relevance(device):
    batch = make_batch([0, 0], [4, 5], 1, 32, 16, torch.float32, device)
    assert mean_of_top(top_cosines(*batch, 3, 0), 3).shape == launched(*batch, 3, 0).shape == (0,)


def test_shapes_and_counts_that_cannot_be_are_refused():
    queries, starts, pages = make_batch([2], [40], 1, 32, 16, torch.float32, "cpu")
    with pytest.raises(ValueError, match="shapes differ"):
        top_cosines(queries[:, :8], starts, pages, 3, 2)
    with pytest.raises(ValueError, match="top_n=0"):
        top_cosines(queries, starts, pages, 0, 2)
