"""`posttrain logs RUN`: what the terminal showed."""

import contextlib
import time
from pathlib import Path

import click

from posttrain.cli.options import existing_run, run_argument, runs_dir_option
from posttrain.errors import InputError
from posttrain.run.attempt_log import log_path
from posttrain.run.folder import RunFolder
from posttrain.run.lock import holder

LOOK_EVERY_S = 0.3


def _logs(run_name: str, runs_dir: Path, attempt: int | None, following: bool) -> None:
    run = existing_run(run_name, runs_dir.absolute())
    if following and attempt is None:
        follow(run)
        return
    found = _found(run)
    path = (found[-1] if found else None) if attempt is None else log_path(run, attempt)
    if path is None or not path.exists():
        there = ", ".join(str(int(log.stem.rpartition("-")[2])) for log in found) or "none"
        raise InputError(f"run {run_name!r} has no log of attempt {attempt}; attempts with a log: {there}")
    click.echo(path.read_text(encoding="utf-8"), nl=False)


def _found(run: RunFolder) -> list[Path]:
    return sorted(run.logs.glob("attempt-*.log"))


def follow(run: RunFolder) -> None:
    """Print the last attempt's log and what is added to it, a new attempt's too, until no process works on the run."""
    with contextlib.suppress(KeyboardInterrupt):
        found = _found(run)
        path, place = (found[-1] if found else None), 0
        while True:
            held = holder(run) is not None
            found = _found(run)
            newest = found[-1] if found else None
            if path is not None:
                with open(path, "rb") as file:
                    file.seek(place)
                    added = file.read()
                    place = file.tell()
                click.echo(added.decode(errors="replace"), nl=False)
            if newest != path:
                path, place = newest, 0
            elif not held:
                return
            else:
                time.sleep(LOOK_EVERY_S)


logs = click.Command(
    "logs",
    callback=_logs,
    params=[
        run_argument(),
        runs_dir_option(),
        click.Option(["--attempt"], type=int, help="Number of the attempt.  [default: the last]"),
        click.Option(["-f", "--follow", "following"], is_flag=True, help="Go on while a process works on the run."),
    ],
    help="Print the log of a run's last attempt.",
)
