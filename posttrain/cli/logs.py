"""`posttrain logs RUN`: what the terminal showed."""

from pathlib import Path

import click

from posttrain.cli.options import existing_run, run_argument, runs_dir_option
from posttrain.errors import InputError
from posttrain.run.attempt_log import log_path


def _logs(run_name: str, runs_dir: Path, attempt: int | None) -> None:
    run = existing_run(run_name, runs_dir.absolute())
    found = sorted(run.logs.glob("attempt-*.log"))
    path = (found[-1] if found else None) if attempt is None else log_path(run, attempt)
    if path is None or not path.exists():
        there = ", ".join(str(int(log.stem.rpartition("-")[2])) for log in found) or "none"
        raise InputError(f"run {run_name!r} has no log of attempt {attempt}; attempts with a log: {there}")
    click.echo(path.read_text(encoding="utf-8"), nl=False)


logs = click.Command(
    "logs",
    callback=_logs,
    params=[
        run_argument(),
        runs_dir_option(),
        click.Option(["--attempt"], type=int, help="Number of the attempt.  [default: the last]"),
    ],
    help="Print the log of a run's last attempt.",
)
