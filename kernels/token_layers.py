"""A token of one request through a decoder's layers in four bits, in five kernels each and one before the first.

A product brings along what it is added to with the norm behind it, or its gate, and attention is one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import _package  # noqa: F401
from .decode_attention import Heads, Rows, decode_attention_reference, launch_decode_attention
from .mxfp4_matvec import (
    TILE,
    How,
    Matrix,
    launch_mxfp4_add_norm,
    launch_mxfp4_matvec,
    launch_mxfp4_swiglu,
    launch_shrink,
    mxfp4_matvec_reference,
)
from .shared import Norm, Shrunk, Workspace

_NUM_LOOPS = (1, 2, 4)  # of products, that are tried


@dataclass(frozen=True)
class Layer:
    """A decoder layer's weights, and its keys' and values' cache `[num_pages, num_keys, page_size, 2 size]`."""

    attention_norm: Norm
    qkv: Matrix
    heads: Heads
    cos_sin: torch.Tensor
    cache: torch.Tensor
    output: Matrix
    mlp_norm: Norm
    gate_up: Matrix
    down: Matrix


class TokenLayers:
    """Layers, and how their kernels are launched.

    `num_loops`: how often programs of a product loop, by its name in a layer. `overlaps`: whether kernels start while
    those before still run (sm_90 and later).
    """

    def __init__(self, layers: Sequence[Layer], workspace: Workspace):
        self.layers = list(layers)
        self.workspace = workspace
        self.num_loops = dict.fromkeys(("qkv", "output", "gate_up", "down"), 1)
        self.overlaps = False

    def through(self, stream: torch.Tensor, rows: Rows) -> torch.Tensor:
        """What the last layer gives."""
        normed: Shrunk | None = launch_shrink(stream, self.layers[0].attention_norm)
        for layer, following in zip(self.layers, [*self.layers[1:], None], strict=True):
            assert normed is not None
            norm = None if following is None else following.attention_norm
            stream, normed = self._layer(layer, stream, normed, rows, norm)
        return stream

    def layer(self, layer: Layer, stream: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The sum of what was before a layer and what it adds."""
        return self._layer(layer, stream, launch_shrink(stream, layer.attention_norm), rows, None)[0]

    def _layer(
        self, layer: Layer, stream: torch.Tensor, normed: Shrunk, rows: Rows, following: Norm | None
    ) -> tuple[torch.Tensor, Shrunk | None]:
        """The sum of what was before a layer and what it adds, and the norm of it that is `following`."""
        qkv = launch_mxfp4_matvec(normed, layer.qkv, self.workspace, self._how("qkv"))
        attended = launch_decode_attention(
            qkv, layer.heads, layer.cos_sin, layer.cache, rows, self.workspace, overlaps=self.overlaps
        )
        stream, normed = self._add("output", attended, layer, stream, layer.mlp_norm)
        activated = launch_mxfp4_swiglu(normed, layer.gate_up, self.workspace, self._how("gate_up"))
        if following is not None:
            return self._add("down", activated, layer, stream, following)
        how = self._how("down")
        return launch_mxfp4_matvec(activated, layer.down, self.workspace, how, added=stream), None

    def _add(self, name: str, x: Shrunk, layer: Layer, stream: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, Shrunk]:
        matrix = getattr(layer, name)
        return launch_mxfp4_add_norm(x, matrix, self.workspace, self._how(name), added=stream, norm=norm)

    def _how(self, name: str) -> How:
        return How(self.num_loops[name], self.overlaps)

    def tune(self, seconds: Callable[[Callable[[], Any]], float]) -> None:
        """Choose how often programs of a product loop by `seconds`, what the kernels that a function launches take:
        over all layers' matrices, which no cache holds. To be called before CUDA graphs are recorded."""
        for name in self.num_loops:
            # Nothing may lie between them: else those that overlap would have nothing to overlap with.
            products = [self._product(name, layer) for layer in self.layers]

            def run(products: list[Callable[[], Any]] = products) -> None:
                for product in products:
                    product()

            taken = {}
            for self.num_loops[name] in _NUM_LOOPS:
                taken[self.num_loops[name]] = seconds(run)
            self.num_loops[name] = min(taken, key=taken.__getitem__)

    def _product(self, name: str, layer: Layer) -> Callable[[], Any]:
        """What launches it, of ones."""
        matrix = getattr(layer, name)
        height, width = matrix.shape
        device = layer.cache.device
        ones = torch.ones((1, height), dtype=torch.float16, device=device)
        if name in ("output", "down"):
            stream = torch.ones((1, width), dtype=torch.bfloat16, device=device)
            return lambda: self._add(name, Shrunk(ones), layer, stream, layer.mlp_norm)
        normed = Shrunk(ones, torch.ones(height // TILE, device=device), layer.mlp_norm.eps)
        launch = launch_mxfp4_swiglu if name == "gate_up" else launch_mxfp4_matvec
        return lambda: launch(normed, matrix, self.workspace, self._how(name))


def token_layers_reference(layers: Sequence[Layer], stream: torch.Tensor, rows: Rows) -> torch.Tensor:
    """`TokenLayers.through` in PyTorch."""

    def normed(norm: Norm) -> torch.Tensor:
        weight = norm.weight.float()
        return torch.nn.functional.rms_norm(stream.float(), (len(weight),), weight, norm.eps).to(stream.dtype)

    for layer in layers:
        qkv = mxfp4_matvec_reference(normed(layer.attention_norm), layer.qkv)
        attended = decode_attention_reference(qkv, layer.heads, layer.cos_sin, layer.cache, rows)
        stream = mxfp4_matvec_reference(attended, layer.output, added=stream)
        activated = mxfp4_matvec_reference(normed(layer.mlp_norm), layer.gate_up, is_gated=True)
        stream = mxfp4_matvec_reference(activated, layer.down, added=stream)
    return stream
