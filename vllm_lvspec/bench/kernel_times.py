"""Where steps spend a GPU's time, kernel by kernel: `python -m vllm_lvspec.bench.kernel_times TRACE`.

For the traces that `lvspec bench-growth --traces` writes. What the profiler does itself is in them: pauses are longer
than they are without it.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

_STEP = re.compile(r"K (\d+), step (\d+)")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_PAUSE = 20.0  # microseconds: shorter ones lie between any two kernels


@dataclass(frozen=True)
class Step:
    """What the device did while the host was in one step; all in milliseconds.

    `pauses`: in which it did nothing for a while, summed; `kernels`: by name how many, and their time.
    """

    drafted: int
    number: int
    total: float
    busy: float
    pauses: float
    kernels: dict[str, tuple[int, float]]


def read(path: Path) -> list[Step]:
    """Steps in order. Raises ValueError for what is no such trace."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        events = [event for event in json.loads(content)["traceEvents"] if event.get("ph") == "X"]
    except (ValueError, KeyError):
        events = []
    # The same marks are among what the device did, too.
    marked = [event for event in events if event.get("cat") == "user_annotation"]
    marks = [(found, event) for event in marked if (found := _STEP.fullmatch(event["name"]))]
    if not marks:
        raise ValueError(f"{path}: has no steps; must be a trace that `lvspec bench-growth --traces` wrote")
    on_device = sorted((event for event in events if event.get("cat") in _ON_DEVICE), key=lambda event: event["ts"])
    marks.sort(key=lambda mark: mark[1]["ts"])
    return [_step(int(found[1]), int(found[2]), event, on_device) for found, event in marks]


def _step(drafted: int, number: int, mark: dict[str, Any], on_device: list[dict[str, Any]]) -> Step:
    begin, end = mark["ts"], mark["ts"] + mark["dur"]
    kernels: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    busy, pauses, until = 0.0, 0.0, begin
    for event in on_device:
        if not begin <= event["ts"] < end:
            continue
        count, time = kernels[event["name"]]
        kernels[event["name"]] = count + 1, time + event["dur"] / 1e3
        if (pause := event["ts"] - until) > _PAUSE:
            pauses += pause
        busy += max(0.0, event["ts"] + event["dur"] - max(until, event["ts"]))
        until = max(until, event["ts"] + event["dur"])
    if end - until > _PAUSE:
        pauses += end - until
    return Step(drafted, number, (end - begin) / 1e3, busy / 1e3, pauses / 1e3, dict(kernels))


def main(
    trace: Annotated[Path, typer.Argument(help="as `lvspec bench-growth --traces` writes it")],
    most: Annotated[int, typer.Option(help="kernels of each K that are shown, those that take longest")] = 20,
) -> None:
    """Print a table of steps, and one of kernels for each K, of its last step."""
    console = Console()
    try:
        steps = read(trace)
    except (OSError, ValueError) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    table = Table("K", "step", "ms", "device busy, ms", "pauses, ms", "kernels")
    for step in steps:
        count = sum(number for number, _ in step.kernels.values())
        times = (f"{time:.2f}" for time in (step.total, step.busy, step.pauses))
        table.add_row(str(step.drafted), str(step.number), *times, str(count))
    console.print(table)
    for drafted in sorted({step.drafted for step in steps}):
        last = [step for step in steps if step.drafted == drafted][-1]
        table = Table("ms", "how many", "kernel", title=f"K {drafted}, step {last.number}")
        for name, (count, time) in sorted(last.kernels.items(), key=lambda item: -item[1][1])[:most]:
            table.add_row(f"{time:.3f}", str(count), name[:90])
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
