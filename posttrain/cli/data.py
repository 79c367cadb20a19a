"""`posttrain data …`: the registry of datasets: list, add, build, show, diff, export, verify."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from posttrain.errors import DataError, InputError

if TYPE_CHECKING:
    from posttrain.data.registry import Registry
    from posttrain.recipe.types import Source

CONTENTS = ("text", "conversations", "pairs", "tasks")
Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def registry_option() -> Decorator:
    return click.option(
        "--registry-dir",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="POSTTRAIN_REGISTRY",
        help="Folder of the registry; else POSTTRAIN_REGISTRY, else posttrain/datasets in the user's data folder.",
    )


def open_registry(folder: Path | None) -> "Registry":
    from posttrain.data.registry import FOLDER, Registry

    if folder is not None:
        # Sources that name a dataset look for it in the same place.
        os.environ[FOLDER] = str(folder)
    return Registry.default()


@click.group(help="Build, look at and export datasets: named, versioned, never overwritten.")
def data() -> None:
    pass


@data.command("list", help="List the datasets of the registry.")
@registry_option()
def list_datasets(registry_dir: Path | None) -> None:
    from posttrain.cli.data_show import print_table

    registry = open_registry(registry_dir)
    stored = [registry.find(key) for key in registry.all_keys()]
    if not stored:
        print(f"no dataset in {registry.folder}; `posttrain data build` or `add` makes one")
        return
    lines: list[tuple[str, ...]] = [("dataset", "content", "rows", "digest", "built", "parent")]
    for one in stored:
        manifest = one.manifest
        parent = (manifest.get("parent") or {}).get("key", "")
        rows = f"{manifest['counts']['rows']:,}"
        lines.append((one.key, one.content, rows, one.digest[:12], manifest.get("created_at", ""), parent))
    print_table(lines)


def selection_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.option("--filter", "filters", multiple=True, metavar="COLUMN=VALUE", help="Keep only such records."),
            click.option("--limit", type=click.IntRange(min=1), help="Take at most so many good rows."),
            click.option(
                "--select",
                "strategy",
                type=click.Choice(["first", "latest", "random"]),
                default="first",
                show_default=True,
                help="Which rows --limit takes.",
            ),
            click.option("--seed", type=int, help="Seed of a random selection."),
            click.option("--parent", metavar="NAME@VERSION", help="The dataset this one was made from."),
            click.option(
                "--fault-share",
                type=click.FloatRange(0.0, 1.0),
                default=0.0,
                show_default=True,
                help="Share of malformed rows that is left out and counted; more refuse the build.",
            ),
        )
    ):
        command = option(command)
    return command


@data.command(
    short_help="Register local files.",
    help="Register local FILES as dataset NAME@VERSION; --tau turns decision tables' Q-values into rewards.",
)
@click.argument("key", metavar="NAME@VERSION")
@click.argument("files", nargs=-1, required=True)
@click.option("--format", "row_format", help="Row format; else the one that fits the columns best.")
@click.option("--content", type=click.Choice(CONTENTS), help="Where the format can make more than one.")
@click.option("--tau", type=click.FloatRange(min=0.0, min_open=True), help="Temperature of the rewards.")
@selection_options
@registry_option()
def add(
    key: str,
    files: tuple[str, ...],
    row_format: str | None,
    content: str | None,
    tau: float | None,
    registry_dir: Path | None,
    **given: Any,
) -> None:
    from posttrain.cli.data_sources import checked_format, content_of, guessed_format, parse_filters
    from posttrain.recipe.types import EVERY_ROW, DecisionTableSource, FileSource

    filters = parse_filters(given.pop("filters"))
    common: dict[str, Any] = {"filters": filters, "selection": EVERY_ROW, "reasoning_effort": None}
    sources: list[Source] = []
    if tau is not None:
        if row_format not in (None, "decision_table"):
            raise InputError(f"--tau belongs to the format decision_table, not {row_format}")
        sources = [DecisionTableSource(kind="decision_table", path=file, tau=tau, **common) for file in files]
        chosen = "tasks"
    else:
        name = checked_format(row_format) if row_format else guessed_format(files[0])
        sources = [FileSource(kind="file", path=file, format=name, **common) for file in files]
        chosen = content_of(name, content)
    build_and_tell(key, open_registry(registry_dir), chosen, sources, given)


@data.command(
    short_help="From a recipe, the registry or the hub.",
    help="Build dataset NAME@VERSION from a recipe's dataset, from registered datasets, or from the hub.",
)
@click.argument("key", metavar="NAME@VERSION")
@click.option("--recipe", help="Recipe (name or FILE.py[:FUNCTION]) whose dataset to build.")
@click.option("--dataset", help="Which of the recipe's datasets.")
@click.option("--from", "parents", multiple=True, metavar="NAME@VERSION", help="A registered dataset; may be repeated.")
@click.option("--hub", "repo", metavar="OWNER/NAME", help="A dataset on the hub.")
@click.option("--subset", help="Its subset.")
@click.option("--split", default="train", show_default=True, help="Its split.")
@click.option("--revision", help="Its commit.")
@click.option("--hub-files", help="Data files inside the repository, where it declares no subsets.")
@click.option("--format", "row_format", help="Row format of --hub.")
@click.option("--content", type=click.Choice(CONTENTS), help="Where the format can make more than one.")
@selection_options
@registry_option()
def build(
    key: str,
    recipe: str | None,
    dataset: str | None,
    parents: tuple[str, ...],
    repo: str | None,
    registry_dir: Path | None,
    **given: Any,
) -> None:
    from posttrain.cli.data_sources import hub_sources, parse_filters, recipe_sources, registered_sources

    registry = open_registry(registry_dir)
    if sum(map(bool, (recipe, parents, repo))) != 1:
        raise InputError("give one of --recipe, --from and --hub; `posttrain data add` takes files")
    filters = parse_filters(given.pop("filters"))
    hub_options = {name: given.pop(name) for name in ("subset", "split", "revision", "hub_files", "row_format")}
    content = given.pop("content")
    if recipe:
        content, sources = recipe_sources(recipe, dataset)
        if filters:
            raise InputError("--filter: the recipe's sources have filters of their own; set them there")
    elif parents:
        content, sources = registered_sources(registry, parents, filters)
    else:
        content, sources = hub_sources(str(repo), hub_options, filters, content)
    build_and_tell(key, registry, content, sources, given)


@data.command(
    short_help="Lengths, turns, tools, targets, examples.",
    help="Show what is in a dataset: lengths, turns, tools, targets, duplicates, examples.",
)
@click.argument("key", metavar="NAME@VERSION")
@click.option("--examples", type=click.IntRange(min=0), default=10, show_default=True, help="Rows to show.")
@click.option("--model", metavar="DIR", help="Count tokens and targets with this model's tokenizer, in Harmony.")
@click.option("--json", "as_json", is_flag=True, help="Manifest, statistics and examples as JSON.")
@registry_option()
def show(key: str, examples: int, model: str | None, as_json: bool, registry_dir: Path | None) -> None:
    from posttrain.cli.data_show import show_dataset

    show_dataset(open_registry(registry_dir).find(key), examples, model, as_json)


@data.command(
    short_help="How two datasets differ.", help="Say how dataset B differs from dataset A: rows by id, counts, sources."
)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@registry_option()
def diff(first: str, second: str, registry_dir: Path | None) -> None:
    from posttrain.cli.data_show import measures_side_by_side, print_table
    from posttrain.data.statistics import identity

    registry = open_registry(registry_dir)
    old, new = registry.find(first), registry.find(second)
    if old.digest == new.digest:
        print(f"{old.key} and {new.key} have the same rows ({old.digest[:12]})")
        return
    before = {row["id"]: identity(row) for row in old.read()}
    after = {row["id"]: identity(row) for row in new.read()}
    changed = [row_id for row_id, digest in after.items() if before.get(row_id, digest) != digest]
    for title, ids in (
        ("only in " + old.key, [row_id for row_id in before if row_id not in after]),
        ("only in " + new.key, [row_id for row_id in after if row_id not in before]),
        ("in both, changed", changed),
    ):
        print(f"{title}: {len(ids):,}" + (f"  ({', '.join(ids[:5])}{', …' if len(ids) > 5 else ''})" if ids else ""))
    print(f"in both, the same: {len(before.keys() & after.keys()) - len(changed):,}")
    print_table([("", old.key, new.key), *measures_side_by_side(old, new)])


@data.command(
    short_help="Write rows for other tools.",
    help="Write a dataset's rows as JSON lines in a shape that other tools read.",
)
@click.argument("key", metavar="NAME@VERSION")
@click.option("--format", "shape", default="rows", show_default=True, help="Export format; see docs/data.md.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write; else standard output.")
@registry_option()
def export(key: str, shape: str, output: Path | None, registry_dir: Path | None) -> None:
    from posttrain.data.export import exported
    from posttrain.run.folder import write_lines_atomic

    stored = open_registry(registry_dir).find(key)
    records = (record for row in stored.read() for record in exported(row, stored.content, shape))
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    if output is None:
        for line in lines:
            print(line)
        return
    if output.exists():
        raise DataError(f"{output} exists and is not overwritten; choose another name or remove it")
    print(f"{write_lines_atomic(output, lines):,} records written to {output}")


@data.command(
    short_help="Check digests, or shared text.",
    help="Check that datasets (all, without a name) are as they were built, or that two share no text.",
)
@click.argument("keys", nargs=-1, metavar="[NAME@VERSION]…")
@click.option("--against", metavar="SET", help="Also look for runs of words in common with it: as `eval --set`.")
@click.option("--words", type=click.IntRange(min=1), default=13, show_default=True, help="Length of such a run.")
@registry_option()
def verify(keys: tuple[str, ...], against: str | None, words: int, registry_dir: Path | None) -> None:
    from posttrain.data.overlap import shared_rows

    registry = open_registry(registry_dir)
    others = rows_of(registry, against) if against else []
    faults = []
    for key in keys or registry.all_keys():
        stored = registry.find(key)
        found = stored.faults()
        if against and not found:
            shared = shared_rows(stored.read(), others, words)
            if shared:
                found = [f"{len(shared):,} rows share {words} words in a row with {against}: {', '.join(shared[:5])}"]
        print(f"{key}: {'; '.join(found) if found else 'ok'}")
        faults += [f"{key}: {fault}" for fault in found]
    if faults:
        raise DataError(f"{len(faults)} fault{'s' if len(faults) > 1 else ''} found")


# ---------------------------------------------------------------- what the commands share


def rows_of(registry: "Registry", word: str) -> list[dict[str, Any]]:
    """Rows of a registered dataset of any content, or the tasks of an evaluation set."""
    if "@" in word:
        return list(registry.find(word).read())
    from posttrain.cli.data_sources import guessed_format
    from posttrain.data.evaluation_sets import find_set, read_set

    return read_set(find_set(word, guessed_format), None).rows


def build_and_tell(
    key: str, registry: "Registry", content: str, sources: list["Source"], given: dict[str, Any]
) -> None:
    from posttrain.data import build

    request = build.Request(content=content, sources=tuple(sources), **given)
    built = build.build(registry, key, request)
    manifest = built.stored.manifest
    for fault in built.faults:
        print(f"warning: left out: {fault}", file=sys.stderr)
    counts = manifest["counts"]
    if request.limit is not None and counts["rows"] < request.limit:
        print(f"warning: {request.limit:,} rows were asked for, {counts['rows']:,} are there", file=sys.stderr)
    malformed = sum(counts["malformed"].values())
    left_out = f", {malformed:,} malformed left out" * bool(malformed)
    left_out += f", {counts['filtered']:,} filtered" * bool(counts["filtered"])
    state = "built" if built.is_new else "is there already, with the same rows"
    print(f"{key} {state}: {counts['rows']:,} {content} rows{left_out}, digest {built.stored.digest[:12]}")
    print(built.stored.folder)
