"""Records of local files, one at a time: JSONL, CSV, Parquet, and text with a record per line that is not blank."""

import csv
import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posttrain.data.rows import Fault
from posttrain.errors import DataError
from posttrain.recipe.spelling import did_you_mean
from posttrain.run.folder import ASSETS

Records = Iterator[dict[str, Any] | Fault]
PARQUET_BATCH = 256
SHIPPED, EVALUATION_SETS = "shipped:", ASSETS / "evaluation_sets"
"""`shipped:NAME` is an evaluation set inside the package."""
LONGEST_CSV_FIELD = 64 * 2**20


def matching(pattern: str) -> list[Path]:
    """The file, or the files of a pattern in sorted order; DataError where there is none."""
    if pattern.startswith(SHIPPED):
        return [EVALUATION_SETS / f"{pattern.removeprefix(SHIPPED)}.jsonl"]
    if not glob.has_magic(pattern) or Path(pattern).is_file():
        return [Path(pattern)]
    found = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not found:
        raise DataError(f"{pattern}: no file matches it")
    return found


def records(path: Path) -> Records:
    """Every record in order; a Fault in place of one that cannot be read. DataError where the file cannot be."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: files {path.suffix or 'without a suffix'} cannot be read{did_you_mean(path.suffix, READERS)}; "
            f"{', '.join(READERS)} can"
        )
    try:
        empty = True
        for record in reader(path):
            empty = False
            yield record
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if empty:
        raise DataError(f"{path}: there is no row in it")


def _jsonl(path: Path) -> Records:
    with open(path, "rb") as file:
        for line in file:
            try:
                value = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
            except UnicodeDecodeError as error:
                yield Fault("row", f"not UTF-8 at byte {error.start}")
            except (ValueError, RecursionError) as error:
                reason = "an empty line" if not line.strip() else f"not JSON: {error}"
                cut = "" if line.endswith(b"\n") else " (the file ends inside this row: it is truncated)"
                yield Fault("row", reason + cut)
            else:
                yield _object(value)


def _object(value: Any) -> dict[str, Any] | Fault:
    """A line may be a bare list of messages, as nanochat's files are."""
    if isinstance(value, list) and value and all(isinstance(one, dict) and "role" in one for one in value):
        return {"messages": value}
    if not isinstance(value, dict):
        return Fault("row", f"Input should be an object, not {type(value).__name__}")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _csv(path: Path) -> Records:
    csv.field_size_limit(LONGEST_CSV_FIELD)
    # Bytes that are no UTF-8 become surrogates, so that the row they are in can be named.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        while True:
            try:
                record = next(reader, None)
            except csv.Error as error:
                yield Fault("row", f"not CSV: {error}")
                continue
            if record is None:
                return
            yield _whole(record)


def _whole(record: dict[Any, Any]) -> dict[str, Any] | Fault:
    if None in record:
        return Fault("row", f"has {len(record[None])} more fields than the header")
    for name, value in record.items():
        if value is None:
            return Fault(name, "is missing: the row has fewer fields than the header")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            return Fault(name, "not UTF-8")
    return record


def _parquet(path: Path) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: no Parquet: {error}") from error


def _text(path: Path) -> Records:
    with open(path, "rb") as file:
        for line in file:
            try:
                said = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield Fault("text", f"not UTF-8 at byte {error.start}")
            else:
                if said.strip():
                    yield {"text": said}


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}
"""By suffix."""
