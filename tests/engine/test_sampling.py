"""Sampling with a drafter draws from the distribution that vLLM draws from without one."""

from collections import Counter

import torch
from vllm import SamplingParams
from workload import QWEN, Request, turn, video

SAMPLES = 3000


def draw(engine, temperature: float, top_k: int, top_p: float) -> Counter:
    """How often each triple of first tokens was drawn."""
    prompt = turn("user", QWEN.video + "Describe the video.") + "<|im_start|>assistant\n"
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=3, n=50, ignore_eos=True)
    requests = [Request("video", prompt, {"video": [video(5)]}, params)] * (SAMPLES // 50)
    return Counter(tuple(o.token_ids) for answer in engine.run(requests, (4,)) for o in answer.outputs)


def chi_square_p_value(first: Counter, second: Counter, least: int = 12) -> float:
    """Two-sample test that both were drawn from one distribution; rare outcomes are taken together."""
    common = [k for k in first | second if first[k] + second[k] >= least]
    rows = [(first[k], second[k]) for k in common]
    rows.append((first.total() - sum(r[0] for r in rows), second.total() - sum(r[1] for r in rows)))
    table = torch.tensor([r for r in rows if sum(r)], dtype=torch.float64)
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    freedom = len(table) - 1
    assert freedom >= 8, "too few outcomes to tell anything"
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2))


def test_the_distribution_is_that_of_the_target_alone(engines):
    plain = engines(QWEN, max_num_seqs=64)
    drafts = {"pruning": "none", "num_speculative_tokens": 2}
    with_drafter = engines(QWEN, drafter=0, lvspec=drafts, max_num_seqs=64)
    for temperature, top_k, top_p in ((1.5, 8, 0.95), (2.0, 3, 1.0)):
        ours = draw(with_drafter, temperature, top_k, top_p)
        theirs = draw(plain, temperature, top_k, top_p)
        assert chi_square_p_value(ours, theirs) > 1e-4
    # The test can tell distributions apart, and drafts were both accepted and rejected.
    assert chi_square_p_value(ours, draw(plain, 1.2, 3, 1.0)) < 1e-4
    accepted = with_drafter.metric("spec_decode_num_accepted_tokens")
    drafted = with_drafter.metric("spec_decode_num_draft_tokens")
    assert 0.1 * drafted < accepted < 0.95 * drafted
