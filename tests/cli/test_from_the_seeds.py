"""docs/from-the-seeds.md: every command of the right column is one that can be typed."""

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from posttrain.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "from-the-seeds.md").read_text()
RECIPE = "from posttrain.recipes.smoke import smoke as my_recipe\n"


def commands() -> list[str]:
    cells = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    assert all(len(cells_of_row) == 2 for cells_of_row in cells)
    return [text for cell in cells for text in re.findall(r"`([^`]+)`", cell[1]) if text.startswith("posttrain ")]


def test_there_are_commands_for_every_system() -> None:
    assert len(commands()) > 40
    assert [line for line in PAGE.splitlines() if line.startswith("## ")] == [
        "## TUI: tool use for GPT-OSS-20B",
        "## RT: traces, versioned datasets, SFT, before and after",
        "## TES: GRPO on decision tables",
        "## SFT+RL: explicit mixtures, SFT then RL",
    ]


@pytest.mark.parametrize("command", commands())
def test_it_parses(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    (tmp_path / "my_recipe.py").write_text(RECIPE)
    for word in words:
        if re.fullmatch(r"[\w-]+\.(jsonl|csv|txt)", word):
            (tmp_path / word).touch()
    for folder in ("my_crate", "my_adapter", "runs/tes/phases/export/exports/hf", "runs/sft_rl/phases/sft/final"):
        (tmp_path / folder).mkdir(parents=True)
    # Down to the last command, options and all; it is not carried out.
    monkeypatch.setattr(click.Command, "invoke", lambda self, context: None)
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_a_wrong_option_does_not_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.Command, "invoke", lambda self, context: None)
    for words in ("start tui --batch-profil balanced", "eval tui --set", "trainn tui"):
        assert CliRunner().invoke(main, words.split()).exit_code == 2
