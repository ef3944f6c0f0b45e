"""A run's figures as Markdown and as plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich.table import Table

from vllm_lvspec.bench.results import Figures, PolicyResult, Report

_TEMPLATE = """\
# {{ settings.suite }}: {{ settings.videos }} videos, {{ settings.samples }} questions\
{% if settings.seeds %}, seed{{ "s" if settings.seeds | length > 1 }} {{ settings.seeds | join(", ") }}{% endif %}


Target `{{ settings.model }}`{% if settings.shape %} in the shape {{ settings.shape }}{% endif %}, drafter \
`{{ settings.draft or "the plugin's choice" }}`{% if settings.draft_shape %} in the shape {{ settings.draft_shape }}\
{% endif %}, K = {{ settings.num_speculative_tokens }}, \
{{ settings.pruning }} pruning of {{ "%.0f" | format(100 * settings.pruning_ratio) }} %, {{ settings.dtype }}, \
batch size {{ settings.batch_size }}, greedy, {{ settings.num_frames }} frames. \
{{ environment.device }}, {{ environment.cores }} cores, \
{% for name, version in environment.versions.items() %}\
{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}; {{ environment.date }}\
{% if environment.resumed %}; resumed{% endif %}. Brackets hold 95 % bootstrap intervals over videos.

    {{ environment.command }}

| policy | tokens per target step | decode speed over ar | bound | facts | order | retention | same answers |
|---|---|---|---|---|---|---|---|
{% for name, p in policies.items() -%}
| {{ name }} | {{ figure(p, "mean_accepted_length", 2) }} | {{ figure(p, "speedup", 2) }} | \
{{ "%.2f" | format(p.bound.speedup) if p.bound else "–" }} | {{ figure(p, "fact_accuracy", 3) }} | \
{{ figure(p, "order_accuracy", 3) }} | {{ figure(p, "retention", 3) }} | \
{{ "%.3f" | format(p.same_answers) if p.same_answers is not none else "–" }} |
{% endfor %}

## With prompts

| policy | time to first token over ar | throughput over ar |
|---|---|---|
{% for name, p in policies.items() -%}
| {{ name }} | {{ figure(p, "first_token_over_ar", 2) }} | {{ figure(p, "throughput_over_ar", 2) }} |
{% endfor %}

## By task

| policy | task | answers | tokens each | tokens per target step | decode speed over ar | facts | retention |
|---|---|---|---|---|---|---|---|
{% for name, p in policies.items() %}{% for task, f in p.tasks.items() -%}
| {{ name }} | {{ task }} | {{ f.answers }} | {{ "%.0f" | format(f.output_tokens / f.answers) }} | \
{{ figure(f, "mean_accepted_length", 2) }} | {{ figure(f, "speedup", 2) }} | {{ figure(f, "fact_accuracy", 3) }} | \
{{ figure(f, "retention", 3) }} |
{% endfor %}{% endfor %}

{% if settings.seeds | length > 1 -%}
## By seed

| policy | seed | tokens per target step | facts | order | retention |
|---|---|---|---|---|---|
{% for name, p in policies.items() %}{% for seed, f in p.seeds.items() -%}
| {{ name }} | {{ seed }} | {{ figure(f, "mean_accepted_length", 2) }} | {{ figure(f, "fact_accuracy", 3) }} | \
{{ figure(f, "order_accuracy", 3) }} | {{ figure(f, "retention", 4) }} |
{% endfor %}{% endfor %}

{% endif %}
## Why tokens were emitted

| policy | exact | loose | shift | target |
|---|---|---|---|---|
{% for name, p in policies.items() -%}
| {{ name }} |{% for reason in ("exact", "loose", "shift", "target") %} {{ p.reasons.get(reason, 0) }} |{% endfor %}

{% endfor %}

{% if has_facts -%}
## Facts

Recall / precision by kind.

| policy |{% for kind in kinds %} {{ kind }} |{% endfor %}

|---|{% for kind in kinds %}---|{% endfor %}

{% for name, p in policies.items() -%}
| {{ name }} |{% for kind in kinds %} {{ share(p.facts.get(kind)) }} |{% endfor %}

{% endfor %}

{% endif %}
{% if has_facts -%}
## By place in the answer

Share of the statements that begin there that are true (and their number), in stretches of tokens.

| policy |{% for begin in places %} from {{ begin }} |{% endfor %}

|---|{% for begin in places %}---|{% endfor %}

{% for name, p in policies.items() -%}
| {{ name }} |{% for begin in places %} {{ stretch(p, begin) }} |{% endfor %}

{% endfor %}

{% endif %}
{% if drafters -%}
## Drafting

| policy | tokens drafted per step | drafter's prompt, ms an answer | target's scores, ms an answer |
|---|---|---|---|
{% for name, p in drafters.items() -%}
| {{ name }} | {{ "%.2f" | format(p.drafted_length or 0) }} | {{ "%.1f" | format(1000 * p.draft_prefill_seconds) }} | \
{{ "%.1f" | format(1000 * p.scoring_seconds) }} |
{% endfor %}

