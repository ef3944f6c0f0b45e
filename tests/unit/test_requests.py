"""What requests may ask of the verifier, through vLLM's own check."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.sample.logits_processor import LogitsProcessor, validate_logits_processors_parameters

import vllm_lvspec
from vllm_lvspec.config import LVSpecConfig
from vllm_lvspec.engine.requests import RequestError, checker_name, make_tool_calls_strict, request_rules
from vllm_lvspec.engine.verification import Verification
from vllm_lvspec.plugin import register
from vllm_lvspec.verify.rules import RequestRules

LVSPEC, STRICT = LVSpecConfig(relaxation=0.6), LVSpecConfig(policy="strict")
FLY, RANDOM = LVSpecConfig(policy="fly"), LVSpecConfig(policy="random", relaxation=0.6)
TOOL = {"type": "function", "function": {"name": "seek", "parameters": {"type": "object", "properties": {}}}}


def asking(policy=None, relaxation=None, **params):
    asked = {"lvspec_policy": policy, "lvspec_relaxation": relaxation}
    return SamplingParams(extra_args={key: x for key, x in asked.items() if x is not None} or None, **params)


@pytest.mark.parametrize(
    ("config", "rules"),
    [
        (LVSPEC, RequestRules("lvspec", 0.6)),
        (RANDOM, RequestRules("random", 0.6)),
        (STRICT, RequestRules("strict", 0.0)),
    ],
)
def test_requests_that_ask_for_nothing_get_the_servers_policy(config, rules):
    assert request_rules(asking(), config) == rules
    others = SamplingParams(extra_args={"top_secret": 1, "kv_transfer_params": {}})
    assert request_rules(others, config) == rules
    assert request_rules(SamplingParams(extra_args={}), config) == rules


@pytest.mark.parametrize("config", [LVSPEC, FLY, RANDOM, STRICT])
@pytest.mark.parametrize("policy", ["strict", "lvspec", "fly", "random"])
def test_a_request_may_ask_for_the_servers_policy_or_for_strict(config, policy):
    if policy in ("strict", config.policy):
        rules = request_rules(asking(policy), config)
        assert rules.policy == policy
        assert rules.is_strict == (policy == "strict")
        assert policy != "strict" or rules.relaxation == 0
    else:
        with pytest.raises(RequestError, match=rf"lvspec_policy='{policy}': must be .*on this server"):
            request_rules(asking(policy), config)


@pytest.mark.parametrize("policy", ["", "Strict", "loose", 1, 0.5, True, ["strict"], {"strict": 1}])
def test_what_is_no_policy_is_refused_with_its_value(policy):
    with pytest.raises(RequestError) as caught:
        request_rules(asking(policy), LVSPEC)
    assert f"lvspec_policy={policy!r}" in str(caught.value)
    assert "strict or lvspec" in str(caught.value)


@pytest.mark.parametrize("config", [LVSPEC, RANDOM])
@pytest.mark.parametrize("relaxation", [0, 0.0, 0.3, 1, 1.0])
def test_a_request_may_be_stricter_or_looser_than_the_server(config, relaxation):
    for policy in (None, config.policy):
        rules = request_rules(asking(policy, relaxation), config)
        assert rules == RequestRules(config.policy if relaxation else "strict", float(relaxation))
        assert isinstance(rules.relaxation, float)


@pytest.mark.parametrize(
    "relaxation", [-0.1, 1.01, 2, math.nan, math.inf, -math.inf, 10**18, "0.5", "", True, False, [0.5], {"a": 0.5}]
)
def test_what_is_no_share_is_refused_with_its_value_and_the_range(relaxation):
    with pytest.raises(RequestError) as caught:
        request_rules(asking(None, relaxation), LVSPEC)
    assert f"lvspec_relaxation={relaxation!r}" in str(caught.value)
    assert "from 0 to 1" in str(caught.value)


def test_an_operator_caps_what_requests_may_ask_for():
    capped = LVSpecConfig(relaxation=0.4, max_relaxation=0.5)
    assert request_rules(asking(None, 0.5), capped).relaxation == 0.5
    with pytest.raises(RequestError, match=r"lvspec_relaxation=0.6: must be a number from 0 to 0.5"):
        request_rules(asking(None, 0.6), capped)
    fixed = LVSpecConfig(relaxation=0.0, max_relaxation=0.0)
    with pytest.raises(RequestError, match=r"lvspec_relaxation=0.1"):
        request_rules(asking(None, 0.1), fixed)


@pytest.mark.parametrize(("config", "policy"), [(STRICT, None), (STRICT, "strict"), (LVSPEC, "strict")])
def test_a_strict_request_has_no_relaxation(config, policy):
    assert request_rules(asking(policy, 0), config) == RequestRules("strict", 0.0)
    with pytest.raises(RequestError, match=r"lvspec_relaxation=0.5.*strict"):
        request_rules(asking(policy, 0.5), config)


@pytest.mark.parametrize("policy", [None, "fly"])
def test_a_relaxation_of_0_is_strict_or_refused_where_the_server_has_no_relaxation(policy):
    try:
        rules = request_rules(asking(policy, 0), FLY)
    except RequestError:
        return
    assert rules.is_strict


@pytest.mark.parametrize("key", ["lvspec_polcy", "lvspec_", "lvspec_relaxation ", "lvspec_guards"])
def test_unknown_keys_of_ours_are_refused_and_the_known_ones_named(key):
    with pytest.raises(RequestError) as caught:
        request_rules(SamplingParams(extra_args={key: 1}), LVSPEC)
    for word in (f"{key}=1", "unknown key", "lvspec_policy", "lvspec_relaxation"):
        assert word in str(caught.value)


@pytest.mark.parametrize("config", [LVSPEC, FLY, RANDOM])
def test_structured_output_is_strict_unless_the_request_asks_otherwise(config):
    structured = StructuredOutputsParams(json={"type": "object"})
    assert request_rules(asking(structured_outputs=structured), config) == RequestRules("strict", 0.0)
    assert request_rules(asking(config.policy, structured_outputs=structured), config).policy == config.policy
    other = SamplingParams(extra_args={"else": 1}, structured_outputs=structured)
    assert request_rules(other, config).is_strict


def test_stops_and_ignored_ends_go_into_the_rules():
    rules = request_rules(asking(stop_token_ids=[5, 9], ignore_eos=True), LVSPEC)
    assert (set(rules.stop_ids), rules.ends) == ({5, 9}, False)
    strict = rules.as_strict()
    assert (strict.policy, strict.relaxation, set(strict.stop_ids), strict.ends) == ("strict", 0.0, {5, 9}, False)
    assert (request_rules(asking(), LVSPEC).stop_ids, request_rules(asking(), LVSPEC).ends) == ((), True)


# vLLM's check


def check(config, params):
    validate_logits_processors_parameters([checker_name(config)], params)


def test_vllm_finds_the_checker_by_its_name_and_refuses_bad_requests_as_the_clients_fault():
    for params in (asking("fly"), asking(None, 3), asking(None, "x"), SamplingParams(extra_args={"lvspec_x": 1})):
        with pytest.raises(VLLMValidationError, match="lvspec_"):
            check(LVSPEC, params)
    for params in (asking(), asking("strict"), asking("lvspec", 0.3), SamplingParams(extra_args={"x": 1})):
        check(LVSPEC, params)


@pytest.mark.parametrize("config", [LVSPEC, STRICT])
def test_log_probabilities_of_tokens_that_are_named_are_refused_and_those_of_the_likeliest_are_not(config):
    with pytest.raises(VLLMValidationError, match=r"logprob_token_ids=\[5, 9\]: not supported.*must be unset"):
        check(config, SamplingParams(logprob_token_ids=[5, 9]))
    check(config, SamplingParams(logprobs=2))


def test_every_server_has_a_checker_of_its_own():
    check(FLY, asking("fly"))
    check(LVSpecConfig(max_relaxation=0.9), asking(None, 0.85))
    with pytest.raises(VLLMValidationError, match=r"from 0 to 0\.82"):
        check(LVSpecConfig(max_relaxation=0.82), asking(None, 0.85))
    for refusing in (STRICT, LVSPEC, RANDOM):
        with pytest.raises(VLLMValidationError, match="lvspec_policy='fly'"):
            check(refusing, asking("fly"))


def test_a_checkers_name_is_one_that_vllm_takes():
    module, colon, name = checker_name(LVSpecConfig(model="a:b.c/d", guard_words={"number": ("é:.",)})).partition(":")
    assert module == "vllm_lvspec.engine.requests" and colon and name.isidentifier()
    imported = __import__(module, fromlist=[name])
    assert issubclass(getattr(imported, name), LogitsProcessor)
    assert checker_name(LVSPEC) == checker_name(LVSpecConfig(relaxation=0.6))
    with pytest.raises(AttributeError):
        imported.NoSuchThing  # noqa: B018


# Tools


def untouched(method):
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return method


@pytest.fixture
def unwrapped(monkeypatch):
    """vLLM's own requests, and again so after the test."""
    for request in (ChatCompletionRequest, ResponsesRequest):
        monkeypatch.setattr(request, "to_sampling_params", untouched(request.to_sampling_params))


