"""`lvspec demo`: the bundled pair, served by vLLM, describes videos over the OpenAI API."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
from rich.console import Console
from rich.status import Status
from rich.table import Table

from vllm_lvspec.bench.videofacts.scene import Scene
from vllm_lvspec.bench.videofacts.score import Score, score_answer
from vllm_lvspec.bench.videofacts.tasks import make_task
from vllm_lvspec.reference import CLIPS, PAIRS, TARGET
from vllm_lvspec.serving import Server, serve

QUESTION = "Describe the video in full detail."


@dataclass(frozen=True)
class Clip:
    path: Path
    scene: Scene

    @property
    def url(self) -> str:
        return "data:video/mp4;base64," + base64.b64encode(self.path.read_bytes()).decode()

    def score(self, text: str) -> Score:
        """What of the scene `text`, a long caption, tells."""
        return score_answer(self.scene, make_task(self.scene, "caption", np.random.default_rng(0)), text)


@dataclass
class Result:
    """What one server did with all clips."""

    name: str
    tokens: int = 0
    seconds: float = 0.0
    steps: float = 0.0
    right: int = 0
    wrong: int = 0
    facts: int = 0
    answers: tuple[str, ...] = ()


def bundled_clips() -> list[Clip]:
    """The generated videos that come with the package."""
    seeds = json.loads((CLIPS / "seeds.json").read_text())
    return [Clip(CLIPS / name, Scene.from_seed(seed)) for name, seed in sorted(seeds.items())]


def run_demo(console: Console, max_tokens: int = 256) -> None:
    """Serve the pair with and without the drafter, show a streamed answer and a table of both."""
    clips = bundled_clips()
    common = [
        "--max-model-len",
        "1024",
        "--max-num-seqs",
        "4",
        "--kv-cache-memory-bytes",
        "256M",
        "--served-model-name",
        "reference",
        *PAIRS["qwen2_5_vl"].server_arguments,
    ]
    results: list[Result] = []
    # One server verifies loosely or strictly, as each request asks.
    for names, arguments in (
        (("lvspec", "strict"), ["--speculative-config", "lvspec"]),
        (("autoregressive",), []),
    ):
        shown = " ".join(["vllm serve", TARGET.name, *arguments])
        console.print(f"starting {shown} (about half a minute)")
        with console.status(shown) as status:
            with serve(TARGET, *common, *arguments, on_wait=partial(_show, status, shown)) as server:
                status.stop()
                console.print(f"[green]●[/] {shown} answers at {server.url}/v1")
                results += [_ask_all(console, server, name, clips, max_tokens, name == "lvspec") for name in names]
                status.start()
                status.update("the server is stopped")
    console.print(_table(results))
    console.print(
        "The bundled target is so small that a drafted token costs a fifth of one of its steps: what is saved here are "
        "target steps more than seconds."
    )
    loose, strict, plain = results
    same = sum(a == b for a, b in zip(strict.answers, plain.answers, strict=True))
    console.print(
        f"strict: {same} of {len(clips)} answers are the same to the letter as without a drafter (weights are "
        "bfloat16; where two tokens are as good as equally likely, one row and eleven rows round differently in vLLM "
        f"itself). lvspec: other words; {loose.right} of {loose.facts} facts are told, {plain.right} without a drafter."
    )


def _show(status: Status, shown: str, seconds: float) -> None:
    status.update(f"[bold]{shown}[/]: the engine starts ({seconds:.0f} s)")


def _ask_all(
    console: Console, server: Server, name: str, clips: Sequence[Clip], max_tokens: int, stream_first: bool
) -> Result:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    policy = None if name == "autoregressive" else name
    _ask(client, clips[-1], 8, policy)  # the first request of a server is slower
    before = _accepted(server)
    result = Result(name)
    answers = []
    for i, clip in enumerate(clips):
        show = console if stream_first and i == 0 else None
        if show is not None:
            show.print(f"\n[bold]{clip.path.name}[/]  {QUESTION}")
        text, tokens, seconds = _ask(client, clip, max_tokens, policy, show)
        score = clip.score(text)
        answers.append(text)
        result.tokens += tokens - 1  # the first token is the prefill's
        result.seconds += seconds
        result.right += sum(score.right.values())
        result.wrong += sum(score.wrong.values())
        result.facts += sum(score.required.values())
    result.answers = tuple(answers)
    result.steps = result.tokens - (_accepted(server) - before)
    return result


def _ask(
    client: openai.OpenAI, clip: Clip, max_tokens: int, policy: str | None, show: Console | None = None
) -> tuple[str, int, float]:
    """Answer, number of tokens, and seconds from the first token to the last."""
    content: list[Any] = [{"type": "video_url", "video_url": {"url": clip.url}}, {"type": "text", "text": QUESTION}]
    stream = client.chat.completions.create(
        model="reference",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"vllm_xargs": {"lvspec_policy": policy}} if policy else None,
    )
    text, tokens, first, last = "", 0, 0.0, 0.0
    for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        if chunk.choices and (piece := chunk.choices[0].delta.content):
            last = time.perf_counter()
            first = first or last
            text += piece
            if show is not None:
                show.print(piece, end="", style="cyan")
    if show is not None:
        show.print("\n")
    return text, tokens, last - first


def _accepted(server: Server) -> float:
    """Drafted tokens accepted so far; a server without a drafter has no such series."""
    return server.metric("vllm:spec_decode_num_accepted_tokens_total")


def _table(results: Sequence[Result]) -> Table:
    table = Table(title=f"{len(bundled_clips())} clips, one at a time")
    for heading in ("", "tokens per target step", "tokens/s", "facts told", "false ones"):
        table.add_column(heading, justify="left" if not heading else "right")
    for result in sorted(results, key=lambda r: r.name):
        table.add_row(
            result.name,
            f"{result.tokens / result.steps:.2f}",
            f"{result.tokens / result.seconds:.0f}",
            f"{result.right} of {result.facts}",
            str(result.wrong),
        )
    return table
