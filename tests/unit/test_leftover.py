import pytest

from vllm_lvspec.draft.leftover import Recalling, left_of


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


def test_what_is_left_is_tried_while_it_spares_more_than_it_costs():
    recalling = Recalling()
    assert recalling.share == 1 and recalling.pays(2.0) and not recalling.pays(4.0)
    for _ in range(40):  # three of four further tokens
        recalling.learn(True, 3, 4)
    assert recalling.share == pytest.approx(0.25, abs=0.1)
    for _ in range(300):
        recalling.learn(True, 0, 9)
    assert recalling.share > 0.9
    assert not recalling.pays(0.0)
    assert not recalling.pays(1.0)
    refused = 1
    while not recalling.pays(1.0):
        refused += 1
    assert 3 < refused < 200  # times may have changed
    recalling.learn(False, 0, 0)
    before = recalling.share
    recalling.fade(10**5)
    assert before < 1 and recalling.share == pytest.approx(1, abs=1e-6)