@pytest.fixture
def wrapped(unwrapped):
    make_tool_calls_strict()


def chat(**fields):
    return ChatCompletionRequest(messages=[{"role": "user", "content": "What happens?"}], model="m", **fields)


def rules_of(request):
    return request_rules(request.to_sampling_params(16, {}), LVSPEC)


@pytest.mark.usefixtures("wrapped")
def test_chats_with_tools_are_strict_unless_they_say_otherwise():
    assert rules_of(chat()) == RequestRules("lvspec", 0.6)
    assert rules_of(chat(tools=[TOOL])).is_strict
    assert rules_of(chat(tools=[TOOL], tool_choice="auto")).is_strict
    assert rules_of(chat(tools=[TOOL], vllm_xargs={"else": 1})).is_strict
    assert rules_of(chat(tools=[TOOL], tool_choice="none")) == RequestRules("lvspec", 0.6)
    assert rules_of(chat(tools=[TOOL], vllm_xargs={"lvspec_policy": "lvspec"})) == RequestRules("lvspec", 0.6)
    assert rules_of(chat(tools=[TOOL], vllm_xargs={"lvspec_relaxation": 0.3})) == RequestRules("lvspec", 0.3)


@pytest.mark.usefixtures("wrapped")
def test_chats_with_a_response_format_are_strict_unless_they_say_otherwise():
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    for form in ({"type": "json_object"}, schema):
        assert rules_of(chat(response_format=form)).is_strict
        assert not rules_of(chat(response_format=form, vllm_xargs={"lvspec_policy": "lvspec"})).is_strict
    assert not rules_of(chat(response_format={"type": "text"})).is_strict


