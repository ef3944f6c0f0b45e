"""What can be seen from outside: metrics on their way, traces, and the page made of them."""

import asyncio
import json
import math
import re
from argparse import Namespace
from types import SimpleNamespace

import cv2
import hypothesis.strategies as st
import numpy as np
import prometheus_client
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from rich.console import Console
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_lvspec.config import METHOD
from vllm_lvspec.engine import trace as trace_module
from vllm_lvspec.engine.scheduler import LVSpecScheduler, with_changes
from vllm_lvspec.engine.trace import RequestTrace, TracedToken, Traces, anchors_of
from vllm_lvspec.kernels.acceptance import LOOSE, Chains, Rules, accept_reference
from vllm_lvspec.kernels.relevance import VisualPages, top_cosines_reference
from vllm_lvspec.observe.endpoint import LVSpecEndpoint, add_texts
from vllm_lvspec.observe.inspect import InspectError, Totals, read_trace, show, write_page
from vllm_lvspec.observe.metrics import (
    METRICS,
    Changes,
    LVSpecStatLogger,
    key,
    record_engines_with_lvspec,
    take_along,
)
from vllm_lvspec.verify import matches
from vllm_lvspec.verify.matches import closest
from vllm_lvspec.verify.rules import RequestRules
from vllm_lvspec.verify.verifier import Choices


def config_of(name, **more):
    return SimpleNamespace(additional_config=more, model_config=SimpleNamespace(served_model_name=name))


def logger_of(name):
    return LVSpecStatLogger(config_of(name))


def value(name, model, **labels):
    labels = {"model_name": model, "engine": "0", **labels}
    return prometheus_client.REGISTRY.get_sample_value(f"lvspec:{name}", labels)


def recorded(logger, changes):
    """`changes` as they arrive: written and read as vLLM's engine and API server do."""
    stats = SchedulerStats()
    take_along(stats, changes)
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    logger.record(MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats, None)


def test_changes_reach_the_series_of_model_and_engine():
    logger = logger_of("one")
    assert value("tokens_total", "one", reason="loose") == 0  # from the start, so that it has a rate
    counts = {key("tokens", "loose"): 3, key("step_seconds", "target"): 1_500_000, key("accepted_length", 4): 2}
    recorded(logger, {**counts, key("draft_cache_usage"): 250_000})
    recorded(logger, {key("tokens", "loose"): 2, key("draft_cache_usage"): 125_000})
    assert value("tokens_total", "one", reason="loose") == 5
    assert value("step_seconds_total", "one", part="target") == pytest.approx(1.5)
    assert value("accepted_length_sum", "one") == 8 and value("accepted_length_count", "one") == 2
    assert value("accepted_length_bucket", "one", le="3.0") == 0
    assert value("draft_cache_usage", "one") == pytest.approx(0.125)
    logger_of("two")
    assert value("tokens_total", "two", reason="loose") == 0


def test_what_is_no_count_of_ours_ends_nothing():
    logger = logger_of("three")
    recorded(logger, {"unknown": 1, key("tokens", "exact"): -1, key("tokens", "shift"): 1})
    assert value("tokens_total", "three", reason="exact") == 0 and value("tokens_total", "three", reason="shift") == 1
    logger.record(None, None)


def test_engines_with_lvspec_have_the_logger_and_others_have_not(monkeypatch):
    monkeypatch.setattr(StatLoggerManager, "__init__", lambda self, *args, **kwargs: seen.append((args, kwargs)))
    monkeypatch.delattr(StatLoggerManager, "_lvspec_taught", raising=False)
    record_engines_with_lvspec()
    wrapped = StatLoggerManager.__init__
    record_engines_with_lvspec()
    assert StatLoggerManager.__init__ is wrapped
    seen = []
    StatLoggerManager(config_of("x"), [0], ["another"], client_count=2)
    StatLoggerManager(vllm_config=config_of("x", lvspec={}), custom_stat_loggers=None, client_count=2)
    StatLoggerManager(config_of("x", lvspec={}), custom_stat_loggers=["another"])
    assert [args[2] for args, _ in seen] == [["another"], [LVSpecStatLogger], ["another", LVSpecStatLogger]]
    assert seen[0][1] == seen[1][1] == {"client_count": 2}


