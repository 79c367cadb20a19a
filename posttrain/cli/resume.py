"""`posttrain resume RUN`: the same as `run`, from the stored recipe."""

from pathlib import Path
from typing import Any

import click

from posttrain.cli.options import (
    accept_pairs,
    attempt_options,
    decide_options,
    execution_from,
    execution_options,
    existing_run,
    run_argument,
    runs_dir_option,
)
from posttrain.recipe.types import Execution
from posttrain.run import manifest, recipe_file


def _resume(
    run_name: str,
    runs_dir: Path,
    redo_from: str | None,
    accept: tuple[str, ...],
    skip_data: bool,
    notify: str | None,
    **given: Any,
) -> None:
    from posttrain.cli.carry_out import carry_out_and_summarise
    from posttrain.pipeline.curriculum import Request

    run = existing_run(run_name, runs_dir.absolute())
    recipe = recipe_file.load(run.recipe)
    stored = manifest.read(run)
    # Flags given now count; the rest is carried out as in the last attempt.
    context = click.get_current_context()
    last = stored["attempts"][-1]["execution"] if stored.get("attempts") else {}
    for name in Execution.model_fields:
        if context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT and name in last:
            given[name] = last[name]
    source = stored.get("source", recipe.name)
    request = Request(recipe, source, execution_from(given), redo_from, accept_pairs(accept), prepared_only=skip_data)
    carry_out_and_summarise(run, request, notify)


resume = click.Command(
    "resume",
    callback=_resume,
    params=[run_argument(), runs_dir_option(), *decide_options(), *attempt_options(), *execution_options()],
    help="Continue a run from its stored recipe, carried out as in its last attempt unless told otherwise.",
)
