"""Traces in the database: their shape, what they can be filtered by, and how they go in and come out."""

import math
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    model_validator,
)
from sqlalchemy import ColumnElement, Select, cast, exists, func, insert, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from posttrain.data.formats import rt_trace
from posttrain.data.formats.format import BadRow
from posttrain.recipe.spelling import did_you_mean
from posttrain.serve.tables import ScoreRow, TraceBody, TraceRow

DEEPEST = 32
"""Levels of `meta`."""
AT_ONCE = 500
"""Values in one statement; SQLite takes 32,766 of them."""
MOST_NAME = 256
"""Characters of what lists can be filtered by."""
Short = Annotated[str, StringConstraints(max_length=MOST_NAME, pattern=r"^[^\x00]*$")]
Whole = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]


# ---------------------------------------------------------------- shape


class Step(BaseModel):
    model_config = ConfigDict(extra="forbid")

    i: Whole
    type: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: Annotated[str, StringConstraints(min_length=1, max_length=rt_trace.MOST_STEP)]


class Trace(BaseModel):
    """A prompt, numbered steps, a final answer."""

    model_config = ConfigDict(extra="forbid")

    trace_version: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    prompt: Annotated[str, StringConstraints(min_length=1, max_length=rt_trace.MOST_PROMPT)]
    final_answer: Annotated[str, StringConstraints(min_length=1, max_length=rt_trace.MOST_ANSWER)]
    steps: Annotated[list[Step], Field(min_length=1, max_length=rt_trace.MOST_STEPS)]
    """`i` counts up by one, from 0 or 1."""
    meta: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _as_the_format_has_it(self) -> Self:
        record = self.model_dump()
        _check_storable(record)
        for name in ("source", "game"):
            if len(str((self.meta or {}).get(name, ""))) > MOST_NAME:
                raise ValueError(f"meta.{name} is longer than {MOST_NAME} characters")
        try:
            rt_trace.fields(record)
        except BadRow as error:
            raise ValueError(str(error)) from None
        return self


def _check_storable(value: Any, depth: int = 0) -> None:
    """ValueError for what JSON, UTF-8 or PostgreSQL cannot hold."""
    if depth > DEEPEST:
        raise ValueError(f"is nested deeper than {DEEPEST} levels")
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("holds a null character, which the database cannot keep")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("holds half a surrogate pair, which is no text")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"holds {value}, which is not JSON")
    elif isinstance(value, dict):
        for name, part in value.items():
            _check_storable(name, depth + 1)
            _check_storable(part, depth + 1)
    elif isinstance(value, list):
        for part in value:
            _check_storable(part, depth + 1)


# ---------------------------------------------------------------- filters


class ColumnFilters(BaseModel):
    """All that are given must hold."""

    model_config = ConfigDict(extra="forbid")

    source: Short | None = None
    game: Short | None = None
    trace_version: Short | None = None
    created_after: AwareDatetime | None = None
    created_before: AwareDatetime | None = None
    score_at_least: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Of any criteria."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        for name in given if isinstance(given, dict) else ():
            if name not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                raise ValueError(
                    f"there is no filter {name!r}{did_you_mean(name, cls.model_fields)}; there are {known}"
                )
            if given[name] is None:
                raise ValueError(f"filter {name!r} is null; leave it out")
        return given


class Filters(ColumnFilters):
    meta: dict[
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")], StrictBool | Whole | float | Short
    ] = Field(default_factory=dict)
    """Values of `meta`, compared as they are; no index helps."""


def conditions(filters: ColumnFilters, dialect: str) -> Iterator[ColumnElement[bool]]:
    """As the query has them."""
    for name in ("source", "game", "trace_version"):
        if (value := getattr(filters, name)) is not None:
            yield getattr(TraceRow, name) == value
    if filters.created_after is not None:
        yield TraceRow.created_at > filters.created_after.timestamp()
    if filters.created_before is not None:
        yield TraceRow.created_at < filters.created_before.timestamp()
    if filters.score_at_least is not None:
        scored = (ScoreRow.trace_seq == TraceRow.seq, ScoreRow.score >= filters.score_at_least)
        yield exists().where(*scored)
    for name, wanted in filters.meta.items() if isinstance(filters, Filters) else ():
        yield exists().where(TraceBody.seq == TraceRow.seq, _meta_is(dialect, name, wanted))