@pytest.mark.usefixtures("wrapped")
def test_responses_with_tools_are_strict_unless_they_say_otherwise():
    tool = {"type": "function", "name": "seek", "parameters": {"type": "object", "properties": {}}, "strict": False}
    assert rules_of(ResponsesRequest(input="What happens?", tools=[tool])).is_strict
    assert not rules_of(ResponsesRequest(input="What happens?")).is_strict
    asked = {"lvspec_policy": "lvspec"}
    assert not rules_of(ResponsesRequest(input="What happens?", tools=[tool], vllm_xargs=asked)).is_strict


@pytest.mark.usefixtures("wrapped")
def test_what_the_client_sent_is_not_changed():
    sent = {"else": 1}
    request = chat(tools=[TOOL], vllm_xargs=sent)
    for _ in range(2):
        assert rules_of(request).is_strict
    assert request.vllm_xargs == sent == {"else": 1}


@pytest.mark.usefixtures("unwrapped")
def test_requests_are_taught_once_and_keep_their_other_parameters():
    request = chat(tools=[TOOL], temperature=0.5, stop_token_ids=[3])
    before = request.to_sampling_params(16, {})
    make_tool_calls_strict()
    taught = ChatCompletionRequest.to_sampling_params
    make_tool_calls_strict()
    assert ChatCompletionRequest.to_sampling_params is taught
    after = request.to_sampling_params(16, {})
    assert (after.temperature, after.stop_token_ids, after.max_tokens) == (0.5, [3], 16)
    assert (before.extra_args, after.extra_args) == (None, {"lvspec_policy": "strict"})


@pytest.mark.usefixtures("unwrapped")
def test_the_first_request_of_a_server_is_strict_too_where_it_has_tools():
    # A request's parameters are made before they are checked, so nothing may wait for the first check.
    register()
    target = Path(vllm_lvspec.__file__).parent / "reference/checkpoints/qwen2_5_vl/target"
    EngineArgs(model=str(target), speculative_config="lvspec").create_engine_config()
    assert rules_of(chat(tools=[TOOL])).is_strict


def test_very_many_stop_tokens_make_a_request_strict():
    few = request_rules(SamplingParams(stop_token_ids=list(range(64))), LVSPEC)
    many = request_rules(SamplingParams(stop_token_ids=list(range(65))), LVSPEC)
    assert few.policy == "lvspec" and len(few.stop_ids) == 64
    assert many == RequestRules()


@pytest.mark.parametrize("key", ["lvspec_policy", "lvspec_relaxation"])
def test_nothing_is_no_answer_to_how_to_verify(key):
    with pytest.raises(RequestError, match=f"{key}=None: must be"):
        request_rules(SamplingParams(extra_args={key: None}), LVSPEC)


def test_a_running_session_is_verified_as_its_newest_parameters_say_and_bad_ones_are_strict():
    verification = Verification.__new__(Verification)
    verification.config, verification.features = LVSPEC, None
    verification.runner = SimpleNamespace(device=torch.device("cpu"))
    verification._requests, verification._visual = {}, None

    def rules_with(extra: dict) -> RequestRules:
        params = SamplingParams(extra_args=extra)
        return verification._request(SimpleNamespace(req_id="a", sampling_params=params, mm_features=[])).rules

    assert rules_with({"lvspec_policy": "strict"}).is_strict
    assert not rules_with({"lvspec_relaxation": 0.5}).is_strict
    assert rules_with({"lvspec_policy": "strict"}).is_strict
    assert rules_with({"lvspec_surprise": 1}).is_strict
