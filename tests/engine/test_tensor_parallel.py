"""Two ranks decide alike, and give what one rank gives."""

from typing import Any

import pytest
import torch
from vllm.distributed import get_tp_group
from workload import LLAVA, QWEN, generate_requests, token_ids

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
    # This drafter's encoder can't be shared by two, so that each rank has it whole.
    assert [encodes for encodes, _ in engine.llm.collective_rpc(encode_the_largest_item)] == [True, True]
    (best, wanted), others = engine.llm.collective_rpc(best_tokens_of)
    assert best == wanted and others == (best, wanted) and len(set(best)) > 8


def shares_of(worker: Any) -> tuple[int, int, int, int]:
    """How many ranks vLLM has, outside of a forward and as the drafter was built; its numbers, and how many tokens its
    cache holds."""
    model = worker.model_runner.drafter.drafter.model
    num_parameters = sum(p.numel() for p in model.model.parameters())
    heads = {layer.num_heads for layer in model._attention_layers().values() if layer.head_size}
    return get_tp_group().world_size, model.num_ranks, num_parameters, max(heads)


def encode_the_largest_item(worker: Any) -> tuple[bool, int]:
    """As where memory is profiled; whether it would be done, and how many were encoded."""
    runner = worker.model_runner
    model, sizes = runner.drafter.drafter.model, []
    encode = model.encode_inputs
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(model, "encode_inputs", lambda inputs: sizes.append(len(encode(inputs))))
        runner._profile_encoder()
    return model.encodes_whole_items, sum(sizes)


def confuse(worker: Any) -> None:
    """The drafter of all ranks but the first."""
    if get_tp_group().is_first_rank:
        return
    for parameter in worker.model_runner.drafter.drafter.model.model.parameters():
        parameter.data.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)))


def next_tokens_of(worker: Any) -> tuple[list[Any], list[Any]]:
    """What is drafted behind some tokens, with its confidences, and what this rank would draft by itself."""
    model = worker.model_runner.drafter.drafter.model
    batch = model.decode_batch(4, 40, 2)
    batch.token_ids.copy_(torch.arange(8))
    batch.asks_all = True
    with torch.inference_mode():
        drafted, own = model.forward(batch, with_probs=True), model._choose(batch, with_probs=True)
    return [values.tolist() for values in drafted], [values.tolist() for values in own]


@pytest.mark.two_ranks
@pytest.mark.parametrize("family", [QWEN, LLAVA], ids=lambda family: family.checkpoint)
def test_a_drafter_that_each_rank_has_whole_drafts_what_the_first_one_says(engines, oracle, family):
    requests = generate_requests(family, 27, seed=2)
    want = token_ids(oracle(family, len(requests), 2))
    engine = engines(family, drafter=0, lvspec={"pruning": "none"})
    ((_, _, num_parameters, heads),) = engine.llm.collective_rpc(shares_of)
    assert token_ids(engine.run(requests, (8, 1, 5))) == want
    drafted, accepted = engine.stats()["drafted_tokens"], engine.metric("spec_decode_num_accepted_tokens")
    assert drafted > 150
    settings = {"pruning": "none", "draft_tensor_parallel_size": 1}
    engine = engines(family, drafter=0, tensor_parallel_size=2, lvspec=settings)
    assert engine.llm.collective_rpc(shares_of) == [(2, 1, num_parameters, heads)] * 2
    (encodes, size), *others = engine.llm.collective_rpc(encode_the_largest_item)
    assert encodes and size > 0 and others == [(encodes, size)]
    assert token_ids(engine.run(requests, (8, 1, 5))) == want
    first = engine.stats()  # asserts that the ranks agree
    assert first["pages_free"] == first["pages_total"]
    assert first["drafted_tokens"] == drafted
    assert engine.metric("spec_decode_num_accepted_tokens") == accepted
    engine.llm.collective_rpc(confuse)
    found, own = zip(*engine.llm.collective_rpc(next_tokens_of), strict=True)
    assert found[0] == found[1] == own[0] != own[1]
    engine.llm.reset_prefix_cache()
    assert token_ids(engine.run(requests, (8, 1, 5))) == want
    second = engine.stats()
    assert second["drafted_tokens"] == 2 * first["drafted_tokens"]
    assert engine.metric("spec_decode_num_accepted_tokens") == 2 * accepted


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
