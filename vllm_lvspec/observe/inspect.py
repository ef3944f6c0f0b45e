"""`lvspec inspect`: an answer about a video, token by token, as a page or in the terminal."""

from __future__ import annotations

import base64
import http.client
import json
import mimetypes
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import cv2
import jinja2
import openai
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_lvspec.config import METHOD
from vllm_lvspec.draft.pairs import default_draft_model
from vllm_lvspec.reference import PAIRS
from vllm_lvspec.serving import serve

REASONS = {
    "exact": "drafted, and the target's own choice",
    "loose": "drafted, another filler than the target's choice",
    "shift": "drafted, and chosen by the target at a neighbouring place",
    "target": "the target's own, because the draft was refused or had ended",
}
# For people who don't tell colours apart, every reason has a line of its own kind under its words, too.
STYLES = {"exact": "", "loose": "black on cyan", "shift": "black on yellow", "target": "bold underline"}
FRAME_HEIGHT = 168  # pixels of a shown frame


class InspectError(RuntimeError):
    """What can't be inspected, and what would be right."""


@dataclass(frozen=True)
class Question:
    """What is asked about a video, of which server. `url`: of one that runs; else `model` is served for it."""

    video: Path
    prompt: str
    url: str | None = None
    api_key: str = "none"
    model: str | None = None
    draft: str | None = None
    family: str = "qwen2_5_vl"
    policy: str | None = None
    relaxation: float | None = None
    max_tokens: int = 256


def ask(question: Question, on_wait: Callable[[float], None] = lambda seconds: None) -> dict[str, Any]:
    """The answer's trace as `/v1/lvspec/trace` gives it, with the prompt beside it."""
    if not question.video.is_file():
        raise InspectError(f"{question.video}: no such file; must be a video")
    if question.url is not None:
        return _ask_server(question, question.url.rstrip("/"))
    settings: dict[str, Any] = {"method": METHOD, "trace": 1, "only_if_faster": False}
    arguments = ["--max-num-seqs", "4", "--enforce-eager"]
    model = question.model
    if model is None:
        pair = PAIRS[question.family]
        model = str(pair.target)
        arguments += ["--max-model-len", "1024", "--kv-cache-memory-bytes", "256M", *pair.server_arguments]
        arguments += ["--served-model-name", f"{question.family}/target"]
    if question.draft is not None:
        settings["model"] = question.draft
    elif default_draft_model(model) is None:
        settings["model"] = "self"
    arguments += ["--speculative-config", json.dumps(settings)]
    with serve(model, *arguments, on_wait=on_wait, environment={"VLLM_PLUGINS": METHOD}) as server:
        return _ask_server(question, server.url + "/v1")


def _ask_server(question: Question, url: str) -> dict[str, Any]:
    client = openai.OpenAI(base_url=url, api_key=question.api_key)
    kind = mimetypes.guess_type(question.video.name)[0] or "video/mp4"
    data = f"data:{kind};base64," + base64.b64encode(question.video.read_bytes()).decode()
    asked: dict[str, Any] = {}
    if question.policy is not None:
        asked["lvspec_policy"] = question.policy
    if question.relaxation is not None:
        asked["lvspec_relaxation"] = question.relaxation
    content: list[Any] = [{"type": "video_url", "video_url": {"url": data}}, {"type": "text", "text": question.prompt}]
    try:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=question.max_tokens,
            extra_body={"vllm_xargs": asked} if asked else None,
        )
    except openai.OpenAIError as error:
        raise InspectError(f"{url}: {error}") from error
    found = fetch_trace(url, answer.id, question.api_key)
    return {**found, "prompt": question.prompt}


