"""What a step costs, without an engine."""

import gzip
import json

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from vllm_lvspec.bench import growth, kernel_times
from vllm_lvspec.bench.growth import Accepted, GrowthReport, GrowthSettings, Measured, Model, Point, Size
from vllm_lvspec.bench.page import page
from vllm_lvspec.bench.results import Environment
from vllm_lvspec.bench.samples import videofacts
from vllm_lvspec.cli import app

ACCEPTED = {
    4: Accepted(tokens_per_step=3.0, tokens_per_step_interval=(2.9, 3.1), speedup=2.0, speedup_interval=(1.9, 2.1))
}
# The second turn's machine was half as fast.
TURNS = {0: [0.1, 0.2, 0.1], 4: [0.15, 0.3, 0.15]}


def test_a_step_is_compared_with_that_of_its_own_turn():
    costs = growth._step_costs(TURNS, ACCEPTED, alone=0.12)
    assert list(costs) == [0, 4]
    assert costs[4].over_none == pytest.approx(1.5)
    assert costs[4].over_none_interval == (pytest.approx(1.5), pytest.approx(1.5))
    assert costs[4].seconds == 0.15
    assert costs[4].speedup == pytest.approx(3 / 1.5)
    assert costs[4].speedup_over_alone == pytest.approx(3 * 0.12 / 0.15)
    assert (costs[0].over_none, costs[0].speedup) == (1, None)
    assert costs[0].speedup_over_alone == pytest.approx(0.12 / 0.1)
    assert growth._step_costs(TURNS, ACCEPTED, alone=None)[4].speedup_over_alone is None


def test_videos_of_other_sizes_show_the_same():
    (sample,) = videofacts(1, 3, ("caption",))
    frames, _ = sample.load_video()
    larger, about = growth._sized(sample, Size(48, 224, 112))
    assert larger.shape == (48, 224, 112, 3)
    assert about["total_num_frames"] == 48
    assert np.array_equal(larger[::2, ::2], frames) and np.array_equal(larger[1::2, 1::2], frames)
    assert np.array_equal(growth._sized(sample, Size(12, 112, 112))[0], frames[::2])


def point(**changed) -> Point:
    return Point(
        **{
            "video": "24x112x112", "prompt_tokens": 200, "output_tokens": 16, "said_tokens": 20.4, "batch_size": 1,
            "alone_seconds": None,
            "draft_prompt_seconds": 0.01, "prompt_seconds": 0.1, "steps": growth._step_costs(TURNS, ACCEPTED, None),
            **changed,
        }
    )  # fmt: skip