{% endif %}
{{ profile_tables }}
{% for name, p in policies.items() if p.bound -%}
{{ name }}: one drafted token costs {{ "%.3f" | format(p.bound.draft_cost) }} of a target step (c), verification adds \
{{ "%.3f" | format(p.bound.verify_overhead) }} (o), of which {{ "%.2f" | format(100 * p.bound.verify_share) }} % of a \
step is this package's own; T / (1 + K c + o) = {{ "%.2f" | format(p.bound.speedup) }}.
{% endfor %}
"""

_PROFILE = """\
{% for kind, parts in profiles.items() -%}
{{ heading }} Where time goes in {{ kinds_of_steps[kind] }}

Milliseconds per step, and percent of the step.

| part |{% for name in profiled %} {{ name }} |{% endfor %}

|---|{% for name in profiled %}---|{% endfor %}

{% for part in parts -%}
| {{ part }} |{% for p in profiled.values() %} {{ part_of_step(p, kind, part) }} |{% endfor %}

{% endfor %}
| whole step |{% for p in profiled.values() %} {{ part_of_step(p, kind) }} |{% endfor %}


{% endfor %}
"""


_MARKERS = "os^vD<>PXp*h"
_KINDS_OF_STEPS = {"decode": "steps without prompts", "prompt": "steps with prompts"}


def markdown(report: Report) -> str:
    """The report as a page."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False)
    kinds = list(dict.fromkeys(kind for p in report.policies.values() for kind in p.facts))
    page = environment.from_string(_TEMPLATE).render(
        settings=report.settings,
        environment=report.environment,
        policies=report.policies,
        kinds=kinds,
        has_facts=bool(kinds),
        drafters={name: p for name, p in report.policies.items() if p.draft_prefill_seconds is not None},
        figure=figure,
        share=_recall_and_precision,
        places=sorted({s.begin for p in report.policies.values() for s in p.stretches}),
        stretch=_true_share,
        profile_tables=profile_markdown(report),
    )
    return page.rstrip() + "\n"


def figure(figures: Figures, name: str, digits: int) -> str:
    """A figure with its interval, if it has one, or a dash where there is none."""
    value = getattr(figures, name)
    if value is None:
        return "–"
    if name not in figures.intervals:
        return f"{value:.{digits}f}"
    low, high = figures.intervals[name]
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _recall_and_precision(facts) -> str:
    if facts is None:
        return "–"
    shown = ["–" if value is None else f"{value:.3f}" for value in (facts.recall, facts.precision)]
    return " / ".join(shown)


def _true_share(policy: PolicyResult, begin: int) -> str:
    found = [s for s in policy.stretches if s.begin == begin]
    if not found or found[0].precision is None:
        return "–"
    return f"{found[0].precision:.3f} ({found[0].right + found[0].wrong})"


