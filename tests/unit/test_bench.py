"""Figures, files and inputs of the bench, without an engine."""

import itertools
import json
import os
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jsonschema
import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner
from vllm import envs

from vllm_lvspec.bench import command, growth, lengths, run, served
from vllm_lvspec.bench.command import (
    BenchError,
    BenchOptions,
    environment,
    kv_cache_bytes,
    parse_engine_arguments,
    parse_numbers,
    parse_settings,
    run_bench,
)
from vllm_lvspec.bench.page import main as page_main
from vllm_lvspec.bench.page import page
from vllm_lvspec.bench.peers import PEERS, DraftSettings, PeerError, speculative_config
from vllm_lvspec.bench.report import figure, markdown, pareto, plot, plot_profile, profile
from vllm_lvspec.bench.results import Environment, Report, Settings, json_schema, summarise
from vllm_lvspec.bench.run import Answer, Journal, JournalError, PolicyRun, StepTimes, within_reach
from vllm_lvspec.bench.samples import DatasetError, dataset, videofacts
from vllm_lvspec.bench.videofacts.scene import Scene, write_mp4
from vllm_lvspec.cli import app
from vllm_lvspec.config import MAX_SPECULATIVE_TOKENS, LVSpecConfig
from vllm_lvspec.reference import TARGET
from vllm_lvspec.reference.upscale import TEXT_SHAPES

ENVIRONMENT = Environment(date="2026-01-01", command="lvspec bench", versions={}, device="test", cores=2, resumed=False)


def settings_for(samples, policies, **changes) -> Settings:
    values = dict(
        title=None, suite="videofacts", samples=len(samples), videos=len({s.video_name for s in samples}), seeds=[1],
        tasks=["caption"],
        policies=policies, model="target", draft="draft", shape=None, draft_shape=None, dtype="float32", batch_size=1,
        num_speculative_tokens=10, pruning="uniform", pruning_ratio=0.9, more={}, max_tokens=256, min_tokens=0,
        num_frames=24, side_by_side=False, repeats=1, profile=False, engine={},
    )  # fmt: skip
    return Settings(**{**values, **changes})


def answer(policy: str, sample: str, tokens: int, steps: int, seconds: float, text: str = "") -> Answer:
    return Answer(policy, sample, list(range(tokens)), text, steps, 0.5, 0.5 + seconds, "stop", seconds + 1)


@pytest.fixture
def report() -> Report:
    """Two videos, `ar` at 10 tokens a second and `strict` at twice that with 4 tokens a step."""
    samples = videofacts(2, 1, ["caption", "choice"])
    truth = {}
    for sample in samples:
        scene = Scene.from_seed(int(sample.video_name))
        truth[sample.name] = _true_answer(scene, sample)
    ar = [answer("ar", s.name, 101, 100, 10.0, truth[s.name]) for s in samples]
    strict = [answer("strict", s.name, 101, 25, 5.0, truth[s.name]) for s in samples]
    runs = {
        "ar": PolicyRun(ar, None),
        "strict": PolicyRun(strict, StepTimes(100, 12.0, 6.0, 0.0, 100, 1000, 0.5, 0.25, 4)),
    }
    return summarise(runs, samples, settings_for(samples, ["ar", "strict"]), ENVIRONMENT)


def _true_answer(scene, sample) -> str:
    from vllm_lvspec.bench.videofacts.tasks import TASKS, make_task

    rng = np.random.default_rng([int(sample.video_name), TASKS.index(sample.task)])
    return make_task(scene, sample.task, rng).answer.text


def test_figures_are_what_they_say(report):
    ar, strict = report.policies["ar"], report.policies["strict"]
    assert (ar.mean_accepted_length, strict.mean_accepted_length) == (1.0, 4.0)
    assert (ar.tokens_per_second, strict.tokens_per_second) == (10.0, 20.0)
    assert (ar.speedup, strict.speedup) == (1.0, 2.0)
    assert (strict.first_token_over_ar, strict.throughput_over_ar) == (1.0, pytest.approx(11 / 6))
    assert (strict.output_tokens, strict.target_steps) == (404, 100)
    assert strict.throughput == pytest.approx(404 / (4 * 6))
    assert ar.fact_accuracy == strict.fact_accuracy == ar.order_accuracy == 1.0
    assert strict.retention == strict.same_answers == 1.0
    assert strict.reasons == {"exact": 300, "target": 104}
    assert ar.reasons == {"exact": 0, "target": 404}
    assert list(strict.tasks) == ["caption", "choice"]
    assert strict.intervals["mean_accepted_length"] == (4.0, 4.0)
    assert strict.facts["colour"].recall == strict.facts["colour"].precision == 1.0


def test_the_bound_is_made_of_measured_costs(report):
    bound = report.policies["strict"].bound
    assert bound.target_step_seconds == pytest.approx(0.1)
    assert bound.draft_cost == pytest.approx(0.06 / 10 / 0.1)
    assert bound.verify_overhead == pytest.approx(0.12 / 0.1 - 1)
    assert bound.speedup == pytest.approx(4 / (1 + 10 * 0.06 + 0.2))
    assert report.policies["ar"].bound is None


def test_what_drafting_costs_a_prompt_is_said_per_answer(report):
    strict = report.policies["strict"]
    assert strict.drafted_length == pytest.approx(10)
    assert strict.draft_prefill_seconds == pytest.approx(0.5 / 4)
    assert strict.scoring_seconds == pytest.approx(0.25 / 4)
    assert report.policies["ar"].drafted_length is None
    assert "| strict | 10.00 | 125.0 | 62.5 |" in markdown(report)
    # Of a run that was stopped, the part that was run to its end: of each of two questions thrice.
    samples = videofacts(2, 1, ["caption", "choice"])
    times = StepTimes(prefill_seconds=1.2, prompts=6)
    runs = {"strict": PolicyRun([answer("strict", s.name, 3, 2, 1.0) for s in samples], times)}
    asked_thrice = summarise(runs, samples, settings_for(samples, ["strict"], repeats=3), ENVIRONMENT)
    assert asked_thrice.policies["strict"].draft_prefill_seconds == pytest.approx(0.2)


