"""The reference pairs' inputs: tokenizer, pixels, positions, and what training teaches."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer

from vllm_lvspec.bench.videofacts.scene import NUM_FRAMES, SIDE, Scene
from vllm_lvspec.bench.videofacts.tasks import TASKS, make_task
from vllm_lvspec.reference import PAIRS, llava_onevision, qwen2_5_vl, train
from vllm_lvspec.reference.families import FAMILIES
from vllm_lvspec.reference.tokenizer import ASSISTANT_TURN, USER_TURN, build_tokenizer
from vllm_lvspec.reference.train import FACT_WEIGHT, SQUARE, STATES, Batch, LetterBatch, Probe, letter_loss, losses


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_the_tokenizer_spends_one_token_a_word_and_reads_any_text(tokenizer):
    for shapes in (qwen2_5_vl.SHAPES, llava_onevision.SHAPES):
        assert all(len(tokenizer) <= shape["vocab_size"] for shape in shapes.values())
    for seed in range(50):
        for kind in TASKS:
            task = make_task(Scene.from_seed(10**6 + seed), kind, np.random.default_rng([seed, 1]))
            words = task.answer.text
            for mark in ",.:?'":
                words = words.replace(mark, f" {mark} ")
            assert len(tokenizer(task.answer.text).input_ids) <= len(words.split())
    text = "Grüße, 世界! <|im_end|> \n\t✓"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("num_frames", [1, 2, 7, 16])
def test_patches_are_those_of_the_qwen_processor(num_frames):
    from transformers import Qwen2VLVideoProcessor

    frames = Scene.from_seed(2).render(num_frames)
    processor = Qwen2VLVideoProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1024})
    theirs = processor(
        [torch.from_numpy(frames).permute(0, 3, 1, 2)], do_sample_frames=False, cap_pixels_per_frame=False
    )["pixel_values_videos"]
    assert torch.allclose(qwen2_5_vl.patchify(frames), theirs.float(), atol=1e-4)
    assert torch.equal(qwen2_5_vl.pixel_values([frames, frames]), torch.cat([qwen2_5_vl.patchify(frames)] * 2))


def test_pixels_are_those_of_the_llava_processor():
    from transformers import LlavaOnevisionVideoProcessor

    frames = Scene.from_seed(2).render(12)
    processor = LlavaOnevisionVideoProcessor(size={"height": SIDE, "width": SIDE})
    theirs = processor([torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="pt")["pixel_values_videos"]
    assert torch.allclose(llava_onevision.pixel_values([frames]), theirs.float(), atol=1e-4)


@pytest.mark.parametrize(("frames", "fps"), [(24, 4.0), (8, 4.0), (2, 1.0), (1, 4.0)])
def test_positions_are_those_of_vllm(frames, fps):
    """Transformers goes on after the largest spatial position, vLLM (and published checkpoints) after the largest."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model
    from vllm.multimodal.inputs import PlaceholderRange

    grid = (max(frames // 2, 1), 8, 8)
    count = grid[0] * 16
    is_video = frames > 1
    data = {
        "video_grid_thw" if is_video else "image_grid_thw": SimpleNamespace(data=torch.tensor(grid)),
        "second_per_grid_ts": SimpleNamespace(data=torch.tensor(2 / fps)),
    }
    feature = SimpleNamespace(
        modality="video" if is_video else "image", data=data, mm_position=PlaceholderRange(offset=5, length=count)
    )
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=4)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.iter_mm_grid_thw = lambda features: Model.iter_mm_grid_thw(model, features)
    theirs, _ = Model.get_mrope_input_positions(model, [0] * (5 + count + 30), [feature])
    assert torch.equal(qwen2_5_vl.position_ids(5, (grid[0], 4, 4), 30, 2 / fps), theirs)
    if fps == 4.0:
        assert torch.equal(qwen2_5_vl.text_positions(5, frames, 30, 2)[:, 1], theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_asks_for_answers_and_names_what_patches_show(name, tokenizer):
    family = FAMILIES[name]
    batch = Batch(family, tokenizer, 3, 4, image=False, long_answers=True)
    assert batch.num_visual == family.num_visual_tokens(family.VIDEO_FRAMES) >= 128
    assert PAIRS[name].num_frames == family.VIDEO_FRAMES
    assert batch.words.shape == (4, batch.num_visual, 5)
    learned = batch.ids[batch.weights == FACT_WEIGHT]
    assert tokenizer.convert_tokens_to_ids("Ġred") in learned or tokenizer.convert_tokens_to_ids("Ġblue") in learned
    share = (batch.weights == FACT_WEIGHT).sum() / (batch.weights > 0).sum()
    assert 0.12 < share < 0.35
    # The square in which the first scene's first object stands, at the first moment.
    scene = Scene.from_seed(1_000_000 + 3 * 4)
    x, y = scene.centre(0, family.moments(family.VIDEO_FRAMES)[-1])
    row = batch.words[0, : batch.num_visual // 16 * 16].view(-1, 16, 5)[-1, int(y) // SQUARE * 4 + int(x) // SQUARE]
    if scene.is_visible(0, NUM_FRAMES):
        assert tokenizer.decode(row[1:2]).strip() == scene.objects[0].shape


@pytest.fixture(params=FAMILIES)
def drafter(request, tokenizer):
    """A family with an untrained drafter of it and what it is probed with."""
    family = FAMILIES[request.param]
    shape = family.SHAPES["draft"]
    model = family.build_model(shape, tokenizer)
    family.prepare_for_training(model)
    return family, model, Probe(shape, 12)


def test_a_pruned_view_keeps_positions_and_every_loss_reaches_every_part(drafter, tokenizer):
    family, model, probe = drafter
    batch = Batch(family, tokenizer, 1, 2, image=False, long_answers=True)
    everything = torch.arange(batch.num_visual)
    whole = losses(family, model, probe, batch, None)
    assert torch.allclose(whole.answers, losses(family, model, probe, batch, everything).answers)
    found = losses(family, model, probe, batch, everything[::7])
    (found.answers + found.patches + found.probe).backward()
    parts = dict(model.named_parameters()) | dict(probe.named_parameters())
    idle = [n for n, p in parts.items() if p.grad is None or not p.grad.abs().sum()]
    # SigLIP's last norm is not used (the layer before it is), nor are key biases, which no softmax sees.
    assert not [n for n in idle if "post_layernorm" not in n and "image_newline" not in n and "k_proj.bias" not in n]


def test_conversations_about_one_video_do_not_see_each_other(drafter, tokenizer):
    """Each is learned as it will be asked: alone, right after the video."""
    family, model, probe = drafter
    kept = torch.arange(family.num_visual_tokens(family.VIDEO_FRAMES))[::3]
    batch = Batch(family, tokenizer, 1, 1, image=False, long_answers=True)
    assert set(batch.talks[0].tolist()) == set(range(6))
    for talk in (1, 3, 5):
        alone, among = (Batch(family, tokenizer, 1, 1, image=False, long_answers=True) for _ in range(2))
        among.weights = among.weights * (among.talks == talk)
        columns = ((alone.talks[0] == 0) | (alone.talks[0] == talk)).nonzero()[:, 0]
        for name in ("ids", "weights", "talks", "offsets"):
            setattr(alone, name, getattr(alone, name)[:, columns])
        assert alone.offsets[0].diff().ge(1).sum() == len(columns) - 2  # a run for the video, one for the conversation
        with torch.no_grad():
            wanted, found = (losses(family, model, probe, b, kept).answers for b in (alone, among))
        assert torch.allclose(wanted, found, atol=1e-5)


def test_text_sees_the_first_visual_token_through_the_gaps_of_a_pruned_view(drafter, tokenizer):
    """Plain positions with gaps look like packed sequences to transformers, which would part text from the video."""
    family, model, probe = drafter
    batch = Batch(family, tokenizer, 1, 1, image=False, long_answers=True)
    kept = torch.arange(batch.num_visual)[::7]
    batch.weights[0, batch.weights[0].nonzero()[:-1, 0]] = 0.0  # the loss is now the last token's alone
    with torch.no_grad():
        before = losses(family, model, probe, batch, kept).answers
        encode = family.encode_visual(model, batch.pixels, batch.num_frames, 1)
        encode[0, 0] += 10
        changed = SimpleNamespace(
            **{k: getattr(family, k) for k in ("text_positions",)}, encode_visual=lambda *a: encode
        )
        after = losses(changed, model, probe, batch, kept).answers
    assert abs(float(before) - float(after)) > 1e-6


def test_the_probe_asks_where_when_and_what_and_how_many_events_there_were(drafter, tokenizer):
    family, _, _ = drafter
    batch = Batch(family, tokenizer, 3, 4, image=False, long_answers=True)
    moments = family.moments(family.VIDEO_FRAMES)
    for i, facts in enumerate(batch.facts):
        scene = Scene.from_seed(1_000_000 + 3 * 4 + i)
        column, row, moment, state, begun = facts[: len(moments) * 16].view(len(moments), 16, 5).unbind(-1)
        assert (column[0].view(4, 4) == torch.arange(4)).all()
        assert (row[0].view(4, 4) == torch.arange(4)[:, None]).all()
        assert (moment == torch.arange(12)[:, None]).all()
        assert (begun == begun[:, :1]).all()
        assert begun[0, 0] == 0
        assert begun[-1, 0] == facts[-1, 4] == len(scene.events)
        assert begun[:, 0].diff().ge(0).all()
        for event in scene.events:
            shown = {STATES[k] for k in state[[event.start - 0.5 <= m < event.stop + 0.5 for m in moments]].flatten()}
            kinds = {"appear": "appears", "vanish": "vanishes", "change": "turns", "bounce": "bounces"}
            assert (event.direction if event.kind == "move" else kinds.get(event.kind, event.kind)) in shown


def test_letters_are_those_of_the_options_told_and_are_told_after_the_options(drafter, tokenizer):
    family, model, _ = drafter
    batch = LetterBatch(tokenizer, 1, 40)
    assert (batch.weights.sum(1) == 1).all()
    for ids, weights in zip(batch.ids, batch.weights, strict=True):
        asked, answer = tokenizer.decode(ids).split("<|im_start|>assistant\n")
        options = {part[0]: part[3:] for part in asked.split("?")[1].split("<|im_end|>")[0][1:-1].split(". ")}
        letter = tokenizer.decode(ids[weights > 0]).strip()
        assert set(options) == set("ABCD")
        assert f" {options[letter]}, " in answer
        assert f"the letter is {letter}." in answer
    assert len({tokenizer.decode(i[w > 0]) for i, w in zip(batch.ids, batch.weights, strict=True)}) == 4
    assert 0 < letter_loss(family, model, batch) < 20


def test_batched_vision_attention_gives_what_transformers_gives(tokenizer):
    model = qwen2_5_vl.build_model(qwen2_5_vl.SHAPES["draft"], tokenizer)
    pixels = qwen2_5_vl.pixel_values([Scene.from_seed(i).render(6) for i in range(2)])
    with torch.no_grad():
        slow = qwen2_5_vl.encode_visual(model, pixels, 6, 2)
        qwen2_5_vl.prepare_for_training(model)
        fast = qwen2_5_vl.encode_visual(model, pixels, 6, 2)
    assert torch.allclose(slow, fast, atol=1e-5)


def test_vision_towers_get_their_grids_where_the_pixels_are(tokenizer):
    model = qwen2_5_vl.build_model(qwen2_5_vl.SHAPES["draft"], tokenizer)
    asked = []

    def visual(pixels, grid_thw):
        asked.append(grid_thw.device.type)
        return SimpleNamespace(pooler_output=pixels.new_zeros(2 * 192, 4))

    model.model.visual.forward = visual
    qwen2_5_vl.encode_visual(model, torch.zeros(2 * 768, 1176, device="meta"), 24, 2)
    assert asked == ["meta"]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_on_is_what_the_chat_template_writes(name, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    family = FAMILIES[name]
    family.save_checkpoint(
        family.build_model(family.SHAPES["draft"], tokenizer), copy.deepcopy(tokenizer), str(tmp_path)
    )
    content = [{"type": "video"}, {"type": "text", "text": "What?"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    theirs, turned = (
        tokenizer.apply_chat_template([{"role": "user", "content": c}], add_generation_prompt=True, tokenize=False)
        for c in (content, content[::-1])
    )
    assert theirs == f"{USER_TURN}{family.BEFORE_VISUAL}<|video_pad|>{family.AFTER_VISUAL}What?{ASSISTANT_TURN}"
    assert turned == theirs


@pytest.fixture
def trained(tmp_path, monkeypatch, tokenizer):
    """Train a drafter for three steps of one video each in a folder; its weights and its log."""
    from safetensors.torch import load_file

    monkeypatch.setattr(train, "CHECKPOINT_STEPS", 2)
    monkeypatch.setattr(train, "build_tokenizer", lambda: copy.deepcopy(tokenizer))

    def run(folder: str, stop_after: int | None = None, **changes):
        done = 0

        def advance(progress, bar):
            nonlocal done
            done += 1
            if done == stop_after:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(train.Progress, "advance", advance)
            options = {"steps": 3, "batch_size": 1, "start": None, **changes}
            train.main("llava_onevision", "draft", tmp_path / folder, **options)
        weights = load_file(tmp_path / folder / "model.safetensors")
        return weights, json.loads((tmp_path / folder / "training_log.json").read_text())

    return run


def test_a_stopped_training_goes_on_exactly_where_it_was(trained):
    whole, log = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", stop_after=3)  # after the state of step 2 was written
    again, again_log = trained("stopped")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert again_log["log"] == log["log"]
    assert len(log["runs"]) == len(again_log["runs"]) == 1


def test_a_training_goes_on_with_its_own_data_only_and_notes_other_plans(trained, tmp_path):
    trained("run", steps=2)
    for key, value in {"batch_size": 2, "seed": 1}.items():
        with pytest.raises(typer.BadParameter, match=f"{key}={value}: the run in .* has"):
            trained("run", **{key: value})
    _, log = trained("run", steps=3, learning_rate=1e-3)
    assert [(r["from_step"], r["steps"], r["learning_rate"]) for r in log["runs"]] == [(0, 2, 2e-3), (2, 3, 1e-3)]


def test_the_cards_curves_are_drawn_from_the_logs(tmp_path):
    from vllm_lvspec.reference.curves import draw

    draw(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
