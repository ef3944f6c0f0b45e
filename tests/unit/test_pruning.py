import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_lvspec.draft.pruning import STRATEGIES, VisualGrid

GRIDS = st.builds(
    VisualGrid, st.integers(1, 40), st.integers(1, 20), st.integers(1, 20), num_extra=st.integers(0, 1)
)  # fmt: skip


@given(GRIDS, st.floats(0, 0.99))
def test_uniform_keeps_the_asked_share_of_different_tokens(grid, ratio):
    kept = STRATEGIES["uniform"](grid, ratio)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, kept.unique())
    assert kept.min() >= 0
    assert kept.max() < grid.num_tokens
    assert abs(len(kept) - max(1, round((1 - ratio) * grid.num_tokens))) <= 1


@given(GRIDS)
def test_uniform_keeps_everything_at_ratio_zero_as_none_does(grid):
    everything = torch.arange(grid.num_tokens)
    assert torch.equal(STRATEGIES["uniform"](grid, 0.0), everything)
    assert torch.equal(STRATEGIES["none"](grid, 0.9), everything)


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_uniform_spreads_over_time_and_space(ratio):
    grid = VisualGrid(32, 16, 16)
    kept = STRATEGIES["uniform"](grid, ratio).numpy()
    per_moment = np.bincount(kept // 256, minlength=32)
    assert per_moment.max() - per_moment.min() <= 1
    # Every place is looked at at some time, and no row or column gets more than its share by a half.
    rows, columns = np.bincount(kept % 256 // 16, minlength=16), np.bincount(kept % 16, minlength=16)
    assert len(np.unique(kept % 256)) == 256
    for counts in (rows, columns):
        assert counts.max() <= 1.5 * counts.mean()
        assert counts.min() >= 0.5 * counts.mean()
