"""Every setting of `--speculative-config lvspec`, its range and its meaning."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_lvspec.draft.pruning import STRATEGIES

METHOD: Literal["lvspec"] = "lvspec"
MAX_SPECULATIVE_TOKENS = 128  # vLLM's rejection sampler takes no longer chains


class LVSpecConfigError(ValueError):
    """A setting that can't work, named with its value and with what would be right."""


class LVSpecConfig(BaseModel):
    """Settings of the drafter and the verifier (`{"method": "lvspec", ...}`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["lvspec"] = Field(METHOD, description="the speculative method")
    model: str | None = Field(
        None,
        min_length=1,
        description="the drafter: a folder or a name of the hub; by default the known partner of the target",
    )
    num_speculative_tokens: int = Field(
        10, ge=1, le=MAX_SPECULATIVE_TOKENS, strict=True, description="K, the tokens drafted per step"
    )
    policy: Literal["strict"] = Field(
        "strict", description='how drafts are verified: "strict" emits what the target alone would emit'
    )
    pruning: str = Field("uniform", description="which tokens of a video the drafter sees")
    pruning_ratio: float = Field(
        0.9, ge=0, lt=1, allow_inf_nan=False, description="share of a video's tokens that the drafter does not see"
    )
    draft_cache_gib: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="size of the drafter's KV cache per rank in GiB; by default room for all requests, at most 4",
    )
    embedding_cache_gib: float = Field(
        0.5,
        gt=0,
        allow_inf_nan=False,
        description="bound of the drafter's cache of visual embeddings per rank in GiB",
    )

    @field_validator("pruning")
    @classmethod
    def _is_known_strategy(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(f"must be one of {', '.join(sorted(STRATEGIES))}")
        return value

    @classmethod
    def parse(cls, value: str | dict[str, Any]) -> LVSpecConfig:
        """Read the word `lvspec`, `lvspec:PATH`, or a dictionary with `"method": "lvspec"`.

        Raises LVSpecConfigError, which names every wrong key with its value and range.
        """
        if isinstance(value, str):
            _, colon, path = value.partition(":")
            if colon and not path:
                raise LVSpecConfigError(f"{value!r}: no drafter after the colon; write lvspec or lvspec:PATH")
            value = {"method": METHOD, "model": path} if path else {"method": METHOD}
        settings = {str(key).replace("-", "_"): setting for key, setting in value.items()}
        try:
            return cls(**settings)
        except ValidationError as error:
            raise LVSpecConfigError("; ".join(_explain(e) for e in error.errors())) from None


def names_lvspec(value: object) -> bool:
    """Whether a `speculative_config`, as users write it, asks for this method."""
    if isinstance(value, str):
        return value == METHOD or value.startswith(METHOD + ":")
    return isinstance(value, dict) and value.get("method") == METHOD


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "speculative_config"
    if error["type"] == "extra_forbidden":
        known = ", ".join(LVSpecConfig.model_fields)
        return f"{key}={error['input']!r}: unknown key; known keys are {known}"
    field = LVSpecConfig.model_fields.get(key)
    meaning = f" ({field.description})" if field is not None else ""
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should be", "must be")
    return f"{key}={json.dumps(error['input'], default=repr)}: {message}{meaning}"