@given(
    st.lists(
        st.dictionaries(st.sampled_from([key("tokens", "exact"), key("draft_prompts"), key("draft_cache_usage")]),
                        st.integers(0, 9)),
        max_size=6,
    )
)  # fmt: skip
def test_changes_add_up_to_counts_and_end_at_the_last_gauge(steps):
    changes, counted, gauge = Changes(), {}, {}
    totals = {}
    for step in steps:
        for name, count in step.items():
            totals[name] = count if name == key("draft_cache_usage") else totals.get(name, 0) + count
        found = changes.since_last(totals)
        assert 0 not in found.values() or key("draft_cache_usage") in found
        for name, count in found.items():
            if name == key("draft_cache_usage"):
                gauge[name] = count
            else:
                counted[name] = counted.get(name, 0) + count
    expected = {name: count for name, count in totals.items() if count}
    assert {name: count for name, count in {**counted, **gauge}.items() if count} == expected


def test_every_metric_is_explained_and_named_as_prometheus_wants_it():
    for name, metric in METRICS.items():
        assert re.fullmatch(r"[a-z_]+", name) and not name.endswith("_total")
        assert metric.documentation.endswith(".")
        assert (metric.label is None) == (not metric.values)


def test_what_the_worker_has_counted_leaves_with_the_scheduler_s_statistics(monkeypatch):
    output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    output = with_changes(output, {"a": 1})
    scheduler = object.__new__(LVSpecScheduler)
    base = LVSpecScheduler.__mro__[1]
    monkeypatch.setattr(base, "make_stats", lambda self, *args, **kwargs: SchedulerStats(**kwargs))
    stats = scheduler.make_stats(num_running_reqs=3, ec_connector_stats=output.ec_connector_output.ec_connector_stats)
    assert stats.waiting_lora_adapters == {"a": 1} and stats.num_running_reqs == 3
    assert stats.ec_connector_stats is None  # vLLM's own loggers would look for a connector
    monkeypatch.setattr(base, "make_stats", lambda self, *args, **kwargs: None)  # --disable-log-stats
    assert scheduler.make_stats(ec_connector_stats=output.ec_connector_output.ec_connector_stats) is None
    assert with_changes(EMPTY_MODEL_RUNNER_OUTPUT, {"a": 1}).ec_connector_output is not None
    assert with_changes(EMPTY_MODEL_RUNNER_OUTPUT, {}) is EMPTY_MODEL_RUNNER_OUTPUT
    assert EMPTY_MODEL_RUNNER_OUTPUT.ec_connector_output is None  # everybody's


# Traces ---------------------------------------------------------------------------------------------------------------


def pages_of(counts, width=5, seed=0, block_size=4):
    torch.manual_seed(seed)
    most = max([*counts, 1])
    blocks = -(-most // block_size)
    table = torch.randperm(len(counts) * blocks, dtype=torch.int32).view(len(counts), blocks)
    positions = [torch.arange(count, dtype=torch.int32) for count in counts]
    starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    return VisualPages(torch.randn(len(counts) * blocks, block_size, 1, width), table, torch.cat(positions), starts)


def test_the_closest_of_many_visual_tokens_are_found_in_parts(monkeypatch):
    pages = pages_of([23])
    queries, starts, visuals = torch.randn(4, 5), [0, 4], [0, 23]
    whole = closest(queries, starts, pages, visuals, 3)
    monkeypatch.setattr(matches, "FEATURES_AT_ONCE", 5)
    cosines, indices = closest(queries, starts, pages, visuals, 3)
    torch.testing.assert_close(cosines, whole[0])
    assert (indices == whole[1]).all()


def test_the_closest_visual_tokens_are_those_whose_cosines_make_the_relevance():
    pages = pages_of([9, 0, 2])
    queries, starts = torch.randn(7, 5), torch.tensor([0, 3, 5, 7], dtype=torch.int32)
    cosines, indices = closest(queries, starts.tolist(), pages, pages.starts.tolist(), 3)
    torch.testing.assert_close(cosines, top_cosines_reference(queries, starts, pages, 3)[0])
    assert (indices[3:5] == -1).all() and (indices[5:, 2] == -1).all()
    feature = pages.features[pages.block_table[0][indices[1, 0] // 4], indices[1, 0] % 4, 0]
    assert torch.cosine_similarity(feature, queries[1], dim=0) == pytest.approx(float(cosines[1, 0]), abs=1e-5)


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, math.nan]), min_size=1, max_size=8), st.data())
def test_anchors_are_those_of_the_kernel(relevance, data):
    num_fillers = data.draw(st.integers(0, len(relevance)))
    threshold = data.draw(st.sampled_from([None, 0.25]))
    count = len(relevance)
    fillers = torch.tensor([[0] * count + [num_fillers]], dtype=torch.int32)
    # What is no anchor is loose where nothing else forbids it; exact tokens hide nothing here, as none is.
    chains = Chains(
        *(torch.tensor(ids, dtype=torch.int32) for ids in ([1] * count, [2] * count, [0], [0, count])),
        exact=torch.zeros(count, dtype=torch.bool), relevance=torch.tensor(relevance).round(decimals=6),
        relative_probs=torch.ones(count),
    )  # fmt: skip
    rules = Rules(
        fillers, torch.tensor([math.inf if threshold is None else threshold]), torch.zeros(1),
        torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(1, 0, dtype=torch.int32),
        torch.zeros(3, dtype=torch.uint8), torch.ones(1, dtype=torch.bool), False,
    )  # fmt: skip
    anchors = anchors_of(relevance, num_fillers, threshold)
    accepted = accept_reference(chains, rules)
    num_loose = int((accepted.reasons == LOOSE).sum())
    assert num_loose == (anchors.index(True) if any(anchors) else count)


