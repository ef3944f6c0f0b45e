"""`lvspec bench` on real engines, each in processes of its own."""

import json
import statistics

import jsonschema
import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_lvspec.bench import growth, kernel_times, lengths, overhead
from vllm_lvspec.bench.command import BenchOptions, run_bench
from vllm_lvspec.bench.peers import DraftSettings
from vllm_lvspec.bench.results import json_schema
from vllm_lvspec.bench.samples import videofacts
from vllm_lvspec.bench.videofacts.scene import Scene, write_mp4
from vllm_lvspec.cli import app


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run of three peers on two videos."""
    path = tmp_path_factory.mktemp("bench") / "out.json"
    options = BenchOptions(
        json_path=path,
        samples=2,
        seeds=[71],
        tasks=["caption", "choice"],
        policies=["ar", "ngram", "strict"],
        draft=DraftSettings(num_speculative_tokens=6),
        engine_arguments={"enforce_eager": True},
        profile=True,
    )
    run_bench(options, Console(quiet=True), ["lvspec", "bench"])
    return path


def test_strict_keeps_every_token_and_saves_target_steps(out):
    report = json.loads(out.read_text())
    ar, ngram, strict = (report["policies"][p] for p in ("ar", "ngram", "strict"))
    assert strict["same_answers"] == strict["retention"] == 1.0
    assert ngram["same_answers"] == 1.0
    assert ar["mean_accepted_length"] == 1.0
    assert strict["mean_accepted_length"] > 1.5
    assert strict["output_tokens"] == ar["output_tokens"] > 150
    assert strict["target_steps"] < ar["target_steps"] == ar["output_tokens"] - 4
    # Every step emits one token of the target's own, but for an answer's last, which may end with a drafted one.
    assert 0 <= strict["reasons"]["exact"] - (ar["target_steps"] - strict["target_steps"]) <= strict["answers"]
    assert sum(strict["reasons"].values()) == strict["output_tokens"]
    assert report["settings"]["num_speculative_tokens"] == 6


def test_the_bound_is_near_what_was_measured(out):
    """Engine and client add to the worker's times, and the machine may be busy: an order of magnitude."""
    strict = json.loads(out.read_text())["policies"]["strict"]
    assert 0 < strict["bound"]["draft_cost"] < 5
    assert 0.3 < strict["bound"]["speedup"] / strict["speedup"] < 5


def test_the_profile_adds_up_to_about_what_a_step_takes(out):
    report = json.loads(out.read_text())
    assert report["policies"]["ar"]["profile"] is None
    strict = report["policies"]["strict"]
    decode, prompt = strict["profile"]["decode"], strict["profile"]["prompt"]
    assert decode["steps"] <= strict["target_steps"] and prompt["steps"] == strict["answers"]
    assert min(decode["seconds"].values()) >= 0
    assert max(decode["seconds"], key=decode["seconds"].get) in ("target", "drafter: further tokens")
    step = strict["mean_accepted_length"] / strict["tokens_per_second"]
    assert 0.3 < sum(decode["seconds"].values()) / step < 3
    assert prompt["seconds"]["visual encoder"] > 0 and prompt["seconds"]["drafter: videos"] > 0
    assert "scheduler and engine" not in prompt["seconds"]
    assert out.with_suffix(".profile.png").stat().st_size > 1000


def test_the_file_follows_its_schema_and_stands_beside_page_and_plots(out):
    jsonschema.validate(json.loads(out.read_text()), json_schema())
    assert "| strict |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 1000
    assert not out.with_suffix(".partial").exists()


