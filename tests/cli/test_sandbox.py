"""`posttrain sandbox`: levels are printed, programs run by their ending, limits and refusals are told."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from posttrain.cli.main import main
from posttrain.sandbox import level
from posttrain.sandbox.confine import LADDER, NAMESPACES


@pytest.fixture(autouse=True)
def choose_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(level, "_wanted", level.AUTO)
    monkeypatch.setattr(level, "_found", {})


def posttrain(*words: str) -> Result:
    return CliRunner().invoke(main, ["sandbox", *words])


def test_check_prints_every_level_and_uses_one() -> None:
    lines = posttrain("check").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(LADDER)
    assert [line.split()[1] for line in lines].count("used") == 1


def test_a_program_runs_and_its_exit_code_is_ours(tmp_path: Path) -> None:
    program = tmp_path / "p.py"
    program.write_text("import sys\nprint('hello')\nsys.exit(7)\n")
    done = posttrain("run", str(program))
    assert (done.exit_code, done.stdout) == (7, "hello\n")
    told = json.loads(posttrain("run", str(program), "--json").stdout)
    assert told["level"] in LADDER and (told["exit"], told["stdout"], told["limit"]) == (7, "hello\n", None)


def test_a_limit_is_told(tmp_path: Path) -> None:
    program = tmp_path / "p.sh"
    program.write_text("sleep 60\n")
    done = posttrain("run", str(program), "--wall-s", "0.3")
    assert done.exit_code == 1 and "ended by the sandbox: wall time of 0.3 s" in done.stderr


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.xyz").write_text("")
    done = posttrain("run", str(tmp_path / "p.xyz"))
    assert done.exit_code == 2 and "what runs a .xyz?" in done.stderr


def test_nothing_runs_where_no_level_can_be_had_unless_switched_off_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(level, "probe", lambda name: level.Probe(name, False, "not here"))
    program = tmp_path / "p.py"
    program.write_text("print('ran')\n")
    refused = posttrain("run", str(program))
    assert refused.exit_code == 5 and "ran" not in refused.stdout
    assert all(f"{name}: not here" in refused.stderr for name in LADDER) and "--sandbox off" in refused.stderr
    asked = posttrain("run", str(program), "--sandbox", NAMESPACES)
    assert asked.exit_code == 5 and "dropped-user" not in asked.stderr  # never lowered
    assert posttrain("run", str(program), "--sandbox", "off").stdout == "ran\n"
