"""Metrics, stats and traces of a server of two ranks behind two API servers with a key; the page made of a trace."""

from __future__ import annotations

import concurrent.futures
import json
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request

import dashboard
import httpx
import hypothesis.strategies as st
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from typer.testing import CliRunner

from vllm_lvspec.cli import app
from vllm_lvspec.demo import QUESTION
from vllm_lvspec.observe.inspect import InspectError, fetch_trace
from vllm_lvspec.reference import CLIPS, PAIRS, TARGET
from vllm_lvspec.serving import serve

pytestmark = pytest.mark.two_ranks
CLIP = CLIPS / "shapes-1.mp4"
KEY = "a-key"
NUM_KEPT = 3


@pytest.fixture(scope="module")
def server():
    settings = {"method": "lvspec", "only_if_faster": False, "trace": NUM_KEPT}
    with serve(
        TARGET, "--speculative-config", json.dumps(settings), "--max-model-len", "1024", "--max-num-seqs", "4",
        "--dtype", "float32", "--enforce-eager", "--served-model-name", "reference", "--api-key", KEY,
        "--allowed-local-media-path", str(CLIPS), *PAIRS["qwen2_5_vl"].server_arguments,
        "--tensor-parallel-size", "2", "--api-server-count", "2",
        environment={"VLLM_PLUGINS": "lvspec", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ) as running:  # fmt: skip
        yield running


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)


