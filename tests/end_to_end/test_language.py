"""The recipe `language` on the tiny base: every phase runs, and what was left out is counted."""

import json
from pathlib import Path

import pytest

from posttrain.recipe.load import find
from posttrain.recipe.types import CodeSource, FolderBase, PreparePhase
from posttrain.run.journal import read_lines
from posttrain.scoring import toolchains
from tests.end_to_end.runs import posttrain


def test_a_quick_test_goes_from_mutants_to_the_last_evaluation(tmp_path: Path) -> None:
    if lacks := toolchains.missing("python"):
        pytest.skip(lacks)
    done = posttrain("run", "language", "--quick-test", "--runs-dir", str(tmp_path), "--name", "l", "--threads", "1")
    assert done.returncode == 0, done.stderr
    results = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("l/phases/*/result.json")}
    assert list(sorted(results)) == sorted(
        ("data", "eval_base", "sft", "eval_sft", "preference", "eval_preference", "grpo", "eval_grpo")
    )
    counts = results["data"]["counts"]
    assert counts["trajectories.rows"] == counts["repairs.rows"] == 2 and counts["heldout.rows"] == 1
    played = results["grpo"]["counts"]
    assert played["episodes"] == 16 and played["masked_truncated"] < 16
    # What was learned by heart is repaired again, but not each time: there is something to learn from.
    assert played["steps_without_spread"] < 4
    episodes = list(read_lines(tmp_path / "l" / "phases" / "grpo" / "samples.jsonl"))
    assert any(episode["parts"]["solved"] == 1 for episode in episodes)
    assert {"heldout.compiles", "heldout.solved", "heldout.hack"} <= results["eval_grpo"]["metrics"].keys()


@pytest.mark.parametrize("language", ["rust", "python", "typescript", "go"])
def test_trees_and_a_run_to_begin_with(language: str) -> None:
    recipe = find("language").build({"language": language, "trees": "a, b", "from_run": "tui"})
    assert recipe.base == FolderBase(kind="folder", path="runs/tui/phases/export/exports/hf")
    prepare = recipe.phases[0]
    assert isinstance(prepare, PreparePhase)
    sources = [source for dataset in prepare.datasets for source in dataset.sources]
    assert {source.path for source in sources if isinstance(source, CodeSource)} == {"a", "b"}
    assert {source.language for source in sources if isinstance(source, CodeSource)} == {language}
    split = {dataset.name: {getattr(one, "split", "") for one in dataset.sources} for dataset in prepare.datasets}
    assert split["heldout"] == {"heldout"} and split["repairs"] == split["trajectories"] == {"train"}
