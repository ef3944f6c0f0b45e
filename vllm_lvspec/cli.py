"""The `lvspec` command."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Speculative decoding for Video-LLMs in vLLM.")

# Options of both benches.
Title = Annotated[str | None, typer.Option(help="what the run shows, for the page of benchmarks")]
Family = Annotated[str, typer.Option(help="bundled pair: qwen2_5_vl, llava_onevision")]
Target = Annotated[str | None, typer.Option(help="another target: a folder or a name of the hub")]
Draft = Annotated[str | None, typer.Option(help="another drafter")]
Shape = Annotated[
    str | None, typer.Option(help="serve the target at the cost of this text model: 0.5b, 1.5b, 3b, 7b, 32b, 72b")
]
DType = Annotated[str | None, typer.Option(help="float32 for the bundled pairs, else vLLM's choice")]


@app.callback()
def main() -> None:
    """Speculative decoding for Video-LLMs in vLLM."""


def _end_as_by_ctrl_c() -> None:
    """Whoever ends a command ends its servers and engines: SIGTERM leaves the contexts as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@app.command()
def demo() -> None:
    """Serve a bundled pair, send it videos over the OpenAI API, and compare ways to verify with no drafter at all."""
    from vllm_lvspec.demo import run_demo
    from vllm_lvspec.serving import ServerError

    _end_as_by_ctrl_c()
    console = Console()
    try:
        run_demo(console)
    except ServerError as error:
        console.print(f"[red]{error}[/]", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("stopped")
        raise typer.Exit(130) from None


@app.command()
def bench(
    json_path: Annotated[
        Path, typer.Option("--json", help="where results go; .md, .png and .answers.jsonl are written beside it")
    ],
    title: Title = None,
    suite: Annotated[str, typer.Option(help="videofacts: generated scenes whose facts are known")] = "videofacts",
    dataset: Annotated[
        str | None, typer.Option(help="instead of a suite: a folder with videos and .jsonl files, or hf:NAME")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="videos of the suite (20), or questions of the dataset")] = None,
    seed: Annotated[str, typer.Option(help="of the suite's scenes, 0 to 99; several with commas between them")] = "1",
    tasks: Annotated[str, typer.Option(help="kinds of questions")] = "caption,description,question,choice",
    policies: Annotated[
        str,
        typer.Option(
            help="peers: ar, ngram, strict, fly, lvspec, random; also with settings, lvspec:relaxation=0.5:guards=order"
        ),
    ] = "ar,strict,lvspec",
    family: Family = "qwen2_5_vl",
    model: Target = None,
    draft: Draft = None,
    shape: Shape = None,
    draft_shape: Annotated[str | None, typer.Option(help="and the drafter at the cost of this one")] = None,
    dtype: DType = None,
    batch_size: Annotated[int, typer.Option(help="requests running at once")] = 1,
    spec_tokens: Annotated[int, typer.Option(help="K, the most tokens drafted per step")] = 10,
    pruning: Annotated[str, typer.Option(help="the drafter's view of the video")] = "uniform",
    pruning_ratio: Annotated[float, typer.Option(help="share of a video's tokens the drafter does not see")] = 0.9,
    relaxation: Annotated[
        float | None, typer.Option(help="lambda, the share of drafted tokens that are fillers")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="any other setting of the plugin's policies, key=value; repeatable"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="per answer")] = 256,
    min_tokens: Annotated[int, typer.Option(help="per answer")] = 0,
    num_frames: Annotated[int | None, typer.Option(help="per video; what the bundled pair knows, else 32")] = None,
    video_key: Annotated[str, typer.Option(help="of a dataset's lines")] = "video",
    prompt_key: Annotated[str, typer.Option(help="of a dataset's lines")] = "prompt",
    engine: Annotated[str, typer.Option(help="more arguments of vLLM's engine, as JSON")] = "{}",
    restart: Annotated[bool, typer.Option(help="forget the answers of a run that was stopped")] = False,
    side_by_side: Annotated[
        bool, typer.Option(help="start all engines at once and ask them in turn, for machines whose speed changes")
    ] = False,
    repeats: Annotated[int, typer.Option(help="times that each question is asked; the one of median time counts")] = 1,
    profile: Annotated[
        bool, typer.Option(help="then ask some questions again, and show where the plugin's steps spend their time")
    ] = False,
) -> None:
    """Compare ways to decode on the same questions: accepted length, speed, and facts kept."""
    from vllm_lvspec.bench.command import (
        BenchError,
        BenchOptions,
        parse_engine_arguments,
        parse_numbers,
        parse_settings,
        run_bench,
    )
    from vllm_lvspec.bench.peers import DraftSettings, PeerError
    from vllm_lvspec.bench.run import JournalError
    from vllm_lvspec.bench.samples import DatasetError
    from vllm_lvspec.config import LVSpecConfigError

    _end_as_by_ctrl_c()
    console = Console()
    try:
        more = parse_settings(settings or [])
        if relaxation is not None:
            more["relaxation"] = relaxation
        options = BenchOptions(
            json_path=json_path,
            title=title,
            suite=suite,
            dataset=dataset,
            samples=samples,
            seeds=parse_numbers("seed", seed),
            tasks=tasks.split(","),
            policies=policies.split(","),
            family=family,
            model=model,
            draft=DraftSettings(draft, spec_tokens, pruning, pruning_ratio, more),
            shape=shape,
            draft_shape=draft_shape,
            dtype=dtype,
            batch_size=batch_size,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            num_frames=num_frames,
            video_key=video_key,
            prompt_key=prompt_key,
            engine_arguments=parse_engine_arguments(engine),
            restart=restart,
            side_by_side=side_by_side,
            repeats=repeats,
            profile=profile,
        )
        run_bench(options, console)
    except (BenchError, DatasetError, JournalError, LVSpecConfigError, PeerError) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def doctor(context: typer.Context) -> None:
    """What `vllm serve` with the same arguments would use, whether it fits into memory, and why not.

    Exit codes: 0 fine, 2 refused, 3 too large, 4 a vLLM that this package does not work with, 5 not known whether it
    fits.
    """
    from vllm_lvspec.engine.doctor import examine

    raise typer.Exit(examine(context.args, Console()))


