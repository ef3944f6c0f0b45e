"""What a request may ask of the verifier: `lvspec_policy` and `lvspec_relaxation` in `vllm_xargs`.

The front end checks requests through vLLM's own hook: `validate_params` of the classes that `logits_processors` names.
The hook gets no configuration, so the name carries the settings: `checker_name` makes one, and this module's
`__getattr__` a class of it, in whatever process vLLM resolves it.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor

from vllm_lvspec.config import LVSpecConfig
from vllm_lvspec.verify.policies import POLICIES
from vllm_lvspec.verify.rules import RequestRules

PREFIX = "lvspec_"
POLICY, RELAXATION = PREFIX + "policy", PREFIX + "relaxation"
SALT = "_lvspec_cache_salt"  # from the scheduler to the workers
MAX_STOP_IDS = 64
_CLASS = "RequestChecker_"


class RequestError(ValueError):
    """Something that a request may not ask for, named with its value and with what would be right."""


def asked_for(params: SamplingParams) -> dict[str, Any]:
    """What the request says of lvspec."""
    return {key: value for key, value in (params.extra_args or {}).items() if str(key).startswith(PREFIX)}


def request_rules(params: SamplingParams, config: LVSpecConfig) -> RequestRules:
    """The rules of a request. Raises RequestError for what it may not ask for.

    Structured output is strict unless the request says otherwise, and so is whoever names very many stop tokens, which
    every step would have to look through.
    """
    asked = asked_for(params)
    policy: str | None = asked.get(POLICY)
    relaxation: Any = asked.get(RELAXATION)
    known = (POLICY, RELAXATION)
    for key in asked.keys() - set(known):
        raise RequestError(f"{key}={asked[key]!r}: unknown key; known keys are {', '.join(known)}")
    allowed = ("strict", config.policy) if config.policy != "strict" else ("strict",)
    if POLICY in asked and policy not in allowed:
        raise RequestError(f"{POLICY}={policy!r}: must be {' or '.join(allowed)} on this server")
    if RELAXATION in asked:
        number = not isinstance(relaxation, bool) and isinstance(relaxation, int | float)
        if not number or not 0 <= relaxation <= config.max_relaxation:
            raise RequestError(f"{RELAXATION}={relaxation!r}: must be a number from 0 to {config.max_relaxation:g}")
        if relaxation > 0 and not POLICIES[policy or config.policy].has_relaxation:
            raise RequestError(f"{RELAXATION}={relaxation!r}: must be 0 where the policy is {policy or config.policy}")
    if policy is None:
        policy = "strict" if not asked and params.structured_outputs is not None else config.policy
    if relaxation is None:
        relaxation = config.relaxation if POLICIES[policy].has_relaxation else None
    stop_ids = tuple(params.stop_token_ids or ())
    if relaxation == 0:
        policy = "strict"
    if len(stop_ids) > MAX_STOP_IDS:  # strict requests need not name them: vLLM cuts behind the first
        policy, relaxation, stop_ids = "strict", None, ()
    return RequestRules(
        policy=policy,
        relaxation=float(relaxation or 0.0),
        stop_ids=stop_ids,
        ends=not params.ignore_eos,
    )


def salt_of(params: SamplingParams) -> str | None:
    """What tells the request's prefixes from those of others."""
    return (params.extra_args or {}).get(SALT)


def end_ids(params: SamplingParams) -> frozenset[int]:
    """Tokens behind which the scheduler cuts a request's answer off."""
    ends = {params.eos_token_id, *(params.stop_token_ids or ())}  # no end of sequence under `ignore_eos`
    return frozenset(token for token in ends if token is not None)


class RequestChecker(LogitsProcessor):
    """Not a processor: what vLLM's front end asks before it admits a request."""

    config: LVSpecConfig

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        request_rules(sampling_params, cls.config)
        if (token_ids := sampling_params.logprob_token_ids) is not None:
            # vLLM 0.32 has none for drafted tokens, and dies of them where others ask for log probabilities.
            raise RequestError(
                f"logprob_token_ids={token_ids!r}: not supported under speculation, nor is generative scoring, "
                "which asks for them; must be unset (logprobs=N gives those of the N most likely tokens)"
            )


def checker_name(config: LVSpecConfig) -> str:
    """What `logits_processors` must name."""
    settings = config.model_dump_json(include={"policy", "relaxation", "max_relaxation"})
    return f"{__name__}:{_CLASS}{settings.encode().hex()}"


def __getattr__(name: str) -> type[RequestChecker]:
    if not name.startswith(_CLASS):
        raise AttributeError(name)
    settings = json.loads(bytes.fromhex(name.removeprefix(_CLASS)))
    return type(name, (RequestChecker,), {"config": LVSpecConfig(**settings)})


def make_tool_calls_strict() -> None:
    """Have requests with `tools` ask for the strict policy where they say nothing of lvspec.

    A request's tools don't reach sampling parameters; where these are made is the only place that sees both. Called
    where a server that uses lvspec makes its configuration, so before its first request.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for request in (ChatCompletionRequest, ResponsesRequest):
        made = request.to_sampling_params
        if not hasattr(made, "lvspec_wrapped"):
            request.to_sampling_params = _strict_with_tools(made)


def _strict_with_tools(to_sampling_params: Any) -> Any:
    @functools.wraps(to_sampling_params)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> SamplingParams:
        params = to_sampling_params(self, *args, **kwargs)
        if self.tools and self.tool_choice != "none" and not asked_for(params):
            params.extra_args = {**(params.extra_args or {}), POLICY: "strict"}
        return params

    vars(wrapper)["lvspec_wrapped"] = True
    return wrapper
