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
    # With a divergence every sampled token is trained on, in groups without spread and unscorable episodes too.
    episodes = [json.loads(line) for line in (phases / names["grpo"] / "samples.jsonl").read_text().splitlines()]
    assert any(episode["score"] is None for episode in episodes)
    for row in rows:
        assert row["target_tokens"] == sum(sum(one["sampled"]) for one in episodes if one["step"] == row["step"])
        assert row["gradient_norm"] > 0
    assert result(tmp_path, names["grpo"], run)["metrics"]["peak_memory_bytes"] > 1e8
