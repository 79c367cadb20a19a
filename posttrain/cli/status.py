"""`posttrain status [RUN]`: where runs stand, read from their files."""

from pathlib import Path

import click

from posttrain.cli.options import existing_run, run_names, runs_dir_option
from posttrain.run.folder import shortest


def _status(run_name: str | None, runs_dir: Path) -> None:
    from posttrain.cli.carry_out import print_summary
    from posttrain.run.lock import holder

    runs_dir = runs_dir.absolute()
    if run_name is None:
        _list_runs(runs_dir)
        return
    run = existing_run(run_name, runs_dir)
    held = holder(run)
    print(f"{shortest(run.path)}: {'held by ' + held if held else 'no process works on it'}")
    print_summary(run)


def _list_runs(runs_dir: Path) -> None:
    from posttrain.pipeline.history import read_history
    from posttrain.run.folder import RunFolder
    from posttrain.run.journal import Journal
    from posttrain.run.lock import holder

    names = run_names(runs_dir)
    if not names:
        print(f"no runs in {runs_dir}; begin with: posttrain run quickstart")
    for name in names:
        run = RunFolder(runs_dir / name)
        history = read_history(Journal(run.events))
        state = "running" if holder(run) else "finished" if history.finished else "not finished"
        print(f"{name}  {state}, {len(history.completed)} phases complete")


status = click.Command(
    "status",
    callback=_status,
    params=[click.Argument(["run_name"], metavar="[RUN]", required=False), runs_dir_option()],
    help="Show where a run stands, phase by phase; without a name, list the runs.",
)
