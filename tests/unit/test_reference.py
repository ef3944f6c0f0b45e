"""The reference pairs' inputs: tokenizer, pixels, positions, and what training teaches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_lvspec.bench.videofacts.scene import NUM_FRAMES, SIDE, Scene
from vllm_lvspec.bench.videofacts.tasks import TASKS, make_task
from vllm_lvspec.reference import PAIRS, llava_onevision, qwen2_5_vl
from vllm_lvspec.reference.families import FAMILIES
from vllm_lvspec.reference.tokenizer import build_tokenizer
from vllm_lvspec.reference.train import FACT_WEIGHT, IGNORE, SQUARE, Batch, losses


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
    assert name not in PAIRS or PAIRS[name].num_frames == family.VIDEO_FRAMES
    assert batch.words.shape == (4, batch.num_visual, 5)
    assert (batch.weights[batch.labels != IGNORE] > 0).all()
    learned = batch.labels[batch.weights == FACT_WEIGHT]
    assert tokenizer.convert_tokens_to_ids("Ġred") in learned or tokenizer.convert_tokens_to_ids("Ġblue") in learned
    share = (batch.weights == FACT_WEIGHT).sum() / (batch.weights > 0).sum()
    assert 0.12 < share < 0.35
    # The square in which the first scene's first object stands, at the first moment.
    scene = Scene.from_seed(1_000_000 + 3 * 4)
    x, y = scene.centre(0, family.moments(family.VIDEO_FRAMES)[-1])
    row = batch.words[0, : batch.num_visual // 16 * 16].view(-1, 16, 5)[-1, int(y) // SQUARE * 4 + int(x) // SQUARE]
    if scene.is_visible(0, NUM_FRAMES):
        assert tokenizer.decode(row[1:2]).strip() == scene.objects[0].shape


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_view_keeps_positions_and_both_losses_reach_every_part(name, tokenizer):
    family = FAMILIES[name]
    model = family.build_model(family.SHAPES["draft"], tokenizer)
    family.prepare_for_training(model)
    batch = Batch(family, tokenizer, 1, 2, image=False, long_answers=True)
    everything = torch.arange(batch.num_visual)
    whole = losses(family, model, batch, None)
    assert torch.allclose(whole[0], losses(family, model, batch, everything)[0])
    answer_loss, patch_loss, _ = losses(family, model, batch, everything[::7])
    (answer_loss + patch_loss).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # SigLIP's last norm is not used (the layer before it is), nor are key biases, which no softmax sees.
    assert not [n for n in idle if "post_layernorm" not in n and "image_newline" not in n and "k_proj.bias" not in n]


@pytest.mark.parametrize("name", FAMILIES)
def test_text_sees_the_first_visual_token_through_the_gaps_of_a_pruned_view(name, tokenizer):
    """Plain positions with gaps look like packed sequences to transformers, which would part text from the video."""
    family = FAMILIES[name]
    model = family.build_model(family.SHAPES["draft"], tokenizer)
    batch = Batch(family, tokenizer, 1, 1, image=False, long_answers=True)
    kept = torch.arange(batch.num_visual)[::7]
    row = batch.labels[0] != IGNORE
    last = batch.labels.clone()
    last[0, row.nonzero()[:-1, 0]] = IGNORE
    batch.labels = last  # the loss is now the last token's alone
    with torch.no_grad():
        before = losses(family, model, batch, kept)[0]
        encode = family.encode_visual(model, batch.pixels, batch.num_frames, 1)
        encode[0, 0] += 10
        changed = SimpleNamespace(
            **{k: getattr(family, k) for k in ("text_positions",)}, encode_visual=lambda *a: encode
        )
        after = losses(changed, model, batch, kept)[0]
    assert abs(float(before) - float(after)) > 1e-6


def test_batched_vision_attention_gives_what_transformers_gives(tokenizer):
    model = qwen2_5_vl.build_model(qwen2_5_vl.SHAPES["draft"], tokenizer)
    pixels = qwen2_5_vl.pixel_values([Scene.from_seed(i).render(6) for i in range(2)])
    with torch.no_grad():
        slow = qwen2_5_vl.encode_visual(model, pixels, 6, 2)
        qwen2_5_vl.prepare_for_training(model)
        fast = qwen2_5_vl.encode_visual(model, pixels, 6, 2)
    assert torch.allclose(slow, fast, atol=1e-5)
