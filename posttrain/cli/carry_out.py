"""What `run` and `resume` share: carrying a run out and summing it up."""

import os
from pathlib import Path

from posttrain.cli.options import DEFAULT_RUNS_DIR
from posttrain.cli.screen import TerminalScreen, table_console
from posttrain.errors import GateFailed, PhaseFault, Stopped
from posttrain.pipeline.curriculum import Request, carry_out
from posttrain.report.summary import summary_rows
from posttrain.run.folder import RunFolder


def carry_out_and_summarise(run: RunFolder, request: Request) -> None:
    """Carry the run out; the summary also follows a gate or a fault, which then decide the exit code."""
    screen = TerminalScreen()
    try:
        worked = carry_out(run, request, screen)
    except (GateFailed, PhaseFault):
        from posttrain.report.page import write_report

        write_report(run)
        print_summary(run)
        raise
    except Stopped as stop:
        where = runs_dir_flag(run)
        raise Stopped(f"{stop}; continue with: posttrain resume {run.path.name}{where}") from stop
    if not worked:
        print(f"run {run.path.name}: nothing left to do")
    print_summary(run)
    print_next_steps(run)


def print_summary(run: RunFolder) -> None:
    from rich.table import Table

    table = Table(title=f"run {run.path.name}", title_justify="left")
    for heading in ("phase", "kind", "status", "time", "result", "gates"):
        table.add_column(heading, overflow="fold")
    for row in summary_rows(run):
        table.add_row(row.phase, row.kind, row.status, row.time, row.key_metric, row.gates)
    with table_console() as console:
        console.print(table, markup=False, highlight=False)


def print_next_steps(run: RunFolder) -> None:
    place, name = shortest(run.path), run.path.name
    where = runs_dir_flag(run)
    print(f"report:   {place / 'report.html'}")
    for folder in sorted(path for path in run.path.glob("phases/*/exports/*") if path.is_dir()):
        print(f"exported: {shortest(folder)}")
    print("next:")
    print(f"  posttrain chat {name}{where}")
    print(f"  posttrain status {name}{where}")


def runs_dir_flag(run: RunFolder) -> str:
    """What has to be added to a command for it to find the run."""
    return "" if run.path.parent == DEFAULT_RUNS_DIR.absolute() else f" --runs-dir {shortest(run.path.parent)}"


def shortest(path: Path) -> Path:
    """Relative to the current folder where that is shorter."""
    relative = Path(os.path.relpath(path))
    return relative if len(str(relative)) < len(str(path)) else path
