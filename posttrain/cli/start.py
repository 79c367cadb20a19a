"""`posttrain start RECIPE|RUN`: `run`, or `resume`, in a session that outlives the shell."""

import sys
from pathlib import Path
from typing import Any, cast

import click

from posttrain.cli.attach import attach_to
from posttrain.cli.options import (
    attempt_options,
    decide_options,
    execution_options,
    existing_run,
    runs_dir_option,
)
from posttrain.cli.run_command import RecipeGroup, chosen_run, run_options
from posttrain.errors import InputError, RunFolderError
from posttrain.host.sessions import KINDS, Kind, Session
from posttrain.recipe.load import FoundRecipe, shipped_names
from posttrain.recipe.spelling import did_you_mean
from posttrain.recipe.types import Recipe
from posttrain.run import recipe_file
from posttrain.run.existing import run_names
from posttrain.run.folder import RunFolder


class StartGroup(RecipeGroup):
    def get_command(self, context: click.Context, name: str) -> click.Command:
        if name in shipped_names() or name.partition(":")[0].endswith(".py"):
            return super().get_command(context, name)
        return _start_of_run(name)

    def command_for(self, found: FoundRecipe, source: str) -> click.Command:
        options = [*run_options(found), *decide_options(), *attempt_options(), *execution_options()]

        def start_recipe(session: str | None, attach: bool | None, **given: Any) -> None:
            run, recipe = chosen_run(found, given)
            words = ["run", source, *given_words(click.get_current_context(), options)]
            start_detached(run, recipe, words, session, attach)

        help_text = f"{found.purpose} In a session that outlives the shell."
        return click.Command(found.name, callback=start_recipe, params=[*options, *_own_options()], help=help_text)


def _start_of_run(name: str) -> click.Command:
    options = [runs_dir_option(), *decide_options(), *attempt_options(), *execution_options()]

    def start_run(session: str | None, attach: bool | None, runs_dir: Path, **given: Any) -> None:
        try:
            run = existing_run(name, runs_dir.absolute())
        except RunFolderError as error:
            known = [*shipped_names(), *run_names(runs_dir)]
            message = f"there is no recipe and no run {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"
            raise RunFolderError(message) from error
        if unknown := click.get_current_context().args:
            raise InputError(f"{unknown[0]}: a run that exists takes no flags of its recipe but those it began with")
        words = ["resume", name, *given_words(click.get_current_context(), options)]
        start_detached(run, recipe_file.load(run.recipe), words, session, attach)

    # What is no recipe may be followed by a recipe's flags: that there is no such run is the first thing to say.
    lenient = {"ignore_unknown_options": True, "allow_extra_args": True}
    params = [*options, *_own_options()]
    return click.Command(name, lenient, callback=start_run, params=params, help="Go on with this run.")


def _own_options() -> list[click.Parameter]:
    return [
        click.Option(["--session"], type=click.Choice([*KINDS, "own"]), help="[default: the first that is there]"),
        click.Option(["--attach/--no-attach"], default=None, help="[default: where this is a terminal]"),
    ]


@click.group(cls=StartGroup, name="start", subcommand_metavar="RECIPE|RUN [OPTIONS]...")
def start() -> None:
    """Start or continue a run in a session that outlives the shell: screen, else tmux, else one of its own."""


def given_words(context: click.Context, options: list[click.Parameter]) -> list[str]:
    """The options that were given, as words for another command that takes them."""
    words = []
    for option in options:
        if context.get_parameter_source(str(option.name)) is not click.core.ParameterSource.COMMANDLINE:
            continue
        value, spelled = context.params[str(option.name)], option.opts[0]
        if isinstance(option, click.Option) and option.is_flag:
            words.append(spelled if value else option.secondary_opts[0])
        else:
            words += [f"{spelled}={one}" for one in (value if isinstance(value, tuple) else (value,))]
    return words


def start_detached(run: RunFolder, recipe: Recipe, words: list[str], session: str | None, attach: bool | None) -> None:
    """Begin the run's session, say where it is, and become its terminal where that is wanted."""
    from posttrain.launch import here

    opened = here.start(run, recipe, words, cast(Kind | None, session))
    if opened is None:
        click.echo(f"run {run.path.name}: nothing left to do")
        return
    _tell(run, opened)
    if sys.stdout.isatty() and sys.stdin.isatty() if attach is None else attach:
        attach_to(run, opened)


def _tell(run: RunFolder, opened: Session) -> None:
    place = "a session of its own" if opened.kind == "own" else f"{opened.kind} session {opened.name}"
    click.echo(f"run {run.path.name} goes on in {place}")
    for command in ("attach", "logs -f", "status", "stop"):
        name, _, flag = command.partition(" ")
        click.echo(f"  posttrain {name} {run.words}{f' {flag}' if flag else ''}")