def floats_of_two_ranks(found):
    """What vLLM's kernel on CPUs takes; the other rank holds nothing."""
    assert found.dtype == torch.float32
    nothing = torch.stack([torch.full_like(found[..., 0], -math.inf), torch.full_like(found[..., 1], -1)], dim=-1)
    return torch.cat([found, nothing])


def traced(relevance, draft, target, tokens, reasons, rules, shares=1):
    """A request's trace after one step in which its chain was the second of two."""
    num = len(draft)
    pages = pages_of([2, 6])
    queries = torch.randn(1 + num, 5)
    traces = Traces(2)
    traces.begin_step()
    traces.note_drafts(torch.tensor([3, *draft]), [1, num])
    choices = Choices(
        *(torch.tensor(ids, dtype=torch.int32) for ids in ([3, *draft], [3, *target], [0, 0], [0, 1, 1 + num])),
        exact=torch.zeros(1 + num, dtype=torch.bool), logits=torch.zeros(1 + num, 9), places=torch.arange(1 + num),
    )  # fmt: skip
    own = [np.arange(2), np.arange(6) * shares]
    traces.note_choices(choices, torch.tensor([0.9, *relevance]), queries, pages, [0, 2, 8], own, floats_of_two_ranks)
    request = traces.request("r-1", lambda: RequestTrace("r-1", rules.policy, rules.relaxation, []))
    traces.add(request, 1, rules, tokens, reasons)
    expected, places = closest(queries, choices.starts.tolist(), pages, [0, 2, 8], 3)
    return traces, request, expected[1:], places[1:]


def test_a_trace_says_for_every_token_what_was_drafted_what_the_target_wanted_and_what_it_saw():
    rules = RequestRules("lvspec", 0.5)
    traces, request, cosines, places = traced(
        [0.1, 0.8, 0.2, 0.7], [5, 6, 7, 8], [5, 6, 1, 2], [5, 6, 7, 2], ["exact", "exact", "loose", "target"], rules,
        shares=10,
    )  # fmt: skip
    assert [token.token_id for token in request.tokens] == [5, 6, 7, 2]
    assert [token.draft_id for token in request.tokens] == [5, 6, 7, 8]
    assert [token.target_id for token in request.tokens] == [5, 6, 1, 2]
    assert [token.is_anchor for token in request.tokens] == [False, True, False, True]
    assert [token.relevance for token in request.tokens] == pytest.approx([0.1, 0.8, 0.2, 0.7])
    assert [[index for index, _ in token.closest] for token in request.tokens] == (10 * places).tolist()
    assert [cosine for _, cosine in request.tokens[2].closest] == pytest.approx(cosines[2].tolist())
    traces.begin_step()  # and a step without drafts
    traces.add(request, 0, RequestRules(), [4], ["target"])
    assert request.tokens[-1] == TracedToken(4, "target", 1, 4)


def test_a_strict_chain_is_traced_without_relevance():
    _, request, _, _ = traced([0.1, 0.8], [5, 6], [5, 1], [5, 1], ["exact", "target"], RequestRules())
    assert [(token.draft_id, token.target_id) for token in request.tokens] == [(5, 5), (6, 1)]
    assert all(token.relevance is None and token.is_anchor is None and not token.closest for token in request.tokens)


