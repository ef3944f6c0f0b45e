"""`lvspec bench-serve`: real servers under vLLM's own load generator."""

import json

from typer.testing import CliRunner

from vllm_lvspec.bench.served import ServedReport
from vllm_lvspec.cli import app


def test_servers_with_and_without_speculation_are_loaded_in_turn(tmp_path):
    path = tmp_path / "served.json"
    command = ["bench-serve", "--json", str(path), "--policies", "ar,strict", "--samples", "3", "--seed", "73"]
    command += ["--concurrency", "2", "--rounds", "1", "--server=--enforce-eager", "--set", "only_if_faster=false"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = ServedReport.model_validate(json.loads(path.read_text()))
    assert list(report.loads) == [2]
    ar, strict = report.loads[2]["ar"], report.loads[2]["strict"]
    assert (ar.requests, ar.failed) == (strict.requests, strict.failed) == (3, 0)
    assert ar.output_tokens == strict.output_tokens > 3 * 20
    assert ar.speedup == ar.throughput_over_ar == 1
    assert strict.speedup > 0 and strict.throughput_over_ar > 0 and strict.first_token_over_ar > 0
    low, high = strict.intervals["speedup"]
    assert low <= strict.speedup <= high
    assert "throughput_over_ar" not in strict.intervals  # of one round
    assert report.settings.model == "qwen2_5_vl/target"
    assert "strict" in result.output


def test_a_server_that_does_not_start_is_quoted(tmp_path):
    command = ["bench-serve", "--json", str(tmp_path / "x.json"), "--policies", "ar", "--samples", "2", "--rounds", "1"]
    result = CliRunner().invoke(app, [*command, "--concurrency", "1", "--server=--max-model-len 100000000"])
    assert result.exit_code == 2
    assert "vllm serve ended with status" in result.output
