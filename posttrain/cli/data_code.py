"""`posttrain data mutate` and `posttrain data trajectories`: repair tasks from source trees, and what they become."""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import click

from posttrain.errors import DataError

OUTPUT = click.Path(path_type=Path, dir_okay=False)


@click.command(
    short_help="Repair tasks from source trees.",
    help="Make repair tasks from the source trees REPO…: mutants that the trees' own tests catch. `shipped:LANGUAGE` "
    "is a small tree inside the package. Verdicts are kept in the cache, so that the same command goes on.",
)
@click.argument("repos", metavar="REPO…", nargs=-1, required=True)
@click.option("--language", type=click.Choice(["rust", "python", "typescript", "go"]), required=True)
@click.option("--output", type=OUTPUT, required=True, help="File of tasks to write, as `data add` reads them.")
@click.option("--limit", type=click.IntRange(min=1), help="Caught mutants of each tree, at most.")
@click.option("--split", type=click.Choice(["train", "heldout"]), help="Of the trees' functions; else all.")
@click.option("--sandbox", "level", default="auto", show_default=True, help="Level of the sandbox.")
def mutate(repos: tuple[str, ...], language: str, output: Path, limit: int | None, split: Any, level: str) -> None:
    from posttrain.sandbox.level import use
    from posttrain.worlds.code.mutate import tasks

    use(level)
    refuse_existing(output)
    counts: Counter[str] = Counter()

    def advance(done: int, of: int) -> None:
        if done % 10 == 0 or done == of:
            print(f"{done:,} of {of:,} mutants judged, {counts['caught']:,} caught", file=sys.stderr, flush=True)

    made = (tasks(repo, language, split, limit, counts, advance) for repo in repos)
    write(output, once(chain.from_iterable(made), counts), "tasks", counts)


@click.command(
    short_help="Conversations and pairs from repair tasks.",
    help="Play the repair tasks of FILE (of `data mutate`): conversations whose tool results come from running the "
    "tools, and with --pairs solutions ranked by running them. A task whose tests pass on its buggy code or fail on "
    "its fixed code is left out and counted.",
)
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--output", type=OUTPUT, help="File of conversations to write.")
@click.option("--pairs", "pairs_output", type=OUTPUT, help="File of preference pairs to write.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the mistakes that are made.")
@click.option("--sandbox", "level", default="auto", show_default=True, help="Level of the sandbox.")
def trajectories(file: Path, output: Path | None, pairs_output: Path | None, seed: int, level: str) -> None:
    from posttrain.data.records import records
    from posttrain.data.rows import Fault, checked
    from posttrain.sandbox.level import use
    from posttrain.worlds.code import trajectories as made

    use(level)
    if output is None and pairs_output is None:
        raise DataError("give --output for conversations, --pairs for preference pairs, or both")
    rows = []
    for number, record in enumerate(records(file), 1):
        row = record if isinstance(record, Fault) else checked(record, "tasks")
        if isinstance(row, Fault):
            raise DataError(f"{file} row {number}: {row}")
        if isinstance(record, dict) and record["world"] == "code":
            rows.append(record)
    if not rows:
        raise DataError(f"{file}: no row is a task of the world `code`; `posttrain data mutate` makes them")
    for path, make, what in ((output, made.conversations, "conversations"), (pairs_output, made.pairs, "pairs")):
        if path is not None:
            refuse_existing(path)
            counts: Counter[str] = Counter()
            write(path, make(rows, seed, counts), what, counts)


def refuse_existing(output: Path) -> None:
    if output.exists():
        raise DataError(f"{output} exists and is not overwritten; choose another name or remove it")


def once(rows: Iterable[dict[str, Any]], counts: Counter[str]) -> Iterable[dict[str, Any]]:
    """Of several trees: a function that two of them have, with one fault, gives one task."""
    seen: set[tuple[str, str]] = set()
    for row in rows:
        key = row["reference"]["buggy_code"], row["reference"]["fixed_code"]
        if key in seen:
            counts["duplicates"] += 1
        else:
            seen.add(key)
            yield row


def write(output: Path, rows: Iterable[dict[str, Any]], what: str, counts: Counter[str]) -> None:
    from posttrain.run.folder import write_lines_atomic

    made = write_lines_atomic(output, (json.dumps(row, ensure_ascii=False) for row in rows))
    for reason, count in counts.most_common():
        print(f"  {count:>7,} {reason}")
    if not made:
        output.unlink()
        raise DataError(f"no {what} could be made; the counts above say why")
    print(f"{made:,} {what} written to {output}")
