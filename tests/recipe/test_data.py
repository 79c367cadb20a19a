"""The shipped recipes' data: every number of the seeds' tables, and each set readable from rows in its true schema."""

import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from posttrain.data.hub import mirrored
from posttrain.data.rows import ConversationRow, Row
from posttrain.data.sources import read_source
from posttrain.recipe.types import Dataset, DecisionTableSource, HubSource, WorldSource
from posttrain.recipes._sft_rl_data import sft_rl_data
from posttrain.recipes._tes_data import tes_data
from posttrain.recipes._tui_data import LANGUAGES, tui_data, tui_tasks
from tests.data.hub_rows import write_hub
from tests.data.sources import FIXTURES, HUB

FULL = {dataset.name: dataset for dataset in tui_data(False, 8192, 32768, 8192)}
QUICK = {dataset.name: dataset for dataset in tui_data(True, 4096, 4096, 4096)}


def taken(dataset: Dataset) -> dict[str, list[int | None]]:
    """Rows taken, by repository."""
    found: dict[str, list[int | None]] = defaultdict(list)
    for source in dataset.sources:
        assert isinstance(source, HubSource)
        found[source.repo].append(source.selection.max_samples)
    return dict(found)


def test_tool_calls() -> None:
    assert FULL["tool_calls"].max_tokens == 8192 and QUICK["tool_calls"].max_tokens == 4096
    assert taken(FULL["tool_calls"]) == {
        "glaiveai/glaive-function-calling-v2": [None],
        "Salesforce/xlam-function-calling-60k": [None],
        "NousResearch/hermes-function-calling-v1": [None, None],
    }
    assert {repo: sum(filter(None, sizes)) for repo, sizes in taken(QUICK["tool_calls"]).items()} == {
        "glaiveai/glaive-function-calling-v2": 500,
        "Salesforce/xlam-function-calling-60k": 200,
        "NousResearch/hermes-function-calling-v1": 300,
    }
    # The gated one only may be missing.
    assert [source.repo for source in FULL["tool_calls"].sources if source.optional] == [  # type: ignore[union-attr]
        "Salesforce/xlam-function-calling-60k"
    ]


def test_agent_trajectories() -> None:
    assert FULL["agent"].max_tokens == 32768
    assert taken(FULL["agent"]) == {
        "xingyaoww/code-act": [None, None],
        "bigcode/commitpackft": [5000] * 6,
        "nuprl/EditPackFT": [10_000],
    }
    assert taken(QUICK["agent"]) == {
        "xingyaoww/code-act": [100, 100],
        "bigcode/commitpackft": [50] * 6,
        "nuprl/EditPackFT": [300],
    }
    assert LANGUAGES == ("python", "javascript", "go", "rust", "java", "typescript")
    for source in FULL["agent"].sources:
        assert isinstance(source, HubSource)
        assert source.reasoning_effort == ("high" if source.format == "code_act" else "medium")
        if source.format != "code_act":
            assert [one.at_most for one in source.filters] == [8000]  # type: ignore[union-attr]
            assert source.selection.seed == 42
    assert [source.split for source in FULL["agent"].sources[:2]] == ["codeact", "general"]  # type: ignore[union-attr]


def test_preferences() -> None:
    assert FULL["preferences"].max_tokens == 8192 and FULL["preferences"].content == "pairs"
    repos = ("Anthropic/hh-rlhf", "m-a-p/CodeFeedback-Filtered-Instruction")
    assert taken(FULL["preferences"]) == dict(zip(repos, ([20_000], [10_000]), strict=True))
    assert taken(QUICK["preferences"]) == dict(zip(repos, ([300], [200]), strict=True))
    assert all(source.selection.seed == 42 for source in FULL["preferences"].sources)  # type: ignore[union-attr]
    (long_enough,) = FULL["preferences"].sources[1].filters  # type: ignore[union-attr]
    assert long_enough.at_least == 100  # type: ignore[union-attr]


def test_no_recorded_call_is_both_trained_on_and_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_HUB_DIR", str(write_hub(tmp_path, rows=60)))
    practised, asked, _ = tui_tasks(False, "", "rows", 8192)
    for place, source in enumerate(FULL["tool_calls"].sources[1:]):
        trained, played, evaluated = (
            {str(row.conversation) for _, row in read_source(one, "conversations") if isinstance(row, ConversationRow)}
            for one in (source, practised.sources[place], asked.sources[place])
        )
        assert len(trained) > len(played) > 0 < len(evaluated)
        assert len(trained | played | evaluated) == len(trained) + len(played) + len(evaluated) == 60


def test_the_nanochat_mixture() -> None:
    mixture, problems = sft_rl_data(False, 2048, 42)
    sizes = [
        (source.world, source.count)
        if isinstance(source, WorldSource)
        else (source.subset or source.repo, source.selection.max_samples)  # type: ignore[union-attr]
        for source in mixture.sources
    ]
    assert sizes == [
        ("ARC-Easy", 2300),
        ("ARC-Challenge", 1100),
        ("main", 8000),
        ("HuggingFaceTB/smol-smoltalk", 10_000),
        ("identity", 1000),
        ("spelling", 600),
    ]
    assert sum(size for _, size in sizes) == 23_000  # type: ignore[misc]
    assert problems.content == "tasks" and taken(problems) == {"openai/gsm8k": [8000]}
    debug, few = sft_rl_data(True, 512, 42)
    assert taken(debug) == {"HuggingFaceTB/smol-smoltalk": [1000]} and taken(few) == {"openai/gsm8k": [500]}
    assert debug.max_tokens == 512


def test_decision_tables() -> None:
    decisions, heldout = tes_data("train.csv", "test.csv", quick_test=False)
    assert (decisions.content, decisions.max_tokens, heldout.name) == ("tasks", 1000, "heldout")
    (source,) = decisions.sources
    assert isinstance(source, DecisionTableSource) and (source.tau, source.path) == (0.05, "train.csv")
    (made, _) = tes_data(str(FIXTURES / "decisions.csv"), "test.csv", quick_test=True)
    assert sum(isinstance(row, Row) for _, row in read_source(made.sources[0], "tasks")) == 2


@pytest.mark.parametrize("quick", [False, True])
def test_every_set_is_read_from_its_own_columns(quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HUB.glob("*/*"):
        shutil.copytree(name, tmp_path / name.relative_to(HUB))
    monkeypatch.setenv("POSTTRAIN_HUB_DIR", str(write_hub(tmp_path, rows=60)))
    for dataset in (
        *tui_data(quick, 8192, 32768, 8192),
        *tui_tasks(quick, "", "rows", 8192),
        *sft_rl_data(quick, 2048, 42),
    ):
        for source in dataset.sources:
            assert isinstance(source, WorldSource) or mirrored(source) is not None  # type: ignore[arg-type]
            assert any(isinstance(row, Row) for _, row in read_source(source, dataset.content)), source
