"""Facts right and accepted lengths of the reference pair, in vLLM, on scenes it was not trained on.

    python -m vllm_lvspec.reference.evaluate --samples 60 --seed 500000

Every run answers the same videos one at a time. Intervals are 95 % bootstrap over videos.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vllm_lvspec.reference import DRAFT, TARGET
from vllm_lvspec.reference.scenes import Scene, score_caption, video_item
from vllm_lvspec.reference.train import SEED_OFFSET

PROMPT = (
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Describe this clip in detail.<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@dataclass
class Run:
    """Per video: share of facts right, order right, tokens after the first, target steps, drafted and accepted."""

    answers: list[list[int]] = field(default_factory=list)
    facts: list[float] = field(default_factory=list)
    order: list[bool] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)


def run(scenes: list[Scene], target: Path, lvspec: dict[str, Any] | None, dtype: str) -> Run:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(target),
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=4,
        kv_cache_memory_bytes=2**28,
        speculative_config=lvspec,
        disable_log_stats=False,
        enable_prefix_caching=False,
    )
    result = Run()
    try:
        for scene in scenes:
            before = _counters(llm)
            prompt: Any = {"prompt": PROMPT, "multi_modal_data": {"video": [video_item(scene.render())]}}
            (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=200), use_tqdm=False)
            drafted, accepted = (a - b for a, b in zip(_counters(llm), before, strict=True))
            score = score_caption(scene, output.outputs[0].text)
            result.answers.append(list(output.outputs[0].token_ids))
            result.facts.append(score.accuracy)
            result.order.append(score.order_right)
            result.tokens.append(len(output.outputs[0].token_ids) - 1)
            result.accepted.append(accepted)
            result.drafted.append(drafted)
    finally:
        llm.llm_engine.engine_core.shutdown()
    return result


def _counters(llm: Any) -> tuple[float, float]:
    totals = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return (
        totals.get("vllm:spec_decode_num_draft_tokens", 0.0),
        totals.get("vllm:spec_decode_num_accepted_tokens", 0.0),
    )


def interval(numerators: list[float], denominators: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Ratio of sums with its 95 % bootstrap interval."""
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    if below.sum() == 0:
        return 0.0, 0.0, 0.0
    picks = np.random.default_rng(seed).integers(0, len(above), (2000, len(above)))
    sums = below[picks].sum(1)
    ratios = above[picks].sum(1) / np.where(sums > 0, sums, np.nan)
    low, high = np.nanpercentile(ratios, [2.5, 97.5])
    return above.sum() / below.sum(), float(low), float(high)


def main(
    samples: int = 60,
    seed: int = 500_000,
    num_speculative_tokens: int = 10,
    dtype: str = "bfloat16",
    target: Path = TARGET,
    draft: Path = DRAFT,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    if seed + samples > SEED_OFFSET:
        raise typer.BadParameter(f"seed={seed}: scenes from {SEED_OFFSET} on were trained with; stay below")
    scenes = [Scene.from_seed(seed + i) for i in range(samples)]
    base = {"method": "lvspec", "model": str(draft), "num_speculative_tokens": num_speculative_tokens}
    variants: dict[str, dict[str, Any] | None] = {
        "autoregressive": None,
        "strict, 0 % pruned": {**base, "pruning": "none"},
        "strict, 90 % pruned": {**base, "pruning": "uniform", "pruning_ratio": 0.9},
    }
    table = Table(title=f"{samples} videos, seeds {seed}-{seed + samples - 1}, K={num_speculative_tokens}, {dtype}")
    for heading in ("", "mean accepted length", "drafts accepted", "facts right", "order right", "same answers"):
        table.add_column(heading)
    results: dict[str, Any] = {}
    plain: list[list[int]] = []
    for name, lvspec in variants.items():
        outcome = run(scenes, target, lvspec, dtype)
        plain = plain or outcome.answers
        steps = [t - a for t, a in zip(outcome.tokens, outcome.accepted, strict=True)]
        length = interval([float(t) for t in outcome.tokens], steps)
        rate = interval(outcome.accepted, outcome.drafted)
        same = sum(a == b for a, b in zip(outcome.answers, plain, strict=True))
        results[name] = {
            "mean_accepted_length": length,
            "acceptance_rate": rate,
            "fact_accuracy": float(np.mean(outcome.facts)),
            "order_accuracy": float(np.mean(outcome.order)),
            "same_answers": same / samples,
        }
        table.add_row(
            name,
            f"{length[0]:.2f} [{length[1]:.2f}, {length[2]:.2f}]",
            f"{rate[0]:.3f} [{rate[1]:.3f}, {rate[2]:.3f}]" if lvspec else "-",
            f"{np.mean(outcome.facts):.3f}",
            f"{np.mean(outcome.order):.3f}",
            f"{same} of {samples}",
        )
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    typer.run(main)
