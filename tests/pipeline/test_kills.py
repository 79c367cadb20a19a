"""SIGKILL at named points of the public command: the resumed run makes the same bytes, and no phase runs twice."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.run.journal import read_lines
from tests.pipeline.command import SMALL, made_by, posttrain


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, place_model: Callable[[Path], None]) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    place_model(folder)
    done = posttrain("run", SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return made_by(folder / "runs" / "small_recipe")


@pytest.fixture
def place(tmp_path: Path, place_model: Callable[[Path], None]) -> Path:
    place_model(tmp_path)
    return tmp_path


POINTS = [
    "phase.started",
    "prepare.dataset_written#2",
    "prepare.before_commit#3",
    "phase.before_result#2",
    "phase.after_result",
    "phase.after_completed#2",
    "run.before_report",
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed_makes_the_same_bytes(point: str, place: Path, undisturbed: dict[str, str]) -> None:
    killed = posttrain("run", SMALL, cwd=place, fault=f"{point}:kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = place / "runs" / "small_recipe"
    complete = {path.parent.name for path in run.glob("phases/*/result.json")}

    resumed = posttrain("resume", "small_recipe", cwd=place)

    assert resumed.returncode == 0, resumed.stderr
    assert made_by(run) == undisturbed
    events = list(read_lines(run / "events.jsonl"))
    second = [place for place, event in enumerate(events) if event["event"] == "attempt_started"][1]
    begun_again = {event["phase"] for event in events[second:] if event["event"] in ("phase_started", "phase_resumed")}
    assert begun_again == {"words", "calls", "jobs"} - complete
    assert sorted(event["phase"] for event in events if event["event"] == "phase_completed") == [
        "calls",
        "jobs",
        "words",
    ]
    assert (run / "report.html").exists() and (run / "report.md").exists()


def test_killed_between_throwing_away_and_starting(place: Path, undisturbed: dict[str, str]) -> None:
    assert posttrain("run", SMALL, cwd=place).returncode == 0
    killed = posttrain("run", SMALL, "--from", "calls", cwd=place, fault="phase.discarded:kill")
    assert killed.returncode == -signal.SIGKILL
    run = place / "runs" / "small_recipe"
    before = (run / "phases" / "words" / "result.json").read_bytes()

    assert posttrain("resume", "small_recipe", cwd=place).returncode == 0

    assert made_by(run) == undisturbed
    assert (run / "phases" / "words" / "result.json").read_bytes() == before
    begun = [event["phase"] for event in read_lines(run / "events.jsonl") if event["event"] == "phase_started"]
    assert begun == ["words", "calls", "jobs", "calls", "jobs"]


def test_a_full_disk_stops_cleanly_and_the_run_goes_on_later(place: Path, undisturbed: dict[str, str]) -> None:
    stopped = posttrain("run", SMALL, cwd=place, fault="prepare.before_commit#2:full")
    assert stopped.returncode == 5
    assert "the disk is full" in stopped.stderr and "posttrain resume small_recipe" in stopped.stderr
    run = place / "runs" / "small_recipe"
    assert [attempt["outcome"] for attempt in json.loads((run / "run.json").read_text())["attempts"]] == ["failed"]

    assert posttrain("resume", "small_recipe", cwd=place).returncode == 0
    assert made_by(run) == undisturbed