def test_page_and_plot_show_every_engine_and_point(tmp_path):
    measured = Measured(
        target="32b", drafter="3b:fp8", draft_gib=3.25, accepted=ACCEPTED,
        points=[point(), point(video="48x112x112", prompt_tokens=392), point(batch_size=8, prompt_tokens=203)],
    )  # fmt: skip
    environment = environment_of_a_test()
    settings = GrowthSettings(
        title="At the cost of 32B", family="qwen2_5_vl", policy="lvspec", dtype="float32", spec_tokens=[4], samples=8,
        seed=1, engine={}, alone=False,
    )  # fmt: skip
    chosen = measured.model_copy(
        update={"token_seconds": {"vLLM": [0.003, 0.005], "lvspec": [0.0021, 0.004]}, "draft_layers": "lvspec"}
    )
    report = GrowthReport(environment=environment, settings=settings, measured=[measured, chosen])
    (tmp_path / "3-growth.json").write_text(report.model_dump_json())
    growth.plot(report, tmp_path / "3-growth.png")
    text = page(tmp_path)
    assert "## At the cost of 32B" in text and "### 32b ← 3b:fp8" in text and "take 3.250 GiB" in text
    assert "| 4 | 3.00 [2.90, 3.10] | 2.00 [1.90, 2.10] |" in text
    taken = "takes 3.00 and 5.00 ms by vLLM's layers and 2.10 and 4.00 ms by this package's; lvspec's were used."
    assert text.count(f"A drafted token behind few others and behind many {taken}") == 1
    assert "| 392 | 20 | 1 | 4 | 1.50 [1.50, 1.50] | 2.00 | – |" in text
    assert "![At the cost of 32B](benchmarks/3-growth.png)" in text
    console = Console(record=True, width=200, quiet=True)
    console.print(*growth.tables(measured))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--targets", "1b"], "targets='1b': must be own or one of 0.5b"),
        (["--drafters", ":fp8"], "drafters=':fp8': must be own or one of 0.5b"),
        (["--videos", "24x112"], "videos='24x112': must be frames x height x width"),
        (["--videos", "0x112x112"], "videos='0x112x112': must be frames x height x width"),
        (["--videos", "24x112x112,24x112x112"], "videos='24x112x112,24x112x112': must be one or more, each once"),
        (["--spec-tokens", "0"], "spec_tokens='0': must be one or more, each 1 or more"),
        (["--spec-tokens", "200"], "spec_tokens=200: must be at most 128"),
        (["--batch-sizes", "2,2"], "batch_sizes='2,2': must be one or more"),
        (["--samples", "1"], "samples=1: must be 2 or more"),
        (["--vocabulary", "12"], "vocabulary=12: must be 1"),
        (["--family", "llava"], "family='llava': must be one of qwen2_5_vl"),
        (["--json", "x.txt"], "json='x.txt': must end in .json"),
    ],
)
def test_wrong_options_are_named(arguments, said):
    result = CliRunner().invoke(app, ["bench-growth", "--json", "x.json", *arguments])
    assert result.exit_code == 2
    assert said in result.output.replace("\n", " ")


def test_models_are_written_as_they_are_read():
    for text in ("own", "0.5b", "72b:fp8", "own:fp8"):
        assert str(Model.parse("targets", text)) == text
    assert str(Size.parse("64x448x672")) == "64x448x672"


def test_a_drafter_that_fails_ends_no_measurement_of_the_others(tmp_path, monkeypatch):
    done = Measured(target="own", drafter="3b", draft_gib=1.0, accepted=ACCEPTED, points=[point()])

    def measure(how, options, target, *drafter):
        if str(drafter[0]) != "3b":
            raise RuntimeError("no kernel\nfor it")
        return done

    monkeypatch.setattr(growth, "_in_own_process", measure)
    monkeypatch.setattr(growth, "environment", lambda command: environment_of_a_test())
    options = growth.GrowthOptions(
        json_path=tmp_path / "growth.json", drafters=[Model("7b", "mxfp4"), Model("3b", None)], alone=False
    )
    with pytest.raises(growth.BenchError, match=r"^not measured: 0.5b ← 7b:mxfp4: no kernel for it$"):
        growth.run_growth(options, Console(quiet=True))
    report = GrowthReport.model_validate_json((tmp_path / "growth.json").read_text())
    assert report.measured == [done]
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_a_target_that_fails_alone_is_measured_with_its_drafters(tmp_path, monkeypatch):
    def measure(how, options, target, *drafter):
        if how is growth._measure_alone and str(target) == "3b":
            raise RuntimeError("no memory")
        if how is growth._measure_alone:
            return {(Size(24, 112, 112), 1, 16): 2.0}
        drafter, alone = drafter
        assert bool(alone) == (str(target) != "3b")
        return Measured(target=str(target), drafter=str(drafter), draft_gib=1.0, accepted=ACCEPTED, points=[point()])

    monkeypatch.setattr(growth, "_in_own_process", measure)
    monkeypatch.setattr(growth, "environment", lambda command: environment_of_a_test())
    targets, drafters = [Model("3b", None), Model("0.5b", None)], [Model(None, None), Model("0.5b", None)]
    options = growth.GrowthOptions(json_path=tmp_path / "growth.json", targets=targets, drafters=drafters)
    with pytest.raises(growth.BenchError, match=r"^not measured: 3b: vLLM without this package: no memory$"):
        growth.run_growth(options, Console(quiet=True))
    report = GrowthReport.model_validate_json((tmp_path / "growth.json").read_text())
    assert [m.name for m in report.measured] == ["3b ← own", "3b ← 0.5b", "0.5b ← own", "0.5b ← 0.5b"]


