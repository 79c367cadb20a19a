"""`posttrain eval RUN|MODEL --set FILE|NAME`: asks an evaluation set of a model and prints its scorecard."""

from typing import TYPE_CHECKING, Any

import click

from posttrain.cli.models import chosen_model, execution_given, model_options, sampling_options, where_options
from posttrain.cli.options import runs_dir_option
from posttrain.errors import InputError
from posttrain.run.folder import NAME, shortest

if TYPE_CHECKING:
    from posttrain.data.evaluation_sets import EvaluationSet
    from posttrain.phases.evaluate_command import Asking


def _eval(target: str, set_name: str, **given: Any) -> None:
    from posttrain.cli.data_sources import guessed_format
    from posttrain.data.evaluation_sets import find_set, read_set, suited
    from posttrain.sandbox import level

    level.use(given["sandbox"])
    found = find_set(set_name, guessed_format)
    asked = read_set(found, given["limit"])
    found = suited(found, asked)
    asking = asking_of(found, given)
    chosen, place = chosen_model(target, given)
    name = given["name"] or default_name(f"{chosen.name if place.name[0] == '_' else chosen.state}-{asked.name}")
    if not NAME.fullmatch(name):
        raise InputError(f"--name {name!r}: use lower-case letters, digits, '.', '_' and '-', at most 64")
    from posttrain.cli.screen import TerminalScreen
    from posttrain.phases.evaluate_command import evaluate

    screen, folder = TerminalScreen(), place / name
    screen.say(f"{chosen.name}, {chosen.state}, on {asked.name}: {len(asked.rows)} tasks")
    record = evaluate(
        chosen, asked, asking, execution_given(given), folder, given["overwrite"], screen.say, screen.progress
    )
    print_scorecard(record, found)
    print(f"answers:  {shortest(folder / 'answers.jsonl')}")
    if given["save_baseline"]:
        from posttrain.report.baselines import save

        print(f"baseline: {shortest(save(given['runs_dir'].absolute(), given['save_baseline'], folder))}")


def default_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in text.lower())[:64].strip("-._")


def asking_of(found: "EvaluationSet", given: dict[str, Any]) -> "Asking":
    """The options, else what the set suggests."""
    from posttrain.phases.evaluate_command import Asking
    from posttrain.recipe.types import Vote

    names = ("temperature", "top_p", "top_k", "max_new_tokens", "max_turns")
    sampling = found.sampling.model_copy(update={name: given[name] for name in names if given[name] is not None})
    samples, ks = given["samples"], given["pass_at"]
    try:
        pass_at = tuple(int(k) for k in ks.split(",")) if ks else tuple(dict.fromkeys((1, samples)))
    except ValueError:
        raise InputError(f"--pass-at {ks}: write numbers with commas between them, such as 1,5,10") from None
    if samples == 1:
        if ks:
            raise InputError(f"--pass-at {ks} needs several --samples")
        return Asking(sampling, None, given["seed"], given["precision"])
    if sampling.temperature == 0:
        raise InputError(f"--samples {samples} at temperature 0 are all the same; give a --temperature above 0")
    if wrong := [k for k in pass_at if not 1 <= k <= samples]:
        raise InputError(f"--pass-at {wrong[0]}: must be from 1 to the {samples} samples of a task")
    vote = Vote(samples=samples, counts=given["takes"], pass_mark=1.0, pass_at=pass_at)
    return Asking(sampling, vote, given["seed"], given["precision"])


def print_scorecard(record: dict[str, Any], found: "EvaluationSet") -> None:
    from rich.table import Table

    from posttrain.cli.screen import table_console
    from posttrain.report import words
    from posttrain.report.scorecard import Line, against_targets

    lines = [Line(**line) for line in record["scorecard"]]
    table, group = Table(), ""
    for heading in ("", "tasks", "unscorable", "full marks", "score"):
        table.add_column(heading, justify="right" if heading else "left")
    for line in lines:
        if line.group != group:
            table.add_section()
            group = line.group
        counts = (str(line.asked), str(line.unscorable), str(line.full))
        table.add_row(line.value or f"all of {line.dataset}", *counts, words.plain(line.score))
    with table_console() as console:
        console.print(table, markup=False, highlight=False)
    parts = (f"{part.replace('_', ' ')} {words.plain(value)}" for part, value in lines[0].parts.items())
    print(f"means:    {', '.join(parts) or 'nothing could be scored'}")
    for reason, count in record["left_out"].items():
        print(f"left out: {count} rows: {reason}")
    for reached in against_targets(lines, found.targets):
        bound = words.bound(reached.target.comparison, reached.target.threshold)
        print(f"target:   {reached.target.metric} {bound}: {words.plain(reached.value)}, {reached.verdict}")


eval_command = click.Command(
    "eval",
    callback=_eval,
    params=[
        click.Argument(["target"], metavar="RUN|MODEL"),
        click.Option(
            ["--set", "set_name"],
            required=True,
            metavar="FILE|NAME",
            help="A file of tasks, a shipped set, a world with tasks, or a registered dataset NAME@VERSION.",
        ),
        *model_options(),
        runs_dir_option(),
        click.Option(["--name"], help="Of the evaluation.  [default: the state (of a folder: its name) and the set's]"),
        click.Option(["--limit"], type=click.IntRange(min=1), help="Ask only the first so many."),
        click.Option(
            ["--samples"], type=click.IntRange(min=1), default=1, show_default=True, help="Answers to each task."
        ),
        click.Option(
            ["--pass-at"], metavar="K,K,…", help="Chance that one of K samples is right.  [default: 1 and all]"
        ),
        click.Option(
            ["--takes"],
            type=click.Choice(["mean", "majority"]),
            default="mean",
            show_default=True,
            help="What several samples score: their mean, or the answer most often given.",
        ),
        click.Option(["--max-turns"], type=click.IntRange(min=1), help="Turns of a task.  [default: the set's]"),
        *sampling_options(temperature="the set's", top_p="the set's", max_new_tokens="the set's"),
        *where_options(),
        click.Option(["--overwrite"], is_flag=True, help="Replace an evaluation of the same name."),
        click.Option(["--save-baseline"], metavar="NAME", help="Keep a copy of it as this baseline."),
    ],
    help="Ask an evaluation set of a run's model, or of a model folder, and print how it did.",
)
