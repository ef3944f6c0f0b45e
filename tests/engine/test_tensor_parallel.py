"""Two ranks decide alike, and give what one rank gives."""

from typing import Any

import pytest
import torch
from vllm.distributed import get_tp_group
from workload import QWEN, generate_requests, token_ids

from vllm_lvspec.config import LVSpecConfigError


def best_tokens_of(worker: Any) -> tuple[list[int], list[int]]:
    """Of random states: as the drafter takes them, and among the logits of all ranks."""
    model = worker.model_runner.drafter.drafter.model
    assert model._split_head is not None
    width = model.vllm_config.model_config.get_hidden_size()
    hidden = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    logits_processor, head = model._split_head
    with torch.inference_mode():
        return logits_processor.get_top_tokens(head, hidden).tolist(), model.model.compute_logits(hidden).argmax(
            -1
        ).tolist()


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
    (best, wanted), others = engine.llm.collective_rpc(best_tokens_of)
    assert best == wanted and others == (best, wanted) and len(set(best)) > 8


def test_ranks_that_were_told_something_else_end_the_start(engines, monkeypatch):
    engine = engines(QWEN, pair=True, lvspec={"policy": "strict"})
    (proposer,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.drafter)
    group = get_tp_group()
    proposer._check_ranks()
    for key, value in (("num_speculative_tokens", 3), ("model", "self")):
        monkeypatch.setattr(group, "broadcast_object", lambda ours, src, key=key, value=value: {**ours, key: value})
        with pytest.raises(
            LVSpecConfigError, match=f"{key}=.*: the first rank has '?{value}'?; must be the same on all"
        ):
            proposer._check_ranks()