def test_throughput_is_that_of_whole_batches():
    """Of two that run at once the second ends right behind the first, and the clock counts for both."""
    samples = videofacts(10, 1, ["caption"])
    seconds = {"ar": [6.0, 0.1] * 5, "strict": [3.0, 0.05, 2.0, 0.05, 3.0, 0.05, 3.0, 0.05, 3.0, 0.05]}
    runs = {
        name: PolicyRun(
            [
                replace(answer(name, s.name, 3, 2, 1.0), wall_seconds=wall)
                for s, wall in zip(samples, each, strict=True)
            ],
            None,
        )
        for name, each in seconds.items()
    }
    found = summarise(runs, samples, settings_for(samples, list(runs), batch_size=2), ENVIRONMENT)
    strict = found.policies["strict"]
    assert strict.throughput_over_ar == pytest.approx(30.5 / 14.25)
    low, high = strict.intervals["throughput_over_ar"]
    assert low == pytest.approx(2.0) and 30.5 / 14.25 < high < 6.1 / 2.05
    few = {name: PolicyRun(run.answers[:8], None) for name, run in runs.items()}
    of_few = summarise(few, samples[:8], settings_for(samples[:8], list(runs), batch_size=2), ENVIRONMENT)
    assert "throughput_over_ar" not in of_few.policies["strict"].intervals
    assert figure(of_few.policies["strict"], "throughput_over_ar", 2) == f"{24.4 / 11.2:.2f}"


def test_no_secret_is_written_down(monkeypatch):
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_API_KEY", "abc")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    assert environment(["lvspec", "bench"]).command == "VLLM_CPU_OMP_THREADS_BIND='0|1' lvspec bench"


def test_a_part_of_what_runs_at_once_has_no_throughput():
    samples = videofacts(2, 1, ["caption", "choice"])
    runs = {name: PolicyRun([answer(name, s.name, 3, 2, 1.0) for s in samples], None) for name in ("ar", "strict")}
    for batch_size, expected in ((1, 1.0), (2, None)):
        found = summarise(runs, samples, settings_for(samples, list(runs), batch_size=batch_size), ENVIRONMENT)
        assert found.policies["strict"].throughput_over_ar == 1.0
        assert found.policies["strict"].tasks["caption"].throughput_over_ar == expected


def test_intervals_are_over_videos_and_hold_the_figure():
    samples = videofacts(40, 1, ["caption"])
    rng = np.random.default_rng(0)
    steps = rng.integers(20, 60, len(samples))
    answers = [answer("strict", s.name, 101, int(n), 1.0) for s, n in zip(samples, steps, strict=True)]
    runs = {"strict": PolicyRun(answers, None)}
    result = summarise(runs, samples, settings_for(samples, ["strict"]), ENVIRONMENT).policies["strict"]
    low, high = result.intervals["mean_accepted_length"]
    assert low < 4000 / steps.sum() < high
    assert high - low < 1
    assert result.retention is None and result.speedup is None and result.same_answers is None and result.bound is None


@pytest.mark.parametrize("said", [None, "1"])
def test_engines_are_in_this_process_only_while_they_are_asked_to_be(said, monkeypatch):
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    monkeypatch.setenv(name, "1")
    if said is None:
        monkeypatch.delenv(name)
    assert envs.VLLM_ENABLE_V1_MULTIPROCESSING
    envs.enable_envs_cache()  # as engines do
    with within_reach(VLLM_USE_V2_MODEL_RUNNER="0"):
        assert not envs.VLLM_ENABLE_V1_MULTIPROCESSING
        assert envs.VLLM_USE_V2_MODEL_RUNNER is False
        envs.enable_envs_cache()
    assert os.environ.get(name) == said and "VLLM_USE_V2_MODEL_RUNNER" not in os.environ
    assert envs.VLLM_ENABLE_V1_MULTIPROCESSING


def test_without_truth_there_are_no_facts():
    samples = videofacts(3, 1, ["caption"])
    blind = [replace(s, score=None) for s in samples]
    runs = {"ar": PolicyRun([answer("ar", s.name, 11, 10, 1.0) for s in blind], None)}
    result = summarise(runs, blind, settings_for(blind, ["ar"]), ENVIRONMENT).policies["ar"]
    assert result.fact_accuracy is result.order_accuracy is result.retention is None
    assert result.facts == {}
    assert "Facts\n" not in markdown(Report(environment=ENVIRONMENT, settings=settings_for(blind, ["ar"]),
                                            policies={"ar": result}))  # fmt: skip


def test_the_json_follows_its_schema_and_every_field_is_explained(report):
    schema = json_schema()
    jsonschema.validate(json.loads(report.model_dump_json()), schema)
    broken = json.loads(report.model_dump_json())
    del broken["policies"]["ar"]["target_steps"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)
    for name, model in {**schema["$defs"], "Report": schema}.items():
        for field, value in model["properties"].items():
            assert "description" in value or name == "Report", f"{name}.{field}"


def test_the_documentation_of_the_json_is_the_schema():
    page = (Path(__file__).parents[2] / "docs" / "bench.md").read_text()
    for model in json_schema()["$defs"].values():
        for field, value in model["properties"].items():
            assert f"| `{field}` | {value['description']} |" in page, field


