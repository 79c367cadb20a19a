"""`posttrain report RUN`: rebuilds the report; it holds nothing that is not in the run's files."""

from pathlib import Path

import click

from posttrain.cli.options import existing_run, run_argument, runs_dir_option
from posttrain.run.folder import shortest


def _report(run_name: str, runs_dir: Path) -> None:
    from posttrain.report.page import write_report

    run = existing_run(run_name, runs_dir.absolute())
    write_report(run)
    print(shortest(run.path / "report.html"))
    print(shortest(run.path / "report.md"))


report = click.Command(
    "report",
    callback=_report,
    params=[run_argument(), runs_dir_option()],
    help="Rebuild a run's report from its files.",
)
