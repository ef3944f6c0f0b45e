"""Other families with vLLM's own quirks: Qwen2-VL without a clock, Qwen3-VL with deepstack levels and timestamps."""

import pytest
from harness import VIEW
from vllm import SamplingParams
from workload import QWEN, Family, generate_requests, token_ids

FAMILIES = [Family(name, QWEN.image, QWEN.video, (2, 4, 8)) for name in ("qwen2_vl", "qwen3_vl")]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.checkpoint)
def test_the_target_as_its_own_drafter_is_always_right_and_pruned_changes_no_output(family, engines):
    requests = generate_requests(family, 18, seed=11)
    for request in requests:
        request.params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    engine = engines(family, drafter=0, max_model_len=768, lvspec={"pruning": "none"})
    whole = token_ids(engine.run(requests))
    stats = engine.stats()
    assert stats["drafted_tokens"] > 300
    assert engine.metric("spec_decode_num_accepted_tokens") == stats["drafted_tokens"]
    assert stats["pages_free"] == stats["pages_total"]
    pruned = engines(family, drafter=0, max_model_len=768)
    assert token_ids(pruned.run(requests)) == whole
    stats = pruned.stats()
    accepted = pruned.metric("spec_decode_num_accepted_tokens")
    if VIEW.get("pruning") == "none":
        assert accepted == stats["drafted_tokens"]
    else:
        assert 0 < accepted < stats["drafted_tokens"], "text is drafted rightly, videos seen through little are not"