def test_any_folder_of_videos_runs_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    for seed in (1, 2):
        write_mp4(str(tmp_path / f"{seed}.mp4"), Scene.from_seed(seed).render())
    lines = [{"video": f"{s}.mp4", "prompt": "What happens in this video?", "task": "mine"} for s in (1, 2)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = BenchOptions(
        json_path=tmp_path / "out.json", dataset=str(tmp_path), policies=["strict"], max_tokens=20, num_frames=24,
        engine_arguments={"enforce_eager": True},
    )  # fmt: skip
    from vllm_lvspec.bench import run

    ask = run._ask

    def stopped(llm, policy, *rest):
        for number, answer in enumerate(ask(llm, policy, *rest)):
            if policy and number == 1:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch:
        patch.setattr(run, "_ask", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_bench(options, Console(quiet=True))
    report = run_bench(options, Console(quiet=True))
    assert report.environment.resumed
    assert report.policies["strict"].answers == 2
    assert report.policies["strict"].wall_seconds >= 2 * report.policies["strict"].first_token_seconds
    assert report.policies["strict"].truncated == 2
    assert report.policies["strict"].fact_accuracy is None
    assert report.settings.seeds == []


def test_the_command_names_wrong_options():
    result = CliRunner().invoke(app, ["bench", "--json", "x.json", "--policies", "ar,fast"])
    assert result.exit_code == 2
    assert "policies='fast': must be of ar, ngram, strict" in result.output.replace("\n", " ")


def test_lengths_of_drafts_are_compared_with_vllm_without_speculation_in_one_process():
    samples = videofacts(4, 72, ("choice", "question"))
    found = lengths.measure("qwen2_5_vl", None, "strict", [4, 8], samples, 2, warm_up=2)
    assert list(found)[:2] == [lengths.WITHOUT, "none"]
    tokens = {name: [group.tokens for group in groups] for name, groups in found.items()}
    assert all(len(groups) == 2 and groups == tokens[lengths.WITHOUT] for groups in tokens.values())
    steps = {name: sum(group.steps for group in groups) for name, groups in found.items()}
    assert steps["none"] == steps[lengths.WITHOUT] == sum(group.decoded for group in found["none"])
    assert steps["8"] < steps["4"] < steps["none"]
    assert all(group.wall_seconds > 0 and group.decode_seconds > 0 for groups in found.values() for group in groups)


def test_what_the_plugin_adds_to_steps_is_measured_beside_vllms_own():
    found = overhead.measure("qwen2_5_vl", None, "strict", videofacts(6, 74, ("question",)), 2, None)
    without, other = found[overhead.WITHOUT], found[overhead.WITH]
    assert without.num_steps == other.num_steps and min(without.num_steps.values()) > 1
    parts = {"inputs", "target", "target: logits", "sampling", "scheduler and engine"}
    assert parts <= without.seconds["decode"].keys()
    assert not [part for part in without.seconds["decode"] if part.startswith(("verification", "drafter"))]
    assert {"verification", "drafter: for whom, how far"} < other.seconds["decode"].keys()
    assert -1 < overhead.overhead(without, other, "decode") < 1


def test_what_steps_cost_is_measured_over_videos_answers_and_requests(tmp_path):
    options = growth.GrowthOptions(
        json_path=tmp_path / "growth.json",
        targets=[growth.Model(None, None)],
        spec_tokens=[2, 6],
        videos=[growth.Size(24, 112, 112), growth.Size(24, 168, 168)],
        batch_sizes=[1, 2],
        output_tokens=[16, 4],
        samples=2,
        seed=75,
        engine_arguments={"enforce_eager": True},
        traces=tmp_path / "traces",
    )
    report = growth.run_growth(options, Console(quiet=True), ["lvspec", "bench-growth"])
    assert report == growth.GrowthReport.model_validate_json((tmp_path / "growth.json").read_text())
    (measured,) = report.measured
    assert measured.name == "own ← own" and 0 < measured.draft_gib < 0.01
    assert 1.5 < measured.accepted[2].tokens_per_step <= 3 < measured.accepted[6].tokens_per_step <= 7
    places = [(point.video, point.batch_size, point.output_tokens) for point in measured.points]
    small, large = "24x112x112", "24x168x168"
    assert places == [(small, 1, 4), (small, 1, 16), (large, 1, 4), (small, 2, 4)]
    num_tokens = {point.video: point.prompt_tokens for point in measured.points}
    assert num_tokens[large] - num_tokens[small] == 12 * (6**2 - 4**2)
    for point in measured.points:
        assert list(point.steps) == [0, 2, 6]
        assert point.steps[0].over_none == 1
        assert all(0 < step.seconds < 5 and step.speedup_over_alone > 0 for step in point.steps.values())
        assert point.alone_seconds > 0
    # Three times as much on an idle machine; a busy one may slow any single place.
    assert statistics.median(point.steps[6].over_none for point in measured.points) > 1
    for kind in ("prompt_seconds", "alone_prompt_seconds"):
        assert [getattr(point, kind) is not None for point in measured.points] == [True, False, True, False]
    assert 0 < measured.points[0].draft_prompt_seconds < measured.points[0].prompt_seconds
    assert (tmp_path / "growth.png").stat().st_size > 1000
    traced = {path.name: kernel_times.read(path) for path in (tmp_path / "traces").iterdir()}
    numbers = range(1 + growth.TRACED_STEPS)
    assert [(step.drafted, step.number) for step in traced["own.json.gz"]] == [(0, i) for i in numbers]
    steps = [(step.drafted, step.number) for step in traced["own-own.json.gz"]]
    assert steps == [(length, i) for length in (0, 2, 6) for i in numbers]
    assert all(step.total > 0 for steps in traced.values() for step in steps)


def test_what_vllm_refuses_ends_a_run_with_its_words(tmp_path):
    options = growth.GrowthOptions(
        json_path=tmp_path / "growth.json",
        targets=[growth.Model(None, None)],
        samples=2,
        engine_arguments={"max_model_len": 10**6},
        alone=False,
    )
    with pytest.raises(growth.BenchError, match=r"not measured: own ← own: .*max_model_len \(1000000\)"):
        growth.run_growth(options, Console(quiet=True))
