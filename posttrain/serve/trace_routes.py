"""Traces over HTTP: one or many in, lists and single ones out, scored and compared."""

import time
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from posttrain.data.formats import evaluation
from posttrain.data.formats.format import BadRow
from posttrain.scoring.answers import score_answer
from posttrain.scoring.score import Score
from posttrain.serve.problems import RESPONSES, Problem
from posttrain.serve.store import Stored
from posttrain.serve.tables import ScoreRow, TraceBody, TraceRow
from posttrain.serve.traces import (
    ColumnFilters,
    KeptTrace,
    Trace,
    TraceLine,
    add_traces,
    find_trace,
    line_of,
    page,
    payload_of,
)

router = APIRouter(prefix="/api/traces", tags=["traces"], responses=RESPONSES)
MOST_TRACES = 1000
"""In one batch."""
Criteria = Literal["answer", "exact", "contains", "numeric"]


class Created(BaseModel):
    id: str
    created_at: datetime
    trace_version: str


class CreatedBatch(BaseModel):
    created_count: int
    traces: list[Created]


def created(row: TraceRow) -> Created:
    return Created(id=row.id, created_at=datetime.fromtimestamp(row.created_at, UTC), trace_version=row.trace_version)


@router.post("", status_code=201)
def create_trace(store: Stored, trace: Trace) -> Created:
    with store.write() as session:
        (row,) = add_traces(session, [trace])
    return created(row)


@router.post("/batch", status_code=201)
def create_traces(
    store: Stored, traces: Annotated[list[Trace], Body(min_length=1, max_length=MOST_TRACES)]
) -> CreatedBatch:
    """All of them or, where one is no good, none."""
    with store.write() as session:
        rows = add_traces(session, traces)
    return CreatedBatch(created_count=len(rows), traces=list(map(created, rows)))


class ListQuery(ColumnFilters):
    limit: int = Field(20, ge=1, le=100)
    offset: int = Field(0, ge=0, le=2**53)


class Page(BaseModel):
    data: list[TraceLine]
    pagination: dict[str, int | None]
    """`limit`, `offset`, and `next_offset` where there are more."""


@router.get("")
def list_traces(store: Stored, query: Annotated[ListQuery, Query()]) -> Page:
    """The newest first."""
    with store.read() as session:
        rows = page(session, query, query.limit + 1, query.offset)
    more = query.offset + query.limit if len(rows) > query.limit else None
    paging = {"limit": query.limit, "offset": query.offset, "next_offset": more}
    return Page(data=[line_of(row) for row in rows[: query.limit]], pagination=paging)


# ---------------------------------------------------------------- scores


class ScoreRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    criteria: Criteria = "answer"
    """`answer` compares numbers as such and looks for any other text in the answer."""
    expected_answer: str | Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Else `expected_answer` of the trace's `meta`."""


class TraceScore(BaseModel):
    trace_id: str
    criteria: str
    score: float | None
    """None: unscorable."""
    details: dict[str, Any]
    """Parts of the score, what was compared, and why it is unscorable where it is."""
    scored_at: datetime


class ScoredTrace(KeptTrace):
    scores: list[TraceScore]
    """The newest of each criteria."""


class Comparison(BaseModel):
    base: ScoredTrace
    other: ScoredTrace


@router.get("/compare")
def compare_traces(store: Stored, base: uuid.UUID, other: uuid.UUID) -> Comparison:
    with store.read() as session:
        return Comparison(base=_scored(session, base), other=_scored(session, other))


@router.get("/{trace_id}")
def get_trace(store: Stored, trace_id: uuid.UUID) -> ScoredTrace:
    with store.read() as session:
        return _scored(session, trace_id)


@router.post("/{trace_id}/score", status_code=201)
def score_trace(store: Stored, trace_id: uuid.UUID, asked: ScoreRequest) -> TraceScore:
    """How the final answer compares with the one that was expected; the length of a trace counts for nothing."""
    with store.read() as session:
        row, body = _found(session, trace_id)
    expected = asked.expected_answer if asked.expected_answer is not None else body.meta.get("expected_answer")
    score = _score(body, asked.criteria, expected)
    details = {"parts": score.parts, "answer": score.answer, "expected_answer": expected, "reason": score.reason}
    entry = ScoreRow(
        trace_seq=row.seq, created_at=time.time(), criteria=asked.criteria, score=score.value, details=details
    )
    with store.write() as session:
        session.add(entry)
        session.flush()
        session.expunge_all()
    return _told(row.id, entry)


def _score(body: TraceBody, criteria: Criteria, expected: Any) -> Score:
    if expected is None:
        return Score(value=None, reason="there is no expected answer: give one, or put it into the trace's meta")
    record = {"prompt": body.prompt, "expected_answer": expected}
    try:
        task = evaluation.task(record if criteria == "answer" else record | {"scorer": criteria})
    except BadRow as error:
        raise Problem(422, str(error)) from None
    return score_answer(task["reference"], body.final_answer)


def _found(session: Session, identity: uuid.UUID) -> tuple[TraceRow, TraceBody]:
    found = find_trace(session, identity)
    if found is None:
        raise Problem(404, f"there is no trace {identity}")
    return found


def _scored(session: Session, identity: uuid.UUID) -> ScoredTrace:
    row, body = _found(session, identity)
    entries = session.scalars(select(ScoreRow).where(ScoreRow.trace_seq == row.seq).order_by(ScoreRow.seq))
    newest = {entry.criteria: entry for entry in entries}
    return ScoredTrace(
        **line_of(row).model_dump(),
        payload=payload_of(row, body),
        scores=[_told(row.id, entry) for entry in newest.values()],
    )


def _told(identity: str, entry: ScoreRow) -> TraceScore:
    return TraceScore(
        trace_id=identity,
        criteria=entry.criteria,
        score=entry.score,
        details=entry.details,
        scored_at=datetime.fromtimestamp(entry.created_at, UTC),
    )
