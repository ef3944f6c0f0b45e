"""The upscaled model is the small one: transformers computes the same logits from both."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from vllm_lvspec.config import LVSpecConfigError
from vllm_lvspec.reference.upscale import (
    TEXT_SHAPES,
    TextShape,
    check_served,
    hf_overrides,
    text_shape,
    upscale,
    upscaled,
)

SMALL = TextShape(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24
)
LARGER = {
    "its own": SMALL,
    "wider": TextShape(48, 2, 6, 2, 24),
    "deeper": TextShape(32, 5, 4, 2, 24),
    "a wider MLP": TextShape(32, 2, 4, 2, 57),
    "more KV heads": TextShape(72, 2, 9, 3, 24),
    "larger groups": TextShape(80, 2, 10, 2, 24),
    "heads twice as large": TextShape(64, 2, 4, 2, 24),
    "heads thrice as large": TextShape(96, 2, 4, 2, 24),
    "larger in all": TextShape(16 * 15, 4, 15, 3, 100),
}
IMAGE, VIDEO, VOCAB = 1, 2, 50
TEXT = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-2, bos_token_id=None, eos_token_id=0, pad_token_id=0,
)  # fmt: skip


def randomised(model, seed=0):
    """Weights wide enough that the logits depend on all of them; norms and biases as well."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5, generator=generator)
    return model.eval()


def qwen(tied=True, **text):
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 1], "rope_theta": 100.0},
            "tie_word_embeddings": tied,
            **text,
        },
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=2,
            spatial_merge_size=2, temporal_patch_size=2, window_size=8, fullatt_block_indexes=[0],
        ),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=3, vision_end_token_id=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return config, Qwen2_5_VLForConditionalGeneration


def llava(tied=True, **text):
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(
            **{**TEXT, "tie_word_embeddings": tied, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
            **text,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8,
            patch_size=2, vision_use_head=False,
        ),
        image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=[[8, 8], [8, 16]],
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=tied,
    )  # fmt: skip
    return config, LlavaOnevisionForConditionalGeneration


FAMILIES = {"qwen2_5_vl": qwen, "llava_onevision": llava}


def inputs(family):
    """Text around a video, and for LLaVA an image, whose lines end in `image_newline`."""
    generator = torch.Generator().manual_seed(7)
    text = torch.randint(5, VOCAB, (12,), generator=generator).tolist()
    if family == "qwen2_5_vl":
        ids = [*text[:4], 3, *[VIDEO] * 12, 4, *text[4:]]
        return dict(
            input_ids=torch.tensor([ids]),
            mm_token_type_ids=torch.tensor([[2 if token == VIDEO else 0 for token in ids]]),
            pixel_values_videos=torch.randn(48, 3 * 2 * 2 * 2, generator=generator),
            video_grid_thw=torch.tensor([[3, 4, 4]]),
        )
    ids = [*text[:4], *[IMAGE] * (16 + 4 * 5), *text[4:8], *[VIDEO] * (3 * 4 + 1), *text[8:]]
    return dict(
        input_ids=torch.tensor([ids]),
        pixel_values=torch.randn(1, 2, 3, 8, 8, generator=generator),
        image_sizes=torch.tensor([[8, 8]]),
        pixel_values_videos=torch.randn(1, 3, 3, 8, 8, generator=generator),
    )


def enlarged(config, shape):
    """The larger model's configuration, as vLLM makes it of the overrides, by way of JSON."""
    large = type(config)(**config.to_dict())
    for part, keys in json.loads(json.dumps(hf_overrides(config, shape))).items():
        for key, value in keys.items():
            old = getattr(getattr(large, part), key, None)
            setattr(getattr(large, part), key, {**old, **value} if isinstance(value, dict) else value)
    return large


