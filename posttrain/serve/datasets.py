"""Datasets over HTTP: built of traces into the registry of `posttrain data`, listed, described, exported."""

import itertools
import json
import random
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Query, Response
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask

from posttrain.data.build import commit_rows
from posttrain.data.export import EXPORTS, exported
from posttrain.data.formats import rt_trace
from posttrain.data.records import records
from posttrain.data.registry import PART, Registry
from posttrain.data.registry import Stored as StoredDataset
from posttrain.data.rows import ConversationRow, Fault
from posttrain.data.statistics import Statistics, spread
from posttrain.errors import DataError
from posttrain.serve.problems import RESPONSES, Problem
from posttrain.serve.settings import Serving, Settings
from posttrain.serve.store import Store, Stored
from posttrain.serve.tables import TraceRow
from posttrain.serve.traces import Filters, Trace, add_traces, matching, payloads

router = APIRouter(prefix="/api/datasets", tags=["datasets"], responses=RESPONSES)
ExportFormat = Literal["trace", "tunix_sft", "training_example"]
Part = Annotated[str, StringConstraints(pattern=f"^{PART.pattern}$")]
Provenance = Annotated[str, StringConstraints(max_length=128, pattern=r"^[^\x00]*$")]
Key = Annotated[str, InPath(max_length=160, description="NAME-VERSION or NAME@VERSION")]
MOST_ROWS = 10_000
MOST_INGESTED = 100_000
PART_ROWS = 500
CHUNK = 2**16
IN_MEMORY = 2**23


# ---------------------------------------------------------------- build