def test_markdown_and_plot_show_every_policy_and_task(report, tmp_path):
    page = markdown(report)
    assert "| strict | 4.00 [4.00, 4.00] | 2.00 [2.00, 2.00] | 2.22 | 1.000" in page
    assert "| strict | 1.00 [1.00, 1.00] | 1.83 [1.83, 1.83] |" in page
    assert "| strict | caption | 2 | 101 |" in page
    assert "T / (1 + K c + o) = 2.22" in page
    assert "{{" not in page and "{%" not in page
    assert all(
        before == "" for before, line in itertools.pairwise(page.splitlines()) if line.startswith(("#", "Target"))
    )
    plot(report, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_profile_is_shown_per_step_by_part(report, tmp_path):
    assert not profile(report) and "Where time goes" not in markdown(report)
    plot_profile(report, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()

    samples = videofacts(2, 1, ["caption"])
    seen = {
        "decode": {"steps": 4, "seconds": {"target": 0.3, "sampling": 0.1}},
        "prompt": {"steps": 0, "seconds": {}},
    }
    runs = {
        "ar": PolicyRun([answer("ar", s.name, 11, 10, 1.0) for s in samples], None),
        "strict": PolicyRun([answer("strict", s.name, 11, 5, 1.0) for s in samples], StepTimes(), None, seen),
    }
    found = summarise(runs, samples, settings_for(samples, ["ar", "strict"]), ENVIRONMENT)
    assert found.policies["ar"].profile is None
    assert found.policies["strict"].profile.keys() == {"decode"}
    page = markdown(found)
    assert "| target | 75.00 (75.0 %) |" in page and "| whole step | 100.00 |" in page
    assert page.index("| target |") < page.index("| sampling |")
    assert "steps with prompts" not in page
    (table,) = profile(found)
    assert [column.header for column in table.columns] == ["part", "strict"]
    assert table.row_count == 3
    plot_profile(found, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_answers_of_one_token_have_no_speed_and_break_nothing(tmp_path):
    samples = videofacts(2, 1, ["caption", "choice"])
    runs = {"ar": PolicyRun([answer("ar", s.name, 1, 0, 0.0) for s in samples], None)}
    report = summarise(runs, samples, settings_for(samples, ["ar"]), ENVIRONMENT)
    assert report.policies["ar"].mean_accepted_length is report.policies["ar"].tokens_per_second is None
    assert "| ar | – |" in markdown(report)
    plot(report, tmp_path / "out.png")


def test_reasons_are_the_plugins_own_where_it_counts_them(report):
    samples = videofacts(2, 1, ["caption", "choice"])
    counted = {"exact": 60, "loose": 20, "shift": 1, "target": 20}
    loose = [replace(answer("lvspec", s.name, 101, 20, 3.0), reasons=counted) for s in samples]
    run = PolicyRun(loose, StepTimes(80, 8.0, 4.0, 0.0, 80, 640), [0] * 150 + [4, 0, 4] + [0] * 47 + [9])
    result = summarise({"lvspec": run}, samples, settings_for(samples, ["lvspec"]), ENVIRONMENT).policies["lvspec"]
    assert result.reasons == {"exact": 240, "loose": 80, "shift": 4, "target": 80}
    assert result.relevance["0.3"] == pytest.approx(0.51) and result.relevance["0.9"] == pytest.approx(0.53)
    assert report.policies["strict"].relevance is None


def test_figures_are_given_by_seed_too(report):
    samples = videofacts(2, 1, ["caption"]) + videofacts(3, 2, ["caption"])
    steps = [10, 10, 20, 20, 20]
    run = PolicyRun([answer("strict", s.name, 101, n, 1.0) for s, n in zip(samples, steps, strict=True)], None)
    policy = summarise({"strict": run}, samples, settings_for(samples, ["strict"]), ENVIRONMENT).policies["strict"]
    assert {seed: (f.answers, f.mean_accepted_length) for seed, f in policy.seeds.items()} == {
        "1": (2, 10),
        "2": (3, 5),
    }


def test_false_statements_are_counted_where_they_stand():
    (sample,) = videofacts(1, 1, ["caption"])
    scene = Scene.from_seed(int(sample.video_name))
    true = _true_answer(scene, sample)
    padding = " It is calm." * 60
    text = true + padding + " Next, the violet circle vanishes."
    claims = sample.claims(text)
    assert sum(c.wrong for c in claims[:-2]) == 0 and sum(c.right for c in claims) > 8
    assert sum(c.wrong for c in claims) > 0 and text[claims[-2].begin :].lstrip().startswith("Next")
    run = PolicyRun([answer("strict", sample.name, 300, 50, 1.0, text)], None)
    policy = summarise({"strict": run}, [sample], settings_for([sample], ["strict"]), ENVIRONMENT).policies["strict"]
    assert policy.stretches[0].precision == 1 and policy.stretches[-1].precision < 1
    assert policy.stretches[-1].begin == 250


def test_the_pareto_plot_needs_points_to_compare(report, tmp_path):
    pareto(report, tmp_path / "few.png")
    assert not (tmp_path / "few.png").exists()
    strict = report.policies["strict"]
    more = {f"lvspec:relaxation={r}": strict for r in (0, 0.5)}
    pareto(report.model_copy(update={"policies": {**report.policies, **more}}), tmp_path / "several.png")
    assert (tmp_path / "several.png").stat().st_size > 5000


# Journal --------------------------------------------------------------------------------------------------------------


def test_a_journal_goes_on_where_it_was(tmp_path):
    path = tmp_path / "run.partial"
    first = Journal(path, {"seed": 1})
    first.add(asdict(answer("ar", "a", 3, 2, 1.0)))
    first.add({"policy": "ar", "times": {"steps": 2}, "relevance": [1, 2]})
    with path.open("a") as file:
        file.write('{"policy": "ar", "samp')  # killed while writing
    again = Journal(path, {"seed": 1})
    assert again.resumed
    assert again.answers["ar"]["a"].token_ids == [0, 1, 2]
    assert again.times["ar"] == {"steps": 2}
    assert again.relevance["ar"] == [1, 2]
    again.add(asdict(answer("ar", "b", 3, 2, 1.0)))
    assert set(Journal(path, {"seed": 1}).answers["ar"]) == {"a", "b"}


def test_answers_to_other_settings_are_neither_taken_up_nor_lost(tmp_path):
    path = tmp_path / "run.partial"
    Journal(path, {"seed": 1, "dtype": "float32"}).add(asdict(answer("ar", "a", 3, 2, 1.0)))
    with pytest.raises(JournalError, match=r"1 answers of a stopped run .*: seed=2, there 1\. .* restart"):
        Journal(path, {"seed": 2, "dtype": "float32"})
    assert Journal(path, {"seed": 1, "dtype": "float32"}).answers["ar"]


def test_a_journal_without_answers_gives_way(tmp_path):
    path = tmp_path / "run.partial"
    Journal(path, {"seed": 1})
    assert not Journal(path, {"seed": 2}).resumed
    Journal(path, {"seed": 2}).add(asdict(answer("ar", "a", 3, 2, 1.0)))


def test_another_file_of_that_name_is_left_alone(tmp_path):
    path = tmp_path / "run.partial"
    for text in ("mine", "5\n6", "[1]\n{}"):
        path.write_text(text)
        with pytest.raises(JournalError, match="must be a stopped run's answers"):
            Journal(path, {"seed": 1})
        assert path.read_text() == text


@pytest.fixture
def stopped_run(folder, monkeypatch):
    """A run over `folder` that was stopped after the first of two questions, and a way to repeat it; no engines."""
    asked = []

    def fake_ask(policies, samples, model, draft, batch_size, max_tokens, min_tokens, engine, journal, **progress):
        known = journal.answers["ar"]
        for sample in samples:
            if sample.name not in known:
                asked.append(sample.question)
                journal.add(asdict(answer("ar", sample.name, 3, 2, 1.0, f"answer to {sample.question}")))
                if len(asked) == 1:
                    raise KeyboardInterrupt
        return {"ar": PolicyRun([known[s.name] for s in samples], None)}

    monkeypatch.setattr("vllm_lvspec.bench.command.run_policies", fake_ask)

    def run(**changes):
        options = {"json_path": folder / "out.json", "dataset": str(folder), "policies": ["ar"], "num_frames": 8}
        return run_bench(BenchOptions(**{**options, **changes}), Console(quiet=True), ["lvspec"])

    with pytest.raises(KeyboardInterrupt):
        run()
    return folder, asked, run


def test_a_stopped_run_goes_on_and_its_answers_are_kept_beside_the_figures(stopped_run):
    folder, asked, run = stopped_run
    assert run().environment.resumed
    assert asked == ["What happens?", "Why?"]
    lines = [json.loads(line) for line in (folder / "out.answers.jsonl").read_text().splitlines()]
    assert [line["answers"] for line in lines] == [{"ar": "answer to What happens?"}, {"ar": "answer to Why?"}]
    assert lines[0]["prompt"] == "What happens?" and lines[0]["video"] == "clips/a.mp4"
    assert not (folder / "out.partial").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: {"max_tokens": 7}, "max_tokens=7, there 256"),
        (lambda folder: (folder / "prompts.jsonl").write_text(
            (folder / "prompts.jsonl").read_text().replace("What", "Who")), "questions="),
        (lambda folder: os.utime(folder / "clips" / "a.mp4", (1, 1)), "questions="),
    ],
)  # fmt: skip
def test_a_stopped_run_of_other_questions_is_not_gone_on_with(stopped_run, change, named):
    folder, asked, run = stopped_run
    changes = change(folder)
    changes = changes if isinstance(changes, dict) else {}
    with pytest.raises(JournalError) as error:
        run(**changes)
    assert named in str(error.value)
    assert asked == ["What happens?"]
    assert len(run(**changes, restart=True).policies) == 1
    assert len(asked) == 3


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_suites_of_different_seeds_share_no_scene_with_each_other_or_with_training():
    from vllm_lvspec.reference.train import SEED_OFFSET

    suites = {seed: videofacts(50, seed, ["choice"]) for seed in (1, 2, 99)}
    scenes = {seed: {Scene.from_seed(int(s.video_name)) for s in suite} for seed, suite in suites.items()}
    trained = {Scene.from_seed(SEED_OFFSET + i) for i in range(3000)}
    for one, other in itertools.combinations([*scenes.values(), trained], 2):
        assert not one & other
    assert max(int(s.video_name) for s in videofacts(10_000, 99, ["choice"])[-1:]) < SEED_OFFSET
    assert [s.question for s in videofacts(3, 1)] == [s.question for s in videofacts(3, 1)]
    frames, details = videofacts(1, 1, num_frames=12)[0].load_video()
    assert frames.shape == (12, 112, 112, 3)
    assert details["fps"] == 2.0


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips").mkdir()
    write_mp4(str(tmp_path / "clips" / "a.mp4"), Scene.from_seed(1).render())
    lines = [
        {"video": "clips/a.mp4", "prompt": "What happens?"},
        {"video": "clips/a.mp4", "prompt": "Why?", "task": "x"},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return tmp_path


def test_a_folder_of_videos_with_prompts_is_a_dataset(folder):
    first, second = dataset(str(folder), None, num_frames=8)
    assert (first.question, first.task, second.task) == ("What happens?", "prompt", "x")
    assert first.video_name == second.video_name
    frames, details = first.load_video()
    assert frames.shape == (8, 112, 112, 3)
    assert details["total_num_frames"] == 24
    assert len(dataset(str(folder), 1, num_frames=8)) == 1


def test_a_dataset_of_the_hub_is_such_a_folder(folder, monkeypatch):
    import huggingface_hub

    fetched = []
    store = folder / "blobs"
    (folder / "clips" / "a.mp4").rename(store)

    def lists(name, repo_type, allow_patterns):
        assert (name, repo_type, allow_patterns) == ("owner/name", "dataset", "*.jsonl")
        return str(folder)

    def file(name, path, repo_type, revision):
        assert revision == folder.name  # of the same state as the lists
        fetched.append(path)
        (folder / path).unlink(missing_ok=True)
        (folder / path).symlink_to(store)  # as in the hub's cache

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lists)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    sample, other = dataset("hf:owner/name", None, 8)
    assert sample.load_video()[0].shape == (8, 112, 112, 3)
    assert sample.video_name == other.video_name
    assert fetched == ["clips/a.mp4"]

    def gone(name, path, repo_type, revision):
        raise FileNotFoundError("no such entry")

    (folder / "clips" / "a.mp4").unlink()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gone)
    with pytest.raises(DatasetError, match=r"prompts.jsonl:1: 'clips/a.mp4' of 'hf:owner/name' can't be had"):
        dataset("hf:owner/name", 1, 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompts.jsonl:3: not JSON"),
        ("[1]", "prompts.jsonl:3: [1]: must be an object"),
        ('{"video": "clips/a.mp4"}', "prompts.jsonl:3: prompt=None: must be text; its keys are video"),
        ('{"video": "clips/b.mp4", "prompt": "x"}', "video='clips/b.mp4': no such file"),
        ('{"video": "../secret.mp4", "prompt": "x"}', "video='../secret.mp4': no such file in the dataset's folder"),
        ('{"video": "clips/text.mp4", "prompt": "x"}', "prompts.jsonl:3: video='clips/text.mp4': can't be opened"),
    ],
)
def test_wrong_lines_are_named(folder, line, message):
    (folder.parent / "secret.mp4").write_bytes(b"x")
    (folder / "clips" / "text.mp4").write_text("no video")
    text = (folder / "prompts.jsonl").read_text().strip() + "\n" + line
    (folder / "prompts.jsonl").write_text(text)
    with pytest.raises(DatasetError) as error:
        dataset(str(folder), None, 8)
    assert message in str(error.value)


