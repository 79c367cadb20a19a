"""Registered traces → SFT on the tiny base → the same questions before and after → delta report."""

import json
from pathlib import Path

import pytest

from posttrain.worlds.duel import traces
from tests.end_to_end.runs import posttrain

KEY, STEPS, CASES = "duels@v1", 3, 6


def ok(*arguments: str) -> str:
    done = posttrain(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_key_becomes_a_model_and_a_report_of_what_it_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_REGISTRY", str(tmp_path / "datasets"))
    monkeypatch.setenv("POSTTRAIN_CACHE_DIR", str(tmp_path / "cache"))
    given, runs = tmp_path / "traces.jsonl", ("--runs-dir", str(tmp_path))
    given.write_text("".join(json.dumps(trace) + "\n" for trace in traces(40, seed=42)))
    ok("data", "add", KEY, str(given), "--format", "rt_trace")
    flags = ("--quick-test", "--dataset-key", KEY, "--evaluation", "world:duel_traces", "--cases", str(CASES))
    ok("run", "trace_sft", *flags, "--steps", str(STEPS), "--seed", "7", "--threads", "1", "--name", "t", *runs)

    run = tmp_path / "t"
    manifest = json.loads((run / "run.json").read_text())
    assert (manifest["recipe"], manifest["dataset_key"], manifest["seed"]) == ("trace_sft", KEY, 7)
    assert manifest["training_config"]["steps"] == STEPS and manifest["artifacts_path"] == str(run)
    assert len(lines(run / "phases/sft/metrics.jsonl")) == STEPS
    assert len(lines(run / "phases/data/data/traces/rows.jsonl")) == 40
    assert (run / "phases/sft/final/adapter_model.safetensors").is_file()
    before, after = (lines(run / f"phases/eval_{when}/answers.jsonl") for when in ("before", "after"))
    assert [row["id"] for row in before] == [row["id"] for row in after] and len(before) == CASES
    assert {row["score"] for row in before + after} <= {0.0, 1.0}

    report = tmp_path / "delta_report.md"
    ok("report", "--before", "t/eval_before", "--after", "t/eval_after", "--output", str(report), *runs)
    assert "**questions exact**" in report.read_text() and f"all {CASES} cases" in report.read_text()


def test_a_key_that_is_not_registered_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    done = posttrain("run", "trace_sft", "--quick-test", "--dataset-key", "duel@v9", "--runs-dir", str(tmp_path))
    assert done.returncode == 2 and "there is no dataset 'duel@v9'" in done.stderr


def test_without_tunix_a_run_that_asks_for_it_ends_before_its_first_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POSTTRAIN_TUNIX_PYTHON", raising=False)
    done = posttrain("run", "trace_sft", "--quick-test", "--backend", "tunix", "--runs-dir", str(tmp_path))
    assert done.returncode == 5 and "pip install google-tunix" in done.stderr
    assert not list(tmp_path.glob("*/phases"))