def profile_markdown(report: Report, heading: str = "##") -> str:
    """Where time goes in steps, a table for each kind of them; nothing where nobody asked for it."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False)
    return environment.from_string(_PROFILE).render(
        heading=heading,
        profiled={name: p for name, p in report.policies.items() if p.profile},
        profiles={kind: parts for kind in _KINDS_OF_STEPS if (parts := _parts(report, kind))},
        kinds_of_steps=_KINDS_OF_STEPS,
        part_of_step=_part_of_step,
    )


def _parts(report: Report, kind: str) -> list[str]:
    """Parts of steps of this kind, those that take most first."""
    seconds: Counter[str] = Counter()
    for p in report.policies.values():
        if p.profile and kind in p.profile:
            seconds.update(p.profile[kind].seconds)
    return [part for part, _ in seconds.most_common()]


def _part_of_step(policy: PolicyResult, kind: str, part: str | None = None) -> str:
    """Of a part, or of whole steps: milliseconds, and percent of the step."""
    if not policy.profile or kind not in policy.profile:
        return "–"
    seconds = policy.profile[kind].seconds
    whole = sum(seconds.values())
    if part is None:
        return f"{1000 * whole:.2f}"
    return f"{1000 * seconds.get(part, 0.0):.2f} ({100 * seconds.get(part, 0.0) / whole:.1f} %)"


def profile(report: Report) -> list[Table]:
    """Where time goes in steps, a table for each kind of them, to be printed; none where nobody asked for it."""
    tables = []
    for kind, title in _KINDS_OF_STEPS.items():
        policies = {name: p for name, p in report.policies.items() if p.profile and kind in p.profile}
        if not policies:
            continue
        table = Table("part", *policies, title=f"{title}: ms per step, percent of it")
        for part in [*_parts(report, kind), None]:
            shown = (_part_of_step(p, kind, part) for p in policies.values())
            table.add_row(part or "whole step", *shown, end_section=part is None)
        tables.append(table)
    return tables


def plot_profile(report: Report, path: Path) -> None:
    """Milliseconds per step by part, a panel for each kind of step, as a PNG; none where nobody asked for it."""
    kinds = [kind for kind in _KINDS_OF_STEPS if _parts(report, kind)]
    if not kinds:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name, p in report.policies.items() if p.profile]
    parts = list(dict.fromkeys(part for kind in kinds for part in _parts(report, kind)))
    colours = dict(zip(parts, (pyplot.get_cmap("tab20")(i) for i in range(20)), strict=False))
    figure, axes = pyplot.subplots(
        len(kinds), 1, figsize=(9, 1.6 + len(kinds) * (0.9 + 0.35 * len(names))), layout="constrained", squeeze=False
    )
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        before = [0.0] * len(names)
        for part in parts:
            seen = [(report.policies[name].profile or {}).get(kind) for name in names]
            widths = [1000 * profile.seconds.get(part, 0.0) if profile else 0.0 for profile in seen]
            axis.barh(names, widths, left=before, color=colours[part], label=part)
            before = [b + w for b, w in zip(before, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_title(_KINDS_OF_STEPS[kind], fontsize="small")
        axis.set_xlabel("ms per step", fontsize="small")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="x-small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def pareto(report: Report, path: Path) -> None:
    """Facts kept over accepted length, a point for each policy with intervals, as a PNG; none without retention.

    Peers of one policy that differ in relaxation alone are joined.
    """
    points: dict[str, list[tuple[str, PolicyResult]]] = {}
    for name, p in report.policies.items():
        if p.retention is None or p.mean_accepted_length is None or name == "ar":
            continue
        policy, *settings = name.split(":")
        values = {key: value for key, _, value in (s.partition("=") for s in settings)}
        own = values.pop("relaxation", "")
        label = " ".join([policy, *(f"{k}={v or 'none'}" for k, v in values.items())])
        points.setdefault(label, []).append((own, p))
    if sum(map(len, points.values())) < 3:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    colours = pyplot.get_cmap("tab20" if len(points) > 10 else "tab10")
    for i, (label, group) in enumerate(points.items()):
        group.sort(key=lambda pair: pair[1].mean_accepted_length or 0)
        x, y = ([getattr(p, key) for _, p in group] for key in ("mean_accepted_length", "retention"))
        errors = [_errors([p for _, p in group], key) for key in ("mean_accepted_length", "retention")]
        axis.errorbar(
            x, y, xerr=errors[0], yerr=errors[1], marker=_MARKERS[i % len(_MARKERS)], color=colours(i % colours.N),
            markersize=5, linewidth=1, elinewidth=0.5, capsize=2, label=label,
        )  # fmt: skip
        for (own, _), place in zip(group, zip(x, y, strict=True), strict=True):
            axis.annotate(own, place, textcoords="offset points", xytext=(4, 4), fontsize="x-small")
    axis.axhline(1, color="grey", linewidth=0.8, zorder=0)
    axis.set_xlabel("tokens per target step")
    axis.set_ylabel("facts kept of ar's")
    axis.set_title("numbers at points: relaxation", fontsize="small")
    axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _errors(policies: Sequence[Figures], key: str) -> list[list[float]]:
    """How far intervals reach below and above the figures."""
    values = [getattr(p, key) for p in policies]
    below, above = zip(*(p.intervals[key] for p in policies), strict=True)
    return [
        [max(v - low, 0) for v, low in zip(values, below, strict=True)],
        [max(high - v, 0) for v, high in zip(values, above, strict=True)],
    ]


def plot(report: Report, path: Path) -> None:
    """Accepted length, speed and retention of every policy by task, with intervals, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("mean_accepted_length", "tokens per target step"),
        ("speedup", "decode speed over ar"),
        ("retention", "facts kept of ar's"),
    ]
    names = list(report.policies)
    tasks = list(dict.fromkeys(task for p in report.policies.values() for task in p.tasks))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), layout="constrained")
    width = 0.8 / len(names)
    for axis, (key, title) in zip(axes, panels, strict=True):
        for i, name in enumerate(names):
            result = report.policies[name]
            whole = [result] if len(tasks) > 1 else []
            shown = [(x, f) for x, f in enumerate([*whole, *result.tasks.values()]) if getattr(f, key) is not None]
            if not shown:
                continue
            values = [getattr(f, key) for _, f in shown]
            errors = _errors([f for _, f in shown], key)
            places = [x + (i - (len(names) - 1) / 2) * width for x, _ in shown]
            axis.bar(places, values, width, yerr=errors, capsize=2, label=name, error_kw={"elinewidth": 0.8})
        groups = ["all", *tasks] if len(tasks) > 1 else tasks
        axis.set_xticks(range(len(groups)), groups, rotation=20)
        axis.set_title(title)
        if key != "mean_accepted_length":
            axis.axhline(1, color="grey", linewidth=0.8, zorder=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 4), fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
