"""vLLM's scheduler, which passes on to the API server what the worker has counted, and takes padding for no drafts."""

from __future__ import annotations

import hashlib
from typing import Any

from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorStats
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ECConnectorOutput, ModelRunnerOutput
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_lvspec.engine.placeholders import PADDING_TOKEN_ID, num_drafted, without_padding
from vllm_lvspec.engine.requests import SALT
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
    _num_resets = 0  # of the prefix cache

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._drop_useless_padding()
        output = super().schedule(*args, **kwargs)
        self._take_fillers_for_padding(output)
        self._pass_salts_on(output)
        scheduled = output.scheduled_spec_decode_tokens.items()
        padding = {req_id: count for req_id, tokens in scheduled if (count := len(tokens) - num_drafted(tokens))}
        if padding:  # counted as what a grammar does not allow
            output.num_invalid_spec_tokens = {**(output.num_invalid_spec_tokens or {}), **padding}
        return output

    def _take_fillers_for_padding(self, output: SchedulerOutput) -> None:
        """Where all but one token of a request is known as it joins, vLLM fills it up to the length of drafts.

        Whole queues can join so, and nobody has planned for logits of what was never drafted.
        """
        drafts = output.scheduled_spec_decode_tokens
        joining = {request.req_id for request in output.scheduled_new_reqs}
        joining |= output.scheduled_cached_reqs.resumed_req_ids
        for req_id in joining & drafts.keys():
            drafts[req_id] = [PADDING_TOKEN_ID] * len(drafts[req_id])

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        self._num_resets += 1
        return super().reset_prefix_cache(*args, **kwargs)

    def _pass_salts_on(self, output: SchedulerOutput) -> None:
        """To the workers, whose drafter finds prefixes, too; of what was before a reset none is found."""
        for data in output.scheduled_new_reqs:
            salt, params = self.requests[data.req_id].cache_salt, data.sampling_params
            if params is None:
                continue
            others = {key: value for key, value in (params.extra_args or {}).items() if key != SALT}
            if salt is not None or self._num_resets:
                # A digest, because parameters are logged.
                others[SALT] = hashlib.sha256(repr((self._num_resets, salt)).encode()).hexdigest()
            params.extra_args = others or None

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        return super().get_grammar_bitmask(without_padding(scheduler_output))

    def _drop_useless_padding(self) -> None:
        """Padding makes a graph only of steps in which all have as many tokens, and no prompt is read."""
        if all(num_drafted(request.spec_token_ids) == len(request.spec_token_ids) for request in self.running):
            return
        num_running, num_waiting = self.get_request_counts()
        num_idle = self.num_waiting_for_streaming_input  # sessions that are among those who wait, but for their users
        may_join = num_waiting > num_idle and num_running + num_idle < self.max_num_active_reqs
        if may_join or len({len(request.spec_token_ids) for request in self.running}) > 1:
            for request in self.running:
                request.spec_token_ids = request.spec_token_ids[: num_drafted(request.spec_token_ids)]

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        if num_draft_tokens == (num_invalid_spec_tokens or {}).get(request_id):  # no draft at all
            return spec_decoding_stats
        return super().make_spec_decoding_stats(
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
        )

    def make_stats(
        self, *args: Any, ec_connector_stats: ECConnectorStats | None = None, **kwargs: Any
    ) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and ec_connector_stats is not None:
            take_along(stats, ec_connector_stats.data)
        return stats
