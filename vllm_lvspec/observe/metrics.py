"""What a server's `/metrics` says of drafting and verification.

The worker counts; each step, what has changed goes with vLLM's own statistics to the API server that records them
(`engine/scheduler.py`), so several API servers and tensor-parallel ranks are counted as vLLM counts them itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import prometheus_client
from prometheus_client.metrics import MetricWrapperBase
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase, StatLoggerManager
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from vllm_lvspec.config import MAX_SPECULATIVE_TOKENS, METHOD
from vllm_lvspec.engine.arguments import lvspec_settings

MILLIONTHS = 1e-6  # what is no whole number travels as a number of these


@dataclass(frozen=True)
class Metric:
    """A family of series. `label` tells `values` apart; counts that arrive are multiplied by `unit`."""

    kind: type[MetricWrapperBase]
    documentation: str
    label: str | None = None
    values: tuple[str, ...] = ()
    unit: float = 1


# Names are those of the series but for the prefix `lvspec:`, and `_total` behind counters.
METRICS: dict[str, Metric] = {
    "tokens": Metric(
        prometheus_client.Counter,
        "Emitted tokens by why they were: exact (drafted, and the target's choice), loose (drafted, another filler "
        "than the target's choice), shift (drafted, chosen by the target nearby), target (the target's own).",
        "reason",
        ("exact", "loose", "shift", "target"),
    ),
    "verified_tokens": Metric(
        prometheus_client.Counter,
        "Drafted tokens by how they were verified: anchors and fillers of loose chains by their relaxation (ties, "
        "thresholds and what is drafted behind an end apart), tokens of strict chains.",
        "kind",
        ("anchor", "filler", "strict"),
    ),
    "chains": Metric(
        prometheus_client.Counter,
        "Verified chains (one per request and step with a draft) by how they were verified.",
        "verification",
        ("loose", "strict"),
    ),
    "missing_features": Metric(
        prometheus_client.Counter,
        "Requests verified strictly because features of their visual tokens were not in the cache.",
    ),
    "drafts": Metric(
        prometheus_client.Counter,
        "Requests of steps by whether they were drafted for, or why not: no room left in their length, the drafter's "
        "cache full, their visual embeddings gone, or drafting would not have paid.",
        "outcome",
        ("drafted", "length", "pool_full", "embeddings", "cost"),
    ),
    "draft_prompts": Metric(prometheus_client.Counter, "Prompts that the drafter has read, or found read."),
    "draft_prompt_tokens": Metric(
        prometheus_client.Counter,
        "Tokens that the drafter sees of these by where their keys and values are from: read, or found in pages of an "
        "earlier prompt that began alike.",
        "source",
        ("read", "found"),
    ),
    "decode_steps": Metric(prometheus_client.Counter, "Steps in which nothing was prefilled."),
    "step_seconds": Metric(
        prometheus_client.Counter,
        "Seconds of decode_steps by part, of drafts on the device's clock; draft_prompt and scoring are of all steps.",
        "part",
        ("target", "verification", "drafting", "draft_prompt", "scoring"),
        MILLIONTHS,
    ),
    "accepted_length": Metric(
        prometheus_client.Histogram, "Drafted tokens accepted per verified chain, without the target's own token."
    ),
    "draft_cache_usage": Metric(
        prometheus_client.Gauge, "Share of the drafter's KV cache in use, 0 to 1.", unit=MILLIONTHS
    ),
    "embedding_cache_bytes": Metric(prometheus_client.Gauge, "Visual embeddings that the drafter keeps."),
    "relaxation": Metric(
        prometheus_client.Gauge,
        "Mean relaxation (lambda, the share of fillers) of the chains of the last step with loose ones.",
        unit=MILLIONTHS,
    ),
}
SEPARATOR = "/"


@functools.cache  # asked for about thirty names after every step
def key(name: str, value: str | int | None = None) -> str:
    """How a series of `METRICS[name]` is called on its way."""
    return name if value is None else f"{name}{SEPARATOR}{value}"


class Changes:
    """What has changed of `{key: number}` since it was last asked: counts by how much, gauges to what."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}

    def since_last(self, now: Mapping[str, int]) -> dict[str, int]:
        changes = {}
        for name, value in now.items():
            before = self._before.get(name, 0)
            if value != before:
                is_gauge = name in METRICS and METRICS[name].kind is prometheus_client.Gauge
                changes[name] = value if is_gauge else value - before
        self._before = dict(now)
        return changes