def test_a_video_that_breaks_off_is_named(folder):
    first, _ = dataset(str(folder), None, num_frames=8)
    (folder / "clips" / "a.mp4").write_text("no video any more")
    with pytest.raises(DatasetError, match=r"a\.mp4: can't be read as a video"):
        first.load_video()


@pytest.mark.parametrize("name", ["bench", "bench-growth"])
def test_whoever_ends_a_bench_has_its_engines_ended(name, tmp_path, monkeypatch):
    def is_ended(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(command, "run_bench", is_ended)
    monkeypatch.setattr(growth, "run_growth", is_ended)
    before = signal.getsignal(signal.SIGTERM)
    try:
        result = CliRunner().invoke(app, [name, "--json", str(tmp_path / "x.json")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 130 and "stopped" in result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"json_path": Path("out.txt")}, "json='out.txt': must end in .json"),
        ({"suite": "other"}, "suite='other': must be videofacts"),
        ({"family": "other"}, "family='other': must be one of qwen2_5_vl, llava_onevision"),
        ({"policies": ["ar", "fast"]}, "policies='fast': must be of ar, ngram, strict"),
        ({"policies": ["ar", "ar"]}, "policies='ar,ar'"),
        ({"batch_size": 0}, "batch_size=0: must be 1 or more"),
        ({"samples": 0}, "samples=0: must be 1 or more"),
        ({"dtype": "floaty"}, "dtype='floaty': must be one of auto"),
        ({"engine_arguments": {"max_model_len": None}}, "max_model_len=None: must be 704 or more"),
        ({"num_frames": 2000}, "num_frames=2000, max_tokens=256: 16512 tokens"),
        ({"model": "/nowhere"}, "model='/nowhere': must be a model's folder or its name on the hub"),
        ({"draft": DraftSettings(model="/nowhere")}, "draft='/nowhere': must be a model's folder"),
        ({"model": "/nowhere", "shape": "7b"}, "model='/nowhere'"),
        ({"tasks": ["caption", "caption"]}, "tasks='caption,caption': must be one or more of"),
        ({"policies": ["ngram"], "draft": DraftSettings(num_speculative_tokens=0)}, "num_speculative_tokens=0: must"),
        ({"engine_arguments": {"speculative_config": "lvspec"}}, "speculative_config='lvspec': leave it out; policies"),
        ({"engine_arguments": {"hf_overrides": {}}, "shape": "7b"}, "hf_overrides={}: leave it out; shape says it"),
        ({"seeds": [100]}, "seed=100: must be from 0 to 99"),
        ({"seeds": [3, 3]}, "seed='3,3': must be one or more, each once"),
        ({"min_tokens": 300}, "min_tokens=300: must be from 0 to max_tokens=256"),
        ({"policies": ["ar:relaxation=1"]}, "policies='ar:relaxation=1': ar has no settings"),
        ({"policies": ["lvspec:loose"]}, "policies='lvspec:loose': 'loose' must be key=value"),
        ({"policies": ["lvspec:relaxation=2"]}, "relaxation=2: must be less than or equal to 1"),
        ({"draft": DraftSettings(more={"guards": "verbs"})}, 'guards="verbs": must be of negation, number, order'),
        ({"tasks": ["caption", "poem"]}, "tasks='caption,poem': must be one or more of caption"),
        ({"dataset": "nowhere"}, "dataset='nowhere': no such folder"),
        ({"draft": DraftSettings(pruning="some")}, "pruning="),
        ({"draft": DraftSettings(num_speculative_tokens=0)}, "num_speculative_tokens=0"),
        ({"engine_arguments": {"max_num_seqs": 4}}, "max_num_seqs=4: leave it out"),
        ({"shape": "1b"}, "shape='1b': must be one of 0.5b"),
        ({"draft_shape": "1b", "shape": "7b"}, "draft_shape='1b': must be one of 0.5b"),
        ({"draft_shape": "3b"}, "draft_shape='3b': must be left out, or go with the target's shape"),
        ({"draft_shape": "3b", "shape": "7b", "model": str(TARGET)}, "draft_shape='3b': must go with draft"),
        ({"repeats": 0}, "repeats=0: must be 1 or more"),
    ],
)
def test_wrong_options_are_named(changes, message, tmp_path):
    options = BenchOptions(**{"json_path": tmp_path / "out.json", **changes})
    with pytest.raises(ValueError, match=r"must|no such|leave it out") as error:
        run_bench(options, Console())
    assert message in str(error.value)