def ask(client, text=QUESTION, **options):
    content = [{"type": "video_url", "video_url": {"url": CLIP.as_uri()}}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(
        model="reference", messages=messages, **{"temperature": 0, "max_tokens": 256, **options}
    )


def get(server, path, key=KEY):
    request = urllib.request.Request(server.url + path, headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def series(server, name):
    """`{labels: value}` of a metric, all API servers together."""
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as reply:
        text = reply.read().decode()
    found = re.findall(rf"^lvspec:{name}{{([^}}]*)}} (\S+)$", text, re.MULTILINE)
    return {tuple(sorted(re.findall(r'(\w+)="([^"]*)"', labels))): float(value) for labels, value in found}


def total(server, name, **labels):
    return sum(v for k, v in series(server, name).items() if labels.items() <= dict(k).items())


def test_metrics_say_what_the_ranks_have_counted_whoever_was_asked(client, server):
    def one(i):
        with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY) as own:  # a connection of its own
            asked = {"extra_body": {"vllm_xargs": {"lvspec_policy": "strict"}}} if i % 2 else {}
            return ask(own, **asked).usage.completion_tokens

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        num_tokens = sum(pool.map(one, range(8)))
    for _ in range(50):  # the last step's are recorded after its answer was sent
        first, second = get(server, "/v1/lvspec/stats")["ranks"]
        if total(server, "tokens_total") == sum(first[f"tokens_{r}"] for r in ("exact", "loose", "shift", "target")):
            break
        time.sleep(0.1)
    for reason in ("exact", "loose", "shift", "target"):
        assert total(server, "tokens_total", reason=reason) == first[f"tokens_{reason}"]
    assert total(server, "tokens_total") == num_tokens
    for kind in ("anchor", "filler", "strict"):
        assert total(server, "verified_tokens_total", kind=kind) == first[f"verified_{kind}"] > 0
    assert total(server, "chains_total", verification="loose") == first["loose_chains"] > 0
    assert total(server, "drafts_total", outcome="drafted") == first["drafted_requests"]
    assert total(server, "draft_prompts_total") == first["prefills"] == 8
    chains = first["loose_chains"] + first["strict_chains"]
    assert total(server, "accepted_length_count") == chains == sum(first["accepted_lengths"])
    accepted = total(server, "accepted_length_sum")
    assert accepted == sum(i * count for i, count in enumerate(first["accepted_lengths"]))
    assert accepted == pytest.approx(server.metric("vllm:spec_decode_num_accepted_tokens_total"), abs=2 * 8)
    assert total(server, "step_seconds_total", part="drafting") > 0
    assert total(server, "embedding_cache_bytes") == first["embedding_bytes"] > 0
    assert total(server, "draft_cache_usage") == pytest.approx(0)  # nothing runs
    assert total(server, "relaxation") == pytest.approx(0.9)
    assert {dict(labels)["model_name"] for labels in series(server, "tokens_total")} == {"reference"}
    assert first["tokens_loose"] == second["tokens_loose"] > 0


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_prometheus_has_numbers_for_every_panel_and_rules_for_every_alert(client, server, tmp_path):
    with dashboard.prometheus(server.url) as running:
        start = time.time()
        while time.time() < start + 20:
            ask(client)
        end = time.time()
        (target,) = running.get("/api/v1/targets")["activeTargets"]
        assert target["health"] == "up", target["lastError"]
        for panel in dashboard.PANELS:
            for asked in panel["targets"]:
                found = running.series(asked["expr"], start, end)
                assert any(values for _, values in found), f"{panel['title']}: {asked['expr']}"
        (group,) = running.get("/api/v1/rules")["groups"]
        assert len(group["rules"]) == 5 and {rule["health"] for rule in group["rules"]} == {"ok"}
        dashboard.draw(running, start, end, tmp_path / "dashboard.png")
    assert (tmp_path / "dashboard.png").stat().st_size > 50_000


def test_routes_ask_for_the_key(server):
    for path in ("/v1/lvspec/stats", "/v1/lvspec/trace/x"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(server, path, key=None)
        assert caught.value.code == 401


def test_stats_show_the_settings(server):
    found = get(server, "/v1/lvspec/stats")
    assert found["model"] == "reference" and found["settings"]["trace"] == NUM_KEPT and len(found["ranks"]) == 2


def test_a_trace_has_the_answer_token_by_token(client, server):
    answer = ask(client)
    (choice,) = fetch_trace(server.url + "/v1", answer.id, KEY)["choices"]
    text = "".join(token["text"] for token in choice["tokens"])
    assert text.removesuffix("<|im_end|>") == answer.choices[0].message.content
    assert len(choice["tokens"]) == answer.usage.completion_tokens and choice["is_finished"]
    assert {token["reason"] for token in choice["tokens"]} >= {"exact", "loose"}
    (item,) = choice["items"]
    assert item["kind"] == "video" and item["num_tokens"] == item["grid"][0] * item["grid"][1] * item["grid"][2]
    assert len(choice["kept"]) == pytest.approx(0.1 * item["num_tokens"], abs=2)
    for token in choice["tokens"]:
        if token["reason"] in ("loose", "shift"):
            assert token["target_id"] != token["token_id"] == token["draft_id"]
            assert token["is_anchor"] == (token["reason"] == "shift")
            assert len({index for index, _ in token["closest"]}) == 3
            assert all(0 <= index < item["num_tokens"] and cosine <= 1.001 for index, cosine in token["closest"])
            # The relevance is the mean of the ten largest cosines, so at most that of the three largest.
            assert token["relevance"] <= sum(cosine for _, cosine in token["closest"]) / 3 + 1e-4
        elif token["reason"] == "exact":
            assert token["target_id"] == token["token_id"]


def test_a_strict_request_and_several_choices_are_traced_too(client, server):
    strict = ask(client, extra_body={"vllm_xargs": {"lvspec_policy": "strict"}})
    (choice,) = fetch_trace(server.url + "/v1", strict.id, KEY)["choices"]
    assert choice["policy"] == "strict" and {t["reason"] for t in choice["tokens"]} == {"exact", "target"}
    several = ask(client, n=2, temperature=1.0, seed=3, max_tokens=12)
    assert len(fetch_trace(server.url + "/v1", several.id, KEY)["choices"]) == 2


def test_an_unknown_or_forgotten_request_is_a_404_that_says_so(client, server):
    first = ask(client, max_tokens=4).id
    for _ in range(NUM_KEPT):
        ask(client, max_tokens=4)
    for request in (first, "nothing", "..%2f..%2fetc", "a b"):
        with pytest.raises(InspectError, match="not among the requests that run and the last 3 finished ones"):
            fetch_trace(server.url + "/v1", request, KEY)


NAMES = st.one_of(
    st.text(max_size=40), st.sampled_from(["..", "../stats", "%2e%2e", "*", "chatcmpl-", "0", "\x00", "a" * 3000])
)
HTTP = httpx.Client()
VISIBLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["GET", "GET", "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]),
    route=st.sampled_from(["stats", "stats/", "trace", "trace/{}", "trace/{}/{}", "{}"]),
    name=NAMES.filter(lambda name: not any("\ud800" <= c <= "\udfff" for c in name)),
    query=st.dictionaries(VISIBLE, VISIBLE, max_size=3),
    body=st.binary(max_size=50),
)
def test_any_request_to_the_routes_is_answered_or_refused(server, method, route, name, query, body):
    path = "/v1/lvspec/" + route.replace("{}", urllib.parse.quote(name, safe=""))
    headers = {"Authorization": f"Bearer {KEY}"}
    reply = HTTP.request(method, server.url + path, params=query, content=body, headers=headers, timeout=60)
    assert reply.status_code in (200, 307, 400, 404, 405, 414, 422), (method, path, reply.text)
    if reply.status_code == 404 and method == "GET":
        assert reply.json()
    assert server.process.poll() is None


def test_the_routes_are_described_with_those_of_vllm(server):
    found = get(server, "/openapi.json")["paths"]
    assert {path for path in found if "lvspec" in path} == {"/v1/lvspec/stats", "/v1/lvspec/trace/{request_id}"}


def test_inspect_asks_a_server_and_writes_a_page(server, tmp_path):
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    command = ["inspect", str(CLIP), "--url", server.url + "/v1", "--api-key", KEY, "--html", str(page)]
    result = CliRunner().invoke(app, [*command, "--json", str(trace), "--max-tokens", "60"])
    assert result.exit_code == 0, result.output
    found = json.loads(trace.read_text())
    assert found["prompt"] == QUESTION
    assert page.read_text().count('class="token ') == len(found["choices"][0]["tokens"]) <= 60
    assert page.read_text().count("data:image/jpeg;base64,") == found["choices"][0]["items"][0]["grid"][0]
    shown = CliRunner().invoke(app, ["inspect", "--trace", str(trace)])
    assert shown.exit_code == 0 and "a step; policy lvspec" in " ".join(shown.output.split())


def test_a_server_without_the_plugin_s_routes_is_named_by_inspect(tmp_path):
    result = CliRunner().invoke(app, ["inspect", "--url", "http://127.0.0.1:9/v1", "--request", "x"])
    assert result.exit_code == 2 and "127.0.0.1:9" in result.output
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "no.mp4")])
    assert result.exit_code == 2 and "no such file" in " ".join(result.output.split())