def test_tokens_behind_an_end_are_no_anchors_and_count_for_no_share():
    traces = Traces(2, is_end=lambda token, rules: token == 6)
    traces.note_drafts(torch.tensor([5, 6, 7, 7]), [4])
    nothing = torch.zeros(4, 0)
    traces._note(relevance=torch.tensor([0.1, 0.2, 0.9, 0.9]), closest=nothing, cosines=nothing)
    chain = traces._chain_of(0, RequestRules("lvspec", 0.5))
    assert [known.get("is_anchor") for known in chain] == [False, True, None, None]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("chatcmpl-1-0a1b2c3d", "chatcmpl-1"),
        ("chatcmpl-1", "chatcmpl-1"),  # where vLLM is told to add nothing
        ("1_chatcmpl-1-0a1b2c3d", "chatcmpl-1"),
        ("cmpl-ab-0-0a1b2c3d", "cmpl-ab"),
        ("resp_ab_0-0a1b2c3d", "resp_ab"),
        ("chatcmpl-a/b-0a1b2c3d", "chatcmpl-a/b"),
    ],
)
def test_a_trace_is_found_by_the_client_s_name(name, asked):
    traces = Traces(1)
    traces.request(name, lambda: RequestTrace(name, "strict", 0.0, []))
    traces.request("chatcmpl-2-0a1b2c3d", lambda: RequestTrace("chatcmpl-2-0a1b2c3d", "strict", 0.0, []))
    assert [trace["request_id"] for trace in traces.of(asked)] == [name]
    assert not traces.of("chatcmpl") and not traces.of("") and not traces.of("1")


def test_so_many_finished_traces_are_kept():
    traces = Traces(2)
    names = [f"chatcmpl-{i}-0a1b2c3d" for i in range(4)]
    for name in names:
        traces.request(name, lambda name=name: RequestTrace(name, "strict", 0.0, []))
    for name in [*names, "unknown"]:
        traces.finish(name)
    assert [bool(traces.of(name)) for name in names] == [False, False, True, True]
    assert traces.of(names[3])[0]["is_finished"]
    again = traces.request(names[3], lambda: RequestTrace(names[3], "fly", 0.0, []))
    assert again.policy == "fly" and not traces.of(names[3])[0]["is_finished"]


def test_traces_have_room_for_so_many_tokens_and_say_what_is_cut(monkeypatch):
    monkeypatch.setattr(trace_module, "MAX_TOKENS", 5)
    traces = Traces(9)

    def add(name, num):
        request = traces.request(name, lambda: RequestTrace(name, "strict", 0.0, []))
        traces.add(request, 0, RequestRules(), [1] * num, ["target"] * num)
        return request

    first, second = add("a", 3), add("b", 2)
    assert add("b", 1).is_cut and len(second.tokens) == 2 and not first.is_cut
    traces.finish("a")
    assert len(add("b", 3).tokens) == 5 and not traces.of("a")
    json.dumps(traces.of("b"))


def test_characters_of_several_tokens_are_shown_with_their_last_one():
    from vllm.tokenizers.registry import get_tokenizer

    from vllm_lvspec.reference import TARGET

    tokenizer = get_tokenizer(str(TARGET))
    text = "A red circle é 🎬."
    ids = tokenizer.encode(text)
    trace = {"tokens": [{"token_id": i, "target_id": i, "draft_id": None} for i in ids]}
    add_texts(trace, tokenizer)
    assert "".join(token["text"] for token in trace["tokens"]) == text
    assert not any("�" in token["text"] for token in trace["tokens"])
    assert trace["tokens"][0]["target_text"] == tokenizer.decode(ids[:1]) and trace["tokens"][0]["draft_text"] is None


# The page -------------------------------------------------------------------------------------------------------------

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def found(**more):
    words = [("A ", "exact"), (EVIL, "loose"), ("ball", "shift"), (".", "target")]
    tokens = [
        {"token_id": i, "text": text, "reason": reason, "step": i // 3, "target_id": 9, "target_text": EVIL,
         "draft_id": i, "draft_text": text, "relevance": 0.25, "is_anchor": i == 2, "closest": [[i, 0.5]]}
        for i, (text, reason) in enumerate(words)
    ]  # fmt: skip
    choice = {
        "request_id": "r", "policy": "lvspec", "relaxation": 0.9, "kept": [0, 3], "num_steps": 2, "is_finished": True,
        "items": [{"kind": "video", "grid": [2, 2, 3], "num_tokens": 13}], "tokens": tokens,
    }  # fmt: skip
    return {"model": EVIL, "prompt": EVIL, "choices": [choice], **more}


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "video.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 8, (64, 48))
    for i in range(8):
        writer.write(np.full((48, 64, 3), 30 * i, np.uint8))
    writer.release()
    return path


