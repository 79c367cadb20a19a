"""Options that several commands share: where runs lie, how to carry them out, and a recipe's own flags."""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import ValidationError

from posttrain.errors import InputError
from posttrain.recipe.flags import Flag, FlagValue
from posttrain.recipe.types import Execution, Recipe
from posttrain.run.existing import run_named
from posttrain.run.folder import DEFAULT_RUNS_DIR, RunFolder


def runs_dir_option() -> click.Option:
    return click.Option(
        ["--runs-dir"],
        type=click.Path(path_type=Path, file_okay=False),
        default=DEFAULT_RUNS_DIR,
        show_default=True,
        help="Folder that holds the runs.",
    )


def decide_options() -> list[click.Parameter]:
    """What may be asked of a run that exists."""
    return [
        click.Option(["--from", "redo_from"], metavar="PHASE", help="Redo this phase and all after it."),
        click.Option(
            ["--accept"],
            metavar="PHASE:GATE",
            multiple=True,
            help="Go on although this hard gate failed; the acceptance is recorded.",
        ),
    ]


def attempt_options() -> list[click.Parameter]:
    """What concerns this attempt alone and is recorded nowhere."""
    return [
        click.Option(["--skip-data"], is_flag=True, help="Use prepared data only; fail where there is none."),
        click.Option(
            ["--notify"],
            envvar="POSTTRAIN_NOTIFY",
            metavar="URL|COMMAND",
            help="Where a message goes when the run ends: a webhook, or a command that reads JSON.",
        ),
    ]


def execution_options() -> list[click.Parameter]:
    """One option per field of `Execution`, with the field's own documentation."""
    options: list[click.Parameter] = []
    for name, field in Execution.model_fields.items():
        options.append(
            click.Option(
                [f"--{name.replace('_', '-')}", name],
                type=_option_type(field.annotation),
                default=field.default,
                show_default=True,
                help=field.description or "",
            )
        )
    return options


def _option_type(annotation: Any) -> Any:
    """A choice for a Literal; else str or int, also where the field may be null."""
    origin = get_origin(annotation)
    if origin is Literal:
        return click.Choice([str(one) for one in get_args(annotation)])
    if origin in (Union, UnionType):
        return _option_type(next(part for part in get_args(annotation) if part is not NoneType))
    if origin is Annotated:
        return _option_type(get_args(annotation)[0])
    return annotation


def flag_options(flags: list[Flag]) -> list[click.Parameter]:
    """A recipe function's parameters as options."""
    return [_flag_option(flag) for flag in flags]


def _flag_option(flag: Flag) -> click.Option:
    spelled = flag.name.replace("_", "-")
    declaration = f"--{spelled}/--no-{spelled}" if flag.type is bool else f"--{spelled}"
    kind: Any = click.Choice([str(one) for one in flag.choices]) if flag.choices else flag.type
    return click.Option(
        [declaration, flag.name],
        type=None if flag.type is bool else kind,
        default=str(flag.default) if flag.choices and flag.default is not None else flag.default,
        show_default=True,
        help=flag.help,
    )


def flag_values(flags: list[Flag], given: Mapping[str, Any]) -> dict[str, FlagValue]:
    """The recipe's own flags out of everything given, in their declared types."""
    values: dict[str, FlagValue] = {}
    for flag in flags:
        value = given[flag.name]
        if flag.choices:
            value = next((one for one in flag.choices if str(one) == value), value)
        values[flag.name] = value
    return values


def execution_from(given: Mapping[str, Any], recipe: Recipe | None = None) -> Execution:
    """The execution options; where one was not given, the recipe's suggestion."""
    fields = {name: given[name] for name in Execution.model_fields}
    suggested = recipe.suggested.model_dump(exclude={"micro_batch_tokens"}) if recipe else {}
    source = click.get_current_context().get_parameter_source
    for name, value in suggested.items():
        if value is not None and source(name) is click.core.ParameterSource.DEFAULT:
            fields[name] = value
    wrong = [f"--{name.replace('_', '-')} {value}" for name, value in fields.items() if _below_one(value)]
    if wrong:
        raise InputError(f"{', '.join(wrong)}: must be at least 1")
    try:
        return Execution(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        message = f"--{option} {first['input']}: {first['msg'][0].lower()}{first['msg'][1:]}"
        raise InputError(message) from error


def _below_one(value: Any) -> bool:
    return isinstance(value, int) and value < 1


def accept_pairs(given: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in given:
        phase, colon, gate = text.partition(":")
        if not (phase and colon and gate):
            raise InputError(f"--accept {text!r}: write it as PHASE:GATE")
        pairs.append((phase, gate))
    return tuple(pairs)


def existing_run(name: str, runs_dir: Path) -> RunFolder:
    """The run called `name` in `runs_dir`, or the one at a path; RunFolderError with near names when there is none."""
    given = Path(name)
    if "/" in name and (given / "recipe.json").is_file():
        return RunFolder(given)
    return run_named(name, runs_dir)


def run_argument() -> click.Argument:
    return click.Argument(["run_name"], metavar="RUN")
