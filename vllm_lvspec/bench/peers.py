"""Ways to decode that are compared: each is what vLLM's `speculative_config` would be.

A peer is a name, or a name with settings of its own: `lvspec:relaxation=0.5:guards=negation+order`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

from vllm_lvspec.config import METHOD, LVSpecConfig


class PeerError(ValueError):
    """A peer that can't be, named with what would be right."""


@dataclass(frozen=True)
class DraftSettings:
    """Settings that peers share. `model` is the drafter; None leaves the choice to the plugin.

    `more`: further settings of this package's policies, as `LVSpecConfig` has them.
    """

    model: str | None = None
    num_speculative_tokens: int = 10
    pruning: str = "uniform"
    pruning_ratio: float = 0.9
    more: dict[str, Any] = field(default_factory=dict)


def _ngram(settings: DraftSettings) -> dict[str, Any]:
    return {
        "method": "ngram",
        "num_speculative_tokens": settings.num_speculative_tokens,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }


def _lvspec(policy: str) -> Callable[[DraftSettings], dict[str, Any]]:
    def config(settings: DraftSettings) -> dict[str, Any]:
        shared = {k: v for k, v in vars(settings).items() if v is not None and k != "more"}
        # Ways to draft and to verify are compared; to leave off what does not pay is one more.
        return {"method": METHOD, "policy": policy, "only_if_faster": False, **shared, **settings.more}

    return config


# vLLM without speculation, vLLM's own n-gram drafter, and every policy of the verifier.
PEERS: dict[str, Callable[[DraftSettings], dict[str, Any] | None]] = {
    "ar": lambda settings: None,
    "ngram": _ngram,
    **{policy: _lvspec(policy) for policy in get_args(LVSpecConfig.model_fields["policy"].annotation)},
}


def speculative_config(peer: str, settings: DraftSettings) -> dict[str, Any] | None:
    """What vLLM is given for `peer`; None for vLLM without speculation.

    Raises PeerError for an unknown name or a part that is no `key=value`, and LVSpecConfigError for a setting of a
    policy that can't work.
    """
    name, *parts = peer.split(":")
    if name not in PEERS:
        raise PeerError(f"policies={name!r}: must be of {', '.join(PEERS)}")
    config = PEERS[name](settings)
    if parts and config is None:
        raise PeerError(f"policies={peer!r}: {name} has no settings; must be {name} alone")
    before = ""
    for text in parts:
        key, equals, value = text.partition("=")
        assert config is not None
        if not equals and before == "anchor_source":  # sources have colons of their own
            config[before] += f":{text}"
            continue
        if not equals or not key:
            raise PeerError(f"policies={peer!r}: {text!r} must be key=value")
        config[key] = setting(value)
        before = key
    if config is not None and config["method"] == METHOD:
        LVSpecConfig.parse(config)
    return config


def setting(text: str) -> Any:
    """A value as it is typed: JSON, or else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
