"""`posttrain plan RECIPE`: what would run and why, and what it needs; nothing is started or written."""

from typing import Any

import click

from posttrain.cli.options import execution_from, execution_options, runs_dir_option
from posttrain.cli.run_command import RecipeGroup, chosen_run, run_options
from posttrain.cli.screen import duration, table_console
from posttrain.errors import RunFolderError
from posttrain.pipeline.plan import Plan, plan_run
from posttrain.recipe.load import FoundRecipe, shipped_names
from posttrain.recipe.spelling import did_you_mean
from posttrain.recipe.types import (
    Batch,
    Epochs,
    EvaluatePhase,
    Execution,
    ExportPhase,
    GrpoPhase,
    MergePhase,
    Phase,
    PreferencePhase,
    PreparePhase,
    Recipe,
    RowBatch,
    SampleBatch,
    SftPhase,
    Skipped,
    Steps,
)
from posttrain.run import recipe_file
from posttrain.run.existing import run_names
from posttrain.run.folder import RunFolder, shortest

MEMORY_PARTS = ("process", "weights", "adapters", "optimizer", "activations", "cache")


class PlanGroup(RecipeGroup):
    def get_command(self, context: click.Context, name: str) -> click.Command:
        if name in shipped_names() or name.partition(":")[0].endswith(".py"):
            return super().get_command(context, name)
        return _plan_of_run(name)

    def command_for(self, found: FoundRecipe, source: str) -> click.Command:
        def show(**given: Any) -> None:
            run, recipe = chosen_run(found, given)
            print_plan(run, recipe, execution_from(given, recipe))

        options = [*run_options(found), *execution_options()]
        return click.Command(found.name, callback=show, params=options, help=found.function.__doc__)


def _plan_of_run(name: str) -> click.Command:
    def show(**given: Any) -> None:
        run = RunFolder.named(given["runs_dir"].absolute(), name)
        if not run.recipe.is_file():
            known = [*shipped_names(), *run_names(run.path.parent)]
            raise RunFolderError(f"there is no recipe and no run {name!r}{did_you_mean(name, known)}; {_known(known)}")
        recipe = recipe_file.load(run.recipe)
        print_plan(run, recipe, execution_from(given, recipe))

    return click.Command(name, callback=show, params=[runs_dir_option(), *execution_options()])


def _known(names: list[str]) -> str:
    return f"known: {', '.join(names)}" if names else "none is known"


@click.group(cls=PlanGroup, name="plan", subcommand_metavar="RECIPE|RUN [OPTIONS]...")
def plan() -> None:
    """Show the resolved recipe, which phases would run, resume or be skipped, and what that needs."""


def print_plan(run: RunFolder, recipe: Recipe, execution: Execution) -> None:
    """The recipe in short, then one row per phase with its standing and its needs."""
    planned = plan_run(run, recipe, execution)
    flags = ", ".join(f"{name} {value}" for name, value in recipe.flags.items())
    print(f"recipe  {recipe.name}{' with ' + flags if flags else ''}, seed {recipe.seed}")
    print(f"base    {planned.base}")
    print(f"run     {shortest(run.path)}{'' if run.recipe.exists() else ' (new)'}")
    _print_phases(planned)
    _print_parts(planned)
    print(f"disk: about {_size(planned.disk_bytes)} more, {_size(planned.free_bytes)} free")
    for room in planned.rooms:
        where = "GPU memory" if room.device == "cuda" else "memory"
        print(f"{where}: about {_size(room.needed_bytes)} at the peak, {_size(room.there_bytes)} there")
    print(f"time: {_time(planned.seconds, planned.unmeasured)}")
    if planned.unknown:
        print(f"not counted, since nothing of them is on this machine yet: {', '.join(planned.unknown)}")
    for shortage in planned.shortages:
        print(f"WARNING: {shortage.what}: {shortage.said}. Change: {shortage.field}")


def _print_parts(planned: Plan) -> None:
    """Memory by part and disk by artefact, of every phase that is still to do."""
    from rich.table import Table

    table = Table(title="what it needs", title_justify="left")
    for heading in ("phase", *MEMORY_PARTS, "memory", "disk by artefact"):
        table.add_column(heading, overflow="fold")
    for row in planned.to_do:
        need = row.needs.memory
        parts = ["" if need is None else _size(getattr(need, part)) for part in (*MEMORY_PARTS, "total")]
        disk = ", ".join(f"{name} {_size(count)}" for name, count in row.needs.disk.items() if count)
        table.add_row(row.phase.name, *parts, disk)
    with table_console() as console:
        console.print(table, markup=False, highlight=False)


def _print_phases(planned: Plan) -> None:
    from rich.table import Table

    table = Table()
    for heading in ("phase", "kind", "what it does", "will", "why", "disk", "memory", "time"):
        table.add_column(heading, overflow="fold")
    for row in planned.phases:
        need = row.needs
        table.add_row(
            row.phase.name,
            row.phase.kind,
            describe(row.phase),
            row.will,
            row.reason,
            _size(need.disk_bytes),
            "" if need.memory is None else _size(need.memory.total),
            "" if row.will == "skip" else "not measured" if need.seconds is None else duration(need.seconds),
        )
    with table_console() as console:
        console.print(table, markup=False, highlight=False)


def _batch(batch: Batch) -> str:
    match batch:
        case SampleBatch():
            return f"{batch.samples} samples"
        case RowBatch():
            return f"{batch.rows} rows of {batch.row_tokens} tokens"


def _steps(steps: Steps) -> str:
    match steps:
        case Epochs(epochs=count):
            return f"{count} epoch{'s' if count > 1 else ''} in steps of"
        case Skipped(reason=reason):
            return f"skipped ({reason}):"
    return f"{steps} steps of"


def describe(phase: Phase) -> str:
    """The phase in a few words."""
    match phase:
        case PreparePhase():
            return ", ".join(dataset.name for dataset in phase.datasets)
        case SftPhase():
            return f"{phase.model} on {phase.dataset}, {_steps(phase.steps)} {_batch(phase.batch)}"
        case PreferencePhase():
            return f"{phase.model} on {phase.dataset}, {_steps(phase.steps)} {phase.pairs_per_step} pairs"
        case GrpoPhase():
            groups = f"{phase.groups_per_step} groups of {phase.group_size}"
            return f"{phase.model} on {phase.dataset}, {_steps(phase.steps)} {groups}"
        case MergePhase():
            return f"{phase.model} to {phase.dtype}"
        case EvaluatePhase():
            shots = f", {phase.shots} shots" if phase.shots else ""
            vote = f", vote of {phase.vote.samples} samples" if phase.vote else ""
            return f"{phase.model} on {', '.join(phase.datasets)}{shots}{vote}"
        case ExportPhase():
            return f"best of {', '.join(one.model for one in phase.candidates)} as {', '.join(phase.formats)}"
    raise AssertionError(phase)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _time(seconds: float, unmeasured: int) -> str:
    if unmeasured == 0:
        return f"about {duration(seconds)}"
    more = f"{unmeasured} phases not measured on this machine"
    return f"{more}" if seconds == 0 else f"{duration(seconds)} and {more}"