def test_a_page_shows_tokens_reasons_frames_and_totals_and_lets_nothing_out_of_the_answer(video, tmp_path):
    write_page(tmp_path / "page.html", found(), video)
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page
    assert page.count('class="token ') == 4 and page.count("data:image/jpeg;base64,") == 2
    assert 'data-first="6" data-name="video 1, time 2 of 2" data-rows="2" data-columns="3"' in page
    assert "2 steps of the target, 2.00 a step" in page and "of 13 visual tokens" in page
    (data,) = re.findall(r'<script type="application/json" class="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data)["tokens"][1]["text"] == EVIL
    assert "http" not in re.sub(r"data:image[^\"]*", "", page).replace("http-equiv", "")  # it asks nobody


def test_the_terminal_shows_the_same(capsys):
    show(Console(width=200, force_terminal=False), found())
    shown = capsys.readouterr().out
    assert EVIL in shown and "2.00 a step" in shown and "2 of 13 visual tokens" in shown
    totals = Totals.of(found()["choices"][0])
    evil = found()
    evil["choices"][0]["tokens"][0]["text"] = "\x1b]0;title\x07\n"
    show(Console(width=200, force_terminal=False), evil)
    assert not set("\x1b\x07") & set(capsys.readouterr().out)
    assert totals.reasons == {"exact": 1, "loose": 1, "shift": 1, "target": 1} and totals.tokens_per_step == 2


def test_what_is_missing_of_an_answer_is_said(tmp_path, capsys):
    for more, said in (
        ({}, None),
        ({"is_finished": False}, "still running"),
        ({"is_cut": True}, "Tokens of this answer are missing"),
    ):
        trace = found()
        trace["choices"][0] |= more
        write_page(tmp_path / "page.html", trace, None)
        show(Console(width=200, force_terminal=False), trace)
        for shown in ((tmp_path / "page.html").read_text(), capsys.readouterr().out):
            assert [word for word in ("still running", "Tokens of this answer are missing") if word in shown] == (
                [said] if said else []
            )


def test_of_several_videos_nobody_knows_which_the_file_is(video, tmp_path):
    trace = found()
    item = {"kind": "video", "grid": [1, 2, 3], "num_tokens": 6}
    for num, pictures in ((1, 1), (2, 0)):
        trace["choices"][0]["items"] = [item] * num
        write_page(tmp_path / "page.html", trace, video)
        page = (tmp_path / "page.html").read_text()
        assert page.count("data:image/jpeg") == pictures and page.count("<figure>") == num


def answering(settings, *engines):
    """A server's routes over engines 2, 3 and so on, of which each says the same of everything: `engines`."""

    async def ask(what, method, timeout, args, kwargs):
        assert what == "collective_rpc"
        return engines

    core = SimpleNamespace(call_utility_all_async=ask, engine_ranks_managed=[*range(2, 2 + len(engines))])
    model = SimpleNamespace(served_model_name="model")
    more = {} if settings is None else {METHOD: settings}
    config = SimpleNamespace(additional_config=more, model_config=model)
    tokenizer = SimpleNamespace(get_tokenizer=lambda: None)
    app, endpoint = FastAPI(), LVSpecEndpoint()
    endpoint.attach_router(app)
    engine = SimpleNamespace(vllm_config=config, engine_core=core, renderer=tokenizer)
    asyncio.run(endpoint.init_state(engine, app.state, Namespace()))
    return TestClient(app)


@pytest.mark.parametrize(
    ("settings", "says"), [(None, "decodes without lvspec"), ({"trace": 0}, "keeps no traces"), ({"trace": 1}, "'x'")]
)
def test_a_server_that_keeps_no_such_trace_says_so(settings, says):
    client = answering(settings, [[], []], [[], []])
    reply = client.get("/v1/lvspec/trace/x")
    assert reply.status_code == 404 and says in reply.json()["error"]["message"]
    if settings is None:
        assert client.get("/v1/lvspec/stats").status_code == 404


def test_routes_ask_all_engines_of_a_server():
    found = answering({"trace": 1}, [{"drafts": 1}, {"drafts": 1}], [{"drafts": 7}]).get("/v1/lvspec/stats").json()
    assert found["ranks"] == [{"engine": 2, "drafts": 1}, {"engine": 2, "drafts": 1}, {"engine": 3, "drafts": 7}]
    trace = {"request_id": "x", "tokens": []}
    for engines in ([[[]], [[trace]]], [[[trace], []], [[]]]):
        assert answering({"trace": 1}, *engines).get("/v1/lvspec/trace/x").json()["choices"] == [trace]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"choices": [{"tokens": [{}], "items": []}]}'])
def test_a_file_that_is_no_trace_is_named(text, tmp_path):
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(InspectError, match=r"trace\.json: .*must be what /v1/lvspec/trace"):
        read_trace(tmp_path / "trace.json")
    with pytest.raises(InspectError, match="nothing"):
        read_trace(tmp_path / "nothing.json")
