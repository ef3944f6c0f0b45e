"""The bundled pair behind `vllm serve`, over the OpenAI API."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import cv2
import httpx
import numpy as np
import openai
import psutil
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from vllm_lvspec.bench.videofacts.scene import Scene
from vllm_lvspec.demo import QUESTION, bundled_clips
from vllm_lvspec.reference import CLIPS, PAIRS, TARGET
from vllm_lvspec.serving import ServerError, _vllm_command, serve

CLIP = CLIPS / "shapes-1.mp4"
# Of a GPU several tests have a part; by itself vLLM takes nine tenths of it.
GPU_SHARE = ["--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", "512M"] if torch.cuda.is_available() else []
STRICT = {"extra_body": {"vllm_xargs": {"lvspec_policy": "strict"}}}
RANKS = [pytest.param(1, id="one rank"), pytest.param(2, id="two ranks", marks=pytest.mark.two_ranks)]


def serve_on(ranks: int, *arguments: str):
    """A server of the bundled target, on so many tensor-parallel ranks."""
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    return serve(
        TARGET, *arguments, "--max-model-len", "1024", "--max-num-seqs", "4", "--dtype", "float32", "--enforce-eager",
        "--served-model-name", "reference", "--allowed-local-media-path", str(CLIPS),
        *GPU_SHARE, *PAIRS["qwen2_5_vl"].server_arguments, "--tensor-parallel-size", str(ranks),
        environment={"VLLM_PLUGINS": "lvspec", **({"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if ranks == 2 else {})},
    )  # fmt: skip


@pytest.fixture(scope="module", params=RANKS)
def ranks(request):
    return request.param


@pytest.fixture(scope="module")
def server(ranks):
    with serve_on(
        ranks, "--speculative-config", '{"method": "lvspec", "only_if_faster": false, "trace": 3}',
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def message(text: str, url: str | None = None, kind: str = "video_url") -> list:
    content = [{"type": kind, kind: {"url": url}}] if url else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def ask(client, messages, **options):
    return client.chat.completions.create(
        model="reference", messages=messages, **{"temperature": 0, "max_tokens": 256, **options}
    )


def test_a_video_is_described_streamed_or_not_from_a_file_or_a_data_url(client, server):
    before = server.metric("vllm:spec_decode_num_accepted_tokens_total")
    whole = ask(client, message(QUESTION, data_url(CLIP.read_bytes()))).choices[0].message.content
    from_file = ask(client, message(QUESTION, CLIP.as_uri())).choices[0].message.content
    stream = ask(client, message(QUESTION, CLIP.as_uri()), stream=True)
    pieces = [c.choices[0].delta.content or "" for c in stream if c.choices]
    assert whole == from_file == "".join(pieces)
    assert len(pieces) > 3
    clip = next(c for c in bundled_clips() if c.path == CLIP)
    score = clip.score(whole)
    assert score.accuracy == 1
    assert server.metric("vllm:spec_decode_num_accepted_tokens_total") > before


def test_images_texts_and_further_turns_are_answered(client):
    frame = io.BytesIO()
    Image.fromarray(Scene.from_seed(901).render(1)[0]).save(frame, "png")
    answer = ask(client, message("Describe the image.", data_url(frame.getvalue(), "image/png"), "image_url"))
    assert answer.choices[0].message.content
    assert ask(client, message("How many objects are there?")).choices[0].finish_reason in ("stop", "length")
    first = message(QUESTION, CLIP.as_uri())
    reply = ask(client, first).choices[0].message.content
    turns = [*first, {"role": "assistant", "content": reply}, *message("What happens first?")]
    assert "first" in ask(client, turns).choices[0].message.content


def test_sampling_options_behave(client):
    video = message(QUESTION, CLIP.as_uri())
    plain = ask(client, video, **STRICT).choices[0].message.content
    word = plain.split()[6]
    stopped = ask(client, video, stop=[word], **STRICT).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == plain[: plain.index(word)]
    several = ask(client, video, n=3, temperature=1.0, seed=5, max_tokens=32)
    assert len({c.message.content for c in several.choices}) > 1
    logged = ask(client, video, logprobs=True, top_logprobs=2, max_tokens=20, **STRICT).choices[0]
    assert "".join(t.token for t in logged.logprobs.content) == logged.message.content
    assert all(t.logprob >= max(x.logprob for x in t.top_logprobs) - 1e-6 for t in logged.logprobs.content)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    forced = ask(client, video, response_format=asked, max_tokens=64)
    text = forced.choices[0].message.content
    assert text.lstrip().startswith("{")
    if forced.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text)["n"], int)


def test_the_server_says_that_it_is_lossy_and_a_request_can_be_strict_or_looser(client, server):
    assert "policy=lvspec is lossy" in server.log.read_text()
    video = message(QUESTION, CLIP.as_uri())
    before = server.metric("vllm:spec_decode_num_drafts_total"), server.metric("vllm:generation_tokens_total")
    strict, loose, zero = (
        ask(client, video, extra_body={"vllm_xargs": asked}, max_tokens=96).choices[0].message.content
        for asked in ({"lvspec_policy": "strict"}, {"lvspec_relaxation": 0.9}, {"lvspec_relaxation": 0})
    )
    assert strict == zero != loose
    assert server.metric("vllm:spec_decode_num_drafts_total") > before[0]
    tool = {"type": "function", "function": {"name": "note", "parameters": {"type": "object", "properties": {}}}}
    assert ask(client, video, tools=[tool], tool_choice="none", max_tokens=8).choices[0].message.content
    # With tools that it may call, the model is verified strictly; what it says is what it says when asked to be strict.
    asked = {"vllm_xargs": {"lvspec_policy": "strict"}}
    called = ask(client, video, tools=[tool], max_tokens=96).choices[0].message
    strict = ask(client, video, tools=[tool], extra_body=asked, max_tokens=96).choices[0].message
    assert called.content == strict.content


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"lvspec_policy": "fly"}, "lvspec_policy='fly': must be strict or lvspec on this server"),
        ({"lvspec_policy": 3}, "lvspec_policy=3"),
        ({"lvspec_relaxation": 1.5}, "lvspec_relaxation=1.5: must be a number from 0 to 1"),
        ({"lvspec_relaxation": "high"}, "lvspec_relaxation='high'"),
        ({"lvspec_relaxation": [1]}, "lvspec_relaxation=[1]"),
        ({"lvspec_policy": "strict", "lvspec_relaxation": 0.5}, "lvspec_relaxation=0.5: must be 0"),
        ({"lvspec_relax": 0.5}, "lvspec_relax=0.5: unknown key; known keys are lvspec_policy, lvspec_relaxation"),
    ],
)
def test_a_request_for_what_can_not_be_is_a_400_that_names_it(asked, named, client, server):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, message(QUESTION, CLIP.as_uri()), extra_body={"vllm_xargs": asked})
    assert named in str(caught.value)
    assert server.is_healthy()


@pytest.mark.parametrize(
    "option",
    [
        {"extra_body": {"min_p": 0.1}, "temperature": 1.0},
        {"logit_bias": {"300": 5}},
        {"extra_body": {"logprob_token_ids": [5, 9]}, "logprobs": True},
    ],
)
def test_what_is_refused_under_speculation_is_a_400(option, client, server):
    with pytest.raises(openai.BadRequestError):
        ask(client, message(QUESTION, CLIP.as_uri()), **option)
    assert server.is_healthy()


@pytest.mark.parametrize(
    "data",
    [b"", b"not a video", CLIP.read_bytes()[:400], CLIP.read_bytes()[:64] + bytes(3000)],
    ids=["empty", "text", "truncated", "zeros"],
)
def test_a_corrupt_video_is_a_4xx_and_the_server_lives(data, client, server):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, message(QUESTION, data_url(data)))
    assert 400 <= caught.value.status_code < 500
    assert server.is_healthy()
    assert ask(client, message(QUESTION, CLIP.as_uri()), max_tokens=8).choices[0].message.content


def video(tmp_path, num_frames, width, height):
    """A file of so many frames; OpenCV writes one of no frames, too."""
    name, codec = ("video.avi", "MJPG") if width == 1 else ("video.mp4", "mp4v")  # which has even sizes only
    path = tmp_path / name
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 8, (width, height))
    for i in range(num_frames):
        writer.write(np.full((height, width, 3), 7 * i % 256, np.uint8))
    writer.release()
    return data_url(path.read_bytes())


def answer_or_status(client, messages):
    """200 and eight tokens, or the status of an error and None."""
    try:
        return 200, ask(client, messages, max_tokens=8, extra_body={"ignore_eos": True})
    except openai.APIStatusError as error:
        return error.status_code, None


@pytest.mark.parametrize(
    ("num_frames", "width", "height"), [(0, 64, 64), (8, 1, 1), (8, 2, 2), (8, 2, 900), (4000, 32, 32), (400, 640, 480)]
)
def test_a_video_of_any_size_is_answered_or_a_4xx_and_the_server_lives(
    num_frames, width, height, tmp_path, client, server
):
    status, answer = answer_or_status(client, message(QUESTION, video(tmp_path, num_frames, width, height)))
    assert 400 <= status < 500 or (status == 200 and num_frames > 0 and answer.usage.completion_tokens == 8)
    assert server.is_healthy()
    assert ask(client, message(QUESTION, CLIP.as_uri()), max_tokens=8).choices[0].message.content


def test_an_image_of_one_pixel_is_answered_or_a_4xx_and_the_server_lives(client, server):
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "png")
    pixels = message("What is it?", data_url(pixel.getvalue(), "image/png"), "image_url")
    status, _ = answer_or_status(client, pixels)
    assert status == 200 or 400 <= status < 500
    assert server.is_healthy()
    assert ask(client, message(QUESTION, CLIP.as_uri()), max_tokens=8).choices[0].message.content


def test_a_prompt_that_is_too_long_is_a_400(client, server):
    with pytest.raises(openai.BadRequestError):
        ask(client, message("the red circle moves " * 600, CLIP.as_uri()))
    assert server.is_healthy()


@pytest.mark.parametrize("path", ["/v1/lvspec/stats", "/v1/lvspec/trace/{request_id}"])
def test_whatever_is_asked_by_the_description_is_answered_as_described(path, server, ranks):
    with urllib.request.urlopen(server.url + "/openapi.json", timeout=60) as reply:
        described = schemathesis.openapi.from_dict(json.load(reply))
    described.config.update(base_url=server.url)
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

    @settings(max_examples=800 if ranks == 1 else 16, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=described[path]["GET"].as_strategy())
    def ask_it(case):
        case.call_and_validate(checks=checks, timeout=60)
        assert server.process.poll() is None

    ask_it()


def test_cancelled_streams_leave_nothing_running_and_others_unharmed(client, server):
    video = message(QUESTION, CLIP.as_uri())
    want = ask(client, video).choices[0].message.content

    def cancelled() -> None:
        stream = ask(client, video, stream=True, max_tokens=800, extra_body={"ignore_eos": True})
        for _, _chunk in zip(range(3), stream, strict=False):
            pass
        stream.close()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        broken = [pool.submit(cancelled) for _ in range(8)]
        whole = [pool.submit(ask, client, video) for _ in range(4)]
        for job in broken:
            job.result()
        assert {job.result().choices[0].message.content for job in whole} == {want}
    for _ in range(100):
        if server.metric("vllm:num_requests_running") == 0:
            break
        time.sleep(0.1)
    assert server.metric("vllm:num_requests_running") == 0


def test_a_killed_worker_ends_the_server_and_no_request_hangs(client, server, ranks):
    """The last that is done to a server."""
    asking = client.with_options(timeout=120)
    options = {"max_tokens": 800, "extra_body": {"ignore_eos": True}}
    stream = ask(asking, message(QUESTION, CLIP.as_uri()), stream=True, **options)
    next(iter(stream))
    family = psutil.Process(server.process.pid).children(recursive=True)
    workers = [process for process in family if "Worker" in "".join(process.cmdline())]
    assert len(workers) == ranks
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(ask, asking, message(QUESTION, CLIP.as_uri()), **options)
        workers[-1].kill()
        with pytest.raises(openai.OpenAIError):
            waiting.result(timeout=120)
    # What has begun ends, with an error or the connection; nobody waits for ever.
    with pytest.raises((openai.OpenAIError, httpx.HTTPError)):
        for _ in stream:
            pass
    server.process.wait(timeout=120)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_a_wrong_setting_ends_vllm_serve_with_one_line():
    command = [*_vllm_command(), "serve", str(TARGET), "-sc", '{"method": "lvspec", "pruning_ratio": 1.0}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pruning_ratio=1.0: must be less than 1" in done.stderr.splitlines()[-1]


def test_an_interrupted_demo_leaves_no_process_behind():
    # A shell that runs this in the background has it ignored, and what it starts would ignore it, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    demo = subprocess.Popen([str(Path(sys.executable).with_name("lvspec")), "demo"], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(family := psutil.Process(demo.pid).children(recursive=True)) < 3:  # server, engine core, worker
        assert time.monotonic() < deadline
        assert demo.poll() is None
        time.sleep(0.5)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "stopped" in output
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


def test_a_server_that_can_not_start_says_why_and_leaves_nothing_behind():
    with pytest.raises(ServerError, match="no such drafter"):
        with serve(TARGET, "--speculative-config", "lvspec:/no/such/drafter", timeout=120):
            pass
