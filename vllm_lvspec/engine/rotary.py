"""Rotary embeddings of a drafter whose positions have three dimensions.

Of text, and so of all that is drafted, the three are the same, and M-RoPE is what models of text have. vLLM has one
kernel for that, and takes four for M-RoPE, in every layer: a tenth or more of what a small drafter takes for a token.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding


class TextRotary(nn.Module):
    """`rotary`, or where positions have one dimension, `[num_tokens]` int64, the same in one kernel and in place."""

    def __init__(self, rotary: MRotaryEmbedding):
        super().__init__()
        self.rotary = rotary

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if positions.ndim > 1:
            return self.rotary(positions, query, key)
        cache = self.rotary._match_cos_sin_cache_dtype(query)
        ops.rotary_embedding(positions, query, key, self.rotary.head_size, cache, self.rotary.is_neox_style)
        return query, key


def give_text_rotary(model: nn.Module) -> bool:
    """Have all of the model's M-RoPE ready for text; whether it has M-RoPE, and no other than vLLM's own.

    The layers of models that are alike share one embedding, the target's among them, so that it must stay as it is.
    """
    found = [m for m in model.modules() if isinstance(getattr(m, "rotary_emb", None), MRotaryEmbedding)]
    if not found or any(type(m.rotary_emb) is not MRotaryEmbedding for m in found):
        return False
    for module in found:
        module.rotary_emb = TextRotary(module.rotary_emb)
    return True
