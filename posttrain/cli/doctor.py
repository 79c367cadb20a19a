"""`posttrain doctor [RECIPE]`: what this machine has, and the command that mends what it lacks."""

import json
from dataclasses import asdict
from typing import Any

import click

from posttrain.cli.options import execution_from, execution_options, runs_dir_option
from posttrain.errors import MachineError
from posttrain.recipe.types import Execution, Recipe
from posttrain.run.folder import RunFolder


def _doctor(words: tuple[str, ...], as_json: bool, port: int, runs_dir: Any) -> None:
    from posttrain.pipeline.doctor import examine

    run, recipe, execution = _subject(words, runs_dir)
    checks = []
    for check in examine(click.get_current_context().obj, run, recipe, execution, port):
        checks.append(check)
        if not as_json:
            mend = f"\n{'':9}{check.mend}" if check.mend else ""
            click.echo(f"{check.status:8} {check.name}: {check.said}{mend}")
    failed = [check.name for check in checks if check.status == "failure"]
    if as_json:
        click.echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    if failed:
        raise MachineError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def _subject(words: tuple[str, ...], runs_dir: Any) -> tuple[RunFolder, Recipe | None, Execution]:
    """The recipe with its flags, as `run` takes them; nothing but the machine without one."""
    if not words:
        return RunFolder(runs_dir.absolute() / "doctor"), None, Execution()
    from posttrain.cli.run_command import chosen_run, run_options
    from posttrain.recipe.load import find

    found = find(words[0])
    flags = click.Command(found.name, params=[*run_options(found), *execution_options()])
    with flags.make_context("doctor", ["--runs-dir", str(runs_dir), *words[1:]]) as context:
        run, recipe = chosen_run(found, context.params)
        return run, recipe, execution_from(context.params, recipe)


doctor = click.Command(
    "doctor",
    callback=_doctor,
    params=[
        click.Argument(["words"], metavar="[RECIPE [OPTIONS]...]", nargs=-1, type=click.UNPROCESSED),
        click.Option(["--json", "as_json"], is_flag=True, help="One JSON object, for programs."),
        click.Option(["--port"], type=click.IntRange(1, 65535), default=8000, show_default=True, help="To be free."),
        runs_dir_option(),
    ],
    context_settings={"ignore_unknown_options": True},
    help="Check this machine, and what a recipe needs of it; each line says how to mend what is not well.",
)
