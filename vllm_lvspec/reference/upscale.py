"""A small checkpoint in the shape of a larger text model: the larger one's cost, the small one's outputs.

`LLM(**upscaled(path, "7b"))` serves the checkpoint at `path` with the layers, widths and heads of Qwen2.5-7B. What a
drafter saves can then be measured at the cost of a large target, with outputs that are worth reading, and without the
large target's weights. Every computation of the larger model is done, on zeros where the small model has nothing.

The larger model is the small one because (d, D: hidden size, small and large; h, H: size of a head)

- the hidden state is `[x, 0]`: what writes to it (embedding, `o_proj`, `down_proj`, projector) has zero rows beyond d;
- `rms_norm([x, 0])` divides by `sqrt(sum(x²)/D + eps')`. With `eps' = eps·d/D` this is `sqrt(d/D)` times the small
  model's divisor, and the norm's weight, times `sqrt(d/D)`, takes that back;
- a head that the small model does not have, or a channel of the MLP, meets zero columns in `o_proj` or `down_proj`;
- query head `s` of a group goes to slot `s` of the larger group of the same KV head, so it attends to the same keys;
- RoPE turns the pair `(i, i + h/2)` by `theta^(-2i/h)`. For `H = r·h` that is the frequency of the pair
  `(r·i, r·i + H/2)`, where the small model's dimensions go; sections of M-RoPE grow r-fold. `sqrt(H/h)` in the queries
  makes up for the scale `1/sqrt(H)` of their products;
- a layer beyond the small model's has zero weights, so it adds nothing to the hidden state;
- a token beyond the small model's vocabulary, where a larger one is asked for, has the weights of the one that stands
  for images, which no model says. The best token stays what it is; probabilities change by next to nothing.

In float32 the outputs differ by rounding alone; in bfloat16 the two factors above are themselves rounded, as all
weights are. The vision tower and its inputs stay the small model's. Zeros may be cheaper than other
numbers where the power that a device may draw, and not its memory or its arithmetic, limits it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from vllm_lvspec.config import LVSpecConfigError

LOAD_FORMAT = "lvspec_upscale"


@dataclass(frozen=True)
class TextShape:
    """The shape of a Qwen2 text model. Raises LVSpecConfigError where heads can't be shared out evenly.

    `vocab_size`: None for the small model's own.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for key, divisor in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
            value, by = getattr(self, key), getattr(self, divisor)
            if value % by:
                raise LVSpecConfigError(f"{key}={value}: must be a multiple of {divisor}={by}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_attention_heads // self.num_key_value_heads


TEXT_SHAPES = {
    "0.5b": TextShape(896, 24, 14, 2, 4864),
    "1.5b": TextShape(1536, 28, 12, 2, 8960),  # Qwen2-VL-2B's
    "3b": TextShape(2048, 36, 16, 2, 11008),
    "7b": TextShape(3584, 28, 28, 4, 18944),
    "32b": TextShape(5120, 64, 40, 8, 27648),
    "72b": TextShape(8192, 80, 64, 8, 29568),
}

# Per family: the type of its text model, and the key of its configuration that repeats the text model's width.
TEXT_MODELS = {"qwen2_5_vl": ("qwen2_5_vl_text", "out_hidden_size"), "llava_onevision": ("qwen2", None)}

# What the axes of every weight that reads or writes the text model's widths stand for, by the end of its name.
HIDDEN, INTERMEDIATE, QUERY, KEY, OTHER = "hidden", "intermediate", "query", "key", "other"
LAYER = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attn.q_proj.weight": (QUERY, HIDDEN),
    "self_attn.q_proj.bias": (QUERY,),
    "self_attn.k_proj.weight": (KEY, HIDDEN),
    "self_attn.k_proj.bias": (KEY,),
    "self_attn.v_proj.weight": (KEY, HIDDEN),
    "self_attn.v_proj.bias": (KEY,),
    "self_attn.o_proj.weight": (HIDDEN, QUERY),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
}
OUTSIDE_LAYERS = {
    "embed_tokens.weight": (OTHER, HIDDEN),
    "norm.weight": (HIDDEN,),
    "lm_head.weight": (OTHER, HIDDEN),
    "multi_modal_projector.linear_1.weight": (HIDDEN, OTHER),
    "multi_modal_projector.linear_1.bias": (HIDDEN,),
    "multi_modal_projector.linear_2.weight": (HIDDEN, HIDDEN),
    "multi_modal_projector.linear_2.bias": (HIDDEN,),
    "image_newline": (HIDDEN,),
}
OF_TOKENS = ("embed_tokens.weight", "lm_head.weight")
IN_TOWER = {"visual.merger.mlp.2.weight": (HIDDEN, OTHER), "visual.merger.mlp.2.bias": (HIDDEN,)}
TOWER_NAME = re.compile(r"(^|\.)(visual|vision_tower)\.")
LAYER_NAME = re.compile(r"^(.*\blayers\.)(\d+)\.(.+)$")


