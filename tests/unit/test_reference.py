"""The generated world, its scorer, and the pair's inputs."""

import itertools

import numpy as np
import pytest
import torch

from vllm_lvspec.reference.model import patchify, position_ids
from vllm_lvspec.reference.scenes import COLOURS, Scene, caption, dialogue, score_caption, write_mp4
from vllm_lvspec.reference.tokenizer import build_tokenizer


def test_a_scene_follows_from_its_seed():
    assert Scene.from_seed(3) == Scene.from_seed(3)
    assert len({Scene.from_seed(i) for i in range(200)}) == 200


def test_frames_show_the_objects_where_they_are():
    for seed in range(30):
        scene = Scene.from_seed(seed)
        frames = scene.render()
        for i, frame in enumerate(frames):
            for obj in scene.objects:
                x, y = (round(c) for c in obj.centre(i))
                assert tuple(frame[y, x]) == COLOURS[obj.colour]


def test_objects_move_one_after_another_and_in_their_direction():
    for seed in range(30):
        objects = Scene.from_seed(seed).objects
        for earlier, later in itertools.pairwise(objects):
            assert earlier.stop <= later.start
        for obj in objects:
            (x0, y0), (x1, y1) = obj.centre(0), obj.centre(15)
            assert {"left": x1 < x0, "right": x1 > x0, "up": y1 < y0, "down": y1 > y0}[obj.direction]


def test_every_true_caption_scores_full_and_every_wrong_one_less():
    for seed in range(300):
        scene, rng = Scene.from_seed(seed), np.random.default_rng(seed)
        text = caption(scene, rng)
        score = score_caption(scene, text)
        assert score.accuracy == 1.0
        assert score.order_right
        first, second = scene.objects[0], scene.objects[1]
        wrong = text.replace(first.colour, "orange")
        assert score_caption(scene, wrong).accuracy < 1.0
        swapped = text.replace(first.name, "@").replace(second.name, first.name).replace("@", second.name)
        assert not score_caption(scene, swapped).order_right
        count = {2: "two", 3: "three"}[len(scene.objects)]
        assert score_caption(scene, text.replace(f"{count} objects", "seven objects")).accuracy < 1.0


def test_invented_objects_cost_as_much_as_missing_ones():
    scene = Scene.from_seed(1)
    text = caption(scene, np.random.default_rng(0))
    known = {o.name for o in scene.objects}
    invented = next(f"{c} circle" for c in COLOURS if f"{c} circle" not in known)
    assert score_caption(scene, f"{text} There is a {invented}.").right == score_caption(scene, text).right - 1
    assert score_caption(scene, "").right == 0


def test_the_tokenizer_spends_one_token_a_word_and_reads_any_text():
    tokenizer = build_tokenizer()
    assert len(tokenizer) <= 640
    for seed in range(50):
        rng = np.random.default_rng([seed, 1])
        for _, answer in dialogue(Scene.from_seed(10**6 + seed), rng):
            words = len(answer.replace(",", " ,").replace(".", " .").split())
            assert len(tokenizer(answer).input_ids) <= words + 1
    text = "Grüße, 世界! <|im_end|> \n\t✓"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("num_frames", [1, 2, 7, 16])
def test_patches_are_those_of_the_processor(num_frames):
    from transformers import Qwen2VLVideoProcessor

    frames = Scene.from_seed(2).render(num_frames)
    processor = Qwen2VLVideoProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 256})
    theirs = processor(
        [torch.from_numpy(frames).permute(0, 3, 1, 2)], do_sample_frames=False, cap_pixels_per_frame=False
    )["pixel_values_videos"]
    assert torch.allclose(patchify(frames), theirs.float(), atol=1e-4)


@pytest.mark.parametrize(("frames", "fps"), [(16, 4.0), (8, 4.0), (2, 1.0), (1, 4.0)])
def test_positions_are_those_of_vllm(frames, fps):
    """Transformers goes on after the largest spatial position, vLLM (and published checkpoints) after the largest."""
    from types import SimpleNamespace

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
    ours = position_ids(5, (grid[0], 4, 4), 30, 2 / fps)
    assert torch.equal(ours, theirs)


def test_a_written_video_reads_back_as_it_was(tmp_path):
    import cv2

    frames = Scene.from_seed(4).render()
    path = tmp_path / "clip.mp4"
    write_mp4(str(path), frames)
    video = cv2.VideoCapture(str(path))
    assert video.get(cv2.CAP_PROP_FPS) == 4.0
    read = []
    while (item := video.read())[0]:
        read.append(item[1][:, :, ::-1])
    assert len(read) == len(frames)
    assert np.abs(np.stack(read).astype(int) - frames).mean() < 5