def event(name: str, kind: str, begin: float, duration: float) -> dict:
    return {"ph": "X", "name": name, "cat": kind, "ts": begin, "dur": duration}


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_trace_tells_what_the_device_did_in_each_step(tmp_path, suffix):
    events = [
        event("K 10, step 1", "user_annotation", 2000, 1000),
        event("K 0, step 3", "user_annotation", 1000, 500),
        event("K 0, step 3", "gpu_user_annotation", 1100, 200),
        {"ph": "M", "name": "process_name"},
        event("gemm", "kernel", 1010, 200),
        event("gemm", "kernel", 1200, 110),  # begins before the other one ends
        event("copy", "gpu_memcpy", 1400, 100),  # behind a pause of 90
        event("launch", "cuda_runtime", 1010, 500),
        event("gemm", "kernel", 2100, 300),  # behind one of 100, and before one of 600
        event("gemm", "kernel", 3000, 300),  # in no step
    ]
    content = json.dumps({"traceEvents": events}).encode()
    trace = tmp_path / f"trace{suffix}"
    trace.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    first, second = kernel_times.read(trace)
    assert (first.drafted, first.number, second.drafted, second.number) == (0, 3, 10, 1)
    assert (first.total, first.busy, first.pauses) == pytest.approx((0.5, 0.4, 0.09))
    assert first.kernels == {"gemm": (2, pytest.approx(0.31)), "copy": (1, pytest.approx(0.1))}
    assert (second.busy, second.pauses) == pytest.approx((0.3, 0.7))
    shown = CliRunner().invoke(typer_app(kernel_times.main), [str(trace), "--most", "1"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0 and "K 10, step 1" in shown.output
    assert "gemm" in shown.output and "copy" not in shown.output


def test_a_trace_that_fails_loses_nothing(tmp_path, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(growth.logger, "warning", lambda text, *values: warnings.append(text % values))
    (tmp_path / "file").touch()
    for folder in (None, tmp_path / "file"):
        growth._trace(object(), growth.GrowthOptions(json_path=tmp_path / "x.json", traces=folder), None, "32b-7b")
    assert len(warnings) == 1 and "no trace of 32b-7b: FileExistsError" in warnings[0]


@pytest.mark.parametrize("content", [b'{"traceEvents": []}', b"{}", b"no trace"])
def test_what_is_no_trace_is_named(tmp_path, content):
    trace = tmp_path / "trace.json"
    trace.write_bytes(content)
    shown = CliRunner().invoke(typer_app(kernel_times.main), [str(trace)], env={"COLUMNS": "300"})
    assert shown.exit_code == 2 and str(trace) in shown.output and "bench-growth --traces" in shown.output


def typer_app(command):
    app = typer.Typer()
    app.command()(command)
    return app


def test_no_further_engine_is_started_once_time_is_up(tmp_path, monkeypatch):
    started = []

    def measure(how, options, target, *drafter):
        started.append((how, str(target)))
        return Measured(target=str(target), drafter="own", draft_gib=1.0, accepted=ACCEPTED, points=[point()])

    monkeypatch.setattr(growth, "_in_own_process", measure)
    monkeypatch.setattr(growth, "environment", lambda command: environment_of_a_test())
    targets = [Model("3b", None), Model("0.5b", None)]
    options = growth.GrowthOptions(json_path=tmp_path / "growth.json", targets=targets, minutes=0)
    growth.run_growth(options, Console(quiet=True))
    assert started == [(growth._measure_alone, "3b"), (growth._measure, "3b")]


def environment_of_a_test() -> Environment:
    return Environment(
        date="2026-01-02T03:04:05+00:00", command="lvspec bench-growth", versions={"vllm": "0.32.0"}, device="a CPU",
        cores=2, resumed=False,
    )  # fmt: skip
