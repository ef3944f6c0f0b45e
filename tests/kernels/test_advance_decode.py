import pytest
import torch

from vllm_lvspec.kernels.advance_decode import advance_decode, advance_decode_reference, launch_advance_decode


def make_batch(rows: int, dims: int, page_size: int, device: torch.device, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    max_pages = 5
    seq_lens = torch.randint(0, max_pages * page_size, (rows,), generator=generator, dtype=torch.int32)
    # The table of a real batch is wider than a row needs, and rows are slices of larger tensors.
    table = torch.randint(0, 2**20, (rows + 3, max_pages + 2), generator=generator, dtype=torch.int32)[:rows]
    positions = torch.randint(0, 10**6, (dims, rows + 3), generator=generator)[:, :rows]
    slots = torch.zeros(rows, dtype=torch.int64)
    return [t.to(device) for t in (positions, seq_lens, slots, table)]


@pytest.mark.parametrize("rows", [1, 5, 123, 128, 129, 300])
@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("page_size", [16, 32, 48, 128, 256])
def test_the_kernel_does_what_its_reference_does(rows, dims, page_size, device):
    ours, theirs = make_batch(rows, dims, page_size, device), make_batch(rows, dims, page_size, device)
    for _ in range(3):  # past the ends of pages
        launch_advance_decode(*ours[:3], ours[3], page_size)
        advance_decode_reference(*theirs[:3], theirs[3], page_size)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def test_slots_are_those_of_the_block_table():
    positions, seq_lens = torch.tensor([[7, 9]]), torch.tensor([3, 4], dtype=torch.int32)
    slots, table = torch.zeros(2, dtype=torch.int64), torch.tensor([[5, 8], [6, 2]], dtype=torch.int32)
    advance_decode(positions, seq_lens, slots, table, page_size=4)
    assert positions.tolist() == [[8, 10]]
    assert seq_lens.tolist() == [4, 5]
    assert slots.tolist() == [5 * 4 + 3, 2 * 4 + 0]


def test_rows_that_differ_are_refused():
    with pytest.raises(ValueError, match="rows differ"):
        advance_decode(torch.zeros(1, 2), torch.zeros(3), torch.zeros(3), torch.zeros(3, 1), 4)
