"""A server under a mixed load for minutes: videos, text, aborts, tiny and huge answers, and requests that are wrong.

    python tests/serve/soak.py --seconds 600 --concurrency 16 --tensor-parallel-size 1

prints what was sent, answered, refused, aborted and lost, and memory over time; its exit code is 1 where a request was
lost, a strict answer is not what it is when asked alone, something was not given back, or memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import statistics
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import openai
import psutil

from vllm_lvspec.demo import QUESTION, bundled_clips
from vllm_lvspec.reference import CLIPS, PAIRS, TARGET
from vllm_lvspec.serving import Server, serve

TEXTS = (QUESTION, "How many objects are there?", "What happens first?")
LENGTHS = (1, 2, 24, 96)
MAX_LEN = 1024
MOST_GROWTH = 1.05  # of memory, from the second quarter of the time to the last
# So that what is measured is what is held. The allocator keeps what was freed for a quarter of an hour; oneDNN, which
# computes on CPUs, keeps a kernel of a third of a MiB for each of up to 1,024 sizes of batches. So does vLLM alone.
NOTHING_KEPT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "2",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
}


@dataclass
class Soak:
    """What has come of the requests so far. `memory`: bytes of all of the server's processes, over time."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    @property
    def growth(self) -> float:
        quarter = max(1, len(self.memory) // 4)
        return statistics.median(self.memory[-quarter:]) / statistics.median(self.memory[quarter : 2 * quarter] or [1])

    @property
    def is_fine(self) -> bool:
        return not self.wrong and not self.counts["lost"] and self.counts["answered"] > 0

    def lines(self) -> list[str]:
        sent = sum(self.counts[kind] for kind in ("answered", "refused", "aborted", "lost"))
        shown = ", ".join(f"{self.counts[kind]} {kind}" for kind in ("answered", "refused", "aborted", "lost"))
        gib = [f"{self.memory[i] / 2**30:.2f}" for i in (0, len(self.memory) // 2, -1)]
        return [
            f"{sent} requests: {shown}; {self.counts['compared']} strict answers compared with those given alone",
            f"memory {gib[0]}, {gib[1]}, {gib[2]} GiB at start, half time and end; growth {self.growth:.3f}",
            *self.wrong,
        ]


def _content(text: str, url: str | None) -> list[Any]:
    seen: list[Any] = [{"type": "video_url", "video_url": {"url": url}}] if url else []
    return [*seen, {"type": "text", "text": text}]


class Load:
    """Asks `server` at random, always the same for a seed and a worker."""

    def __init__(self, server: Server, soak: Soak, num_videos: int):
        self.client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=300)
        self.soak = soak
        self.urls = [clip.path.as_uri() for clip in bundled_clips()[:num_videos]]
        corrupt = (b"", b"not a video", (CLIPS / "shapes-1.mp4").read_bytes()[:400])
        self.corrupt = ["data:video/mp4;base64," + base64.b64encode(data).decode() for data in corrupt]
        self.alone: dict[tuple[str, str | None, int], str] = {}

    async def ask(self, text: str, url: str | None, max_tokens: int, policy: str | None, **more: Any) -> Any:
        xargs = more.pop("vllm_xargs", {"lvspec_policy": policy} if policy else None)
        extra = {**more.pop("extra_body", {}), **({"vllm_xargs": xargs} if xargs else {})}
        return await self.client.chat.completions.create(
            model="reference",
            messages=[{"role": "user", "content": _content(text, url)}],
            temperature=more.pop("temperature", 0),
            max_tokens=max_tokens,
            extra_body=extra or None,
            **more,
        )

    async def prepare(self) -> None:
        """Every strict question alone."""
        for text in TEXTS:
            for url in [*self.urls, None]:
                for length in LENGTHS:
                    answer = await self.ask(text, url, length, "strict")
                    self.alone[text, url, length] = answer.choices[0].message.content

    async def work(self, dice: random.Random, until: float) -> None:
        kinds = {
            self.strict: 40, self.loose: 20, self.sampled: 10, self.aborted: 12, self.huge: 3, self.broken: 6,
            self.bad: 9,
        }  # fmt: skip
        while time.monotonic() < until:
            (kind,) = dice.choices(list(kinds), list(kinds.values()))
            try:
                await kind(dice)
            except Exception as error:  # whatever it is, the request is lost, and that is what is looked for
                self.soak.counts["lost"] += 1
                self.soak.wrong.append(f"lost: {kind.__name__}: {type(error).__name__}: {error}"[:300])

    async def strict(self, dice: random.Random) -> None:
        question = dice.choice(list(self.alone))
        answer = await self.ask(*question, "strict")
        self.soak.counts["answered"] += 1
        self.soak.counts["compared"] += 1
        if (said := answer.choices[0].message.content) != self.alone[question]:
            self.soak.wrong.append(f"strict answer differs: {question}: {said!r}, alone {self.alone[question]!r}")

    async def loose(self, dice: random.Random) -> None:
        xargs = {"lvspec_relaxation": dice.choice((0.3, 0.9, 1.0))}
        await self.ask(dice.choice(TEXTS), dice.choice(self.urls), dice.choice(LENGTHS), None, vllm_xargs=xargs)
        self.soak.counts["answered"] += 1

    async def sampled(self, dice: random.Random) -> None:
        url = dice.choice([*self.urls, None])
        await self.ask(
            dice.choice(TEXTS), url, 64, None, temperature=1.0, n=dice.choice((1, 2)), seed=dice.getrandbits(16)
        )
        self.soak.counts["answered"] += 1

    async def huge(self, dice: random.Random) -> None:
        # To the very end of the context, where drafts are cut off.
        answer = await self.ask(TEXTS[1], dice.choice(self.urls), MAX_LEN, None, extra_body={"ignore_eos": True})
        self.soak.counts["answered"] += 1
        if answer.choices[0].finish_reason != "length" or answer.usage.total_tokens != MAX_LEN:
            self.soak.wrong.append(f"an answer to the end of the context has {answer.usage.total_tokens} tokens")

    async def aborted(self, dice: random.Random) -> None:
        stream = await self.ask(
            QUESTION, dice.choice(self.urls), MAX_LEN, None, stream=True, extra_body={"ignore_eos": True}
        )
        num = dice.randrange(12)
        async for _ in stream:
            num -= 1
            if num < 0:
                break
        await stream.close()
        self.soak.counts["aborted"] += 1

    async def broken(self, dice: random.Random) -> None:
        await self._refused(self.ask(QUESTION, dice.choice(self.corrupt), 8, None), "a corrupt video")

    async def bad(self, dice: random.Random) -> None:
        wrong = ({"lvspec_policy": 3}, {"lvspec_relaxation": "x"}, {"lvspec_relaxation": 7}, {"lvspec_unknown": 1})
        asked = dice.choice(wrong)
        await self._refused(self.ask(QUESTION, self.urls[0], 8, None, vllm_xargs=asked), str(asked))

    async def _refused(self, request: Any, name: str) -> None:
        try:
            await request
        except openai.APIStatusError as error:
            self.soak.counts["refused"] += 1
            if not 400 <= error.status_code < 500:
                self.soak.wrong.append(f"{name}: status {error.status_code}")
        else:
            self.soak.wrong.append(f"{name} was answered")


def memory_of(server: Server) -> int:
    root = psutil.Process(server.process.pid)
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().uss  # what is shared is counted once, or not at all
        except psutil.NoSuchProcess:
            continue
    return total


async def load(server: Server, soak: Soak, seconds: float, concurrency: int, seed: int, num_videos: int) -> None:
    work = Load(server, soak, num_videos)
    await work.prepare()
    until = time.monotonic() + seconds
    workers = [asyncio.create_task(work.work(random.Random(seed * 1000 + i), until)) for i in range(concurrency)]
    while time.monotonic() < until:
        soak.memory.append(memory_of(server))
        await asyncio.sleep(min(5.0, seconds / 20))
    await asyncio.gather(*workers)
    for _ in range(100):
        if server.metric("vllm:num_requests_running") == server.metric("vllm:num_requests_waiting") == 0:
            break
        await asyncio.sleep(0.1)
    else:
        soak.wrong.append("requests run on behind the end of the load")
    with urllib.request.urlopen(server.url + "/v1/lvspec/stats", timeout=60) as reply:
        ranks = json.load(reply)["ranks"]
    for rank, stats in enumerate(ranks):
        if stats["pages_free"] != stats["pages_total"] or stats["sequences"]:
            soak.wrong.append(f"rank {rank}: {stats['pages_total'] - stats['pages_free']} pages were not given back")
    same = [{key: value for key, value in stats.items() if key.startswith("tokens_")} for stats in ranks]
    if any(stats != same[0] for stats in same):
        soak.wrong.append(f"ranks differ: {same}")


def run(seconds: float, concurrency: int, seed: int = 0, tensor_parallel_size: int = 1, num_videos: int = 6) -> Soak:
    """A soak of a server of its own; memory is judged where it is long enough to show."""
    soak = Soak()
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if tensor_parallel_size == 2 else {}
    settings = {"method": "lvspec", "only_if_faster": False, "trace": 4}
    # Of 64 blocks that eight requests may want there are 40, so that some are preempted.
    with serve(
        TARGET, "--speculative-config", json.dumps(settings), "--max-model-len", str(MAX_LEN), "--max-num-seqs", "8",
        "--dtype", "float32", "--enforce-eager", "--served-model-name", "reference",
        "--allowed-local-media-path", str(CLIPS), *PAIRS["qwen2_5_vl"].server_arguments,
        "--num-gpu-blocks-override", "40", "--tensor-parallel-size", str(tensor_parallel_size),
        environment={"VLLM_PLUGINS": "lvspec", "VLLM_CPU_KVCACHE_SPACE": "1", **NOTHING_KEPT, **binding},
    ) as server:  # fmt: skip
        asyncio.run(load(server, soak, seconds, concurrency, seed, num_videos))
        if not server.is_healthy():
            soak.wrong.append("the server is not healthy at the end")
    return soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    options = parser.parse_args()
    soak = run(options.seconds, options.concurrency, options.seed, options.tensor_parallel_size)
    if soak.growth > MOST_GROWTH:
        soak.wrong.append(f"memory has grown by a factor of {soak.growth:.3f}; at most {MOST_GROWTH}")
    print("\n".join(soak.lines()))
    return 0 if soak.is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
