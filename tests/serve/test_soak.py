"""A short soak, so that the long one (`make soak`) is known to work."""

import pytest
import soak


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.two_ranks)])
def test_a_mixed_load_is_answered_refused_or_aborted_and_leaves_nothing_behind(ranks):
    result = soak.run(seconds=20, concurrency=16, seed=ranks, tensor_parallel_size=ranks, num_videos=1)
    assert result.is_fine, "\n".join(result.lines())
    assert result.counts["compared"] > 5 and result.counts["refused"] > 0 and result.counts["aborted"] > 0


def test_a_soak_that_loses_or_mixes_up_answers_is_not_fine():
    fine = soak.Soak(memory=[100] * 8)
    fine.counts.update(answered=3)
    assert fine.is_fine and fine.growth == 1
    lost = soak.Soak(memory=[100] * 8)
    lost.counts.update(answered=3, lost=1)
    assert not lost.is_fine
    mixed = soak.Soak(wrong=["strict answer differs"], memory=[100] * 4 + [200] * 4)
    mixed.counts.update(answered=3)
    assert not mixed.is_fine and mixed.growth == 2 and "strict answer differs" in mixed.lines()
