"""What is planned to fit into a device."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from vllm_lvspec.engine import memory
from vllm_lvspec.engine.memory import BYTES_PER_LOGIT, SHARE_OF_LOGITS, most_rows, waiting_bytes

VOCAB = 152_064


def config(max_num_seqs: int, budget: int, length: int = 10) -> SimpleNamespace:
    scheduler = SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    model = SimpleNamespace(get_vocab_size=lambda: VOCAB)
    return SimpleNamespace(scheduler_config=scheduler, model_config=model, num_speculative_tokens=length)


@pytest.mark.parametrize(
    ("target", "gib", "rows"),
    [
        pytest.param(config(8, 8192), 24, 88, id="all drafts of all requests"),
        pytest.param(config(256, 8192), 160, 2816, id="all drafts of many requests on a large GPU"),
        pytest.param(config(256, 512), 141, 512, id="no more than a step has tokens"),
        pytest.param(config(256, 8192), 24, 423, id="what a smaller GPU has room for"),
        pytest.param(config(1024, 8192), 24, 1228, id="what vLLM plans for itself"),
        pytest.param(config(2, 8192, 128), 4, 130, id="a whole draft, whatever it takes"),
    ],
)
def test_as_many_rows_of_logits_as_are_of_use_and_fit(target, gib, rows):
    assert most_rows(target, gib * 2**30) == rows
    if rows == 423:
        assert rows * VOCAB * BYTES_PER_LOGIT <= SHARE_OF_LOGITS * gib * 2**30


def test_prompts_that_wait_have_an_embedding_of_every_level_for_each_token_that_the_cache_holds():
    draft = SimpleNamespace(hf_config=SimpleNamespace(), get_hidden_size=lambda: 64, dtype=torch.bfloat16)
    assert waiting_bytes(draft, 100) == 100 * 64 * 2
    draft.hf_config.vision_config = SimpleNamespace(deepstack_visual_indexes=[8, 16, 24])
    assert waiting_bytes(draft, 100) == 4 * 100 * 64 * 2


@pytest.mark.parametrize("limit", [None, 1 << 20, 1 << 60])
def test_ranks_on_cpus_share_what_the_machine_or_the_container_has(limit, monkeypatch):
    monkeypatch.setattr(memory, "get_cgroup_memory_limit", lambda: limit)
    monkeypatch.setattr(memory, "get_cgroup_memory_usage", lambda: None if limit is None else 1 << 19)
    total, free = memory.device_memory(1)
    assert total == min(psutil.virtual_memory().total, limit or 1 << 60)
    assert 0 < free < total and (limit != 1 << 20 or free == 1 << 19)
    assert memory.device_memory(2)[0] == total // 2
