"""Objectives other than the quickstart's, and recompute, through the public command."""

import json
from pathlib import Path

from tests.end_to_end.runs import posttrain, result

RECIPE = Path(__file__).parent / "recipes" / "variants.py"


def test_other_objectives_run_through_with_recompute(tmp_path):
    done = posttrain("run", str(RECIPE), "--threads", "1", "--recompute", "full", "--runs-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = [folder.name for folder in tmp_path.iterdir()]
    phases = tmp_path / run / "phases"
    recipe = json.loads((tmp_path / run / "recipe.json").read_text())["recipe"]
    names = {phase["kind"]: phase["name"] for phase in recipe["phases"]}
    # KTO starts at its reference: each completion is a coin's toss, 1 - sigmoid(0), whatever the divergence of 0.
    first = json.loads((phases / names["preference"] / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"] - 0.5) < 1e-4
    assert (phases / names["preference"] / "reference_kl.json").exists()
    rows = [json.loads(line) for line in (phases / names["grpo"] / "metrics.jsonl").read_text().splitlines()]
    # With a divergence every scorable group is trained on, even one without spread.
    scorable = [row for row in rows if row["unscorable"] < 4]
    assert all((row["target_tokens"] > 0) == (row in scorable) for row in rows)
    assert all(row["gradient_norm"] > 0 for row in scorable)
    assert result(tmp_path, names["grpo"], run)["metrics"]["peak_memory_bytes"] > 1e8
