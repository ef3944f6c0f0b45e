"""What a rank has counted since its start, by the names of `observe.metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_lvspec.observe.metrics import MILLIONTHS, key

if TYPE_CHECKING:
    from vllm_lvspec.engine.runner import LVSpecGPUModelRunner

OUTCOMES = {
    "drafted": "drafted_requests", "length": "skipped_length", "pool_full": "skipped_pool_full",
    "embeddings": "skipped_embeddings", "cost": "skipped_cost",
}  # fmt: skip


def counts_of(runner: LVSpecGPUModelRunner) -> dict[str, int]:
    """Whole numbers only; asked for after every step, so nothing here looks at the device."""
    verification, drafter, times = runner.verification, runner.drafter.drafter, runner.step_times
    assert drafter is not None
    pool = drafter.model.pool
    seconds = {
        "target": times.target_seconds - times.verify_seconds,
        "verification": times.verify_seconds,
        "drafting": times.draft_seconds,
        "draft_prompt": drafter.prefill_seconds,
        "scoring": runner.scores.seconds,
    }
    return {
        **{key("tokens", name): count for name, count in verification.tokens_by_reason().items()},
        **{key("verified_tokens", kind): count for kind, count in verification.verified.items()},
        key("chains", "loose"): verification.counts["loose_chains"],
        key("chains", "strict"): verification.counts["strict_chains"],
        key("missing_features"): verification.counts["missing_features"],
        **{key("drafts", name): drafter.counts[count] for name, count in OUTCOMES.items()},
        key("draft_prompts"): drafter.counts["prefills"],
        key("draft_prompt_tokens", "read"): drafter.counts["read_prompt_tokens"],
        key("draft_prompt_tokens", "found"): drafter.counts["found_prompt_tokens"],
        key("decode_steps"): times.steps,
        **{key("step_seconds", part): round(value / MILLIONTHS) for part, value in seconds.items()},
        **{key("accepted_length", i): count for i, count in enumerate(verification.accepted_lengths) if count},
        key("draft_cache_usage"): round((1 - pool.num_free / pool.num_pages) / MILLIONTHS),
        key("embedding_cache_bytes"): drafter.embeddings.num_bytes,
        key("relaxation"): round(verification.relaxation / MILLIONTHS),
    }
