"""How far to draft, in one process: every group of questions is answered in every way, one after another.

A machine whose speed changes from minute to minute favours whoever runs in a good one. Here all ways share its minutes,
and ratios are taken group by group. All but one are ways of one engine; the other engine is vLLM without speculation,
with which all are compared.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vllm_lvspec.bench.run import prompt_writer, running_engine, turned, within_reach
from vllm_lvspec.bench.samples import Sample, videofacts
from vllm_lvspec.config import METHOD
from vllm_lvspec.draft.drafts import Drafts
from vllm_lvspec.reference import PAIRS
from vllm_lvspec.reference.upscale import LOAD_FORMAT, TextShape, upscaled

NUM_RESAMPLED = 4000
WITHOUT = "vLLM without speculation"


class Way(NamedTuple):
    """`length`: K, at most; `recalls`: whether what is left of drafts is tried again."""

    length: int
    is_adaptive: bool = False
    only_if_faster: bool = False
    recalls: bool = True


class Measured(NamedTuple):
    """Of one group: seconds from the first request to the last token, and tokens; seconds and tokens between each
    request's first token and its last, and the steps in which these came."""

    wall_seconds: float
    tokens: int
    decode_seconds: float
    decoded: int
    steps: int


class SteeredDrafter:
    """Drafts as far as it is told, at most, from step to step; nothing at first. `llm` runs in this process."""

    def __init__(self, llm: Any):
        (self.drafter,) = llm.collective_rpc(lambda worker: worker.model_runner.drafter.drafter)
        self._start, self._rests, self._length = self.drafter.start, self.drafter.rests, 0
        self.drafter.start = self._start_as_far
        self.drafter.rests = lambda req_ids: not self._length or self._rests(req_ids)

    def set_length(self, length: int) -> None:
        self._length = length

    def _start_as_far(self, requests: Sequence[Any], most: int, num_prefilling: int) -> Drafts:
        # Of none it still hears what was refused.
        return self._start(requests, min(most, self._length), num_prefilling)


def ways(lengths: Sequence[int]) -> dict[str, Way]:
    """Ways of an engine with a drafter: no drafts at all, each of `lengths` in every step, each drafted anew whatever
    was left of the last draft, each where it pays, and adaptive ones of the longest."""
    return {
        "none": Way(0),
        **{f"{length}": Way(length) for length in lengths},
        **{f"{length}, anew": Way(length, recalls=False) for length in lengths},
        **{f"{length}, only if faster": Way(length, only_if_faster=True) for length in lengths},
        "adaptive": Way(max(lengths), is_adaptive=True, only_if_faster=True),
    }


def fastest(answered: Sequence[Measured]) -> Measured:
    """Of several times: what else the machine did only added to them. With prompts it may be another one."""
    whole = min(answered, key=lambda measured: measured.wall_seconds)
    decoding = min(answered, key=lambda measured: measured.decode_seconds)
    return decoding._replace(wall_seconds=whole.wall_seconds, tokens=whole.tokens)