LABELS = ("model_name", "engine")  # as vLLM's
LENGTHS = (*range(17), 20, 24, 32, 48, 64, 96, MAX_SPECULATIVE_TOKENS)  # the same for every engine of a process


@functools.cache
def _families() -> dict[str, MetricWrapperBase]:
    """One of each for the process, however many engines it starts."""
    families = {}
    for name, metric in METRICS.items():
        labels = LABELS if metric.label is None else (*LABELS, metric.label)
        options: dict[str, Any] = {}
        if metric.kind is prometheus_client.Gauge:
            options["multiprocess_mode"] = "mostrecent"
        elif metric.kind is prometheus_client.Histogram:
            options["buckets"] = LENGTHS
        families[name] = metric.kind(f"{METHOD}:{name}", metric.documentation, labels, **options)
    return families


class LVSpecStatLogger(StatLoggerBase):
    """Writes what arrives into the series of one engine."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0):
        self._families = _families()
        self._labels = str(vllm_config.model_config.served_model_name), str(engine_index)
        for name, metric in METRICS.items():  # a series that begins at 0 has a rate from its first event on
            for value in metric.values or (None,):
                self._series(name, value)

    def _series(self, name: str, value: str | None) -> Any:
        return self._families[name].labels(*self._labels, *([] if value is None else [value]))

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is None:
            return
        for name, count in taken_along(scheduler_stats).items():
            name, _, value = name.partition(SEPARATOR)
            metric = METRICS.get(name)
            if metric is None or count < 0:  # whatever it is, no request ends for it
                continue
            if metric.kind is prometheus_client.Histogram:
                series = self._series(name, None)
                for _ in range(count):
                    series.observe(int(value))
            elif metric.kind is prometheus_client.Gauge:
                self._series(name, None).set(count * metric.unit)
            else:
                self._series(name, value or None).inc(count * metric.unit)

    def log_engine_initialized(self) -> None:
        pass


def record_engines_with_lvspec() -> None:
    """Have vLLM give every engine with lvspec an `LVSpecStatLogger`, where it has loggers at all.

    An entry point of the group `vllm.stat_logger_plugins` would do it for engines without lvspec, too, and would switch
    statistics on where `--disable-log-stats` has switched them off.
    """
    if getattr(StatLoggerManager, "_lvspec_taught", False):
        return
    make = StatLoggerManager.__init__

    @functools.wraps(make)
    def wrapper(
        self: StatLoggerManager,
        vllm_config: VllmConfig,
        engine_idxs: list[int] | None = None,
        custom_stat_loggers: list | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if lvspec_settings(vllm_config) is not None:
            custom_stat_loggers = [*(custom_stat_loggers or []), LVSpecStatLogger]
        make(self, vllm_config, engine_idxs, custom_stat_loggers, *args, **kwargs)

    StatLoggerManager.__init__ = wrapper
    StatLoggerManager._lvspec_taught = True


def take_along(stats: SchedulerStats, changes: dict[str, int]) -> None:
    """Put `changes` where they reach `record`.

    vLLM's statistics have no field for others. This one is a mapping of names to whole numbers, about adapters, which
    an engine with lvspec refuses to have; and vLLM looks into it only where there may be some.
    """
    stats.waiting_lora_adapters = changes


def taken_along(stats: SchedulerStats) -> dict[str, int]:
    return stats.waiting_lora_adapters
