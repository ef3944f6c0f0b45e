"""With a drafter, vLLM's greedy outputs are token for token those without one."""

from __future__ import annotations

import pytest
from vllm import SamplingParams
from workload import LLAVA, QWEN, Request, generate_requests, image, token_ids, turn, video

COUNT = 108  # requests per family, 12 of each kind
SIZES = (1, 8, 3, 5, 2, 7, 4, 6)


@pytest.mark.parametrize("family", [QWEN, LLAVA], ids=lambda f: f.checkpoint)
def test_the_target_as_its_own_unpruned_drafter_is_always_right(family, engines):
    engine = engines(family, drafter=0, lvspec={"pruning": "none"})
    requests = [
        Request(kind, r.prompt, r.data, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        for r in generate_requests(family, 27, seed=1)
        for kind in [r.kind]
    ]
    engine.run(requests, SIZES)
    stats = engine.stats()
    assert stats["drafted_tokens"] > 500
    assert engine.metric("spec_decode_num_accepted_tokens") == stats["drafted_tokens"]
    assert stats["pages_free"] == stats["pages_total"]


@pytest.mark.parametrize("family", [QWEN, LLAVA], ids=lambda f: f.checkpoint)
def test_an_unrelated_pruned_drafter_changes_no_output(family, engines, oracle):
    want = oracle(family, COUNT, 2)
    engine = engines(family, drafter=1)
    got = engine.run(generate_requests(family, COUNT, seed=2), SIZES)
    assert token_ids(got) == token_ids(want)
    assert [o.outputs[0].text for o in got] == [o.outputs[0].text for o in want]
    assert [o.outputs[0].finish_reason for o in got] == [o.outputs[0].finish_reason for o in want]
    for g, w in zip(got, want, strict=True):
        assert (g.outputs[0].logprobs is None) == (w.outputs[0].logprobs is None)
        for ours, theirs in zip(g.outputs[0].logprobs or [], w.outputs[0].logprobs or [], strict=True):
            assert {t: pytest.approx(p.logprob, abs=1e-3) for t, p in theirs.items()} == {
                t: p.logprob for t, p in ours.items()
            }
    assert sum(o.num_cached_tokens > 0 for o in got) > 20, "prefix hits are part of this test"
    stats = engine.stats()
    assert stats["drafted_requests"] > 500
    assert stats["pages_free"] == stats["pages_total"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"enable_prefix_caching": False}, id="no_prefix_caching"),
        pytest.param({"max_num_batched_tokens": 96}, id="chunked_prefill"),
        pytest.param({"num_gpu_blocks_override": 26}, id="preemption"),
    ],
)
@pytest.mark.parametrize("drafter", [0, 1])
def test_scheduling_changes_no_output(drafter, options, engines, oracle):
    count = 27
    want = oracle(QWEN, count, 2)
    engine = engines(QWEN, drafter=drafter, **options)
    got = engine.run(generate_requests(QWEN, count, seed=2), (8,))
    assert token_ids(got) == token_ids(want)
    if "num_gpu_blocks_override" in options:
        assert engine.metric("num_preemptions") > 0
    stats = engine.stats()
    assert stats["drafted_tokens"] > 300
    assert stats["pages_free"] == stats["pages_total"]
    if drafter == 0:
        assert engine.metric("spec_decode_num_accepted_tokens") > 0


def test_requests_that_end_at_the_length_limit_do_not_cost_others_their_drafts(engines):
    filler = "the red circle moves " * 100
    near = [Request("text", turn("user", filler + "." * i) + "<|im_start|>assistant\n") for i in range(4)]
    far = [Request("video", turn("user", QWEN.video + "Go on."), {"video": [video(i)]}) for i in range(4)]
    for request in near + far:
        request.params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    want = engines(QWEN).run(near + far)
    engine = engines(QWEN, drafter=0, lvspec={"pruning": "none"})
    before = engine.stats()["drafted_tokens"], engine.metric("spec_decode_num_accepted_tokens")
    got = engine.run(near + far)
    assert token_ids(got) == token_ids(want)
    assert any(len(o.prompt_token_ids) + len(o.outputs[0].token_ids) == 512 for o in got[:4])
    drafted = engine.stats()["drafted_tokens"] - before[0]
    accepted = engine.metric("spec_decode_num_accepted_tokens") - before[1]
    tokens = sum(len(o.outputs[0].token_ids) for o in got)
    assert drafted == accepted
    assert accepted > 0.85 * tokens, "eleven tokens a step, and one of them the target's"


def test_aborted_requests_leave_no_page_behind(engines):
    engine = engines(QWEN, drafter=1)
    engine.run_and_abort(generate_requests(QWEN, 18, seed=5), max_tokens=200, before_step=28)
    stats = engine.stats()
    assert stats["pages_free"] == stats["pages_total"]
    # The engine still answers, and rightly.
    fresh = generate_requests(QWEN, 8, seed=6)
    got = engine.run(fresh)
    assert token_ids(got) == token_ids(engines(QWEN).run(fresh))


def test_seeded_sampling_is_repeatable_and_lives_through_chunked_prefill(engines):
    engine = engines(QWEN, drafter=1, max_num_batched_tokens=96, enable_prefix_caching=False)
    requests = generate_requests(QWEN, 6, seed=7)
    for i, request in enumerate(requests):
        request.params = SamplingParams(temperature=1.0, top_p=0.9, seed=i, max_tokens=30, ignore_eos=True)
    first = token_ids(engine.run(requests, (1,)))
    assert token_ids(engine.run(requests, (1,))) == first
    assert len({tuple(t) for t in first}) == len(first)
    # Together they share a token budget, and with it the number of drafts that are verified in a step.
    assert all(len(t) == 30 for t in token_ids(engine.run(requests, (8,))))