def upscaled(model: str, shape: str | TextShape, revision: str | None = None) -> dict[str, Any]:
    """Arguments of vLLM's engine that serve the checkpoint `model` in `shape` (a key of `TEXT_SHAPES`, or a shape).

    `LLM(**upscaled(path, "7b"), speculative_config="lvspec")`; on the command line
    `vllm serve PATH --load-format lvspec_upscale --hf-overrides JSON`, with `hf_overrides` of this as JSON. Only the
    checkpoint's configuration is read here; vLLM's workers make the weights while they load them, and nothing is
    written to disk.

    Raises LVSpecConfigError, which names key, value and what would be right, where `model` does not fit into `shape`.
    """
    if isinstance(shape, str):
        _require(shape in TEXT_SHAPES, f"shape={shape!r}: must be one of {', '.join(TEXT_SHAPES)}")
        shape = TEXT_SHAPES[shape]
    config = AutoConfig.from_pretrained(model, revision=revision)
    arguments = {"model": model, "load_format": LOAD_FORMAT, "hf_overrides": hf_overrides(config, shape)}
    return arguments if revision is None else {**arguments, "revision": revision}


def text_shape(config: PretrainedConfig) -> TextShape:
    """The shape of the text model of a vision-language model's `config`."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return TextShape(
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        intermediate_size=text.intermediate_size,
        vocab_size=text.vocab_size,
    )


def hf_overrides(config: PretrainedConfig, shape: TextShape) -> dict[str, dict[str, Any]]:
    """What `shape` changes in the small model's `config`, nested as there, in types that JSON has.

    Raises LVSpecConfigError where the model does not fit into `shape`.
    """
    small = _check_fits(config, shape)
    text = config.text_config
    changed: dict[str, Any] = {
        **{key: value for key, value in asdict(shape).items() if value is not None},
        "head_dim": shape.head_dim,
        "rms_norm_eps": text.rms_norm_eps * small.hidden_size / shape.hidden_size,
        "layer_types": ["full_attention"] * shape.num_hidden_layers,
    }
    if sections := text.rope_parameters.get("mrope_section"):
        ratio = shape.head_dim // small.head_dim
        changed["rope_parameters"] = {"mrope_section": [ratio * section for section in sections]}
    overrides = {"text_config": changed}
    if width_key := TEXT_MODELS[config.model_type][1]:
        overrides["vision_config"] = {width_key: shape.hidden_size}
    return overrides


def check_served(config: PretrainedConfig, served: PretrainedConfig) -> None:
    """Raise LVSpecConfigError where `served`, of the larger shape, is not what `hf_overrides` makes of `config`."""
    for part, keys in hf_overrides(config, text_shape(served)).items():
        for key, right in keys.items():
            value = getattr(getattr(served, part), key, None)
            if isinstance(right, dict):
                value = {name: (value or {}).get(name) for name in right}
            same = math.isclose(value, right) if isinstance(value, float) else value == right
            _require(
                same,
                f"hf_overrides: {part}.{key}={value!r} does not go with {part}.hidden_size and the heads of the "
                f"larger shape; must be {right!r} (take hf_overrides from vllm_lvspec.reference.upscale.upscaled)",
            )


def upscale(
    tensors: Iterable[tuple[str, torch.Tensor]], config: PretrainedConfig, shape: TextShape
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the larger model, one at a time, from those of the small one.

    `tensors`: all weights of the checkpoint, whole, with the names that they were saved under, in any order; `config`:
    the small model's. Layers beyond the small model's come last, as views of a single number, which take no memory.
    Weights that are scaled (norms, queries) come in float32, whatever they were saved in.

    Raises LVSpecConfigError where the model does not fit into `shape`, or where a weight of the text model is unknown.
    """
    small = _check_fits(config, shape)
    axes = _Axes(small, shape)
    layers: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        kind, names = _axes_of(name)
        if names is None:
            yield name, tensor
            continue
        large = axes.place(tensor, names)
        if kind.endswith("norm.weight"):
            large = large.float() * math.sqrt(small.hidden_size / shape.hidden_size)
        elif "q_proj" in kind:
            large = large.float() * math.sqrt(shape.head_dim / small.head_dim)
        elif kind in OF_TOKENS and shape.vocab_size is not None:
            image = large[getattr(config, "image_token_id", None) or config.image_token_index]
            large = torch.cat([large, image.expand(shape.vocab_size - len(large), -1)])
        if (match := LAYER_NAME.match(name)) and not int(match[2]):
            layers[match[1] + "{}." + kind] = tensor.new_tensor(float("norm" in kind)).expand(large.shape)
        yield name, large
    for i in range(small.num_hidden_layers, shape.num_hidden_layers):
        for name, constant in layers.items():
            yield name.format(i), constant


