"""The recipes `tes`, `duel` and `sft_rl` on the tiny base, shortened, through the public command."""

import json
import re
from pathlib import Path

import pytest

from tests.end_to_end.runs import posttrain, result

RECIPE = Path(__file__).parent / "recipes" / "shortened.py"


def shortened(recipe: str, runs_dir: Path) -> Path:
    done = posttrain(
        "run", str(RECIPE), "--recipe", recipe, "--threads", "1", "--runs-dir", str(runs_dir), "--name", recipe
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return runs_dir / recipe


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("recipe", ["tes", "duel"])
def test_decisions_are_sampled_rewarded_voted_on_and_exported(recipe: str, tmp_path: Path) -> None:
    run = shortened(recipe, tmp_path)
    rows = {row["id"]: row["reference"] for row in lines(run / "phases/data/data/decisions/rows.jsonl")}
    episodes = lines(run / "phases/grpo/samples.jsonl")
    assert len(episodes) == 2 * 4 * 4
    # An episode is paid what its table says of the action it named, or has a reason why not.
    for episode in episodes:
        if episode["score"] is None:
            assert episode["reason"]
        else:
            named = int(re.findall(r"\[(\d)\]", episode["completion"])[-1])
            assert episode["score"] == pytest.approx(rows[episode["task"]]["rewards"][named])
    assert sum(episode["score"] is None for episode in episodes) < len(episodes)
    for step in lines(run / "phases/grpo/metrics.jsonl"):
        assert step["drift"] < 1e-4 and (step["gradient_norm"] > 0 or step["unscorable"] == 16)
    answers = lines(run / "phases/eval_grpo/answers.jsonl")
    assert len(answers) == 12 and all(len(answer["samples"]) == 3 for answer in answers)
    metrics = result(tmp_path, "export", recipe)["metrics"]
    assert metrics["hf_greedy_agreement"] == metrics["gguf_greedy_agreement"] == 1


def test_sft_on_a_mixture_then_reinforcement_on_sums(tmp_path: Path) -> None:
    run = shortened("sft_rl", tmp_path)
    assert [folder.name for folder in sorted((run / "phases").iterdir())] == [
        *("data", "eval_base", "eval_rl", "eval_sft", "rl", "sft")
    ]
    losses = [row["loss"] for row in lines(run / "phases/sft/metrics.jsonl")]
    assert len(losses) == 12 and losses[-1] < losses[0]
    episodes = lines(run / "phases/rl/samples.jsonl")
    assert len(episodes) == 2 * 4 * 4 and {episode["score"] for episode in episodes} <= {None, 0.0, 1.0}
    assert all(len(lines(run / f"phases/eval_{model}/answers.jsonl")) == 12 for model in ("base", "sft", "rl"))
