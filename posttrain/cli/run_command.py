"""`posttrain run RECIPE`: the recipe's parameters are its flags."""

from pathlib import Path
from typing import Any

import click

from posttrain.cli.options import (
    accept_pairs,
    attempt_options,
    decide_options,
    execution_from,
    execution_options,
    flag_options,
    flag_values,
    runs_dir_option,
)
from posttrain.recipe.load import FoundRecipe, find, shipped_names
from posttrain.recipe.types import Recipe
from posttrain.run.folder import RunFolder


class RecipeGroup(click.Group):
    """Takes a recipe's name or file where a group takes a command, so that each recipe shows its own flags."""

    def list_commands(self, context: click.Context) -> list[str]:
        return shipped_names()

    def get_command(self, context: click.Context, name: str) -> click.Command:
        return self.command_for(find(name), name)

    def command_for(self, found: FoundRecipe, source: str) -> click.Command:
        raise NotImplementedError

    def parse_args(self, context: click.Context, words: list[str]) -> list[str]:
        if words and words[0].startswith("-") and words[0] not in context.help_option_names:
            context.fail(f"the recipe comes before its options: {context.command_path} RECIPE {words[0]} ...")
        return super().parse_args(context, words)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, find(name).purpose.replace("\n", " ")) for name in self.list_commands(context)]
        with formatter.section("Recipes"):
            formatter.write_dl([*rows, ("FILE.py[:FUNCTION]", "A recipe of your own.")])


class RunGroup(RecipeGroup):
    def command_for(self, found: FoundRecipe, source: str) -> click.Command:
        def start(**given: Any) -> None:
            run, recipe = chosen_run(found, given)
            from posttrain.cli.carry_out import carry_out_and_summarise
            from posttrain.pipeline.curriculum import Request

            accept = accept_pairs(given["accept"])
            execution, redo_from = execution_from(given, recipe), given["redo_from"]
            request = Request(recipe, source, execution, redo_from, accept, prepared_only=given["skip_data"])
            carry_out_and_summarise(run, request, given["notify"])

        options = [*run_options(found), *decide_options(), *attempt_options(), *execution_options()]
        return click.Command(found.name, callback=start, params=options, help=found.function.__doc__)


def run_options(found: FoundRecipe) -> list[click.Parameter]:
    """The recipe's flags, and where its run lies."""
    name = click.Option(["--name"], help="Name of the run.  [default: the recipe's name and its changed flags]")
    return [*flag_options(found.flags), name, runs_dir_option()]


def chosen_run(found: FoundRecipe, given: dict[str, Any]) -> tuple[RunFolder, Recipe]:
    values = flag_values(found.flags, given)
    name = given["name"] if given["name"] is not None else found.default_run_name(values)
    runs_dir: Path = given["runs_dir"]
    run = RunFolder.named(runs_dir.absolute(), name)
    return run, found.build(values)


@click.group(cls=RunGroup, name="run", subcommand_metavar="RECIPE [OPTIONS]...")
def run() -> None:
    """Start a recipe's run, or continue it where it was stopped.

    \b
    posttrain run RECIPE --help    shows the recipe's own flags
    """