@app.command()
def inspect(
    video: Annotated[Path | None, typer.Argument(help="the video that is asked about, or that a trace is of")] = None,
    prompt: Annotated[str, typer.Option(help="what is asked")] = "Describe the video in full detail.",
    html: Annotated[
        Path | None, typer.Option(help="write a page; without it the answer is shown in the terminal")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the trace")] = None,
    trace: Annotated[Path | None, typer.Option(help="show a trace that was saved, and ask nobody")] = None,
    url: Annotated[
        str | None, typer.Option(help="ask a server that runs with tracing on, such as http://localhost:8000/v1")
    ] = None,
    request: Annotated[str | None, typer.Option(help="with --url: show this request's trace, and ask nothing")] = None,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="of that server")] = "none",
    family: Family = "qwen2_5_vl",
    model: Target = None,
    draft: Draft = None,
    policy: Annotated[str | None, typer.Option(help="of this request: strict, or the server's")] = None,
    relaxation: Annotated[float | None, typer.Option(help="of this request")] = None,
    max_tokens: Annotated[int, typer.Option(help="of the answer")] = 256,
) -> None:
    """Show an answer token by token: what was accepted loosely, what the target would have said, and what was seen."""
    from vllm_lvspec.observe.inspect import InspectError, Question, ask, fetch_trace, read_trace, show, write_page
    from vllm_lvspec.reference import PAIRS
    from vllm_lvspec.serving import ServerError

    _end_as_by_ctrl_c()
    console = Console()
    try:
        if family not in PAIRS:
            raise InspectError(f"family={family!r}: must be one of {', '.join(PAIRS)}")
        if trace is not None:
            found = read_trace(trace)
        elif request is not None:
            if url is None:
                raise InspectError(f"request={request!r}: of which server? Say --url, too")
            found = fetch_trace(url.rstrip("/"), request, api_key)
        elif video is None:
            raise InspectError("no video: name one, or --trace FILE, or --url URL --request ID")
        else:
            question = Question(video, prompt, url, api_key, model, draft, family, policy, relaxation, max_tokens)
            with console.status("the engine starts") as status:
                found = ask(question, lambda seconds: status.update(f"the engine starts ({seconds:.0f} s)"))
        if json_path is not None:
            json_path.write_text(json.dumps(found, indent=1))
        if html is not None:
            write_page(html, found, video)
            console.print(f"{html}: {html.stat().st_size / 1e6:.1f} MB", highlight=False)
        else:
            show(console, found)
    except (InspectError, ServerError) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("stopped")
        raise typer.Exit(130) from None


