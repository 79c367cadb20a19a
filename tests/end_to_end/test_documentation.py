"""What the documentation shows can be typed: its recipe runs, its rows are read, its options exist."""

import json
import re
from pathlib import Path

import pytest

from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.prepare import prepare_dataset
from posttrain.recipe.types import EVERY_ROW, Dataset, Execution, FileSource
from posttrain.recipes.quickstart import CHAT
from posttrain.run.folder import ASSETS
from tests.end_to_end.runs import posttrain

DOCS = Path(__file__).parents[2] / "docs"
RECIPES = (DOCS / "recipes.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", RECIPES, flags=re.MULTILINE | re.DOTALL)


def test_the_example_recipe_runs_as_it_stands(tmp_path: Path) -> None:
    [source] = blocks("python")
    recipe = tmp_path / "my_tools.py"
    recipe.write_text(source)
    where = ["--runs-dir", str(tmp_path / "runs")]
    # Two steps cannot pass the example's gate; accepted, the run goes on to its end.
    failed = posttrain("run", str(recipe), "--steps", "2", "--threads", "1", *where)
    assert failed.returncode == 3, failed.stdout + failed.stderr
    done = posttrain("resume", "my_tools-steps-2", "--accept", "train:loss", *where)
    assert done.returncode == 0, done.stdout + done.stderr
    phases = tmp_path / "runs" / "my_tools-steps-2" / "phases"
    assert json.loads((phases / "train" / "result.json").read_text())["metrics"]["steps"] == 2
    assert len((phases / "ask" / "answers.jsonl").read_text().splitlines()) == 50


@pytest.mark.parametrize(("content", "number"), [("text", 0), ("conversations", 1), ("pairs", 2)])
def test_the_example_rows_are_read_and_rendered(content: str, number: int, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(blocks("json")[number])
    source = FileSource(
        kind="file", path=str(rows), format="rows", filters=(), selection=EVERY_ROW, reasoning_effort=None
    )
    limits = {"max_tokens": 999, "too_long": "drop", "faulty_share": 0.0}
    dataset = Dataset.model_validate({"name": "own", "content": content, "sources": (source,), **limits})
    tokenizer = Tokenizer.load(ASSETS / "tiny_base")
    made = prepare_dataset(dataset, CHAT, tokenizer, tmp_path / "own", "any", 1, lambda rows: None)
    assert made["counts"]["rows"] == 1 and made["counts"]["target_tokens"] > 0


def test_every_execution_option_is_named() -> None:
    named = set(re.findall(r"^\| `--([a-z-]+)` \|", RECIPES, flags=re.MULTILINE))
    assert named == {name.replace("_", "-") for name in Execution.model_fields}
