"""Two ranks decide alike, and give what one rank gives."""

import pytest
from workload import QWEN, generate_requests, token_ids


@pytest.mark.two_ranks
@pytest.mark.parametrize("drafter", [0, 1])
def test_two_ranks_give_what_one_gives(drafter, engines, oracle):
    count = 45
    want = oracle(QWEN, count, 2)
    pruning = {"pruning": "none"} if drafter == 0 else {}
    engine = engines(QWEN, drafter=drafter, tensor_parallel_size=2, lvspec=pruning)
    got = engine.run(generate_requests(QWEN, count, seed=2), (8, 1, 5))
    assert token_ids(got) == token_ids(want)
    stats = engine.stats()  # asserts that the ranks agree
    assert stats["drafted_tokens"] > 300
    assert stats["pages_free"] == stats["pages_total"]
    if drafter == 0:
        assert engine.metric("spec_decode_num_accepted_tokens") > 0.5 * stats["drafted_tokens"]
