"""Builds a registered dataset from sources: rows are read, selected, counted and committed as a new version."""

import json
import random
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from posttrain.data.hub import resolved_revision
from posttrain.data.registry import Registry, Stored, split_key
from posttrain.data.rows import Fault, Row
from posttrain.data.sources import Placed, content_digest, label, read_source
from posttrain.data.statistics import Statistics
from posttrain.errors import DataError
from posttrain.recipe.types import HubSource, RegisteredSource, Source

Strategy = Literal["first", "latest", "random"]


@dataclass(frozen=True)
class Request:
    """What to build, over all sources together."""

    content: str
    sources: tuple[Source, ...]
    limit: int | None
    strategy: Strategy
    seed: int | None
    parent: str | None
    fault_share: float
    """More malformed rows than this share of all refuse the build."""


@dataclass(frozen=True)
class Built:
    stored: Stored
    is_new: bool
    faults: tuple[str, ...]
    """The first malformed rows, each with its place."""


@dataclass
class _Tally:
    """What was met while reading."""

    read: Counter[str]
    faults: Counter[str]
    other: Counter[str]
    examples: list[str]


MOST_EXAMPLES = 10


def build(registry: Registry, key: str, request: Request) -> Built:
    """The new version, or the one that is there with the same rows. DataError where nothing or too little is good."""
    split_key(key)
    if request.strategy == "random" and request.seed is None:
        raise DataError("a random selection needs a seed: give --seed")
    if request.strategy == "random" and request.limit is None:
        raise DataError("a random selection needs a limit: give --limit")
    parent = registry.find(request.parent) if request.parent else None
    read = _reader(request)
    tally = _Tally(Counter(), Counter(), Counter(), [])

    def manifest(taken: Counter[str], statistics: Statistics) -> dict[str, Any]:
        tally.other["rows"] = taken.total()
        tally.read = Counter({source: taken[source] for source in tally.read})
        _check(key, request, tally, statistics)
        return _manifest(request, parent, tally, statistics)

    stored, is_new = commit_rows(registry, key, _chosen(request, read, tally), manifest)
    return Built(stored, is_new, tuple(tally.examples))


def commit_rows(
    registry: Registry,
    key: str,
    rows: Iterable[tuple[str, Row]],
    manifest: Callable[[Counter[str], Statistics], dict[str, Any]],
) -> tuple[Stored, bool]:
    """Write rows, each with the label of its source, and commit them; and whether the version is new.

    `manifest` is asked once they are written, with their number by source: it describes them, or refuses.
    """
    registry.folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=registry.folder))
    try:
        taken, statistics = _write(temporary, rows)
        return registry.commit(key, temporary, manifest(taken, statistics))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _reader(request: Request) -> Callable[[Counter[str]], Iterator[tuple[str, str, Row | Fault]]]:
    def read(counts: Counter[str]) -> Iterator[tuple[str, str, Row | Fault]]:
        for number, source in enumerate(request.sources):
            placed: Placed = read_source(source, request.content, counts)
            for place, row in placed:
                yield f"{number} {label(source)}", place, row

    return read


def _chosen(request: Request, read: Callable[..., Any], tally: _Tally) -> Iterator[tuple[str, Row]]:
    """The selected rows in the sources' order; every fault is tallied."""

    def good(record: _Tally) -> Iterator[tuple[str, Row]]:
        for source, place, row in read(record.other):
            if isinstance(row, Fault):
                record.faults[f"{row.field}: {row.reason}"] += 1
                if len(record.examples) < MOST_EXAMPLES:
                    record.examples.append(f"{place}: {row}")
            else:
                record.read[source] += 1
                yield source, row

    if request.limit is None:
        yield from good(tally)
    elif request.strategy == "first":
        yield from islice(good(tally), request.limit)
    elif request.strategy == "latest":
        yield from deque(good(tally), maxlen=request.limit)
    else:
        total = sum(1 for _ in good(_Tally(Counter(), Counter(), Counter(), [])))
        chosen = set(random.Random(request.seed).sample(range(total), min(total, request.limit)))
        for number, pair in enumerate(good(tally)):
            if number in chosen:
                yield pair


def _write(folder: Path, rows: Iterable[tuple[str, Row]]) -> tuple[Counter[str], Statistics]:
    statistics, seen, taken = Statistics(), set[str](), Counter[str]()
    with open(folder / "rows.jsonl", "wb") as file, open(folder / "ids.txt", "wb") as ids:
        for source, row in rows:
            if row.id in seen:
                raise DataError(
                    f"{source.partition(' ')[2]}: id {row.id!r} is there twice; ids are unique in a dataset"
                )
            seen.add(row.id)
            taken[source] += 1
            line = row.model_dump_json()
            statistics.add(json.loads(line))
            file.write(line.encode() + b"\n")
            ids.write(json.dumps(row.id, ensure_ascii=False).encode() + b"\n")
    return taken, statistics


def _check(key: str, request: Request, tally: _Tally, statistics: Statistics) -> None:
    malformed = sum(tally.faults.values())
    looked_at = malformed + tally.other["rows"]
    if malformed > request.fault_share * looked_at:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in tally.faults.most_common(5))
        raise DataError(
            f"{key}: {malformed} of {looked_at} rows are malformed, more than the allowed share "
            f"{request.fault_share:g}: {reasons}. The first: {tally.examples[0]}. Mend them, or give --fault-share"
        )
    if not tally.other["rows"]:
        raise DataError(f"{key}: no row is left ({tally.other['filtered']} filtered); an empty dataset is not built")


def _manifest(request: Request, parent: Stored | None, tally: _Tally, statistics: Statistics) -> dict[str, Any]:
    lineage = _lineage(request.sources, parent)
    return {
        "content": request.content,
        "created_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "parent": lineage,
        "sources": [
            _source(source, tally.read[f"{number} {label(source)}"]) for number, source in enumerate(request.sources)
        ],
        "selection": {"limit": request.limit, "strategy": request.strategy, "seed": request.seed},
        "counts": {
            "rows": tally.other["rows"],
            "filtered": tally.other["filtered"],
            "unavailable_sources": tally.other["unavailable"],
            "malformed": dict(sorted(tally.faults.items())),
        },
        "statistics": statistics.summary(),
    }


def _source(source: Source, rows: int) -> dict[str, Any]:
    described: dict[str, Any] = {**source.model_dump(mode="json"), "rows": rows, "digest": content_digest(source)}
    if isinstance(source, HubSource):
        described["resolved_revision"] = resolved_revision(source)
    return described


def _lineage(sources: Sequence[Source], parent: Stored | None) -> dict[str, str] | None:
    """The parent that was named, or the one dataset that all rows come from."""
    if parent is not None:
        return {"key": parent.key, "digest": parent.digest}
    if len(sources) == 1 and isinstance(sources[0], RegisteredSource):
        digest = content_digest(sources[0])
        return {"key": sources[0].dataset, "digest": str(digest)}
    return None
