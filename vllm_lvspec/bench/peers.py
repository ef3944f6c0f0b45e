"""Ways to decode that are compared: each is what vLLM's `speculative_config` would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from vllm_lvspec.config import METHOD, LVSpecConfig


@dataclass(frozen=True)
class DraftSettings:
    """Settings that peers share. `model` is the drafter; None leaves the choice to the plugin."""

    model: str | None = None
    num_speculative_tokens: int = 10
    pruning: str = "uniform"
    pruning_ratio: float = 0.9


def _ngram(settings: DraftSettings) -> dict[str, Any]:
    return {
        "method": "ngram",
        "num_speculative_tokens": settings.num_speculative_tokens,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }


def _lvspec(policy: str) -> Callable[[DraftSettings], dict[str, Any]]:
    def config(settings: DraftSettings) -> dict[str, Any]:
        chosen = {k: v for k, v in vars(settings).items() if v is not None}
        return {"method": METHOD, "policy": policy, **chosen}

    return config


# vLLM without speculation, vLLM's own n-gram drafter, and every policy of the verifier.
PEERS: dict[str, Callable[[DraftSettings], dict[str, Any] | None]] = {
    "ar": lambda settings: None,
    "ngram": _ngram,
    **{policy: _lvspec(policy) for policy in get_args(LVSpecConfig.model_fields["policy"].annotation)},
}
