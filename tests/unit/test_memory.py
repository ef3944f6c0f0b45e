"""What is planned to fit into a device."""

from types import SimpleNamespace

import pytest

from vllm_lvspec.engine.memory import BYTES_PER_LOGIT, SHARE_OF_LOGITS, most_rows

VOCAB = 152_064


def config(max_num_seqs: int, budget: int, length: int = 10) -> SimpleNamespace:
    scheduler = SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    model = SimpleNamespace(get_vocab_size=lambda: VOCAB)
    return SimpleNamespace(scheduler_config=scheduler, model_config=model, num_speculative_tokens=length)


@pytest.mark.parametrize(
    ("target", "gib", "rows"),
    [
        pytest.param(config(8, 8192), 24, 88, id="all drafts of all requests"),
        pytest.param(config(256, 8192), 141, 2816, id="all drafts of many requests on a large GPU"),
        pytest.param(config(256, 512), 141, 512, id="no more than a step has tokens"),
        pytest.param(config(256, 8192), 24, 529, id="what a smaller GPU has room for"),
        pytest.param(config(1024, 8192), 24, 2048, id="what vLLM plans for itself"),
        pytest.param(config(2, 8192, 128), 4, 130, id="a whole draft, whatever it takes"),
    ],
)
def test_as_many_rows_of_logits_as_are_of_use_and_fit(target, gib, rows):
    assert most_rows(target, gib * 2**30) == rows
    if rows == 529:
        assert rows * VOCAB * BYTES_PER_LOGIT <= SHARE_OF_LOGITS * gib * 2**30
