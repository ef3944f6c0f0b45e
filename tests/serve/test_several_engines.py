"""A server of two data-parallel engines, each of which has a target and a drafter of its own."""

from __future__ import annotations

import concurrent.futures
import json
import re
import time
import urllib.request
from collections import Counter

import openai
import pytest

from vllm_lvspec.demo import QUESTION
from vllm_lvspec.observe.inspect import fetch_trace
from vllm_lvspec.reference import CLIPS, PAIRS, TARGET
from vllm_lvspec.serving import serve

pytestmark = pytest.mark.two_ranks  # as many cores
NUM_CLIPS = 2
REASONS = ("exact", "loose", "shift", "target")


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as reply:
        return reply.read().decode()


def test_requests_are_spread_over_engines_that_draft_count_and_keep_traces_of_their_own():
    settings = {"method": "lvspec", "only_if_faster": False, "trace": 16}
    with serve(
        TARGET, "--speculative-config", json.dumps(settings), "--max-model-len", "1024", "--max-num-seqs", "4",
        "--dtype", "float32", "--enforce-eager", "--served-model-name", "reference", "--data-parallel-size", "2",
        "--allowed-local-media-path", str(CLIPS), "--kv-cache-memory-bytes", "256M",
        *PAIRS["qwen2_5_vl"].server_arguments,
        environment={"VLLM_PLUGINS": "lvspec", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ) as server:  # fmt: skip

        def ask(i: int):
            video = {"url": (CLIPS / f"shapes-{1 + i % NUM_CLIPS}.mp4").as_uri()}
            content = [{"type": "video_url", "video_url": video}, {"type": "text", "text": QUESTION}]
            with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
                return client.chat.completions.create(
                    model="reference",
                    messages=[{"role": "user", "content": content}],
                    temperature=0,
                    max_tokens=256,
                    extra_body={"vllm_xargs": {"lvspec_policy": "strict" if i % 4 < 2 else "lvspec"}},
                )

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(16)))
        # In float32 the target says the same, whichever engine it is in.
        texts = [{a.choices[0].message.content for a in answers[clip::4]} for clip in range(NUM_CLIPS)]
        assert [len(found) for found in texts] == [1] * NUM_CLIPS and texts[0] != texts[1]
        num_tokens = sum(answer.usage.completion_tokens for answer in answers)
        counted: Counter[str] = Counter()
        for _ in range(50):  # the last step's are recorded after its answer was sent
            series = re.findall(r'^lvspec:tokens_total{engine="(\d)",.*} (\S+)$', get(server.url + "/metrics"), re.M)
            counted = Counter()
            for engine, value in series:
                counted[engine] += int(float(value))
            if sum(counted.values()) == num_tokens:
                break
            time.sleep(0.1)
        assert sum(counted.values()) == num_tokens and set(counted) == {"0", "1"} and min(counted.values()) > 0
        ranks = json.loads(get(server.url + "/v1/lvspec/stats"))["ranks"]
        assert {str(rank["engine"]): sum(rank[f"tokens_{reason}"] for reason in REASONS) for rank in ranks} == counted
        assert all(rank["drafted_tokens"] > 0 for rank in ranks)
        for answer in answers:
            (choice,) = fetch_trace(server.url + "/v1", answer.id)["choices"]
            assert len(choice["tokens"]) == answer.usage.completion_tokens
