"""vLLM's scheduler, which passes on to the API server what the worker has counted."""

from __future__ import annotations

from typing import Any

from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorStats
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ECConnectorOutput, ModelRunnerOutput

from vllm_lvspec.observe.metrics import take_along


def with_changes(output: ModelRunnerOutput, changes: dict[str, int]) -> ModelRunnerOutput:
    """What a step returns, with `changes` as the statistics of an encoder connector.

    That is the one open field that reaches the scheduler; such connectors are refused, so nobody else writes there.
    """
    if not changes:
        return output
    return ModelRunnerOutput.with_ec_conn_output(
        output, ECConnectorOutput(ec_connector_stats=ECConnectorStats(changes))
    )


class LVSpecScheduler(Scheduler):
    def make_stats(
        self, *args: Any, ec_connector_stats: ECConnectorStats | None = None, **kwargs: Any
    ) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and ec_connector_stats is not None:
            take_along(stats, ec_connector_stats.data)
        return stats
