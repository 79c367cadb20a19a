"""The thread beside an attempt: signs of life on a clock that nobody sets, and a disk that becomes narrow."""

import io
import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from posttrain.cli.main import main
from posttrain.cli.screen import TerminalScreen
from posttrain.errors import MachineError
from posttrain.host import machine
from posttrain.pipeline import track
from posttrain.pipeline.stop import StopSignals
from posttrain.pipeline.track import Tracker
from posttrain.pipeline.watch import Watch, read_heartbeat, since_boot
from posttrain.recipe.load import find
from posttrain.run.folder import RunFolder
from tests.pipeline.test_curriculum import SMALL


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def watching(run: RunFolder) -> tuple[Watch, StopSignals, io.StringIO]:
    said = io.StringIO()
    screen = TerminalScreen(said)
    stop = StopSignals(screen.say)
    return Watch(run, screen, stop), stop, said


def test_progress_is_a_sign_of_life(run: RunFolder) -> None:
    watched, _, _ = watching(run)
    with watched.progress("train", 10, "steps", 3) as progress:
        progress.advance(2)
    watched._write()
    beat = read_heartbeat(run)
    assert beat is not None and beat.doing == "train: 5/10 steps"
    assert 0 <= since_boot() - beat.moved < 60 and beat.beat >= beat.moved


def test_a_heartbeat_of_another_boot_or_a_torn_one_is_none(run: RunFolder) -> None:
    assert read_heartbeat(run) is None
    watched, _, _ = watching(run)
    watched._write()
    beat = json.loads(run.heartbeat.read_text())
    run.heartbeat.write_text(json.dumps(beat | {"boot": "another"}))
    assert read_heartbeat(run) is None
    run.heartbeat.write_text(run.heartbeat.read_text()[:9])
    assert read_heartbeat(run) is None


def test_a_narrow_disk_is_warned_of_once_and_a_full_one_stops_the_run(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, stop, said = watching(run)
    watched.next_save_bytes = 10**9
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 10**10)
    watched._look_at_disk()
    assert not said.getvalue() and not stop.requested()
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 2 * 10**9)
    watched._look_at_disk()
    watched._look_at_disk()
    assert said.getvalue().count("--keep-checkpoints 1") == 1 and not stop.requested()
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 10**9)
    watched._look_at_disk()
    assert stop.requested() and isinstance(stop.error, MachineError)
    assert "the next save takes 1,000 MB" in str(stop.error)


def test_a_run_stopped_by_the_disk_ends_with_5_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 1000)
    words = ["run", SMALL, "--fresh"]
    # The first look is when the thread begins; the phases that follow see the request.
    stopped = CliRunner().invoke(main, words)
    assert stopped.exit_code == 5 and "the disk is nearly full" in stopped.output
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, words).exit_code == 0


def test_too_little_room_is_said_before_the_first_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 10**6)
    free = machine.free_bytes(tmp_path)
    monkeypatch.setattr("posttrain.pipeline.curriculum.disk_bytes", lambda *asked: 10 * free)
    recipe = Path(__file__).parents[1] / "end_to_end" / "recipes" / "small_sft.py"
    said = CliRunner().invoke(main, ["run", str(recipe), "--name", "own", "--device", "cpu"]).output
    first = said.index("starting")
    assert -1 < said.find("WARNING: the run needs about") < first
    assert -1 < said.find("GB of memory, there are 0.0 GB and no GPU; what makes it fit: posttrain plan own") < first


def test_a_gpu_that_is_asked_for_and_not_there_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("a machine without a GPU is missing: this one has one, and the test is about its absence")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "gpus", list)
    refused = CliRunner().invoke(main, ["run", SMALL, "--fresh", "--device", "cuda"])
    assert refused.exit_code == 5 and "--device cuda: this machine has no NVIDIA GPU" in refused.output
    assert not list(tmp_path.glob("runs/*/phases/*"))


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jumps = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    words = ["run", SMALL, "--fresh"]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert "nothing left to do" in CliRunner().invoke(main, words).output
    for path in tmp_path.glob("runs/*/phases/*/result.json"):
        assert json.loads(path.read_text())["seconds"] >= 0


# ---------------------------------------------------------------- trackers


class Recording:
    def __init__(self, run: RunFolder, recipe: object) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []

    def log(self, phase: str, step: int, values: dict[str, float]) -> None:
        if "fail" in values:
            raise OSError("no route")
        self.rows.append((phase, step, values))

    def close(self) -> None: ...


def test_a_tracker_is_told_the_rows_numbers_and_let_go_of_when_it_fails(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(track.LIBRARIES, "wandb", Recording)
    said: list[str] = []
    recipe = find("smoke").build({})
    tracker = Tracker("wandb", run, recipe, said.append)
    library = tracker.backend
    tracker.log("train", 3, {"step": 3, "loss": 0.5, "note": "x", "missing": None})
    tracker.log("train", 4, {"step": 4, "fail": 1})
    tracker.log("train", 5, {"step": 5, "loss": 0.4})
    assert isinstance(library, Recording) and library.rows == [("train", 3, {"loss": 0.5})]
    assert said == ["WARNING: wandb failed and is told nothing more: OSError: no route"]
    tracker.close()


def test_a_tracker_that_is_not_installed_is_named(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MachineError, match=r"--tracker trackio: .*pip install 'posttrain\[track\]'"):
        Tracker("trackio", run, find("smoke").build({}), print)


def test_tensorboard_reads_what_was_told(run: RunFolder) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker("tensorboard", run, find("smoke").build({}), print)
    for step in (1, 2):
        tracker.log("train", step, {"step": step, "loss": 1.0 / step})
    tracker.close()
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    tensors = events.Tensors("train/loss")
    assert [one.step for one in tensors] == [1, 2]
    assert [one.tensor_proto.float_val[0] for one in tensors] == pytest.approx([1.0, 0.5])
