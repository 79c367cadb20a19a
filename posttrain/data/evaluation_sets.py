"""Evaluation sets by name or file: whose rows are asked, how long an answer may be, and what is aimed at."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.data.records import EVALUATION_SETS, SHIPPED
from posttrain.data.rows import Fault
from posttrain.data.sources import read_source
from posttrain.errors import DataError, InputError
from posttrain.recipe.spelling import did_you_mean
from posttrain.recipe.types import (
    EVERY_ROW,
    CodeSource,
    FileSource,
    RegisteredSource,
    RowFormat,
    Sampling,
    Source,
    WorldSource,
)
from posttrain.report.scorecard import Target
from posttrain.run.folder import digest_json
from posttrain.worlds.registry import MAKERS

HELD_OUT_ROWS = 200
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=512, max_turns=4)


@dataclass(frozen=True)
class EvaluationSet:
    """Where the tasks come from, and what is used where the caller says nothing else."""

    name: str
    source: Source
    sampling: Sampling = GREEDY
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class Asked:
    """The tasks of a set as they are asked."""

    name: str
    rows: list[dict[str, Any]]
    digest: str
    left_out: dict[str, int]
    """Rows that could not be read, by reason."""


def _held_out(world: str) -> WorldSource:
    return WorldSource(kind="world", world=world, split="heldout", count=HELD_OUT_ROWS, seed=0)


CODING_AGENT = EvaluationSet(
    name="coding_agent",
    # A tree of its own, that no recipe trains on.
    source=CodeSource(
        kind="code", path="shipped:coding_agent", language="python", split="all", count=HELD_OUT_ROWS, seed=0
    ),
    sampling=Sampling(temperature=0.2, top_p=1.0, top_k=None, max_new_tokens=512, max_turns=10),
    # The targets of the TUI system for its 200 tasks of at most ten attempts.
    targets=(
        Target("compiles", ">=", 0.85),
        Target("solved", ">=", 0.70),
        Target("lint", ">=", 0.80),
        Target("iterations", "<=", 3),
        Target("diff_lines", "<=", 50),
        Target("format", ">=", 0.99),
    ),
)
NAMED = {CODING_AGENT.name: CODING_AGENT}


def shipped() -> list[str]:
    """Names of the sets that come with the package."""
    return sorted({*NAMED, *(file.stem for file in EVALUATION_SETS.glob("*.jsonl"))})


def find_set(given: str, guessed: Callable[[str], RowFormat]) -> EvaluationSet:
    """A file, a shipped set, a registered dataset `NAME@VERSION`, or a world's held-out tasks.

    `guessed` says how a file's columns become rows.
    """
    worlds = sorted(world for world, content in MAKERS if content == "tasks")
    if (EVALUATION_SETS / f"{given}.jsonl").is_file():
        return EvaluationSet(given, _file(f"{SHIPPED}{given}", "evaluation"))
    if given in NAMED:
        return NAMED[given]
    if given in worlds:
        return EvaluationSet(given, _held_out(given))
    if Path(given).is_file():
        return EvaluationSet(Path(given).stem, _file(given, guessed(given)))
    if "@" in given:
        source = RegisteredSource(
            kind="registered", dataset=given, filters=(), selection=EVERY_ROW, reasoning_effort=None
        )
        return EvaluationSet(given, source)
    known = [*shipped(), *worlds]
    raise InputError(
        f"--set {given}: there is no such file and no such set{did_you_mean(given, known)}; "
        f"sets: {', '.join(shipped())}; worlds with tasks: {', '.join(worlds)}; or a registered dataset NAME@VERSION"
    )


def suited(chosen: EvaluationSet, asked: Asked) -> EvaluationSet:
    """Repair tasks of any tree are asked and judged as the coding agent's own are."""
    if all(row["world"] == "code" for row in asked.rows):
        return replace(chosen, sampling=CODING_AGENT.sampling, targets=CODING_AGENT.targets)
    return chosen


def _file(path: str, name: RowFormat) -> FileSource:
    return FileSource(kind="file", path=path, format=name, filters=(), selection=EVERY_ROW, reasoning_effort=None)


def read_set(chosen: EvaluationSet, limit: int | None) -> Asked:
    """The first `limit` tasks, or all. DataError for an id that comes twice, or where no row is left."""
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    placed = read_source(chosen.source, "tasks")
    for place, row in placed:
        if isinstance(row, Fault):
            left_out[str(row)] += 1
            continue
        if row.id in seen:
            raise DataError(f"{place}: id {row.id!r} comes twice; answers are paired by id, so each needs its own")
        seen.add(row.id)
        rows.append(row.model_dump(mode="json"))
        if len(rows) == limit:
            break
    if not rows:
        raise DataError(f"evaluation set {chosen.name}: none of its rows can be asked: {dict(left_out)}")
    return Asked(chosen.name, rows, digest_json(rows), dict(left_out))