class _Axes:
    """Where the entries of the small model's axes lie on those of the larger one."""

    def __init__(self, small: TextShape, large: TextShape):
        ratio, half = large.head_dim // small.head_dim, small.head_dim // 2
        first = ratio * torch.arange(half)
        in_head = torch.cat([first, first + large.head_dim // 2])
        query_heads = torch.arange(small.num_attention_heads)
        group, slot = query_heads // small.group_size, query_heads % small.group_size
        starts = {KEY: torch.arange(small.num_key_value_heads), QUERY: group * large.group_size + slot}
        self.places = {key: (start[:, None] * large.head_dim + in_head).flatten() for key, start in starts.items()}
        self.places[HIDDEN] = torch.arange(small.hidden_size)
        self.places[INTERMEDIATE] = torch.arange(small.intermediate_size)
        self.sizes = {
            HIDDEN: large.hidden_size,
            INTERMEDIATE: large.intermediate_size,
            QUERY: large.num_attention_heads * large.head_dim,
            KEY: large.num_key_value_heads * large.head_dim,
        }

    def place(self, tensor: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        """`tensor` among zeros; `names`: what its axes stand for."""
        large = tensor.new_zeros([self.sizes.get(name, n) for name, n in zip(names, tensor.shape, strict=True)])
        places = [self.places.get(name, torch.arange(n)) for name, n in zip(names, tensor.shape, strict=True)]
        large[torch.meshgrid(*places, indexing="ij")] = tensor
        return large


def _axes_of(name: str) -> tuple[str, tuple[str, ...] | None]:
    """What kind of weight `name` is, and what its axes stand for; None for what stays as it is."""
    if TOWER_NAME.search(name):
        kind = "visual." + name.partition("visual.")[2]
        return kind, IN_TOWER.get(kind)
    match = LAYER_NAME.match(name)
    table = LAYER if match else OUTSIDE_LAYERS
    kinds = [match[3]] if match else [kind for kind in table if name == kind or name.endswith("." + kind)]
    if not kinds or kinds[0] not in table:
        raise LVSpecConfigError(f"{name!r}: no weight of a Qwen2 text model; such a checkpoint can't be upscaled")
    return kinds[0], table[kinds[0]]


def _check_fits(config: PretrainedConfig, shape: TextShape) -> TextShape:
    """The small model's shape. Raises LVSpecConfigError where it can't be upscaled to `shape`."""
    model_type = config.model_type
    _require(model_type in TEXT_MODELS, f"model_type={model_type!r}: must be one of {', '.join(TEXT_MODELS)}")
    text = config.text_config
    right = TEXT_MODELS[model_type][0]
    _require(text.model_type == right, f"text_config.model_type={text.model_type!r}: must be {right!r}")
    quantized = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    _require(not quantized, "quantization_config: a quantized checkpoint can't be upscaled; must not be set")
    rope_type = text.rope_parameters.get("rope_type", "default")
    _require(rope_type == "default", f"text_config.rope_parameters.rope_type={rope_type!r}: must be 'default'")
    kinds = set(text.layer_types)
    _require(kinds == {"full_attention"}, f"text_config.layer_types={sorted(kinds)}: all must be 'full_attention'")
    small = text_shape(config)
    for key in (*asdict(small), "group_size"):
        ours, most = getattr(small, key), getattr(shape, key)
        name = "num_attention_heads / num_key_value_heads" if key == "group_size" else key
        _require(most is None or ours <= most, f"{name}={ours}: larger than the shape's; must be at most {most}")
    _require(
        shape.head_dim % small.head_dim == 0,
        f"head_dim={small.head_dim} (hidden_size / num_attention_heads): must divide the shape's head_dim="
        f"{shape.head_dim}",
    )
    return small


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise LVSpecConfigError(message)
