"""What this package adds to steps, part by part, beside vLLM's own runner without speculation in the same process.

Forwards are left out of the sum: the same weights in two engines take a few per cent more or less time by where in
memory they happen to lie, which is more than what is looked for here.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_lvspec.bench.lengths import answer, target_engine
from vllm_lvspec.bench.run import prompt_writer, running_engine, turned, within_reach
from vllm_lvspec.bench.samples import Sample, videofacts
from vllm_lvspec.config import METHOD
from vllm_lvspec.engine.profile import DECODE, FORWARDS, PROMPT, StepProfile
from vllm_lvspec.reference import PAIRS

WITHOUT, WITH = "vLLM", "with lvspec"


def measure(
    family: str,
    shape: str | None,
    policy: str,
    samples: list[Sample],
    batch_size: int,
    drafts: str | None,
    with_videos: bool = True,
) -> dict[str, StepProfile]:
    """Of both engines over all groups of `batch_size` samples but the first, each asked of both, in turning order.

    `drafts`: `fixed` or `adaptive`, where they pay; None: nothing is drafted. Without videos their questions alone are
    asked.
    """
    model, arguments = target_engine(family, shape, batch_size)
    config = {"method": METHOD, "model": str(PAIRS[family].draft), "policy": policy, "draft_length": drafts or "fixed"}
    groups = [samples[i : i + batch_size] for i in range(0, len(samples) - batch_size + 1, batch_size)]
    with (
        # Custom proposers run on vLLM's first runner, with which they are compared.
        within_reach(VLLM_USE_V2_MODEL_RUNNER="0"),
        running_engine(model, None, batch_size, arguments) as without,
        running_engine(model, config, batch_size, arguments) as llm,
    ):
        engines = {WITHOUT: without, WITH: llm}
        runners = {name: one.collective_rpc(lambda worker: worker.model_runner)[0] for name, one in engines.items()}
        if drafts is None:
            runners[WITH].drafter.drafter.rests = lambda req_ids: True
        profiles = {name: StepProfile(runner) for name, runner in runners.items()}
        write = prompt_writer(without)
        for number, group in enumerate(groups):
            inputs = [write(sample) for sample in group]
            if not with_videos:
                inputs = [{"prompt": sample.question} for sample in group]
            for name in turned(list(engines), number):
                if number:
                    profiles[name].start()
                answer(engines[name].llm_engine, [f"{number}-{name}-{s.name}" for s in group], inputs)
                if number:
                    profiles[name].stop()
    return profiles


def overhead(without: StepProfile, other: StepProfile, kind: str) -> float:
    """What the other's steps of a kind take more, forwards apart, as a share of a whole step without."""
    whole = sum(without.seconds[kind].values()) / without.num_steps[kind]
    own = [
        sum(seconds for part, seconds in profile.seconds[kind].items() if part not in FORWARDS)
        / profile.num_steps[kind]
        for profile in (without, other)
    ]
    return (own[1] - own[0]) / whole


def main(
    family: Annotated[str, typer.Option(help="bundled pair")] = "qwen2_5_vl",
    shape: Annotated[str | None, typer.Option(help="cost of the target: 0.5b, 3b, 7b")] = None,
    policy: Annotated[str, typer.Option(help="of the verifier")] = "lvspec",
    videos: Annotated[int, typer.Option(help="of the suite videofacts, besides those of a first group")] = 32,
    seed: Annotated[int, typer.Option(help="of the suite's scenes")] = 6,
    task: Annotated[str, typer.Option(help="kind of questions")] = "caption",
    batch_size: Annotated[int, typer.Option(help="questions asked together")] = 8,
    drafts: Annotated[
        str | None, typer.Option(help="fixed or adaptive: draft so where it pays; nothing is drafted without")
    ] = None,
    text_only: Annotated[bool, typer.Option(help="ask without the videos")] = False,
) -> None:
    """Print milliseconds per step by part, with and without this package, and the sum of what it adds."""
    samples = videofacts(videos + batch_size, seed, (task,), num_frames=PAIRS[family].num_frames)
    profiles = measure(family, shape, policy, samples, batch_size, drafts, not text_only)
    console = Console()
    for kind in (DECODE, PROMPT):
        if not all(profile.num_steps[kind] for profile in profiles.values()):
            continue
        table = Table("part", *profiles, "more", title=f"{kind} steps: ms per step")
        per_step = [
            {part: 1000 * seconds / profile.num_steps[kind] for part, seconds in profile.seconds[kind].items()}
            for profile in profiles.values()
        ]
        for part in sorted({*per_step[0], *per_step[1]}, key=lambda part: -per_step[1].get(part, 0.0)):
            before, now = (seconds.get(part, 0.0) for seconds in per_step)
            table.add_row(part, f"{before:.3f}", f"{now:.3f}", f"{now - before:+.3f}")
        console.print(table)
        share = overhead(profiles[WITHOUT], profiles[WITH], kind)
        console.print(f"forwards apart: {100 * share:+.1f} % of a step of {sum(per_step[0].values()):.2f} ms")


if __name__ == "__main__":
    typer.run(main)
