"""Every setting of `--speculative-config lvspec`, its range and its meaning."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_lvspec.draft.pruning import STRATEGIES
from vllm_lvspec.kernels.relevance import MAX_TOP_N
from vllm_lvspec.verify.guards import KINDS, WORDS
from vllm_lvspec.verify.policies import POLICIES
from vllm_lvspec.verify.sources import AnchorSource

METHOD: Literal["lvspec"] = "lvspec"
SELF = "self"  # the target as its own drafter
AUTO = "auto"
MAX_TRACES = 256
MAX_SPECULATIVE_TOKENS = 128  # vLLM's rejection sampler takes no longer chains


_Share = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]
_Cosine = Annotated[float, Field(ge=-1, le=1, strict=True, allow_inf_nan=False)]


class LVSpecConfigError(ValueError):
    """A setting that can't work, named with its value and with what would be right."""


class LVSpecConfig(BaseModel):
    """Settings of the drafter and the verifier (`{"method": "lvspec", ...}`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["lvspec"] = Field(METHOD, description="the speculative method")
    model: str | None = Field(
        None,
        min_length=1,
        description="the drafter: a folder, a name of the hub, or self: the target's own weights on the pruned video; "
        "by default the known partner of the target, else self",
    )
    num_speculative_tokens: int = Field(
        10, ge=1, le=MAX_SPECULATIVE_TOKENS, strict=True, description="K, the most tokens drafted per step"
    )
    draft_length: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="whether K tokens are drafted, or as many of them as pay, by what was measured at the start and "
        "how drafts have fared",
    )
    only_if_faster: bool = Field(
        True,
        strict=True,
        description="whether steps and requests for which drafting would not pay, because many others run or the "
        "answer is short, go without",
    )
    policy: Literal["strict", "fly", "lvspec", "random"] = Field(
        "lvspec",
        description="how drafts are verified: strict emits what the target alone would emit; lvspec is strict on what "
        "the video decides and loose on the rest; fly (arXiv 2511.22972) and random are there to compare with",
    )
    relaxation: _Share = Field(0.9, description="lambda, the share of drafted tokens that are fillers")
    max_relaxation: _Share = Field(1.0, description="the largest relaxation that a request may ask for")
    anchor_source: str = Field("hidden", description="whose states are compared with those of the video")
    anchor_top_n: int = Field(
        10, ge=1, le=MAX_TOP_N, strict=True, description="N, the number of largest cosines whose mean is the relevance"
    )
    anchor_threshold: _Cosine | None = Field(
        None,
        description="a relevance from which a token is an anchor whatever its rank; with relaxation=1 it alone decides",
    )
    anchor_projection: int | None = Field(
        None, ge=8, strict=True, description="width to which states are projected before they are stored and compared"
    )
    probability_floor: _Share = Field(
        0.5,
        description="least probability of a loosely accepted token, as a share of that of the target's best",
    )
    shift_window: int = Field(
        2, ge=0, le=MAX_SPECULATIVE_TOKENS, strict=True, description="how far an anchor may have shifted; 0: not at all"
    )
    shift_direction: Literal["both", "back"] = Field(
        "both", description="whether a shift may rest on a later choice of the target or on earlier ones only"
    )
    guards: tuple[str, ...] = Field(
        ("negation", "order"), description="kinds of words that are never accepted loosely: negation, number, order"
    )
    guard_languages: tuple[str, ...] = Field(("en",), description="languages whose lists of such words are used")
    guard_words: dict[str, tuple[str, ...]] = Field({}, description="more such words, by kind")
    fly_window: int = Field(6, ge=0, le=MAX_SPECULATIVE_TOKENS, strict=True, description="W of the policy fly")
    fly_entropy: float = Field(
        0.3, ge=0, strict=True, allow_inf_nan=False, description="the entropy (nats) that policy fly asks for"
    )
    pruning: str = Field("uniform", description="which tokens of a video the drafter sees")
    pruning_ratio: float = Field(
        0.9, ge=0, lt=1, allow_inf_nan=False, description="share of a video's tokens that the drafter does not see"
    )
    self_cache: Literal["copy", "compute"] = Field(
        "copy",
        description="where the drafter self has keys and values of what it sees from: the target's pages, or a forward "
        "of its own",
    )
    draft_quantization: str | None = Field(
        AUTO,
        min_length=1,
        description="how the weights of the drafter's language model are quantised, a name that vLLM's --quantization "
        "takes, such as fp8 or mxfp4; none: as the drafter's checkpoint says; auto: mxfp4 on Hopper GPUs where the "
        "drafter runs in bfloat16, otherwise as none",
    )
    draft_hf_overrides: dict[str, Any] = Field(
        {}, description="what is changed in the drafter's configuration, as vLLM's --hf-overrides changes the target's"
    )
    draft_tensor_parallel_size: int | None = Field(
        None,
        ge=1,
        strict=True,
        description="how many ranks share the drafter: 1, so that each has the whole of it, or all of the target's; by "
        "default all where they can",
    )
    draft_cache_gib: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="size of the drafter's KV cache per rank in GiB; by default room for all requests, at most 4 "
        "and a tenth of the memory",
    )
    embedding_cache_gib: float = Field(
        0.5,
        gt=0,
        allow_inf_nan=False,
        description="bound of the drafter's cache of visual embeddings per rank in GiB",
    )
    trace: int = Field(
        0,
        ge=0,
        le=MAX_TRACES,
        strict=True,
        description="how many finished requests are kept token by token, with why each was emitted, for whoever may "
        "ask the server; 0: none",
    )

    @field_validator("draft_quantization")
    @classmethod
    def _is_in_lower_case(cls, value: str | None) -> str | None:
        name = (value or "none").lower()  # as vLLM reads them
        return None if name == "none" else name

    @field_validator("pruning")
    @classmethod
    def _is_known_strategy(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(f"must be one of {', '.join(sorted(STRATEGIES))}")
        return value

    @field_validator("anchor_source")
    @classmethod
    def _is_source(cls, value: str) -> str:
        AnchorSource.parse(value)
        return value

    @field_validator("guards", "guard_languages", mode="before")
    @classmethod
    def _is_list(cls, value: Any) -> Any:
        """A list, or its members joined by `+`, as shells like it better."""
        return tuple(part for part in value.split("+") if part) if isinstance(value, str) else value

    @field_validator("guards")
    @classmethod
    def _are_kinds(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _known(value, KINDS)

    @field_validator("guard_languages")
    @classmethod
    def _are_languages(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _known(value, WORDS)

    @field_validator("guard_words")
    @classmethod
    def _are_words_of_kinds(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        _known(tuple(value), KINDS)
        if any(not word.strip() for words in value.values() for word in words):
            raise ValueError("must be words, none of them blank")
        return value

    @model_validator(mode="before")
    @classmethod
    def _has_a_default_below_the_cap(cls, data: Any) -> Any:
        cap = data.get("max_relaxation") if isinstance(data, dict) else None
        if isinstance(cap, int | float) and not isinstance(cap, bool) and "relaxation" not in data:
            data = {**data, "relaxation": min(cls.model_fields["relaxation"].default, max(cap, 0))}
        return data

    @model_validator(mode="after")
    def _keeps_its_own_cap(self) -> LVSpecConfig:
        if self.relaxation > self.max_relaxation:
            raise ValueError(f"relaxation={self.relaxation}: must be at most max_relaxation={self.max_relaxation}")
        return self

    @property
    def is_lossy(self) -> bool:
        """Whether requests that ask for nothing may get other tokens than the target's."""
        return POLICIES[self.policy].is_loose(self.relaxation)

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


def _known(values: tuple[str, ...], known: Iterable[str]) -> tuple[str, ...]:
    if set(values) - set(known):
        raise ValueError(f"must be of {', '.join(known)}")
    return values


def names_lvspec(value: object) -> bool:
    """Whether a `speculative_config`, as users write it, asks for this method."""
    if isinstance(value, str):
        return value == METHOD or value.startswith(METHOD + ":")
    return isinstance(value, dict) and value.get("method") == METHOD


def _explain(error: Any) -> str:
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = ", ".join(LVSpecConfig.model_fields)
        return f"{key}={error['input']!r}: unknown key; known keys are {known}"
    field = LVSpecConfig.model_fields.get(str(error["loc"][0]))
    meaning = f" ({field.description})" if field is not None else ""
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should be", "must be")
    return f"{key}={json.dumps(error['input'], default=repr)}: {message}{meaning}"
