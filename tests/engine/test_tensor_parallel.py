"""Two ranks decide alike, and give what one rank gives."""

import pytest
from workload import QWEN, generate_requests, token_ids


@pytest.mark.two_ranks
def test_two_ranks_give_what_one_gives(engines, oracle):
    count = 27
    want = oracle(QWEN, count, 2)
    engine = engines(QWEN, drafter=5, tensor_parallel_size=2)
    got = engine.run(generate_requests(QWEN, count, seed=2), (8, 1, 5))
    assert token_ids(got) == token_ids(want)
    stats = engine.stats()  # asserts that the ranks agree
    assert stats["drafted_tokens"] > 150
    assert stats["pages_free"] == stats["pages_total"]
