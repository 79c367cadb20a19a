"""What `run` and `resume` share: carrying a run out and summing it up."""

import click

from posttrain.cli.screen import TerminalScreen, table_console
from posttrain.errors import GateFailed, PhaseFault, PosttrainError, Stopped
from posttrain.host.notify import Message, send
from posttrain.pipeline.curriculum import Request, carry_out
from posttrain.report.summary import summary_rows
from posttrain.run.folder import RunFolder, shortest


def carry_out_and_summarise(run: RunFolder, request: Request, notify: str | None) -> None:
    """Carry the run out and tell whoever wants to know how it ended, by `notify`."""
    try:
        worked = _carry_out_and_summarise(run, request)
    except PosttrainError as error:
        outcome = {GateFailed: "gate_failed", Stopped: "stopped"}.get(type(error), "failed")
        _tell(notify, Message(run.path.name, outcome, error.exit_code, str(error)))
        raise
    if worked:
        _tell(notify, Message(run.path.name, "completed", 0, f"The report is {run.path / 'report.html'}."))


def _tell(notify: str | None, message: Message) -> None:
    fault = send(notify, message) if notify else None
    if fault:
        click.echo(f"warning: no message was sent: {fault}", err=True)


def _carry_out_and_summarise(run: RunFolder, request: Request) -> bool:
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
        raise Stopped(f"{stop}; continue with: posttrain resume {run.words}") from stop
    if not worked:
        print(f"run {run.path.name}: nothing left to do")
    print_summary(run)
    print_next_steps(run)
    return worked


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
    print(f"report:   {shortest(run.path) / 'report.html'}")
    for folder in sorted(path for path in run.path.glob("phases/*/exports/*") if path.is_dir()):
        print(f"exported: {shortest(folder)}")
    print("next:")
    print(f"  posttrain chat {run.words}")
    print(f"  posttrain status {run.words}")
