"""The Ray Serve app with two replicas of the bundled pair on CPUs, one of which is killed under load.

    python tests/serve/ray_failover.py --requests 60 --concurrency 4

prints what was asked, how often it had to be asked again, and what was lost; its exit code is 1 where a request was
lost, a strict answer is another one than before, or the replica did not come back. `pip install ".[ray]"` first.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import logging
import os
import signal
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import psutil

from vllm_lvspec.demo import QUESTION, bundled_clips

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "ray"))

URL = "http://127.0.0.1:8000/v1"
NUM_REPLICAS = 2
MOST_TRIES = 90  # of a request, one a second
START_SECONDS = 300


def start() -> None:
    """Ray, and the app on it."""
    import ray
    from ray import serve
    from serve_app import Settings, app

    from vllm_lvspec.reference import CLIPS, PAIRS, TARGET

    # Replicas are told how many CPUs they have, and these may be more than there are.
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, configure_logging=False)
    settings = Settings(
        model=str(TARGET),
        name="reference",
        cpus_per_replica=1,
        min_replicas=NUM_REPLICAS,
        max_replicas=NUM_REPLICAS,
        engine={
            "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 4, "enforce_eager": True,
            "kv_cache_memory_bytes": 2**28, "allowed_local_media_path": str(CLIPS),
            "media_io_kwargs": {"video": PAIRS["qwen2_5_vl"].sampling},
        },
        # Both have all cores, so none may spin while it waits.
        environment={
            "OMP_NUM_THREADS": "1", "KMP_BLOCKTIME": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        },
    )  # fmt: skip
    serve.run(app(settings), blocking=False)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Ray logs all that it logs


def replicas() -> list[psutil.Process]:
    """Processes of Ray in which an engine of the app runs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica" in " ".join(process.cmdline()) and "LLMServer" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def kill(replica: psutil.Process) -> None:
    """As where its machine is gone: with everything it has started."""
    for process in [*replica.children(recursive=True), replica]:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


class Asker:
    """Asks until there is an answer, as clients of a service with replicas do."""

    def __init__(self) -> None:
        self.client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0, timeout=120)
        self.urls = [clip.path.as_uri() for clip in bundled_clips()]
        self.counts: Counter[str] = Counter()

    def ask(self, number: int) -> str | None:
        """A strict caption; None where nobody ever answered."""
        content: list[Any] = [
            {"type": "video_url", "video_url": {"url": self.urls[number % len(self.urls)]}},
            {"type": "text", "text": QUESTION},
        ]
        for _ in range(MOST_TRIES):
            try:
                answer = self.client.chat.completions.create(
                    model="reference",
                    messages=[{"role": "user", "content": content}],
                    temperature=0,
                    max_tokens=96,
                    extra_body={"vllm_xargs": {"lvspec_policy": "strict"}},
                )
            except (openai.APIConnectionError, openai.APITimeoutError, openai.InternalServerError) as error:
                self.counts[f"asked again: {type(error).__name__}"] += 1
                time.sleep(1)
                continue
            return answer.choices[0].message.content
        return None


def wait_for_replicas() -> float:
    """Seconds until all replicas run."""
    from ray import serve

    started = time.monotonic()
    while True:
        apps = serve.status().applications.values()
        running = [app.deployments[name].replica_states.get("RUNNING", 0) for app in apps for name in app.deployments
                   if "LLMServer" in name]  # fmt: skip
        if running == [NUM_REPLICAS] and len(replicas()) == NUM_REPLICAS:
            return time.monotonic() - started
        if time.monotonic() - started > START_SECONDS:
            raise SystemExit(f"{running} replicas run after {START_SECONDS} s, {NUM_REPLICAS} should")
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--concurrency", type=int, default=4)
    options = parser.parse_args()
    import ray

    try:
        start()
        print(f"{NUM_REPLICAS} replicas answer after {wait_for_replicas():.0f} s", flush=True)
        with urllib.request.urlopen(URL + "/models", timeout=30) as reply:
            print("models:", [model["id"] for model in json.load(reply)["data"]])
        asker = Asker()
        alone = [asker.ask(number) for number in range(len(asker.urls))]
        answers: list[str | None] = []
        with concurrent.futures.ThreadPoolExecutor(options.concurrency) as pool:
            waiting = [pool.submit(asker.ask, number) for number in range(options.requests)]
            for number, future in enumerate(waiting):
                answers.append(future.result())
                if number == options.requests // 4:
                    victim = replicas()[0]
                    kill(victim)
                    print(f"replica {victim.pid} killed after {number + 1} answers", flush=True)
        lost = answers.count(None)
        wrong = sum(answer is not None and answer != alone[i % len(alone)] for i, answer in enumerate(answers))
        print(f"{len(answers)} requests: {len(answers) - lost} answered, {lost} lost, {wrong} with another answer")
        print(dict(asker.counts) or "none had to be asked again")
        print(f"{NUM_REPLICAS} replicas run again {wait_for_replicas():.0f} s after the last answer", flush=True)
    finally:
        ray.shutdown()
    sys.exit(bool(lost or wrong))


if __name__ == "__main__":
    main()