class Build(BaseModel):
    model_config = ConfigDict(extra="forbid")

    dataset_name: Part
    dataset_version: Part
    filters: Filters = Field(default_factory=Filters)
    limit: int = Field(100, ge=1, le=MOST_ROWS)
    selection_strategy: Literal["latest", "random"] = "latest"
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    session_id: Provenance | None = None
    parent_dataset_id: Provenance | None = None
    training_run_id: Provenance | None = None
    provenance: dict[str, str | int | float | bool | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _seeded(self) -> Self:
        if self.selection_strategy == "random" and self.seed is None:
            raise ValueError("a random selection needs a seed")
        return self

    @property
    def key(self) -> str:
        return f"{self.dataset_name}@{self.dataset_version}"


class Built(BaseModel):
    dataset_key: str
    dataset: str
    """NAME@VERSION, as recipes and `posttrain data` have it."""
    build_id: str
    trace_count: int
    matching: int
    """Traces that the filters let through; where they are fewer than `limit`, all of them are in."""
    limit: int
    is_new: bool
    """Otherwise this version was there already, with the same rows."""
    digest: str
    manifest_path: str


@router.post("/build", status_code=201)
def build_dataset(settings: Serving, store: Stored, asked: Build, response: Response) -> Built:
    """A new version of the newest traces or of random ones. One that exists is never overwritten."""
    registry = settings.registry
    _refuse_ambiguous(registry, asked)
    parent = find_dataset(registry, asked.parent_dataset_id) if asked.parent_dataset_id else None
    with store.read() as session:
        found, total = _matching(session, store, asked.filters)
        if not found:
            raise Problem(422, f"{asked.key}: none of {total} traces passes the filters; an empty dataset is not built")
        chosen = _chosen(found, asked)
        rows = (("traces", conversation_row(*one)) for one in payloads(session, chosen))
        stored, is_new = _commit(registry, asked, rows, total, len(found), parent)
    response.status_code = 201 if is_new else 200
    return Built(
        dataset_key=_dashed(stored),
        dataset=stored.key,
        build_id=stored.manifest.get("build_id", stored.digest),
        trace_count=stored.manifest["counts"]["rows"],
        matching=len(found),
        limit=asked.limit,
        is_new=is_new,
        digest=stored.digest,
        manifest_path=str(stored.folder / "manifest.json"),
    )


def _matching(session: Session, store: Store, filters: Filters) -> tuple[list[int], int]:
    found = list(session.scalars(matching(filters, store.dialect).order_by(TraceRow.seq)))
    return found, session.scalar(select(func.count()).select_from(TraceRow)) or 0


def _chosen(found: Sequence[int], asked: Build) -> Sequence[int]:
    """In the order they came in."""
    if asked.selection_strategy == "latest":
        return found[-asked.limit :]
    return sorted(random.Random(asked.seed).sample(found, min(asked.limit, len(found))))


def conversation_row(identity: str, payload: dict[str, Any]) -> ConversationRow:
    return ConversationRow(id=identity, **rt_trace.fields(payload))


def _commit(
    registry: Registry,
    asked: Build,
    rows: Iterable[tuple[str, ConversationRow]],
    total: int,
    passing: int,
    parent: StoredDataset | None,
) -> tuple[StoredDataset, bool]:
    steps: list[int] = []

    def counted() -> Iterator[tuple[str, ConversationRow]]:
        for source, row in rows:
            steps.append(len(row.conversation.metadata["trace"]["steps"]))
            yield source, row

    def manifest(taken: Counter[str], statistics: Statistics) -> dict[str, Any]:
        return {
            "content": "conversations",
            "created_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "parent": {"key": parent.key, "digest": parent.digest} if parent else None,
            "sources": [{"kind": "traces", "path": "of the server", "rows": taken.total(), "digest": None}],
            "selection": {"limit": asked.limit, "strategy": asked.selection_strategy, "seed": asked.seed},
            "counts": {
                "rows": taken.total(),
                "filtered": total - passing,
                "unavailable_sources": 0,
                "malformed": {},
            },
            "statistics": statistics.summary() | {"steps": spread(steps)},
            "build_id": str(uuid.uuid4()),
            "request": asked.model_dump(mode="json", exclude_defaults=True) | {"limit": asked.limit},
        }

    try:
        return commit_rows(registry, asked.key, counted(), manifest)
    except DataError as error:
        raise Problem(409, str(error)) from error


# ---------------------------------------------------------------- keys


def _named(registry: Registry, key: str) -> list[str]:
    """Those NAME@VERSION that exist and that `key` can mean: a name or a version may have a `-` of its own."""
    pairs = (
        [key.partition("@")]
        if "@" in key
        else [(key[:at], "@", key[at + 1 :]) for at, letter in enumerate(key) if letter == "-"]
    )
    return [
        f"{name}@{version}"
        for name, at, version in pairs
        if at and PART.fullmatch(name) and PART.fullmatch(version)
        and (registry.folder / name / version / "manifest.json").is_file()
    ]  # fmt: skip


def find_dataset(registry: Registry, key: str) -> StoredDataset:
    """Problem 404 where there is none, 409 where there are two."""
    found = _named(registry, key)
    if not found:
        raise Problem(404, f"there is no dataset {key!r}; POST /api/datasets/build makes one")
    if len(found) > 1:
        raise Problem(409, f"{key!r} can be {' or '.join(found)}: write it as NAME@VERSION")
    return registry.find(found[0])


def _refuse_ambiguous(registry: Registry, asked: Build) -> None:
    others = [key for key in _named(registry, f"{asked.dataset_name}-{asked.dataset_version}") if key != asked.key]
    if others:
        raise Problem(409, f"the key {asked.dataset_name}-{asked.dataset_version} would also mean {others[0]}")


def _dashed(stored: StoredDataset) -> str:
    return stored.key.replace("@", "-")


# ---------------------------------------------------------------- list, manifest, export


class DatasetLine(BaseModel):
    dataset_key: str
    dataset: str
    content: str
    rows: int
    digest: str
    created_at: str
    parent: dict[str, str] | None


class DatasetPage(BaseModel):
    data: list[DatasetLine]
    pagination: dict[str, int | None]


@router.get("")
def list_datasets(
    settings: Serving,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    offset: Annotated[int, Query(ge=0, le=2**53)] = 0,
) -> DatasetPage:
    """By name, whoever built them."""
    keys = settings.registry.all_keys()
    lines = [_line(settings.registry.find(key)) for key in keys[offset : offset + limit]]
    more = offset + limit if offset + limit < len(keys) else None
    return DatasetPage(data=lines, pagination={"limit": limit, "offset": offset, "next_offset": more})


def _line(stored: StoredDataset) -> DatasetLine:
    told = stored.manifest
    return DatasetLine(
        dataset_key=_dashed(stored),
        dataset=stored.key,
        content=stored.content,
        rows=told["counts"]["rows"],
        digest=stored.digest,
        created_at=told["created_at"],
        parent=told.get("parent"),
    )


@router.get("/{key}/manifest")
def get_manifest(settings: Serving, key: Key) -> dict[str, Any]:
    """As it lies on disk, with the ids of its rows."""
    stored = find_dataset(settings.registry, key)
    identities = [json.loads(line) for line in (stored.folder / "ids.txt").read_text(encoding="utf-8").splitlines()]
    more = {"dataset_key": _dashed(stored), "trace_ids": identities, "trace_count": len(identities)}
    return more | stored.manifest


@router.get("/{key}/export.jsonl", response_class=Response)
def export_dataset(settings: Serving, key: Key, format: ExportFormat = "trace") -> Response:
    """A record per line."""
    stored = find_dataset(settings.registry, key)
    rows = (ConversationRow.model_validate(row) for row in stored.read())
    return as_lines(rows if stored.content == "conversations" else (), stored.content, format)


def as_lines(rows: Iterable[ConversationRow], content: str, format: ExportFormat) -> Response:
    """All of them are made before the first is sent: an answer that ends early would pass for a short one."""
    if content not in EXPORTS[format]:
        raise Problem(422, f"{content} cannot be exported as {format}")
    file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (closed once it is sent)
    try:
        for row in rows:
            for record in exported(row.model_dump(mode="json"), content, format):
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    except BaseException:
        file.close()
        raise
    file.seek(0)
    chunks = iter(lambda: file.read(CHUNK), b"")
    return StreamingResponse(chunks, media_type="application/x-ndjson", background=BackgroundTask(file.close))


# ---------------------------------------------------------------- ingest


class Ingest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    path: Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00]*$")]
    """A JSONL file of traces, relative to the server's folder for them."""
    source_name: Part
    """Becomes `source` of each trace's `meta`; what stood there is kept as `ingested_source`."""


