"""A run's figures as Markdown and as plots."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from vllm_lvspec.bench.results import Figures, Report

_TEMPLATE = """\
# {{ settings.suite }}: {{ settings.videos }} videos, {{ settings.samples }} questions\
{% if settings.seed is not none %}, seed {{ settings.seed }}{% endif %}


Target `{{ settings.model }}`{% if settings.shape %} in the shape {{ settings.shape }}{% endif %}, drafter \
`{{ settings.draft or "the plugin's choice" }}`, K = {{ settings.num_speculative_tokens }}, \
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

## By task

| policy | task | answers | tokens each | tokens per target step | decode speed over ar | facts | retention |
|---|---|---|---|---|---|---|---|
{% for name, p in policies.items() %}{% for task, f in p.tasks.items() -%}
| {{ name }} | {{ task }} | {{ f.answers }} | {{ "%.0f" | format(f.output_tokens / f.answers) }} | \
{{ figure(f, "mean_accepted_length", 2) }} | {{ figure(f, "speedup", 2) }} | {{ figure(f, "fact_accuracy", 3) }} | \
{{ figure(f, "retention", 3) }} |
{% endfor %}{% endfor %}

{% if has_facts -%}
## Facts

Recall / precision by kind.

| policy |{% for kind in kinds %} {{ kind }} |{% endfor %}

|---|{% for kind in kinds %}---|{% endfor %}

{% for name, p in policies.items() -%}
| {{ name }} |{% for kind in kinds %} {{ share(p.facts.get(kind)) }} |{% endfor %}

{% endfor %}

{% endif %}
{% for name, p in policies.items() if p.bound -%}
{{ name }}: one drafted token costs {{ "%.3f" | format(p.bound.draft_cost) }} of a target step (c), verification adds \
{{ "%.3f" | format(p.bound.verify_overhead) }} (o); T / (1 + K c + o) = {{ "%.2f" | format(p.bound.speedup) }}.
{% endfor %}
"""


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
        figure=_figure,
        share=_recall_and_precision,
    )
    return page.rstrip() + "\n"


def _figure(figures: Figures, name: str, digits: int) -> str:
    value = getattr(figures, name)
    if value is None:
        return "–"
    low, high = figures.intervals[name]
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _recall_and_precision(facts) -> str:
    if facts is None:
        return "–"
    shown = ["–" if value is None else f"{value:.3f}" for value in (facts.recall, facts.precision)]
    return " / ".join(shown)


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
            shown = [(x, f) for x, f in enumerate([result, *result.tasks.values()]) if getattr(f, key) is not None]
            if not shown:
                continue
            values = [getattr(f, key) for _, f in shown]
            lows, highs = zip(*(f.intervals[key] for _, f in shown), strict=True)
            errors = [
                [max(v - low, 0) for v, low in zip(values, lows, strict=True)],
                [max(high - v, 0) for v, high in zip(values, highs, strict=True)],
            ]
            places = [x + (i - (len(names) - 1) / 2) * width for x, _ in shown]
            axis.bar(places, values, width, yerr=errors, capsize=2, label=name, error_kw={"elinewidth": 0.8})
        axis.set_xticks(range(len(tasks) + 1), ["all", *tasks], rotation=20)
        axis.set_title(title)
        if key != "mean_accepted_length":
            axis.axhline(1, color="grey", linewidth=0.8, zorder=0)
    axes[0].margins(y=0.25)  # room for the names
    axes[0].legend(fontsize="small", loc="upper left", ncols=len(names))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