def fetch_trace(url: str, request_id: str, api_key: str = "none") -> dict[str, Any]:
    """A request's trace from the server whose OpenAI API is at `url`."""
    address = f"{url}/{METHOD}/trace/{urllib.parse.quote(request_id, safe='')}"
    try:
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {api_key}"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return _checked(json.load(reply), address)
    except urllib.error.HTTPError as error:
        body = error.read().decode(errors="replace")
        try:
            message = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f'{body.strip() or error.reason}; was it started with VLLM_PLUGINS={METHOD} and "trace"?'
        raise InspectError(f"{address}: {message}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InspectError(f"{address}: {error}") from None


def read_trace(path: Path) -> dict[str, Any]:
    """A trace that was saved from a server, or by this command."""
    try:
        return _checked(json.loads(path.read_text()), str(path))
    except (OSError, ValueError) as error:
        raise InspectError(f"{path}: {error}; must be what /v1/{METHOD}/trace/REQUEST gives") from None


class _Token(BaseModel):
    token_id: int
    text: str
    reason: Literal["exact", "loose", "shift", "target"]
    step: int
    target_id: int
    target_text: str | None
    draft_id: int | None
    draft_text: str | None
    relevance: float | None
    is_anchor: bool | None
    closest: list[tuple[int, float]]


class _Item(BaseModel):
    kind: str
    grid: tuple[int, int, int]
    num_tokens: int


class _Choice(BaseModel):
    request_id: str
    policy: str
    relaxation: float
    items: list[_Item]
    kept: list[int] | None
    tokens: list[_Token]
    num_steps: int
    is_finished: bool
    is_cut: bool = False


class _Found(BaseModel):
    model: str = ""
    prompt: str = ""
    choices: list[_Choice]


def _checked(found: Any, where: str) -> dict[str, Any]:
    """What a server or a file gives, with everything that is shown. Raises InspectError where it is something else."""
    try:
        return _Found.model_validate(found).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InspectError(f"{where}: {key}: {first['msg']}; must be what /v1/{METHOD}/trace/REQUEST gives") from None


@dataclass(frozen=True)
class Totals:
    """What happened to an answer's tokens. `seen`, `kept`: visual tokens of the prompt, and those the drafter saw."""

    tokens: int
    steps: int
    reasons: dict[str, int]
    seen: int
    kept: int | None

    @classmethod
    def of(cls, choice: dict[str, Any]) -> Totals:
        counts = Counter(token["reason"] for token in choice["tokens"])
        return cls(
            tokens=len(choice["tokens"]),
            steps=choice["num_steps"],
            reasons={name: counts[name] for name in REASONS},
            seen=sum(item["num_tokens"] for item in choice["items"]),
            kept=None if choice["kept"] is None else len(choice["kept"]),
        )

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / max(1, self.steps)


def show(console: Console, found: dict[str, Any]) -> None:
    """The answers in the terminal."""
    for choice in found["choices"]:
        totals = Totals.of(choice)
        answer = Text()
        for token in choice["tokens"]:
            text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in token["text"])
            answer.append(text, style=STYLES[token["reason"]])
        console.print(answer)
        table = Table(show_header=False, box=None)
        for name, meaning in REASONS.items():
            table.add_row(Text(name, style=STYLES[name]), str(totals.reasons[name]), meaning)
        console.print(table)
        console.print(
            f"{totals.tokens} tokens in {totals.steps} steps of the target: {totals.tokens_per_step:.2f} a step; "
            f"policy {choice['policy']}, relaxation {choice['relaxation']:g}"
        )
        if (state := _state(choice)) is not None:
            console.print(state, style="bold")
        if totals.kept is not None:
            console.print(f"the drafter saw {totals.kept} of {totals.seen} visual tokens")


def write_page(path: Path, found: dict[str, Any], video: Path | None) -> None:
    """One HTML file with everything in it. `video`: whose frames are shown, where the prompt has one."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((files("vllm_lvspec.observe") / "page.html.jinja").read_text(encoding="utf-8"))
    choices = [
        {**choice, "totals": Totals.of(choice), "frames": _frames(choice["items"], video), "state": _state(choice)}
        for choice in found["choices"]
    ]
    page = template.render(prompt=found["prompt"], model=found["model"], choices=choices, reasons=REASONS)
    path.write_text(page, encoding="utf-8")


def _state(choice: dict[str, Any]) -> str | None:
    """What is missing of an answer, and why; None where it is whole."""
    if choice.get("is_cut"):
        return "Tokens of this answer are missing: a trace is bounded, and there was no room for them."
    return None if choice["is_finished"] else "The request was still running: its answer goes on."


def _frames(items: Sequence[dict[str, Any]], video: Path | None) -> list[dict[str, Any]]:
    """For each step of time of each item, `rows x columns` of its tokens from number `first` on, and a picture."""
    frames = []
    first = 0
    if sum(item["kind"] == "video" for item in items) > 1:
        video = None  # nobody knows of which of them it is
    for number, item in enumerate(items):
        time, rows, columns = item["grid"]
        pictures = _pictures(video, time) if video is not None and item["kind"] == "video" else [None] * time
        for t, picture in enumerate(pictures):
            frames.append(
                {
                    "name": f"{item['kind']} {number + 1}" + (f", time {t + 1} of {time}" if time > 1 else ""),
                    "first": first + t * rows * columns,
                    "rows": rows,
                    "columns": columns,
                    "picture": picture,
                }
            )
        first += item["num_tokens"]
    return frames


def _pictures(video: Path, count: int) -> list[str | None]:
    """`count` frames of the video, evenly over its time, as data URLs; None for those that can't be read."""
    capture = cv2.VideoCapture(str(video))
    try:
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        wanted = [int((t + 0.5) / count * total) for t in range(count)]
        pictures: list[str | None] = [None] * count
        for number in range(total):
            if not capture.grab():
                break
            if number in wanted:
                is_read, frame = capture.retrieve()
                if is_read:
                    data = _encoded(frame)
                    pictures = [data if number == w else old for w, old in zip(wanted, pictures, strict=True)]
        return pictures
    finally:
        capture.release()


def _encoded(frame: Any) -> str:
    height, width = frame.shape[:2]
    size = max(1, round(width * FRAME_HEIGHT / height)), FRAME_HEIGHT
    _, data = cv2.imencode(".jpg", cv2.resize(frame, size, interpolation=cv2.INTER_AREA))
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