def _meta_is(dialect: str, name: str, wanted: str | float | bool) -> ColumnElement[bool]:
    if dialect == "postgresql":
        return cast(TraceBody.meta, JSONB)[name] == cast(wanted, JSONB)
    found = func.json_extract(TraceBody.meta, f'$."{name}"')
    kind = func.json_type(TraceBody.meta, f'$."{name}"')
    # SQLite has no booleans: true comes out as 1.
    if isinstance(wanted, bool):
        return kind == ("true" if wanted else "false")
    return (found == wanted) & kind.not_in(("true", "false"))


def matching(filters: ColumnFilters, dialect: str) -> Select[int]:
    """Their numbers, which grow with the order they came in."""
    return select(TraceRow.seq).where(*conditions(filters, dialect))


# ---------------------------------------------------------------- in


def add_traces(session: Session, traces: Sequence[Trace]) -> list[TraceRow]:
    """All of them, in order."""
    now = datetime.now(UTC).timestamp()
    rows = [_row(trace, now) for trace in traces]
    session.add_all(rows)
    session.flush()
    bodies = [
        {"seq": row.seq, **trace.model_dump(exclude={"trace_version", "meta"}), "meta": trace.meta or {}}
        for row, trace in zip(rows, traces, strict=True)
    ]
    session.execute(insert(TraceBody), bodies)
    # What the caller reads of them outlives the session.
    session.expunge_all()
    return rows


def _row(trace: Trace, now: float) -> TraceRow:
    named = {name: value for name in ("source", "game") if isinstance(value := (trace.meta or {}).get(name), str)}
    return TraceRow(id=str(uuid.uuid4()), created_at=now, trace_version=trace.trace_version, **named)


# ---------------------------------------------------------------- out


class TraceLine(BaseModel):
    """What a list shows of a trace."""

    id: str
    created_at: datetime
    trace_version: str
    source: str | None
    game: str | None


class KeptTrace(TraceLine):
    payload: dict[str, Any]
    """As it was sent."""


def line_of(row: TraceRow) -> TraceLine:
    return TraceLine(
        id=row.id,
        created_at=datetime.fromtimestamp(row.created_at, UTC),
        trace_version=row.trace_version,
        source=row.source,
        game=row.game,
    )


def page(session: Session, filters: ColumnFilters, limit: int, offset: int) -> list[TraceRow]:
    """The newest first."""
    dialect = session.get_bind().dialect.name
    chosen = matching(filters, dialect).order_by(TraceRow.seq.desc()).limit(limit).offset(offset).subquery()
    query = select(TraceRow).join(chosen, TraceRow.seq == chosen.c.seq).order_by(TraceRow.seq.desc())
    return list(session.scalars(query))


def find_trace(session: Session, identity: uuid.UUID) -> tuple[TraceRow, TraceBody] | None:
    query = select(TraceRow, TraceBody).join(TraceBody, TraceBody.seq == TraceRow.seq)
    found = session.execute(query.where(TraceRow.id == str(identity))).first()
    return None if found is None else (found[0], found[1])


def payload_of(row: TraceRow, body: TraceBody) -> dict[str, Any]:
    kept = {"prompt": body.prompt, "final_answer": body.final_answer, "steps": body.steps, "meta": body.meta}
    return {"trace_version": row.trace_version, **kept}


def payloads(session: Session, numbers: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Id and payload of the traces with these numbers, in their order."""
    for begin in range(0, len(numbers), AT_ONCE):
        part = numbers[begin : begin + AT_ONCE]
        query = select(TraceRow, TraceBody).join(TraceBody, TraceBody.seq == TraceRow.seq)
        found = {
            row.seq: (row.id, payload_of(row, body))
            for row, body in session.execute(query.where(TraceRow.seq.in_(part)))
        }
        yield from (found[number] for number in part)
