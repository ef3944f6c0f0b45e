"""The bundled pairs: what vLLM computes is what transformers computes, they see what happens, and drafting pays."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
from vllm import LLM, SamplingParams

from vllm_lvspec.bench.samples import videofacts
from vllm_lvspec.bench.videofacts.score import totals
from vllm_lvspec.reference import PAIRS
from vllm_lvspec.reference.families import FAMILIES
from vllm_lvspec.reference.tokenizer import ASSISTANT_TURN, USER_TURN, build_tokenizer

NUM_VIDEOS = 8
SEED = 70  # of the suite; the figures in the card are of others


class Pair:
    """A family's pair in vLLM, and its answers to a few questions."""

    def __init__(self, name: str):
        self.name = name
        self.family = FAMILIES[name]
        self.pair = PAIRS[name]
        self.samples = videofacts(NUM_VIDEOS, SEED, num_frames=self.pair.num_frames)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            self.llm = LLM(
                str(self.pair.target), dtype="float32", max_model_len=1024, max_num_seqs=4, enforce_eager=True,
                disable_log_stats=False,
                speculative_config={"method": "lvspec", "policy": "strict", "only_if_faster": False},
                kv_cache_memory_bytes=2**28,
            )  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=256, logprobs=1)
        self.answers = self.llm.generate([self.prompt(s) for s in self.samples], params, use_tqdm=False)

    def prompt(self, sample) -> dict:
        video = f"{self.family.BEFORE_VISUAL}<|video_pad|>{self.family.AFTER_VISUAL}"
        text = USER_TURN + video + sample.question + ASSISTANT_TURN
        return {"prompt": text, "multi_modal_data": {"video": [sample.load_video()]}}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    running = Pair(request.param)
    yield running
    running.llm.llm_engine.engine_core.shutdown()


def test_all_checkpoints_together_are_small():
    size = sum(
        f.stat().st_size for pair in PAIRS.values() for path in (pair.target, pair.draft) for f in path.iterdir()
    )
    assert size < 40e6


def test_checkpoints_have_the_tokenizer_that_is_built_today():
    built = build_tokenizer()
    for name, pair in PAIRS.items():
        for path in (pair.target, pair.draft):
            found = AutoTokenizer.from_pretrained(path)
            assert found.backend_tokenizer.to_str() == built.backend_tokenizer.to_str()
            log = json.loads((path / "training_log.json").read_text())
            assert log["family"] == name and log["log"][-1]["step"] == log["steps"] - 1


def test_every_drafted_answer_is_what_transformers_would_say(pair):
    family = pair.family
    model = AutoModelForImageTextToText.from_pretrained(pair.pair.target, dtype=torch.float32).eval()
    head = AutoTokenizer.from_pretrained(pair.pair.target)(USER_TURN + family.BEFORE_VISUAL).input_ids
    num_visual = family.num_visual_tokens(pair.pair.num_frames)
    for sample, answer in list(zip(pair.samples, pair.answers, strict=True))[:6]:
        ids = torch.tensor([*answer.prompt_token_ids, *answer.outputs[0].token_ids])
        assert ids[: len(head)].tolist() == head
        frames = sample.load_video()[0]
        with torch.no_grad():
            visual = family.encode_visual(model, family.pixel_values([frames]), len(frames), 1)
            embeds = model.get_input_embeddings()(ids[None])
            embeds[:, len(head) : len(head) + num_visual] = visual
            positions = family.text_positions(len(head), len(frames), len(ids) - len(head) - num_visual, 1)
            hidden = model.model.language_model(inputs_embeds=embeds, position_ids=positions)
            logprobs = model.lm_head(hidden.last_hidden_state[0]).log_softmax(-1)
        first = len(answer.prompt_token_ids) - 1
        for i, token in enumerate(answer.outputs[0].token_ids):
            best = logprobs[first + i].max()
            assert float(logprobs[first + i, token]) == pytest.approx(float(best), abs=2e-3)
            assert float(logprobs[first + i, token]) == pytest.approx(
                answer.outputs[0].logprobs[i][token].logprob, abs=2e-3
            )


# What the card says of the target, less a margin for eight videos (and as many choices).
RECALL = dict.fromkeys(("count", "colour", "shape", "size", "motion", "event", "order"), 0.85)
RECALL |= {"relation": 0.75, "negation": 0.75, "choice": 0.7}


def test_the_target_sees_what_happens_and_in_which_order(pair):
    scores = [(s, s.score(a.outputs[0].text)) for s, a in zip(pair.samples, pair.answers, strict=True)]
    told = [score for sample, score in scores if sample.task in ("caption", "description")]
    assert sum(s.accuracy for s in told) / len(told) > 0.9
    assert sum(bool(s.order_right) for s in told) / len(told) > 0.85
    counts = totals(score for _, score in scores)
    recall = {kind: counts[kind]["right"] / counts[kind]["required"] for kind in RECALL}
    assert all(recall[kind] > floor for kind, floor in RECALL.items()), recall


def test_the_drafter_saves_target_steps(pair):
    accepted = sum(m.value for m in pair.llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
    tokens = sum(len(a.outputs[0].token_ids) - 1 for a in pair.answers)
    assert tokens / (tokens - accepted) > 1.8
