"""`posttrain stop RUN`: the step is finished and saved, then the run ends and can be continued."""

import time
from pathlib import Path

import click

from posttrain.cli.options import existing_run, run_argument, runs_dir_option
from posttrain.errors import MachineError
from posttrain.run.lock import holder


def _stop(run_name: str, runs_dir: Path, now: bool, wait_s: float) -> None:
    from posttrain.launch import here

    run = existing_run(run_name, runs_dir.absolute())
    owner = here.ask_to_stop(run, now)
    if owner is None:
        click.echo(f"run {run.path.name}: no process works on it")
        return
    until = time.monotonic() + wait_s
    while holder(run) == owner:
        if time.monotonic() > until:
            raise MachineError(
                f"{owner} was asked to stop and is still at work after {wait_s:g} s; it ends after the step at hand. "
                f"Wait, or end it at once, losing what is not saved: posttrain stop {run.words} --now"
            )
        time.sleep(0.1)
    click.echo(f"run {run.path.name}: {here.how_it_ended(run)}; it goes on with: posttrain start {run.words}")


stop = click.Command(
    "stop",
    callback=_stop,
    params=[
        run_argument(),
        runs_dir_option(),
        click.Option(["--now"], is_flag=True, help="At once: what was not saved is lost."),
        click.Option(["--wait-s"], type=float, default=600.0, show_default=True, help="Seconds to wait for its end."),
    ],
    help="Stop a run: it finishes the step at hand, saves, and ends with exit code 4.",
)