def test_a_full_pool_means_fewer_drafts_and_no_error(engines, oracle):
    want = oracle(QWEN, 36, 2)
    # About four pages of 32 tokens: room for one or two pruned requests of the eight that run.
    engine = engines(QWEN, drafter=1, lvspec={"draft_cache_gib": 4 * 32 * 2 * 2 * 2 * 32 * 4 / 2**30})
    got = engine.run(generate_requests(QWEN, 36, seed=2))
    assert token_ids(got) == token_ids(want)
    stats = engine.stats()
    assert stats["pages_total"] == 4
    assert stats["skipped_pool_full"] > 0
    assert stats["drafted_tokens"] > 0
    assert stats["pages_free"] == 4


def test_a_video_whose_embeddings_are_gone_is_not_drafted_for(engines):
    engine = engines(QWEN, drafter=1, lvspec={"embedding_cache_gib": 1e-9})
    data = {"video": [video(3, 8)]}
    body = QWEN.video + "the red circle moves up, then left. " * 5
    requests = [
        Request("video", turn("user", body + ask), data, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        for ask in ("Describe the video.", "Which object moves first?")
    ]
    # A target that drafts for itself with its own keys and values needs no embeddings.
    (model,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.drafter.drafter.model)
    copies = model.copies
    got = engine.run(requests[:1])
    model.pool.forget_keys()  # as if others had needed the room
    got += engine.run(requests[1:])
    assert got[1].num_cached_tokens > 0
    stats = engine.stats()
    assert stats["embedding_items"] == 0
    assert (stats["skipped_embeddings"] > 0) == (not copies)
    assert token_ids(got) == token_ids(engines(QWEN).run(requests, (1,)))


def test_every_mix_of_sampling_limits_is_served_also_before_anyone_has_a_draft(engines):
    engine = engines(QWEN, drafter=1)
    requests = generate_requests(QWEN, 16, seed=9)
    for i, request in enumerate(requests):
        request.params = SamplingParams(
            temperature=(0.0, 1.0)[i % 2], top_k=(0, 3)[i // 2 % 2], top_p=(1.0, 0.8)[i // 4 % 2], max_tokens=1 + i
        )
    for size in (1, 8):
        outputs = engine.run(requests, (size,))
        assert all(0 < len(tokens) <= 1 + i for i, tokens in enumerate(token_ids(outputs)))


def test_ids_that_only_the_targets_padded_vocabulary_has_are_fine(engines):
    prompt = {"prompt_token_ids": [5, 1592, 9, 1599, 11]}
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    want = engines(QWEN, target=4).llm.generate(prompt, params, use_tqdm=False)
    engine = engines(QWEN, target=4, drafter=0)
    got = engine.llm.generate(prompt, params, use_tqdm=False)
    assert token_ids(got) == token_ids(want)
    assert max(token_ids(got)[0]) >= 1472
    assert engine.stats()["drafted_tokens"] > 0


def test_an_identifier_used_for_two_images_costs_no_more_than_drafts(engines):
    engine = engines(QWEN, drafter=1)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for side in (112, 56):
        picture = image(3).resize((side, side))
        prompt = {
            "prompt": turn("user", QWEN.image + "Go on."),
            "multi_modal_data": {"image": [picture]},
            "multi_modal_uuids": {"image": ["the-same"]},
        }
        engine.llm.reset_mm_cache()
        engine.llm.reset_prefix_cache()
        engine.llm.llm_engine.reset_encoder_cache()
        (output,) = engine.llm.generate(prompt, params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 8


def test_new_target_weights_change_the_answers_and_the_old_drafter_does_not(engines, checkpoint):
    requests = generate_requests(QWEN, 18, seed=12)
    want = token_ids(engines(QWEN, target=3).run(requests))
    engine = engines(QWEN, drafter=0)
    assert token_ids(engine.run(requests)) != want
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": checkpoint("qwen2_5_vl", seed=3)})
    assert engine.llm.reset_prefix_cache()
    assert token_ids(engine.run(requests)) == want


def test_structured_output_and_several_answers_work(engines):
    from vllm.sampling_params import StructuredOutputsParams

    engine = engines(QWEN, drafter=1)
    data = {"image": [image(3)]}
    prompt = turn("user", QWEN.image + "Describe the image.") + "<|im_start|>assistant\n"
    answers = ["a red circle moves", "a blue square slides to the left"]
    choices = StructuredOutputsParams(choice=list(answers))
    forced = Request("image", prompt, data, SamplingParams(temperature=0, max_tokens=40, structured_outputs=choices))
    several = Request("image", prompt, data, SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=20))
    (one, many) = engine.run([forced, several])
    assert one.outputs[0].text in answers
    assert token_ids([one]) == token_ids(engines(QWEN).run([forced]))
    assert len({o.text for o in many.outputs}) == 3


def test_llava_videos_of_different_lengths_in_one_batch_do_not_kill_the_engine(engines):
    engine = engines(LLAVA, drafter=1)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    requests = [
        Request("video", turn("user", LLAVA.video + "Go on."), {"video": [video(i, 2 + i)]}, params) for i in range(4)
    ]
    alone = [engine.run([r])[0] for r in requests]
    engine.llm.reset_prefix_cache()
    assert token_ids(engine.run(requests)) == token_ids(alone)