def test_a_list_in_another_encoding_is_named(folder):
    (folder / "prompts.jsonl").write_bytes('{"video": "clips/a.mp4", "prompt": "où"}'.encode("latin-1"))
    with pytest.raises(DatasetError, match=r"prompts.jsonl: byte 37 is not UTF-8"):
        dataset(str(folder), None, 8)


@pytest.mark.parametrize("shape", TEXT_SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_holds_all_requests_of_every_shape(shape, dtype):
    """vLLM refuses to start where one request of full length has no room; with less, requests wait for each other."""
    large = TEXT_SHAPES[shape]
    block, most, batch_size = 128, 2048, 4
    per_block = block * 2 * large.num_hidden_layers * large.num_key_value_heads * large.head_dim
    per_block *= torch.finfo(getattr(torch, dtype)).bits // 8
    blocks = kv_cache_bytes(large, dtype, most, batch_size) // per_block
    assert blocks >= 1 + batch_size * -(-(most + MAX_SPECULATIVE_TOKENS + 1) // block)


def test_engine_arguments_are_an_object():
    assert parse_engine_arguments('{"tensor_parallel_size": 2}') == {"tensor_parallel_size": 2}
    for text in ("[", "[1]"):
        with pytest.raises(BenchError, match="engine="):
            parse_engine_arguments(text)


def test_peers_may_have_settings_of_their_own():
    shared = DraftSettings("DRAFT", more={"relaxation": 0.5, "shift_window": 0})
    assert speculative_config("ar", shared) is None
    config = speculative_config("lvspec:relaxation=0.7:guards=negation+order:num_speculative_tokens=6", shared)
    parsed = LVSpecConfig.parse(config)
    assert (parsed.relaxation, parsed.shift_window, parsed.num_speculative_tokens) == (0.7, 0, 6)
    assert parsed.guards == ("negation", "order")
    source = speculative_config("lvspec:anchor_source=layer:4:read:anchor_top_n=1", shared)
    assert (source["anchor_source"], source["anchor_top_n"]) == ("layer:4:read", 1)


def test_settings_and_seeds_are_read_from_the_command_line():
    assert parse_settings(["guards=order", "shift_window=3"]) == {"guards": "order", "shift_window": 3}
    assert parse_numbers("seed", "1,22") == [1, 22]
    with pytest.raises(BenchError, match="set='guards': must be key=value"):
        parse_settings(["guards"])
    with pytest.raises(BenchError, match="seed='1;2': must be a number"):
        parse_numbers("seed", "1;2")


def test_every_policy_of_the_verifier_is_a_peer():
    settings = DraftSettings("DRAFT", 6, "none", 0.5)
    assert PEERS["ar"](settings) is None
    assert PEERS["ngram"](settings)["num_speculative_tokens"] == 6
    for name, config in PEERS.items():
        if name not in ("ar", "ngram"):
            parsed = LVSpecConfig.parse(config(settings))
            assert (parsed.policy, parsed.model, parsed.num_speculative_tokens) == (name, "DRAFT", 6)
            assert (parsed.pruning, parsed.pruning_ratio) == ("none", 0.5)


class StepEngine:
    """Its requests take two steps of 20 ms each, so that those that begin together end together."""

    def __init__(self):
        self.llm_engine = self
        self.steps_left: dict[str, int] = {}
        self.seconds = 0.0

    def add_request(self, request_id, inputs, params):
        self.steps_left[request_id] = 2

    def step(self):
        time.sleep(0.02)
        self.seconds += 0.02
        completion = SimpleNamespace(token_ids=[1, 2], text="", finish_reason="stop")
        outputs = []
        for name in list(self.steps_left):
            self.steps_left[name] -= 1
            finished = self.steps_left[name] == 0
            outputs.append(SimpleNamespace(request_id=name, finished=finished, outputs=[completion]))
            if finished:
                del self.steps_left[name]
        return outputs


def read_slowly(sample):
    time.sleep(0.05)
    return {"multi_modal_data": {"video": [(np.zeros(100, np.uint8), {})]}}


@pytest.mark.parametrize(
    ("batch_size", "num_read"),
    [(1, [3, 3, 3, 6, 6, 6, 7]), (2, [4, 4, 4, 4, 7, 7, 7]), (5, [5, 5, 5, 5, 5, 7, 7])],
)
def test_videos_are_read_ahead_as_many_as_there_is_room_for_and_no_less_than_a_batch(monkeypatch, batch_size, num_read):
    monkeypatch.setattr(run, "has_plugin", lambda llm: False)
    monkeypatch.setattr(run, "PREPARED_BYTES", 250)
    read = []
    samples = [SimpleNamespace(name=str(i)) for i in range(7)]
    answers = run._ask(StepEngine(), "ar", samples, lambda s: read.append(s.name) or read_slowly(s), batch_size, 8, 0)
    assert [(answer.sample, len(read)) for answer in answers] == list(zip("0123456", num_read, strict=True))


def test_answers_that_end_in_one_step_share_its_seconds_and_while_nothing_runs_the_clock_stands(monkeypatch):
    monkeypatch.setattr(run, "has_plugin", lambda llm: False)
    engine = StepEngine()
    samples = [SimpleNamespace(name=str(i)) for i in range(6)]
    answers = []
    for answer in run._ask(engine, "ar", samples, read_slowly, 3, 8, 0):
        time.sleep(0.05)
        answers.append(answer)
    assert [a.sample for a in answers] == list("012345")
    assert [a.wall_seconds > 0 for a in answers] == [True, False, False] * 2
    assert sum(a.wall_seconds for a in answers) == pytest.approx(engine.seconds, abs=0.04)


def test_lengths_are_compared_with_no_drafts_at_all():
    compared = lengths.ways([5, 12])
    assert next(iter(compared)) == "none"
    assert compared["none"].length == 0
    assert compared["adaptive"] == lengths.Way(12, is_adaptive=True, only_if_faster=True)
    assert compared["5"] == lengths.Way(5) and compared["5"].recalls
    assert compared["5, anew"] == lengths.Way(5, recalls=False)
    assert compared["5, only if faster"] == lengths.Way(5, only_if_faster=True)


def test_ratios_are_taken_group_by_group():
    others = np.array([1.0, 10.0, 100.0, 3.0])
    mean, low, high = lengths.ratios(2 * others, others)
    assert (mean, low, high) == pytest.approx((2, 2, 2))
    mean, low, high = lengths.ratios(np.array([1.0, 40.0, 100.0, 12.0]), others)
    assert mean == pytest.approx(2)
    assert 1 <= low < 2 < high <= 4


def test_of_several_times_the_fastest_counts_with_prompts_and_without():
    slow = lengths.Measured(wall_seconds=3.0, tokens=30, decode_seconds=1.0, decoded=10, steps=4)
    fast = lengths.Measured(wall_seconds=2.0, tokens=31, decode_seconds=1.5, decoded=11, steps=5)
    expected = lengths.Measured(wall_seconds=2.0, tokens=31, decode_seconds=1.0, decoded=10, steps=4)
    assert lengths.fastest([slow, fast]) == lengths.fastest([fast, slow]) == expected


def test_every_way_has_its_turn_to_be_the_first():
    turned = [run.turned(["a", "b", "c"], number) for number in range(4)]
    assert turned == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


class TurnEngine:
    """Of a policy; writes down what it is asked, and takes another time for each answer."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, policy):
        self.policy = policy
        self.times = itertools.cycle([3.0, 1.0, 2.0])


@pytest.fixture
def turn_engines(monkeypatch):
    TurnEngine.asked = []

    def ask(engine, policy, samples, *how):
        for sample in samples:
            if policy:
                engine.asked.append((policy, sample.name))
            yield answer(policy, sample.name, 11, 5, next(engine.times))

    @contextmanager
    def running_engine(model, config, batch_size, arguments):
        yield TurnEngine(config.get("policy", "ngram") if config else "ar")

    for name, fake in (("_ask", ask), ("running_engine", running_engine), ("prompt_writer", lambda llm: None)):
        monkeypatch.setattr(run, name, fake)
    monkeypatch.setattr(run, "_counters", lambda llm: None)


def run_on_fakes(tmp_path, samples, batch_size=2, policies=("ar", "strict"), **how) -> dict[str, PolicyRun]:
    journal = Journal(tmp_path / "out.partial", {})
    return run.run_policies(policies, samples, "target", DraftSettings("draft"), batch_size, 8, 0, {}, journal, **how)


def test_side_by_side_all_are_asked_in_turn(turn_engines, tmp_path):
    samples = videofacts(5, 1, ["choice"])
    a, b, c, d, e = (sample.name for sample in samples)
    found = run_on_fakes(tmp_path, samples, side_by_side=True)
    assert [[answer.sample for answer in policy.answers] for policy in found.values()] == [[a, b, c, d, e]] * 2
    turns = [("ar", [a, b]), ("strict", [a, b]), ("strict", [c, d]), ("ar", [c, d]), ("ar", [e]), ("strict", [e])]
    assert TurnEngine.asked == [(policy, name) for policy, names in turns for name in names]


def test_one_after_another_each_is_asked_everything(turn_engines, tmp_path):
    samples = videofacts(3, 1, ["choice"])
    run_on_fakes(tmp_path, samples)
    assert [policy for policy, _ in TurnEngine.asked] == ["ar"] * 3 + ["strict"] * 3


@pytest.mark.parametrize("side_by_side", [False, True])
def test_no_engine_starts_behind_that_of_ngrams(side_by_side, turn_engines, tmp_path):
    started: list[str] = []
    found = run_on_fakes(tmp_path, videofacts(1, 1, ["choice"]), policies=["ar", "ngram", "strict"],
                         on_start=started.append, side_by_side=side_by_side)  # fmt: skip
    assert started == ["ar", "strict", "ngram"] and list(found) == ["ar", "ngram", "strict"]


def test_a_stopped_run_makes_up_for_the_profile_alone(turn_engines, tmp_path, monkeypatch):
    samples = videofacts(2, 1, ["choice"])
    run_on_fakes(tmp_path, samples)
    num_asked = len(TurnEngine.asked)
    monkeypatch.setattr(run, "has_plugin", lambda llm: llm.policy != "ar")
    monkeypatch.setattr(TurnEngine, "collective_rpc", lambda self, name: [{"decode": {}}], raising=False)
    found = run_on_fakes(tmp_path, samples, with_profile=True)
    assert len(TurnEngine.asked) == num_asked
    assert found["ar"].profile is None and found["strict"].profile == {"decode": {}}


def test_of_several_answers_the_one_of_median_time_counts(turn_engines, tmp_path):
    samples = videofacts(1, 1, ["choice"])
    found = run_on_fakes(tmp_path, samples, repeats=3, batch_size=3)
    assert len(TurnEngine.asked) == 6
    assert [policy.answers[0].last_token_seconds for policy in found.values()] == [2.5, 2.5]


def test_a_group_is_measured_from_its_first_request_to_its_last_token(monkeypatch):
    engine = StepEngine()
    engine.has_unfinished_requests = lambda: bool(engine.steps_left)
    measured = lengths.answer(engine, ["a", "b"], [{}, {}])
    # Each reports two tokens in the first of its two steps already: none comes after it.
    assert (measured.tokens, measured.decoded, measured.steps) == (4, 0, 2)
    assert measured.wall_seconds == pytest.approx(0.04, abs=0.03)
    assert measured.decode_seconds == pytest.approx(2 * 0.02, abs=0.03)


def page_command() -> typer.Typer:
    app = typer.Typer()
    app.command()(page_main)
    return app


def loaded(ttfts, itls, throughput, errors=()) -> dict:
    """What vLLM's load generator writes about a round, as far as it is read."""
    errors = [*errors, *[""] * (len(ttfts) - len(errors))]
    lengths = [1 + len(gaps) if not error else 0 for gaps, error in zip(itls, errors, strict=True)]
    return {
        "ttfts": ttfts, "itls": itls, "output_lens": lengths, "errors": errors,
        "output_throughput": throughput, "completed": sum(not e for e in errors), "failed": sum(map(bool, errors)),
        "total_output_tokens": sum(lengths),
    }  # fmt: skip


def test_servers_are_compared_request_by_request():
    ar = loaded([0.2, 0.4], [[0.1] * 10, [0.3] * 20], 10.0)
    fast = loaded([0.3, 0.6], [[0.05] * 10, [0.1] * 20], 25.0)
    found = served._compare({"ar": [ar, ar], "lvspec": [fast, fast]})
    lvspec = found["lvspec"]
    assert (found["ar"].speedup, found["ar"].throughput_over_ar) == (1.0, 1.0)
    assert lvspec.speedup == pytest.approx(2.5)  # twice and three times as fast
    assert lvspec.intervals["speedup"] == (pytest.approx(2), pytest.approx(3))
    assert lvspec.first_token_over_ar == pytest.approx(1.5)
    assert lvspec.throughput_over_ar == pytest.approx(2.5)
    assert lvspec.token_seconds == pytest.approx(0.075)
    assert (lvspec.requests, lvspec.failed, lvspec.output_tokens) == (4, 0, 64)


def test_requests_that_failed_are_counted_and_have_no_speed():
    ar = loaded([0.2, 0.4], [[0.1] * 10, [0.3] * 20], 10.0)
    broken = loaded([0.2, 0.0], [[0.1] * 10, []], 5.0, ["", "no connection"])
    found = served._compare({"ar": [ar], "strict": [broken]})["strict"]
    assert (found.requests, found.failed) == (1, 1)
    assert found.speedup == pytest.approx(1.0) and found.intervals["speedup"] == (1.0, 1.0)
    alone = served._compare({"strict": [broken]})["strict"]
    assert alone.speedup is alone.throughput_over_ar is alone.first_token_over_ar is None and not alone.intervals


def test_servers_whose_answers_have_one_token_are_compared_but_for_decoding():
    one = loaded([0.2, 0.4], [[], []], 10.0)
    found = served._compare({"ar": [one], "strict": [one]})["strict"]
    assert found.speedup is found.token_seconds is None
    assert found.first_token_over_ar == found.throughput_over_ar == 1.0


def test_every_figure_of_servers_is_explained():
    schema = served.ServedReport.model_json_schema()
    for name, model in schema["$defs"].items():
        assert all("description" in value for value in model["properties"].values()), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policies": ["ar", "ar"]}, "policies='ar,ar': must name one or more, each once"),
        ({"concurrency": [0]}, "concurrency='0': must be one or more, each 1 or more"),
        ({"rounds": 0}, "rounds=0: must be 1 or more"),
        ({"max_tokens": 1025}, "max_tokens=1025: must be at most 1024"),
        ({"policies": ["ar", "fast"]}, "policies='fast': must be of ar, ngram"),
        ({"shape": "1b"}, "shape='1b': must be one of 0.5b"),
        ({"family": "llava"}, "family='llava': must be one of qwen2_5_vl"),
        ({"json_path": Path("x.txt")}, "json='x.txt': must end in .json"),
        ({"model": "/nowhere"}, "model='/nowhere': must be a model's folder"),
    ],
)
def test_servers_are_not_started_with_wrong_options(options, said):
    with pytest.raises((BenchError, PeerError), match=said):
        served.run_served(served.ServeOptions(**{"json_path": Path("x.json"), **options}), Console(quiet=True))


