"""How many rows and tokens a dataset will have: counted where it is prepared, else judged from its first rows."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.encode import Encoder, Unread
from posttrain.data.hub import mirrored
from posttrain.data.rows import Row
from posttrain.data.sources import local_files, read_source
from posttrain.errors import PosttrainError
from posttrain.recipe.types import CodeSource, Dataset, HubSource, PreparePhase, Recipe, Source, WorldSource
from posttrain.run.folder import RunFolder, digest_json

SAMPLE = 48
"""Rows of each source that are read and rendered."""
OFFSET_BYTES = 8


@dataclass(frozen=True)
class Expected:
    rows: int = 0
    tokens: int = 0
    """Of all samples together."""
    samples: int = 0
    longest: int = 0
    row_bytes: int = 0
    """Of the rows as JSON lines."""
    unknown: tuple[str, ...] = ()
    """Sources of which nothing can be said yet."""

    @property
    def disk_bytes(self) -> int:
        """A token takes four bytes and its target flag one."""
        return self.row_bytes + 5 * self.tokens + OFFSET_BYTES * self.samples


def expected(recipe: Recipe, run: RunFolder, base: Path | None) -> dict[str, Expected]:
    """By dataset. `base` is the folder of the base's tokenizer; without one, nothing can be rendered."""
    found = {}
    for phase in recipe.phases:
        for dataset in phase.datasets if isinstance(phase, PreparePhase) else ():
            folder = run.phase(phase.name).data / dataset.name
            found[dataset.name] = _counted(folder) or _judged(recipe, dataset, base)
    return found


def _counted(folder: Path) -> Expected | None:
    """What a prepared dataset says of itself."""
    try:
        described = json.loads((folder / "dataset.json").read_text())
        counts = described["counts"]
        return Expected(
            rows=counts["rows"],
            tokens=counts.get("tokens", 0),
            samples=sum(part["samples"] for part in described["parts"]),
            row_bytes=(folder / "rows.jsonl").stat().st_size,
        )
    except (OSError, ValueError, KeyError):
        return None


def _judged(recipe: Recipe, dataset: Dataset, base: Path | None) -> Expected:
    total = Expected()
    for source in dataset.sources:
        rows = _row_count(source)
        sample = _sample(recipe, dataset, source, base) if rows is not None and base is not None else None
        if rows is None or sample is None or not sample.rows:
            total = replace(total, unknown=(*total.unknown, getattr(source, "repo", source.kind)))
            continue
        scale = rows / sample.rows
        total = Expected(
            total.rows + rows,
            total.tokens + round(sample.tokens * scale),
            total.samples + round(sample.samples * scale),
            max(total.longest, sample.longest),
            total.row_bytes + round(sample.row_bytes * scale),
            total.unknown,
        )
    return total


def _row_count(source: Source) -> int | None:
    """Rows of a source, by its recipe or by its files; None where only reading it would tell."""
    if isinstance(source, WorldSource):
        return source.count
    if isinstance(source, CodeSource) or (isinstance(source, HubSource) and mirrored(source) is None):
        return None
    most, repeat = source.selection.max_samples, source.selection.repeat
    lines = [_lines(path) for path in local_files(source) if path.suffix == ".jsonl"]
    if lines:
        return repeat * min(sum(lines), most or sum(lines))
    return most


@cache
def _lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


_sampled: dict[str, Expected | None] = {}


def _sample(recipe: Recipe, dataset: Dataset, source: Source, base: Path) -> Expected | None:
    key = digest_json([dataset.model_dump(mode="json"), source.model_dump(mode="json"), str(base)])
    if key not in _sampled:
        try:
            _sampled[key] = _rendered(recipe, dataset, source, base)
        except (PosttrainError, OSError):
            _sampled[key] = None
    return _sampled[key]


def _rendered(recipe: Recipe, dataset: Dataset, source: Source, base: Path) -> Expected:
    tokenizer = Tokenizer.load(base)
    encode = Encoder(dataset, renderer(recipe.chat, tokenizer), tokenizer)
    placed = [
        (place, row) for place, row in islice(read_source(source, dataset.content), SAMPLE) if isinstance(row, Row)
    ]
    lines = [row.model_dump_json().encode() + b"\n" for _, row in placed]
    block = encode(Unread(0, len(placed), [place for place, _ in placed], lines, Counter(), []))
    return Expected(
        rows=len(placed),
        tokens=len(block.tokens),
        samples=len(block.lengths),
        longest=max(block.lengths, default=0),
        row_bytes=sum(map(len, block.rows)),
    )