class Ingested(BaseModel):
    ingested_count: int
    trace_ids: list[str]


@router.post("/ingest", status_code=201)
def ingest(settings: Serving, store: Stored, asked: Ingest) -> Ingested:
    """All traces of the file or, where one is no good, none."""
    path = _below(settings, asked.path)
    count = sum(1 for _ in itertools.islice(_traces(path, asked.source_name), MOST_INGESTED + 1))
    if count > MOST_INGESTED:
        raise Problem(422, f"{asked.path} has more than {MOST_INGESTED:,} traces; divide it")
    identities: list[str] = []
    with store.write() as session:
        found = _traces(path, asked.source_name)
        while part := list(itertools.islice(found, PART_ROWS)):
            identities += [row.id for row in add_traces(session, part)]
    return Ingested(ingested_count=len(identities), trace_ids=identities)


def _below(settings: Settings, given: str) -> Path:
    """The file in the folder; Problem for a path that leads out of it, also through a link."""
    folder = settings.ingest.resolve()
    path = folder / given
    try:
        inside = path.resolve() == path and path.is_relative_to(folder)
        there = inside and path.is_file()
    except (OSError, RuntimeError, ValueError):
        inside = there = False
    if not inside:
        raise Problem(422, f"path {given!r}: only files below {folder} are read, by relative path and without links")
    if not there:
        raise Problem(404, f"there is no file {given!r} in {folder}")
    if path.suffix != ".jsonl":
        raise Problem(422, f"path {given!r}: only .jsonl files are read")
    return path


def _traces(path: Path, source: str) -> Iterator[Trace]:
    for number, record in enumerate(records(path), 1):
        if isinstance(record, Fault):
            raise Problem(422, f"{path.name}, row {number}: {record}; nothing was ingested")
        meta = record.get("meta") or {}
        if isinstance(meta, dict):
            before = {"ingested_source": meta["source"]} if "source" in meta else {}
            record = {**record, "meta": {**meta, **before, "source": source}}
        try:
            yield Trace.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            said = f"{where}: {first['msg']}" if where else first["msg"]
            raise Problem(422, f"{path.name}, row {number}: {said}; nothing was ingested") from None