@app.command(name="bench-serve")
def bench_serve(
    json_path: Annotated[Path, typer.Option("--json", help="where results go")],
    title: Title = None,
    policies: Annotated[str, typer.Option(help="servers to compare, as in bench; ar has no speculation")] = "ar,lvspec",
    samples: Annotated[int, typer.Option(help="requests of a round: questions about so many videos")] = 16,
    seed: Annotated[int, typer.Option(help="of the suite's scenes, 0 to 99")] = 1,
    task: Annotated[str, typer.Option(help="kind of questions")] = "caption",
    family: Family = "qwen2_5_vl",
    model: Target = None,
    draft: Draft = None,
    shape: Shape = None,
    dtype: DType = None,
    spec_tokens: Annotated[int, typer.Option(help="K, the most tokens drafted per step")] = 10,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="any other setting of the plugin, key=value; repeatable")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="per answer")] = 256,
    concurrency: Annotated[str, typer.Option(help="requests at once; several with commas between them")] = "1,8",
    rounds: Annotated[int, typer.Option(help="times that every server has every load, in turn")] = 3,
    server: Annotated[str, typer.Option(help="more arguments of vllm serve, as on its command line")] = "",
) -> None:
    """Load servers with and without speculation by vLLM's own load generator, over the OpenAI API."""
    from vllm_lvspec.bench.command import BenchError, parse_numbers, parse_settings
    from vllm_lvspec.bench.peers import DraftSettings, PeerError
    from vllm_lvspec.bench.samples import DatasetError
    from vllm_lvspec.bench.served import ServeOptions, run_served
    from vllm_lvspec.config import LVSpecConfigError
    from vllm_lvspec.serving import ServerError

    _end_as_by_ctrl_c()
    console = Console()
    try:
        options = ServeOptions(
            json_path=json_path,
            title=title,
            policies=policies.split(","),
            samples=samples,
            seed=seed,
            task=task,
            family=family,
            model=model,
            draft=DraftSettings(draft, spec_tokens, more=parse_settings(settings or [])),
            shape=shape,
            dtype=dtype,
            max_tokens=max_tokens,
            concurrency=parse_numbers("concurrency", concurrency),
            rounds=rounds,
            server_arguments=shlex.split(server),
        )
        run_served(options, console)
    except (BenchError, DatasetError, LVSpecConfigError, PeerError, ServerError) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("stopped")
        raise typer.Exit(130) from None


@app.command(name="bench-growth")
def bench_growth(
    json_path: Annotated[Path, typer.Option("--json", help="where results go; a .png is written beside it")],
    title: Title = None,
    family: Family = "qwen2_5_vl",
    policy: Annotated[str, typer.Option(help="of the verifier, for what is accepted")] = "lvspec",
    targets: Annotated[
        str, typer.Option(help="shapes at whose cost the target runs, maybe quantised: own, 0.5b, 32b, 72b:mxfp4")
    ] = "0.5b",
    drafters: Annotated[str, typer.Option(help="and those of drafters: own, 3b, 7b:mxfp4")] = "own",
    spec_tokens: Annotated[str, typer.Option(help="values of K")] = "5,10,15",
    videos: Annotated[
        str, typer.Option(help="frames x height x width; all but the first with one request and the shortest answer")
    ] = "24x112x112",
    batch_sizes: Annotated[str, typer.Option(help="requests at once, about the first video")] = "1",
    output_tokens: Annotated[
        str, typer.Option(help="of the answer about the first video, where steps are measured")
    ] = "16",
    samples: Annotated[int, typer.Option(help="captions whose drafts are counted")] = 8,
    seed: Annotated[int, typer.Option(help="of the scenes, 0 to 98")] = 1,
    dtype: Annotated[str, typer.Option(help="weights and activations")] = "float32",
    engine: Annotated[str, typer.Option(help="more arguments of vLLM's engine, as JSON")] = "{}",
    alone: Annotated[bool, typer.Option(help="also measure vLLM's own engine, without this package")] = True,
    minutes: Annotated[
        float | None, typer.Option(help="after which no further engine is started; the first one always is")
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="tokens that larger shapes know, Qwen2.5-VL's 152064; else the bundled pair's")
    ] = None,
    traces: Annotated[
        Path | None, typer.Option(help="folder for a profiler's trace of some steps of each engine")
    ] = None,
) -> None:
    """How what a step costs grows with videos, answers, requests and K, at the cost of targets and drafters of any
    size."""
    from vllm_lvspec.bench.command import BenchError, parse_engine_arguments, parse_numbers
    from vllm_lvspec.bench.growth import GrowthOptions, Model, Size, run_growth
    from vllm_lvspec.bench.samples import DatasetError
    from vllm_lvspec.config import LVSpecConfigError

    _end_as_by_ctrl_c()
    console = Console()
    try:
        options = GrowthOptions(
            json_path=json_path,
            title=title,
            family=family,
            policy=policy,
            targets=[Model.parse("targets", text) for text in targets.split(",")],
            drafters=[Model.parse("drafters", text) for text in drafters.split(",")],
            spec_tokens=parse_numbers("spec_tokens", spec_tokens),
            videos=[Size.parse(text) for text in videos.split(",")],
            batch_sizes=parse_numbers("batch_sizes", batch_sizes),
            output_tokens=parse_numbers("output_tokens", output_tokens),
            samples=samples,
            seed=seed,
            dtype=dtype,
            engine_arguments=parse_engine_arguments(engine),
            alone=alone,
            minutes=minutes,
            vocabulary=vocabulary,
            traces=traces,
        )
        run_growth(options, console)
    except (BenchError, DatasetError, LVSpecConfigError) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("stopped")
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app()
