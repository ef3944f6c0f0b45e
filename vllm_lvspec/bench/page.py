"""`python -m vllm_lvspec.bench.page FOLDER`: the benchmarks' page, from the JSON files of their runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from jinja2 import Environment, StrictUndefined

from vllm_lvspec.bench.growth import COST_HEADINGS, GrowthReport, accepted_rows, cost_rows
from vllm_lvspec.bench.report import figure, profile_markdown
from vllm_lvspec.bench.results import Report
from vllm_lvspec.bench.served import ServedReport, shown

_TEMPLATE = """\
# Benchmarks

Made by `make benchmarks-page` from the files in [benchmarks/](benchmarks/), which `lvspec bench`, `lvspec bench-serve`
and `lvspec bench-growth` have written; what the columns mean is in [bench.md](bench.md). Brackets hold 95 % bootstrap
intervals. `ar` is vLLM without speculation, in the same run on the same machine. The bundled pairs are small; with
`--shape` the target costs what a text model of that size costs, with the same answers.
{% for name, report in reports.items() %}
{% set settings = report.settings %}

## {{ settings.title or name }}

{{ models(report) }}, {{ settings.dtype }}, {{ about(report) }}. \
{{ report.environment.device }}, {{ report.environment.cores }} cores, \
{% for package, version in report.environment.versions.items() %}\
{{ package }} {{ version }}{{ ", " if not loop.last }}{% endfor %}; {{ report.environment.date }}.

    {{ report.environment.command }}

{% if is_served(report) %}
| at once | policy | throughput over ar | time to first token over ar | decode speed over ar |
|---|---|---|---|---|
{% for at_once, servers in report.loads.items() %}{% for policy, served in servers.items() -%}
| {{ at_once }} |{% for text in shown(policy, served) %} {{ text }} |{% endfor %}

{% endfor %}{% endfor %}
{% elif is_growth(report) %}
{% for measured in report.measured %}
### {{ measured.name }}

The drafter's weights take {{ "%.3f" | format(measured.draft_gib) }} GiB.
{% if measured.token_seconds %}
A drafted token behind few others and behind many takes {{ milliseconds(measured.token_seconds["vLLM"]) }} by vLLM's \
layers and {{ milliseconds(measured.token_seconds["lvspec"]) }} by this package's; {{ measured.draft_layers }}'s were \
used.
{% endif %}

| K | tokens per step | decode speed over no drafts |
|---|---|---|
{% for length, row in accepted_rows(measured).items() -%}
| {{ length }} |{% for text in row %} {{ text }} |{% endfor %}

{% endfor %}

| {{ cost_headings | join(" | ") }} |
|{% for _ in cost_headings %}---|{% endfor %}

{% for row in cost_rows(measured) -%}
|{% for text in row %} {{ text }} |{% endfor %}

{% endfor %}
{% endfor %}
{% else %}
| policy | tokens per target step | decode speed over ar | of the bound | time to first token over ar | \
throughput over ar | retention |
|---|---|---|---|---|---|---|
{% for policy, p in report.policies.items() -%}
| {{ policy }} | {{ figure(p, "mean_accepted_length", 2) }} | {{ figure(p, "speedup", 2) }} | \
{{ "%.2f of %.2f" | format(p.speedup / p.bound.speedup, p.bound.speedup) if p.bound else "–" }} | \
{{ figure(p, "first_token_over_ar", 2) }} | {{ figure(p, "throughput_over_ar", 2) }} | {{ figure(p, "retention", 3) }} |
{% endfor %}

{{ profile_markdown(report, "###") }}
{% endif %}
{% if name in plots %}

![{{ settings.title or name }}](benchmarks/{{ name }}.png)
{% endif %}
{% endfor %}
"""


def page(folder: Path) -> str:
    """All runs in `folder`, in the order of their files' names."""
    reports = {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    text = environment.from_string(_TEMPLATE).render(
        reports=reports,
        about=_about,
        models=_models,
        is_served=lambda report: isinstance(report, ServedReport),
        is_growth=lambda report: isinstance(report, GrowthReport),
        plots={path.stem for path in folder.glob("*.png")},
        accepted_rows=accepted_rows,
        cost_rows=cost_rows,
        cost_headings=COST_HEADINGS,
        milliseconds=_milliseconds,
        shown=shown,
        figure=figure,
        profile_markdown=profile_markdown,
    )
    lines: list[str] = []
    for line in text.splitlines():
        if line or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).rstrip() + "\n"


def _milliseconds(seconds: list[float]) -> str:
    return " and ".join(f"{1e3 * each:.2f}" for each in seconds) + " ms"


AnyReport = Report | ServedReport | GrowthReport


def _read(path: Path) -> AnyReport:
    content = json.loads(path.read_text())
    kinds: dict[str, type[AnyReport]] = {"loads": ServedReport, "measured": GrowthReport}
    (kind,) = [kinds[key] for key in kinds if key in content] or [Report]
    return kind.model_validate(content)


def _models(report: AnyReport) -> str:
    if isinstance(report, GrowthReport):
        return f"The bundled pair {report.settings.family} in the shapes that are named"
    settings = report.settings
    shape, draft = f" in the shape {settings.shape}" if settings.shape else "", settings.draft or "the plugin's choice"
    return f"Target `{settings.model}`{shape}, drafter `{draft}`"


def _about(report: AnyReport) -> str:
    """What was asked, and how."""
    if isinstance(report, GrowthReport):
        growth = report.settings
        return f"{growth.samples} captions (seed {growth.seed}), `{growth.policy}`, greedy"
    if isinstance(report, ServedReport):
        settings = report.settings
        return (
            f"{settings.samples} requests ({settings.task}, seed {settings.seed}) in each of {settings.rounds} rounds, "
            f"up to {settings.max_tokens} tokens each, greedy"
        )
    s = report.settings
    seeds = f", seed{'s' if len(s.seeds) > 1 else ''} {', '.join(map(str, s.seeds))}" if s.seeds else ""
    turns = ", all policies in turn" if s.side_by_side else ""
    repeats = f", the median of {s.repeats}" if s.repeats > 1 else ""
    return (
        f"{s.samples} questions ({', '.join(s.tasks)}{seeds}), batch size {s.batch_size}, K = "
        f"{s.num_speculative_tokens}, {s.pruning} pruning of {100 * s.pruning_ratio:.0f} %, greedy{turns}{repeats}"
    )


def main(folder: Annotated[Path, typer.Argument(help="with the JSON files")]) -> None:
    """Print the page."""
    if not any(folder.glob("*.json")):
        raise typer.BadParameter(f"{str(folder)!r}: must be a folder with JSON files of runs")
    print(page(folder), end="")


if __name__ == "__main__":
    typer.run(main)
