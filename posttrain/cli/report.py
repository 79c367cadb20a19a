"""`posttrain report`: a run's report from its files, or what changed between two evaluations."""

from pathlib import Path

import click

from posttrain.cli.options import existing_run, runs_dir_option
from posttrain.errors import GateFailed, InputError
from posttrain.run.folder import shortest


def _report(
    run_name: str | None,
    runs_dir: Path,
    before: str | None,
    after: str | None,
    output: Path | None,
    gate: float | None,
) -> None:
    if run_name is None:
        if before is None or after is None:
            raise InputError("give a RUN, or two evaluations: --before A --after B")
        compare(runs_dir.absolute(), before, after, output, gate)
        return
    if before or after or output or gate is not None:
        raise InputError(
            "a RUN has a report of its own; --before, --after, --output and --gate compare two evaluations"
        )
    from posttrain.report.page import write_report

    run = existing_run(run_name, runs_dir.absolute())
    write_report(run)
    print(shortest(run.path / "report.html"))
    print(shortest(run.path / "report.md"))


def compare(runs_dir: Path, before: str, after: str, output: Path | None, gate: float | None) -> None:
    """Print or write the difference; GateFailed where the gate is asked for and `after` is worse."""
    if output is not None and output.suffix not in (".md", ".json"):
        raise InputError(f"--output {output}: its name must end in .md or .json")
    from posttrain.report.baselines import find
    from posttrain.report.delta import REGRESSION, as_json, delta, markdown, regressions
    from posttrain.run.folder import write_atomic, write_json_atomic

    found = delta(find(runs_dir, before), find(runs_dir, after))
    worse = regressions(found, REGRESSION if gate is None else gate / 100)
    if output is None:
        print(markdown(found))
    elif output.suffix == ".json":
        write_json_atomic(output, as_json(found, worse))
    else:
        write_atomic(output, markdown(found).encode("utf-8", "replace"))
    if output is not None:
        print(shortest(output))
    if gate is not None:
        if worse:
            lines = "\n".join(f"  {line}" for line in worse)
            raise GateFailed(f"{after} is worse than {before} by more than {gate:g} %:\n{lines}")
        print(f"gate: no score is worse by more than {gate:g} % with an interval that excludes 0")


report = click.Command(
    "report",
    callback=_report,
    params=[
        click.Argument(["run_name"], metavar="[RUN]", required=False),
        runs_dir_option(),
        click.Option(
            ["--before"], metavar="A", help="A baseline, RUN/EVALUATION, RUN/PHASE, or a file or folder of answers."
        ),
        click.Option(["--after"], metavar="B", help="The same; compared with A, case by case."),
        click.Option(
            ["--output"], type=click.Path(path_type=Path, dir_okay=False), help="FILE.md or FILE.json; else printed."
        ),
        click.Option(
            ["--gate"],
            type=click.FloatRange(min=0),
            is_flag=False,
            flag_value=5.0,
            metavar="[PERCENT]",
            help="Exit with 3 where a score is worse by more than 5 % (or PERCENT) and its interval excludes 0.",
        ),
    ],
    help="Rebuild a run's report from its files, or compare two evaluations.",
)
