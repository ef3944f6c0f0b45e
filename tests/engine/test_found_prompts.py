"""What the drafter has read of a prompt it does not read again, and drafts the same."""

from typing import Any

import pytest
from vllm import SamplingParams
from workload import LLAVA, QWEN, Family, Request, generate_requests, image, token_ids, turn, video

from vllm_lvspec.reference import PAIRS

START = "<|im_start|>assistant\n"
TEXT = "the red circle moves up, then left. " * 4


def drafter_of(engine: Any) -> Any:
    (drafter,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.drafter.drafter)
    return drafter


def requests_about(family: Family) -> list[Request]:
    """Two questions about each of two videos, one behind an image and an answer, and one about the image alone."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    videos = [video(scene, PAIRS[family.checkpoint].num_frames) for scene in (60, 61)]

    def ask(question: str, seen: list, kind: str = "video") -> Request:
        placeholder = family.video if kind == "video" else family.image
        return Request(kind, turn("user", placeholder + TEXT + question) + START, {kind: seen}, params)

    found = [ask(question, [seen]) for seen in videos for question in ("Describe it.", "What is left of it?")]
    both = turn("user", family.image + "Look." + family.video + TEXT + "Describe it.") + START
    for more in ("", "A blue square.<|im_end|>\n" + turn("user", "And then?") + START):
        found.append(Request("both", both + more, {"image": [image(3)], "video": [videos[0]]}, params))
    return [*found, ask("What is it?", [image(3)], "image"), ask("Describe it.", [videos[1]])]


@pytest.mark.two_ranks
@pytest.mark.parametrize("pruning", ["redundancy", "attention"])
@pytest.mark.parametrize("size", [1, 2])
def test_one_rank_and_two_find_what_they_have_read(engines, pruning, size):
    requests = requests_about(QWEN)
    want = token_ids(engines(QWEN).run(requests, (1,)))
    found = []
    for options in ({}, {"tensor_parallel_size": 2}):
        lvspec = {"pruning": pruning, **({"draft_tensor_parallel_size": size} if options else {})}
        engine = engines(QWEN, drafter=0, lvspec=lvspec, **options)
        assert token_ids(engine.run([*requests, *requests], (1, 1, 1, 2))) == [*want, *want]
        found.append(engine.stats())  # asserts that the ranks agree
    assert all(stats["found_prompt_tokens"] > 100 for stats in found)


@pytest.mark.parametrize("family", [QWEN, LLAVA], ids=lambda family: family.checkpoint)
@pytest.mark.parametrize("pruning", ["none", "uniform", "redundancy", "similarity"])
def test_prompts_that_begin_alike_are_read_once_and_drafted_for_alike(engines, family, pruning):
    requests = requests_about(family)
    want = token_ids(engines(family).run(requests, (1,)))
    engine = engines(family, drafter=0, lvspec={"pruning": pruning, "pruning_ratio": 0.5})
    drafter = drafter_of(engine)
    assert drafter._finds_prefixes, "as vLLM does by default"
    runs = {}
    for finds in (False, True):
        drafter._finds_prefixes = finds
        engine.llm.reset_prefix_cache()
        before, accepted = drafter.counts.copy(), engine.metric("spec_decode_num_accepted_tokens")
        assert token_ids(engine.run(requests, (1, 1, 1, 2))) == want
        counted = engine.stats()
        assert counted["pages_free"] == counted["pages_total"]
        runs[finds] = drafter.counts - before, engine.metric("spec_decode_num_accepted_tokens") - accepted
    (plain, accepted), (found, accepted_again) = runs[False], runs[True]
    # As many are accepted of as many: what is found is what would have been read.
    assert accepted == accepted_again > 0 and found["drafted_tokens"] == plain["drafted_tokens"]
    assert plain["found_prompt_tokens"] == 0 < found["found_prompt_tokens"]
    assert found["read_prompt_tokens"] + found["found_prompt_tokens"] == plain["read_prompt_tokens"]
    # With similarity other questions see other parts of a video, but for the last, which has come before.
    assert found["found_prompt_tokens"] > (0.1 if pruning == "similarity" else 0.3) * plain["read_prompt_tokens"]


def test_salts_of_requests_reach_the_drafter_and_without_prefix_caching_it_finds_nothing(engines):
    request = requests_about(QWEN)[0]
    engine = engines(QWEN, drafter=0)
    drafter = drafter_of(engine)
    drafter.model.pool.forget_keys()
    found = []
    for salt in (None, None, "mine", "mine", "theirs", "reset", None, None):
        if salt == "reset":
            engine.llm.reset_prefix_cache()
            continue
        before = drafter.counts["found_prompt_tokens"]
        prompt = {**request.inputs, **({} if salt is None else {"cache_salt": salt})}
        engine.llm.generate(prompt, request.params, use_tqdm=False)
        found.append(drafter.counts["found_prompt_tokens"] - before)
    assert found[1] == found[3] == found[6] > 0 == found[0] == found[2] == found[4] == found[5]
    engine = engines(QWEN, drafter=0, enable_prefix_caching=False)
    engine.run([request, request], (1,))
    assert engine.stats()["found_prompt_tokens"] == 0


def test_the_target_as_its_own_drafter_forgets_what_it_read_with_other_weights(engines, checkpoint):
    requests = generate_requests(QWEN, 9, seed=12)
    engine = engines(QWEN, lvspec={"model": "self", "self_cache": "compute"})
    engine.run(requests)
    drafter = drafter_of(engine)
    pool = drafter.model.pool
    assert pool.find(list(pool._pages)[:1]) and len(drafter.embeddings)
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": checkpoint("qwen2_5_vl", seed=3)})
    assert not pool._pages and not len(drafter.embeddings)