def test_the_published_page_is_what_its_files_make():
    docs = Path(__file__).parents[2] / "docs"
    assert (docs / "benchmarks.md").read_text() == page(docs / "benchmarks"), "make benchmarks-page"


def test_the_page_of_benchmarks_is_made_from_their_files(report, tmp_path):
    report.settings.title = "Captions, one at a time"
    (tmp_path / "1-captions.json").write_text(report.model_dump_json())
    ar, fast = loaded([0.2], [[0.1] * 10], 10.0), loaded([0.2], [[0.05] * 10], 15.0)
    settings = served.ServedSettings(
        title=None, model="target", draft=None, shape="0.5b", dtype="float32", policies=["ar", "lvspec"], samples=1,
        seed=1, task="caption", max_tokens=256, concurrency=[4], rounds=1, server=[],
    )  # fmt: skip
    loads = {4: served._compare({"ar": [ar], "lvspec": [fast]})}
    under_load = served.ServedReport(environment=ENVIRONMENT, settings=settings, loads=loads)
    (tmp_path / "2-servers.json").write_text(under_load.model_dump_json())
    text = page(tmp_path)
    assert "## Captions, one at a time" in text and "## 2-servers" in text
    assert "| strict | 4.00 [4.00, 4.00] | 2.00 [2.00, 2.00] | 0.90 of 2.22 | 1.00 [1.00, 1.00] |" in text
    assert "| 4 | lvspec | 1.50 | 1.00 [1.00, 1.00] | 2.00 [2.00, 2.00] |" in text
    lines = text.splitlines()
    assert CliRunner().invoke(page_command(), [str(tmp_path)]).output == text
    (tmp_path / "empty").mkdir()
    assert CliRunner().invoke(page_command(), [str(tmp_path / "empty")]).exit_code == 2
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        assert not (before.startswith("|") and not line and after.startswith("|")), "a table that falls apart"