def ratios(speeds: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of `speeds` over `others` `[num_groups]`, and its 95 % bootstrap interval."""
    logs = np.log(speeds / others)
    rng = np.random.default_rng(0)
    means = logs[rng.integers(0, len(logs), (NUM_RESAMPLED, len(logs)))].mean(1)
    low, high = np.exp(np.percentile(means, [2.5, 97.5]))
    return float(np.exp(logs.mean())), float(low), float(high)


def answer(core: Any, names: Sequence[str], inputs: Sequence[dict[str, Any]]) -> Measured:
    """Ask the engine `core` all `inputs` at once, by these `names`; greedy."""
    from vllm import SamplingParams

    started = time.perf_counter()
    for name, prompt in zip(names, inputs, strict=True):
        core.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=256))
    first: dict[str, tuple[float, int]] = {}
    last: dict[str, tuple[float, int]] = {}
    reports = 0
    while core.has_unfinished_requests():
        outputs = core.step()
        now = time.perf_counter()
        for output in outputs:
            last[output.request_id] = now, len(output.outputs[0].token_ids)
            first.setdefault(output.request_id, last[output.request_id])
            reports += 1
    return Measured(
        max(seconds for seconds, _ in last.values()) - started,
        sum(tokens for _, tokens in last.values()),
        sum(last[name][0] - first[name][0] for name in last),
        sum(last[name][1] - first[name][1] for name in last),
        reports - len(last),
    )


def target_engine(family: str, shape: str | None, batch_size: int) -> tuple[str, dict[str, Any]]:
    """The bundled target, and arguments of an engine that serves it to `batch_size` requests."""
    target = str(PAIRS[family].target)
    arguments: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 2048,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 * 2**20 * max(2, batch_size // 4),
        **(upscaled(target, shape) if shape else {}),
    }
    return arguments.pop("model", target), arguments


def give_shape(shape: str | TextShape, config: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Have an engine of these `arguments` run the drafter of lvspec's `config` at the cost of `shape`."""
    config["draft_hf_overrides"] = upscaled(config["model"], shape)["hf_overrides"]
    arguments["load_format"] = LOAD_FORMAT  # the target's, too, which may have its own shape


def measure(
    family: str,
    shape: str | None,
    policy: str,
    lengths: Sequence[int],
    samples: Sequence[Sample],
    batch_size: int,
    warm_up: int = 1,
    repeats: int = 1,
    chosen: Sequence[str] = (),
    drafter_shape: str | None = None,
) -> dict[str, list[Measured]]:
    """By way, of every group of `batch_size` samples that are asked together, but for the first `warm_up` groups.

    The very first is asked in every way, the others only with adaptive drafts, which learn from what becomes of them.
    Each is asked `repeats` times in each way, in turn. Besides vLLM's own, only `chosen` ways are compared, or all. The
    drafter runs at the cost of `drafter_shape`.
    """
    pair = PAIRS[family]
    model, arguments = target_engine(family, shape, batch_size)
    config: dict[str, Any] = {
        "method": METHOD, "model": str(pair.draft), "policy": policy, "draft_length": "adaptive",
        "num_speculative_tokens": max(lengths),
    }  # fmt: skip
    if drafter_shape is not None:
        give_shape(drafter_shape, config, arguments)
    groups = [samples[i : i + batch_size] for i in range(0, len(samples) - batch_size + 1, batch_size)]
    compared = ways(lengths)
    names = [WITHOUT, *(name for name in compared if not chosen or name in chosen)]
    found: dict[str, list[Measured]] = defaultdict(list)
    with (
        within_reach(),
        running_engine(model, None, batch_size, arguments) as without,
        running_engine(model, config, batch_size, arguments) as llm,
    ):
        steered = SteeredDrafter(llm)
        payoff = steered.drafter.payoff
        write = prompt_writer(llm)
        for number, group in enumerate(groups):
            inputs = [write(sample) for sample in group]
            is_measured = number >= warm_up
            asked = names if is_measured or number == 0 else ["adaptive"]
            answered: dict[str, list[Measured]] = defaultdict(list)
            for turn, name in itertools.product(range(repeats), turned(asked, number)):
                engine = without if name == WITHOUT else llm
                if name in compared:
                    length, payoff.is_adaptive, payoff.only_if_faster, payoff.recalls = compared[name]
                    steered.set_length(length)
                    payoff.refusal = None  # it was another way's
                requests = [f"{number}-{name}-{turn}-{sample.name}" for sample in group]
                answered[name].append(answer(engine.llm_engine, requests, inputs))
            if is_measured:
                for name, measured in answered.items():
                    found[name].append(fastest(measured))
    return {name: found[name] for name in names}


def main(
    family: Annotated[str, typer.Option(help="bundled pair")] = "qwen2_5_vl",
    shape: Annotated[str | None, typer.Option(help="cost of the target: 0.5b, 3b, 7b")] = None,
    drafter: Annotated[str | None, typer.Option(help="cost of the drafter, likewise")] = None,
    policy: Annotated[str, typer.Option(help="of the verifier")] = "lvspec",
    lengths: Annotated[str, typer.Option(help="values of K")] = "10",
    videos: Annotated[int, typer.Option(help="of the suite videofacts")] = 8,
    seed: Annotated[int, typer.Option(help="of the suite's scenes")] = 6,
    task: Annotated[str, typer.Option(help="kind of questions")] = "caption",
    batch_size: Annotated[int, typer.Option(help="questions asked together")] = 1,
    warm_up: Annotated[int, typer.Option(min=1, help="groups of further videos that are asked first")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="times that each group is asked; the fastest counts")] = 1,
    only: Annotated[str, typer.Option(help="ways to compare, as in the table, with slashes between them")] = "",
) -> None:
    """Print speeds over those of vLLM without speculation: of decoding, and of everything with prompts; and that of
    decoding with adaptive drafts over each."""
    samples = videofacts(videos + warm_up * batch_size, seed, (task,), num_frames=PAIRS[family].num_frames)
    tried = [int(k) for k in lengths.split(",")]
    chosen = [name.strip() for name in only.split("/") if name.strip()]
    for name in chosen:
        if name not in ways(tried):
            raise typer.BadParameter(f"only={name!r}: must be one of {', '.join(ways(tried))}")
    found = measure(family, shape, policy, tried, samples, batch_size, warm_up, repeats, chosen, drafter)
    table = Table("drafts", "decoding over vLLM's", "throughput over vLLM's", "adaptive over it", "tokens per step")
    decoding = {name: np.array([m.decoded / m.decode_seconds for m in groups]) for name, groups in found.items()}
    throughput = {name: np.array([m.tokens / m.wall_seconds for m in groups]) for name, groups in found.items()}
    for name, groups in found.items():
        compared = [(decoding[name], decoding[WITHOUT]), (throughput[name], throughput[WITHOUT])]
        if "adaptive" in found:
            compared.append((decoding["adaptive"], decoding[name]))
        per_step = sum(m.decoded for m in groups) / sum(m.steps for m in groups)
        texts = ["{:.2f} [{:.2f}, {:.2f}]".format(*ratios(*pair)) for pair in compared]
        texts += [""] * (3 - len(texts))  # adaptive drafts are not among what is compared
        table.add_row(name, *texts, f"{per_step:.2f}")
    console = Console()
    console.print(f"{policy}, {task}, batch size {batch_size}, {len(found[WITHOUT])} groups")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
