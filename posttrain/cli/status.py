"""`posttrain status [RUN]`: where runs stand, read from their files."""

from pathlib import Path

import click

from posttrain.cli.options import existing_run, runs_dir_option
from posttrain.run.existing import run_names
from posttrain.run.folder import RunFolder, shortest


def _status(run_name: str | None, runs_dir: Path) -> None:
    from posttrain.cli.carry_out import print_summary
    from posttrain.run.lock import holder

    runs_dir = runs_dir.absolute()
    if run_name is None:
        _list_runs(runs_dir)
        return
    run = existing_run(run_name, runs_dir)
    owner = holder(run)
    print(f"{shortest(run.path)}: {f'held by {owner}' if owner else 'no process works on it'}")
    if owner is not None:
        _print_signs_of_life(run)
    print_summary(run)


def _print_signs_of_life(run: RunFolder) -> None:
    """What it is doing and since when; a process that has stopped beating, or beats without getting on, shows."""
    from posttrain.cli.screen import duration
    from posttrain.host.sessions import read_session
    from posttrain.pipeline.watch import read_heartbeat, since_boot

    session = read_session(run.session)
    if session is not None and session.kind != "own":
        gone = "" if session.alive() else ", which is dead"
        print(f"in {session.kind} session {session.name}{gone}")
    beat = read_heartbeat(run)
    if beat is not None:
        moved, seen = (duration(since_boot() - then) for then in (beat.moved, beat.beat))
        print(f"{beat.doing}; last progress {moved} ago, last sign of life {seen} ago")


def _list_runs(runs_dir: Path) -> None:
    from posttrain.pipeline.history import read_history
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
