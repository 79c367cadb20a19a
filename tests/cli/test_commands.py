"""What the commands say and what they never import."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from posttrain.cli.main import COMMANDS, main
from posttrain.cli.screen import PlainProgress, StrayOutput, duration
from posttrain.data.vocabulary import make_fresh_base
from posttrain.recipe.load import shipped_names
from posttrain.recipe.types import Recipe
from tests.pipeline.command import SMALL, posttrain
from tests.pipeline.small_recipe import small_recipe

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runn", "smoke"], "did you mean run"),
        (["run", "smok"], "no recipe 'smok' (did you mean smoke"),
        (["run", "smoke", "--sed", "1"], "--seed"),
        (["run", "--seed", "1", "smoke"], "the recipe comes before its options"),
        (["run", "smoke", "--seed", "many"], "'many' is not a valid integer"),
        (["run", "smoke", "--name", "../x"], "run name '../x' is not allowed"),
        (["status", "nothing"], "there is no run 'nothing'"),
        (["resume", "../x"], "run name '../x' is not allowed"),
        (["run", "smoke", "--device", "tpu"], "Invalid value for '--device': 'tpu'"),
        (["plan", "smok"], "did you mean smoke"),
    ],
)
def test_bad_input_exits_with_2_and_offers_the_nearest_names(invoke: Invoke, words: list[str], said: str) -> None:
    refused = invoke(*words)
    assert refused.exit_code == 2
    assert said in refused.output
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(invoke: Invoke, name: str) -> None:
    assert invoke(name, "--help").exit_code == 0


def test_a_recipes_parameters_are_flags_with_help(invoke: Invoke) -> None:
    said = " ".join(invoke("run", "smoke", "--help").output.split())
    assert "--seed INTEGER" in said and "Seed of data, order, adapters and sampling" in said
    assert "--micro-batch-tokens" in said and "Tokens of one forward and backward pass" in said


def test_flags_work_with_a_space_and_with_an_equals_sign(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "rows 7" in invoke("plan", SMALL, "--rows", "7").output
    assert "rows 7" in invoke("plan", SMALL, "--rows=7").output


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_recipe_can_be_planned(invoke: Invoke, name: str) -> None:
    planned = invoke("plan", name)
    assert planned.exit_code == 0, planned.output
    assert "not begun" in planned.output and "not measured" in planned.output
    assert not Path("runs").exists()


def test_the_schema_describes_recipes(invoke: Invoke) -> None:
    schema = json.loads(invoke("schema").output)
    assert schema == Recipe.model_json_schema()
    assert "GrpoPhase" in schema["$defs"]


HEAVY = {"torch", "transformers", "datasets", "peft"}


@pytest.mark.parametrize(
    ("words", "never"),
    [
        (["--help"], HEAVY | {"pydantic", "rich", "numpy"}),
        (["plan", "smoke"], HEAVY),
        (["status"], HEAVY),
        (["run", "smoke", "--help"], HEAVY),
        (["schema"], HEAVY),
    ],
)
def test_light_commands_import_nothing_heavy(words: list[str], never: set[str], tmp_path: Path) -> None:
    assert not imported_by(words, tmp_path) & never


def test_a_run_with_nothing_left_to_do_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    make_fresh_base(small_recipe(fresh=True), tmp_path / "model")
    assert "nothing left" not in posttrain("run", SMALL, cwd=tmp_path).stdout
    assert not imported_by(["run", SMALL], tmp_path) & HEAVY


def imported_by(words: list[str], cwd: Path) -> set[str]:
    """Top-level modules that a process holds after the command."""
    code = (
        "import sys\nfrom posttrain.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print('\\nimported:', *sorted(name for name in sys.modules if '.' not in name))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("imported:")[2].split())


def test_progress_says_how_far_how_fast_and_how_long_in_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 110.0, 112.0, 120.0])
    monkeypatch.setattr("posttrain.cli.screen.time.perf_counter", lambda: next(clock))
    lines: list[str] = []
    with PlainProgress("sft", 40, "steps", 10, lines.append, lines.append) as progress:
        progress.advance(5)
        progress.advance(15, loss=0.25)
        progress.advance(10)
    # After 10 s 20 of the remaining 30 steps are done: 2 a second, 10 left.
    assert lines == [
        "sft: 30/40 steps, 2 steps/s, 5.0 s left, loss 0.25",
        "sft: 40/40 steps, 1.5 steps/s, 20 s, loss 0.25",
    ]


def test_stray_output_of_libraries_becomes_lines() -> None:
    lines: list[str] = []
    stray = StrayOutput(lines.append)
    stray.write("a warn")
    stray.write("ing\n10%\r20%\r100%\n\nlast")
    assert lines == ["a warning", "100%"]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.25, 42.4, 61, 3660)] == ["0.2 s", "42 s", "1 min 01 s", "1 h 01 min"]
