"""The dashboard without Grafana: a real Prometheus scrapes a server, and its answers are drawn as the panels ask.

python tests/serve/dashboard.py docs/dashboard.png --seconds 150
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import re
import subprocess
import tempfile
import textwrap
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import yaml
from matplotlib.figure import Figure

from vllm_lvspec.demo import QUESTION, bundled_clips
from vllm_lvspec.reference import CLIPS, PAIRS, TARGET
from vllm_lvspec.serving import _free_port, serve

DEPLOY = Path(__file__).parents[2] / "deploy"
PANELS: list[dict[str, Any]] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())["panels"]
VARIABLES = {"$__rate_interval": "15s", "$model": ".*"}
COLUMNS, ROW_INCHES = 24, 0.42


class Prometheus:
    """One that runs at `url`, and scrapes every second."""

    def __init__(self, url: str):
        self.url = url

    def get(self, path: str, **query: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=30) as reply:
            return json.load(reply)["data"]

    def series(
        self, expression: str, start: float, end: float
    ) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Labels, and `(seconds since start, value)` where there is a number."""
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        found = self.get("/api/v1/query_range", query=expression, start=start, end=end, step=1)["result"]
        return [
            (
                one["metric"],
                [(at - start, float(value)) for at, value in one["values"] if math.isfinite(float(value))],
            )
            for one in found
        ]


@contextlib.contextmanager
def prometheus(server_url: str) -> Iterator[Prometheus]:
    """Run it as `deploy/docker` does, over one server, with the alerts."""
    port = _free_port()
    config = yaml.safe_load((DEPLOY / "docker" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "grafana" / "alerts.yml")]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [server_url.removeprefix("http://")]}]
    with tempfile.TemporaryDirectory(prefix="lvspec-") as folder:
        path = Path(folder) / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            running = Prometheus(f"http://127.0.0.1:{port}")
            for _ in range(100):
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    running.get("/api/v1/status/buildinfo")
                    break
                time.sleep(0.2)
            yield running
        finally:
            process.terminate()
            process.wait(10)


def draw(running: Prometheus, start: float, end: float, path: Path) -> None:
    """All panels at their places, with titles, descriptions, units and legends, stacked where Grafana stacks them."""
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in PANELS)
    figure = Figure(figsize=(17, height * ROW_INCHES))
    for panel in PANELS:
        place = panel["gridPos"]
        axes = figure.add_axes(
            (
                (place["x"] + 1.1) / COLUMNS, 1 - (place["y"] + place["h"] - 1.2) / height,
                (place["w"] - 1.5) / COLUMNS, (place["h"] - 3.4) / height,
            )
        )  # fmt: skip
        lines = textwrap.wrap(panel["description"], 12 * place["w"])
        axes.set_title("\n".join(lines), fontsize=7, loc="left", color="#555")
        above = {"xytext": (0, 8 + 9 * len(lines)), "textcoords": "offset points"}
        axes.annotate(panel["title"], (0, 1), xycoords="axes fraction", fontsize=9, weight="bold", **above)
        found = [
            (_legend(target.get("legendFormat") or "", labels), values)
            for target in panel["targets"]
            for labels, values in running.series(target["expr"], start, end)
            if values
        ]
        defaults = panel["fieldConfig"]["defaults"]
        unit = defaults["unit"]
        if panel["type"] == "stat":
            for _, values in found:
                axes.text(0.5, 0.4, _shown(values[-1][1], unit), fontsize=22, ha="center", va="center")
            axes.axis("off")
            continue
        stacking = defaults["custom"]["stacking"]["mode"]
        if stacking == "none":
            for name, values in found:
                axes.plot(*zip(*values, strict=True), label=name, linewidth=1.5)
        else:
            times = sorted({at for _, values in found for at, _ in values})
            rows = np.array([[dict(values).get(at, 0.0) for at in times] for _, values in found])
            if stacking == "percent":
                rows, unit = rows / np.maximum(rows.sum(0), 1e-12), "percentunit"
            axes.stackplot(times, rows, labels=[name for name, _ in found], alpha=0.75)
        axes.yaxis.set_major_formatter(lambda value, _, unit=unit: _shown(value, unit))
        axes.set_xlabel("seconds", fontsize=7, loc="right", labelpad=1)
        axes.tick_params(labelsize=7)
        axes.margins(x=0)
        axes.set_ylim(bottom=0, top=1 if stacking == "percent" else None)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=5, frameon=False)
    figure.savefig(path, dpi=75)


def _shown(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "bytes":
        return f"{value / 2**20:.3g} MiB" if value >= 2**20 else f"{value / 2**10:.3g} KiB"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    return f"{value:.3g}" + {"reqps": " /s"}.get(unit, "")


def _legend(text: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), text)


def load(server_url: str, until: float, seed: int) -> None:
    """Questions of different kinds, one after another; every third one strictly."""
    client = openai.OpenAI(base_url=server_url + "/v1", api_key="none", max_retries=0)
    dice = random.Random(seed)
    clips = bundled_clips()
    while time.time() < until:
        url = dice.choice(clips).path.as_uri()
        text = dice.choice([QUESTION, "What happens first?", "How many objects are there?"])
        content: list[Any] = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": text}]
        strict = {"vllm_xargs": {"lvspec_policy": "strict"}} if dice.random() < 1 / 3 else None
        client.chat.completions.create(
            model="reference", messages=[{"role": "user", "content": content}], max_tokens=256, extra_body=strict
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seconds", type=float, default=150)
    options = parser.parse_args()
    arguments = [
        "--speculative-config", '{"method": "lvspec", "only_if_faster": false}', "--max-model-len", "1024",
        "--max-num-seqs", "4", "--enforce-eager", "--served-model-name", "reference",
        "--kv-cache-memory-bytes", "256M", "--allowed-local-media-path", str(CLIPS),
        *PAIRS["qwen2_5_vl"].server_arguments,
    ]  # fmt: skip
    with serve(TARGET, *arguments) as server, prometheus(server.url) as running:
        start = time.time()
        clients = [threading.Thread(target=load, args=(server.url, start + options.seconds, i)) for i in range(3)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        draw(running, start + 15, time.time(), options.path)


if __name__ == "__main__":
    main()
