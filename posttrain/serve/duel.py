"""The high-card duel over HTTP: traces of it, kept or only shown."""

import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from posttrain import __version__
from posttrain.serve.datasets import ExportFormat, as_lines, conversation_row
from posttrain.serve.problems import RESPONSES, Problem
from posttrain.serve.store import Stored
from posttrain.serve.tables import TraceRow
from posttrain.serve.traces import Filters, Trace, add_traces, find_trace, matching, payload_of, payloads
from posttrain.worlds import duel

router = APIRouter(prefix="/api/ungar", tags=["duel"], responses=RESPONSES)
PREVIEWED = 3
MOST = 1000
DUELS = Filters(source="ungar", game="high_card_duel")


class Generate(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: int = Field(ge=1, le=MOST)
    seed: int = Field(0, ge=-(2**53), le=2**53)
    """Duel number n has the seed `seed` + n."""
    persist: bool = True
    variant: Literal["decision", "reveal"] = "decision"
    """`decision`: fold, call or raise, played by the optimal move. `reveal`: there is no choice."""


@router.get("/status")
def status() -> dict[str, Any]:
    """It is part of this program, so it is always there."""
    return {"available": True, "version": __version__, "game": "high_card_duel", "variants": list(duel.TRACES)}


@router.post("/high-card-duel/generate", status_code=201)
def generate(store: Stored, asked: Generate) -> dict[str, Any]:
    made = [Trace.model_validate(one) for one in duel.traces(asked.count, asked.seed, asked.variant)]
    identities: list[str] = []
    if asked.persist:
        with store.write() as session:
            identities = [row.id for row in add_traces(session, made)]
    return {"trace_ids": identities, "preview": [trace.model_dump() for trace in made[:PREVIEWED]]}


@router.get("/high-card-duel/export.jsonl", response_class=Response)
def export(
    store: Stored,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    trace_ids: Annotated[str | None, Query(max_length=40_000)] = None,
    format: ExportFormat = "tunix_sft",
) -> Response:
    """The latest duels in the order they came in, or those with these ids, separated by commas."""
    with store.read() as session:
        if trace_ids is None:
            newest = matching(DUELS, store.dialect).order_by(TraceRow.seq.desc()).limit(limit)
            found = list(payloads(session, sorted(session.scalars(newest))))
        else:
            found = []
            for word in trace_ids.split(","):
                pair = find_trace(session, _identity(word))
                if pair is None:
                    raise Problem(404, f"there is no trace {word.strip()}")
                found.append((pair[0].id, payload_of(*pair)))
    return as_lines((conversation_row(identity, payload) for identity, payload in found), "conversations", format)


def _identity(word: str) -> uuid.UUID:
    try:
        return uuid.UUID(word.strip())
    except ValueError:
        raise Problem(422, f"trace_ids: {word.strip()[:64]!r} is no id") from None
