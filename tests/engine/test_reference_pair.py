"""The bundled pair: what vLLM computes is what transformers computes, and drafting pays."""

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from vllm import LLM, SamplingParams

from vllm_lvspec.reference import DRAFT, TARGET
from vllm_lvspec.reference.evaluate import PROMPT
from vllm_lvspec.reference.model import encode_visual, patchify, position_ids
from vllm_lvspec.reference.scenes import Scene, score_caption, video_item

SEEDS = range(700_000, 700_024)


@pytest.fixture(scope="module")
def strict_engine():
    llm = LLM(
        str(TARGET), dtype="float32", max_model_len=1024, max_num_seqs=4, enforce_eager=True, disable_log_stats=False,
        speculative_config="lvspec",
    )  # fmt: skip
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def answers(strict_engine):
    prompts = [
        {"prompt": PROMPT, "multi_modal_data": {"video": [video_item(Scene.from_seed(s).render())]}} for s in SEEDS
    ]
    return strict_engine.generate(prompts, SamplingParams(temperature=0, max_tokens=160, logprobs=1), use_tqdm=False)


def test_both_checkpoints_are_small():
    size = sum(f.stat().st_size for f in [*TARGET.iterdir(), *DRAFT.iterdir()])
    assert size < 20e6


def test_every_drafted_answer_is_what_transformers_would_say(answers):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(TARGET, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    head = tokenizer("<|im_start|>user\n<|vision_start|>").input_ids
    for seed, answer in list(zip(SEEDS, answers, strict=True))[:6]:
        ids = torch.tensor([*answer.prompt_token_ids, *answer.outputs[0].token_ids])
        assert ids[: len(head)].tolist() == head
        with torch.no_grad():
            visual = encode_visual(model, patchify(Scene.from_seed(seed).render()), torch.tensor([[8, 8, 8]]))
            embeds = model.get_input_embeddings()(ids[None])
            embeds[0, len(head) : len(head) + 128] = visual
            positions = position_ids(len(head), (8, 4, 4), len(ids) - len(head) - 128, 0.5)
            hidden = model.model.language_model(inputs_embeds=embeds, position_ids=positions[:, None])
            logprobs = model.lm_head(hidden.last_hidden_state[0]).log_softmax(-1)
        first = len(answer.prompt_token_ids) - 1
        for i, token in enumerate(answer.outputs[0].token_ids):
            assert int(logprobs[first + i].argmax()) == token
            assert float(logprobs[first + i, token]) == pytest.approx(
                answer.outputs[0].logprobs[i][token].logprob, abs=2e-3
            )


def test_answers_tell_colours_shapes_and_their_order(answers):
    scores = [score_caption(Scene.from_seed(s), a.outputs[0].text) for s, a in zip(SEEDS, answers, strict=True)]
    assert sum(s.right for s in scores) > 0.7 * sum(s.total for s in scores)
    assert sum(s.order_right for s in scores) > 0.7 * len(scores)


def test_the_drafter_saves_the_target_steps(answers, strict_engine):
    accepted = sum(m.value for m in strict_engine.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
    tokens = sum(len(a.outputs[0].token_ids) - 1 for a in answers)
    assert tokens / (tokens - accepted) > 1.8