@pytest.mark.parametrize(("shape", "tied"), [*((shape, False) for shape in LARGER), ("larger in all", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_small_model(family, shape, tied):
    shape = LARGER[shape]
    config, architecture = FAMILIES[family](tied)
    small = randomised(architecture(config))
    large = architecture(enlarged(config, shape)).eval()
    weights = dict(upscale(small.state_dict().items(), config, shape))
    large.load_state_dict(weights, strict=True)
    assert replace(text_shape(large.config), vocab_size=shape.vocab_size) == shape
    batch = inputs(family)
    with torch.no_grad():
        want, got = small(**batch).logits, large(**batch).logits
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_beyond_the_small_models_are_as_unlikely_as_that_for_images(family, tied):
    shape = replace(LARGER["larger in all"], vocab_size=VOCAB + 7)
    config, architecture = FAMILIES[family](tied)
    small = randomised(architecture(config))
    large = architecture(enlarged(config, shape)).eval()
    large.load_state_dict(dict(upscale(small.state_dict().items(), config, shape)), strict=True)
    assert text_shape(large.config) == shape
    batch = inputs(family)
    with torch.no_grad():
        want, got = small(**batch).logits, large(**batch).logits
    torch.testing.assert_close(got[..., :VOCAB], want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[..., VOCAB:], want[..., IMAGE, None].expand(-1, -1, 7), atol=1e-4, rtol=1e-4)
    with pytest.raises(LVSpecConfigError, match=f"vocab_size={VOCAB}: .* must be at most {VOCAB - 1}"):
        hf_overrides(config, replace(shape, vocab_size=VOCAB - 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_that_checkpoints_use_is_upscaled_alike(family):
    config, architecture = FAMILIES[family](tied=False)
    tensors = randomised(architecture(config)).state_dict()
    shape = LARGER["larger in all"]
    want = dict(upscale(tensors.items(), config, shape))
    published = [
        ("model.language_model.", "model." if family == "qwen2_5_vl" else "language_model.model."),
        ("lm_head.", "lm_head." if family == "qwen2_5_vl" else "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ]

    def rename(name):
        old, new = next((pair for pair in published if name.startswith(pair[0])), ("", ""))
        return new + name.removeprefix(old)

    got = dict(upscale(((rename(name), tensor) for name, tensor in tensors.items()), config, shape))
    assert got.keys() == {rename(name) for name in want}
    assert all(torch.equal(got[rename(name)], tensor) for name, tensor in want.items())


def test_the_vision_tower_is_passed_on_untouched():
    config, architecture = qwen()
    tensors = architecture(config).state_dict()
    changed = {n for n, t in upscale(tensors.items(), config, LARGER["larger in all"]) if t is not tensors.get(n)}
    assert {name for name in changed if "visual" in name} == {
        "model.visual.merger.mlp.2.weight",
        "model.visual.merger.mlp.2.bias",
    }


def test_one_weight_is_held_at_a_time_and_layers_beyond_hold_none():
    config, architecture = qwen()
    small = architecture(config).state_dict()
    asked = []

    def tensors():
        for name, tensor in small.items():
            asked.append(name)
            yield name, tensor

    for i, (name, tensor) in enumerate(upscale(tensors(), config, LARGER["larger in all"])):
        if i < len(small):
            assert asked[-1] == name and len(asked) == i + 1
        else:
            assert tensor.untyped_storage().nbytes() == tensor.element_size()
    assert i + 1 == len(small) + 2 * 12


def test_bfloat16_weights_are_scaled_in_float32():
    config, _ = qwen()
    norm = torch.tensor([1.0] * 32, dtype=torch.bfloat16)
    ((_, large), *_) = upscale([("model.norm.weight", norm)], config, LARGER["wider"])
    assert large.dtype == torch.float32
    assert large[:32].tolist() == pytest.approx([math.sqrt(32 / 48)] * 32, rel=1e-7)
    assert not large[32:].any()


def test_the_shapes_are_those_of_the_published_models():
    assert {name: shape.head_dim for name, shape in TEXT_SHAPES.items()} == {
        "0.5b": 64, "1.5b": 128, "3b": 128, "7b": 128, "32b": 128, "72b": 128,
    }  # fmt: skip
    billions = {
        # q, k, v and o, and the MLP; embeddings and vision are the small model's
        name: s.num_hidden_layers
        * s.hidden_size
        * (2 * s.hidden_size + 2 * s.num_key_value_heads * s.head_dim + 3 * s.intermediate_size)
        / 1e9
        for name, s in TEXT_SHAPES.items()
    }
    assert billions == pytest.approx(
        {"0.5b": 0.358, "1.5b": 1.31, "3b": 2.77, "7b": 6.53, "32b": 31.2, "72b": 70.2}, rel=0.01
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (TextShape(24, 2, 3, 1, 24), r"hidden_size=32: larger than the shape's; must be at most 24"),
        (TextShape(48, 1, 6, 2, 24), r"num_hidden_layers=2: larger than the shape's; must be at most 1"),
        (TextShape(48, 2, 6, 2, 23), r"intermediate_size=24: larger than the shape's; must be at most 23"),
        (TextShape(32, 2, 2, 2, 24), r"num_attention_heads=4: larger than the shape's; must be at most 2"),
        (TextShape(48, 2, 6, 1, 24), r"num_key_value_heads=2: larger than the shape's; must be at most 1"),
        (TextShape(48, 2, 6, 6, 24), r"num_attention_heads / num_key_value_heads=2: larger than .* at most 1"),
        (TextShape(72, 2, 6, 2, 24), r"head_dim=8 .* must divide the shape's head_dim=12"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_name(shape, message):
    config, architecture = qwen()
    with pytest.raises(LVSpecConfigError, match=message):
        hf_overrides(config, shape)
    with pytest.raises(ValueError, match=message):
        next(upscale(architecture(config).state_dict().items(), config, shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_type": "yarn"}, r"rope_type='yarn': must be 'default'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types=.*: all must be 'full_attention'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config: .* must not be set"),
        ({"model_type": "qwen3_vl_text"}, r"text_config.model_type='qwen3_vl_text': must be 'qwen2_5_vl_text'"),
    ],
)
def test_what_the_formulas_do_not_cover_is_refused_by_name(change, message):
    config, _ = qwen()
    for key, value in change.items():
        if key == "rope_type":
            config.text_config.rope_parameters[key] = value
        else:
            setattr(config.text_config, key, value)
    with pytest.raises(LVSpecConfigError, match=message):
        hf_overrides(config, SMALL)


def test_other_families_shapes_and_weights_are_refused_by_name(tmp_path):
    config, _ = qwen()
    with pytest.raises(LVSpecConfigError, match=r"model_type='qwen2': must be one of qwen2_5_vl, llava_onevision"):
        hf_overrides(Qwen2Config(**TEXT), SMALL)
    with pytest.raises(LVSpecConfigError, match=r"shape='8b': must be one of 0.5b, 1.5b, 3b, 7b, 32b, 72b"):
        upscaled(str(tmp_path), "8b")
    with pytest.raises(LVSpecConfigError, match=r"num_attention_heads=9: must be a multiple of num_key_value_heads=2"):
        TextShape(72, 2, 9, 2, 24)
    for name in ("model.layers.0.self_attn.q_norm.weight", "model.something.weight"):
        with pytest.raises(LVSpecConfigError, match=rf"'{name}': no weight of a Qwen2 text model"):
            next(upscale([(name, torch.ones(8))], config, SMALL))


def test_overrides_that_forget_a_factor_are_refused_by_name():
    config, _ = qwen()
    shape = LARGER["larger in all"]
    served = enlarged(config, shape)
    check_served(config, served)
    served.text_config.rms_norm_eps = config.text_config.rms_norm_eps
    with pytest.raises(LVSpecConfigError, match=r"text_config.rms_norm_eps=0.01 .* must be 0.0013"):
        check_served(config, served)
    served = enlarged(config, shape)
    served.text_config.rope_parameters["mrope_section"] = [1, 2, 1]
    with pytest.raises(LVSpecConfigError, match=r"rope_parameters=\{'mrope_section': \[1, 2, 1\]\} .* \[2, 4, 2\]"):
        check_served(config, served)
