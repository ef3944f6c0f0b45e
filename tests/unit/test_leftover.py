import pytest

from vllm_lvspec.draft.leftover import left_of


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ([9], [2, 3, 4, 2]),  # another word for the first
        ([1, 2, 9], [4, 2]),
        ([1, 2, 3, 4, 9], []),
        ([1, 3], [4, 2]),  # one was left out
        ([1, 4], [2]),
        ([4], [2]),
        ([1, 2, 3, 2], []),  # three were
        ([1, 2], [3, 4, 2]),  # the rest was not verified
        ([1, 2, 3, 4, 2], []),
        ([1, 2, 3, 4, 2, 9], []),
        ([9, 9], []),  # said without a draft
        ([1, 9, 3], []),
    ],
)
def test_what_is_left_of_a_draft_is_what_may_follow_again(said, left):
    assert left_of([1, 2, 3, 4, 2], said) == left


def test_of_no_draft_nothing_is_left():
    assert left_of([], [1]) == left_of((), []) == []
