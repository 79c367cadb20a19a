"""The model that a word on the command line means, and the options of commands that sample from one."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from posttrain.cli.options import execution_from, execution_options, existing_run
from posttrain.errors import InputError
from posttrain.recipe.types import Execution, HubBase
from posttrain.run.folder import EVALUATIONS, RunFolder

if TYPE_CHECKING:
    from posttrain.phases.chosen_model import ChosenModel

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
EXECUTION = ("device", "compile", "base_weights", "threads", "sandbox", "rollout_tokens")
"""Fields of an execution that matter where nothing is trained."""


def model_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--state"],
            metavar="STATE",
            help="Of a run: base, a phase, or PHASE/checkpoint-N.  [default: what an export would take]",
        ),
        click.Option(
            ["--adapter"],
            type=click.Path(path_type=Path, file_okay=False, exists=True),
            help="PEFT adapter on a model folder.",
        ),
        click.Option(
            ["--effort"],
            type=click.Choice(["low", "medium", "high"]),
            help="Reasoning effort.  [default: the chat format's]",
        ),
    ]


def where_options() -> list[click.Parameter]:
    """How this machine does it."""
    return [option for option in execution_options() if option.name in EXECUTION]


def sampling_options(**defaults: str) -> list[click.Parameter]:
    """Without a value the option is None, and `defaults` says in words what then holds."""

    def shown(name: str) -> str:
        return f"  [default: {defaults[name]}]"

    return [
        click.Option(["--temperature"], type=click.FloatRange(min=0), help="0 is greedy." + shown("temperature")),
        click.Option(
            ["--top-p"],
            type=click.FloatRange(min=0, max=1, min_open=True),
            help="Of the sampled mass." + shown("top_p"),
        ),
        click.Option(
            ["--top-k"],
            type=click.IntRange(min=1),
            help="Sample from so many tokens, at most.  [default: all]",
        ),
        click.Option(["--max-new-tokens"], type=click.IntRange(min=1), help="Per turn." + shown("max_new_tokens")),
        click.Option(["--seed"], type=int, default=0, show_default=True, help="Seed of every sampled token."),
        precision_option(),
    ]


def precision_option() -> click.Option:
    return click.Option(
        ["--precision"],
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        show_default=True,
        help="Of matrix products.",
    )


def chosen_model(target: str, given: dict[str, Any]) -> tuple["ChosenModel", Path]:
    """A run, `shipped:tiny`, a model or adapter folder, or a repository of the hub; and where evaluations of it lie."""
    runs_dir, state, adapter = given["runs_dir"].absolute(), given["state"], given["adapter"]
    folder = RunFolder(Path()).model_folder(target)
    is_model = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    is_repository = HUB_NAME.fullmatch(target) is not None and not folder.exists()
    if not is_model and not is_repository:
        run = existing_run(target, runs_dir)
        if adapter is not None:
            raise InputError(f"{target}: --adapter goes with a model folder; a run's states bring their own")
        return _of_run(run, state).with_effort(given["effort"]), run.evaluations
    if state is not None:
        raise InputError(f"{target}: --state goes with a run; {target} is a model")
    from posttrain.phases.chosen_model import of_folder

    if is_repository:
        from posttrain.pipeline.base import hub_folder

        folder = hub_folder(HubBase(kind="hub", repo=target, revision=None))
    name = target.rstrip("/").rpartition("/")[2].removeprefix("shipped:")
    return of_folder(name, folder, adapter).with_effort(given["effort"]), runs_dir / EVALUATIONS


def _of_run(run: RunFolder, state: str | None) -> "ChosenModel":
    from posttrain.phases.chosen_model import of_run
    from posttrain.pipeline.base import resolve_base
    from posttrain.run import recipe_file

    return of_run(run, resolve_base(recipe_file.load(run.recipe), run), state)


def execution_given(given: dict[str, Any]) -> Execution:
    fields = {name: field.default for name, field in Execution.model_fields.items()}
    return execution_from(fields | {name: given[name] for name in EXECUTION})
