"""Runs over HTTP: start, resume and stop them, and read what they wrote."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi import Path as InPath
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

from posttrain.report.read import PhaseRecord, listing, mapping, number, read_run
from posttrain.report.summary import gate_verdicts, key_metric
from posttrain.run.folder import NAME, RunFolder, files_below
from posttrain.run.journal import read_lines
from posttrain.run.lock import holder
from posttrain.run.redaction import redact
from posttrain.serve import control
from posttrain.serve.problems import RESPONSES, Problem
from posttrain.serve.settings import Serving

router = APIRouter(prefix="/api/runs", tags=["runs"], responses=RESPONSES)
RunName = Annotated[str, InPath(pattern=f"^{NAME.pattern}$")]
Value = str | int | float | bool | None
LOOK_EVERY_S = 0.3
CHUNK = 2**16


def _run(settings: Serving, name: RunName) -> RunFolder:
    return control.run_of(settings, name)


Run = Annotated[RunFolder, Depends(_run)]


class StartRun(BaseModel):
    model_config = ConfigDict(extra="forbid")

    recipe: str
    """A shipped recipe."""
    flags: dict[str, Value] = Field(default_factory=dict)
    """The recipe's own flags, by their names in Python."""
    name: str | None = Field(None, pattern=f"^{NAME.pattern}$")
    """Else the recipe's name and its changed flags."""
    execution: dict[str, str | int | None] = Field(default_factory=dict)
    """As the options of `posttrain run`, by their names in Python."""


class ResumeRun(BaseModel):
    model_config = ConfigDict(extra="forbid")

    redo_from: str | None = Field(None, max_length=64, pattern=f"^{NAME.pattern}$")
    """This phase and all after it are done again."""
    accept: list[Annotated[str, Field(max_length=130, pattern=r"^[a-z0-9._-]+:[a-z0-9._-]+$")]] = Field(
        default_factory=list
    )
    """PHASE:GATE of hard gates to go on in spite of."""


class PhaseLine(BaseModel):
    name: str
    kind: str
    status: str
    seconds: float | None
    key_metric: str
    gates: str


class RunStatus(control.RunState):
    recipe: str
    flags: dict[str, Any]
    run_id: str | None
    git_sha: str | None
    seed: int | None
    datasets: dict[str, Any]
    phases: list[PhaseLine]


@router.get("")
def list_runs(
    settings: Serving,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    offset: Annotated[int, Query(ge=0, le=2**53)] = 0,
) -> dict[str, Any]:
    """The newest first."""
    names = control.newest_names(settings)
    states = [control.state_of(RunFolder(settings.runs_dir / name)) for name in names[offset : offset + limit]]
    more = offset + limit if offset + limit < len(names) else None
    return {"data": states, "pagination": {"limit": limit, "offset": offset, "next_offset": more}}


@router.post("", status_code=201)
def start_run(settings: Serving, asked: StartRun) -> control.RunState:
    """As `posttrain start RECIPE`, which also continues a run of this name and recipe."""
    run = control.start(settings, asked.recipe, asked.flags, asked.name, asked.execution)
    return control.state_of(run)


@router.get("/{name}")
@router.get("/{name}/status")
def get_run(run: Run) -> RunStatus:
    record, state = read_run(run, answers=False), control.state_of(run)
    git = record.manifest.get("git") or {}
    return RunStatus(
        **state.model_dump(),
        recipe=str(record.recipe.get("name")),
        flags=record.recipe.get("flags") or {},
        run_id=record.manifest.get("run_id"),
        git_sha=git.get("commit"),
        seed=record.recipe.get("seed"),
        datasets=record.manifest.get("datasets") or {},
        phases=list(map(_line, record.phases)),
    )


def _line(phase: PhaseRecord) -> PhaseLine:
    return PhaseLine(
        name=phase.name,
        kind=phase.kind,
        status=phase.status,
        seconds=phase.seconds,
        key_metric=key_metric(phase),
        gates=gate_verdicts(phase),
    )


@router.post("/{name}/resume", status_code=202)
def resume_run(settings: Serving, run: Run, asked: ResumeRun | None = None) -> control.RunState:
    """As `posttrain start RUN`."""
    wanted = asked or ResumeRun()
    return control.state_of(control.resume(settings, run.path.name, wanted.redo_from, tuple(wanted.accept)))


@router.post("/{name}/cancel", status_code=202)
def cancel_run(
    settings: Serving,
    run: Run,
    response: Response,
    now: Annotated[bool, Query(description="Unsaved work is lost.")] = False,
) -> dict[str, Any]:
    """As `posttrain stop RUN`, without waiting: the step at hand is finished and saved. 200 where nothing runs."""
    stopping = control.stop(settings, run.path.name, now)
    response.status_code = 202 if stopping else 200
    return {"name": run.path.name, "stopping": stopping}


# ---------------------------------------------------------------- what it wrote


@router.get("/{name}/logs", response_class=EventSourceResponse)
async def follow_logs(
    run: Run,
    follow: bool = True,
    last_event_id: Annotated[str | None, Header(max_length=64, pattern=r"^\d{1,9}:\d{1,18}$")] = None,
) -> AsyncIterator[ServerSentEvent]:
    """The last attempt's log as events `log`, and later ones' while a process works on the run; then one `end`.

    An event's id says where the next one begins, so that a client that lost its connection goes on from there.
    """
    attempt, place = map(int, last_event_id.split(":")) if last_event_id else (_last_attempt(run), 0)
    while True:
        held = holder(run) is not None
        text, place = _read_on(run, attempt, place)
        if text:
            yield ServerSentEvent(data={"attempt": attempt, "text": text}, event="log", id=f"{attempt}:{place}")
        elif attempt < _last_attempt(run):
            attempt, place = attempt + 1, 0
        elif not held or not follow:
            break
        else:
            await asyncio.sleep(LOOK_EVERY_S)
    yield ServerSentEvent(data={"state": control.state_of(run).state}, event="end")


def _last_attempt(run: RunFolder) -> int:
    return max((int(path.stem.rpartition("-")[2]) for path in run.logs.glob("attempt-*.log")), default=0)


def _read_on(run: RunFolder, attempt: int, place: int) -> tuple[str, int]:
    """Whole lines from this byte on, and where they end; the log itself is redacted."""
    path = run.logs / f"attempt-{attempt:04d}.log"
    try:
        with open(path, "rb") as file:
            file.seek(place)
            read = file.read(CHUNK)
    except OSError:
        return "", place
    end = read.rfind(b"\n") + 1 or (len(read) if len(read) == CHUNK else 0)
    return read[:end].decode(errors="replace"), place + end


@router.get("/{name}/metrics")
def get_metrics(
    run: Run,
    phase: Annotated[str | None, Query(pattern=f"^{NAME.pattern}$")] = None,
    after_step: Annotated[int, Query(ge=-1, le=2**53)] = -1,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> dict[str, Any]:
    """Raw values per step by phase, the first `limit` of each after a step; `more` names phases with further ones."""
    names = [phase] if phase else [one.name for one in read_run(run, answers=False).phases]
    if phase and not run.phase(phase).path.is_dir():
        raise Problem(404, f"run {run.path.name!r} has no phase {phase!r} with files")
    found, more = {}, []
    for name in names:
        rows: list[dict[str, Any]] = []
        for row in read_lines(run.phase(name).metrics):
            if (number(row.get("step")) or 0) > after_step:
                if len(rows) == limit:
                    more.append(name)
                    break
                rows.append(row)
        if rows:
            found[name] = rows
    return {"phases": found, "more": more}


@router.get("/{name}/artifacts")
def list_artifacts(run: Run) -> dict[str, Any]:
    """Every file of the run but links and what is being written, with the digest where a result names it."""
    digests = {
        f"phases/{phase.name}/{output.get('path')}": output.get("sha256")
        for phase in read_run(run, answers=False).phases
        for output in map(mapping, listing(phase.result.get("outputs")))
    }
    listed = []
    for path in files_below(run.path):
        relative = str(path.relative_to(run.path))
        if path.is_symlink() or any(part.startswith(".") for part in Path(relative).parts):
            continue
        try:
            size = path.stat().st_size
        except OSError:
            continue  # it was moved or removed in the meantime
        listed.append({"path": relative, "bytes": size, "sha256": digests.get(relative)})
    return {"artifacts": listed}


@router.get("/{name}/artifacts/{path:path}", response_class=FileResponse)
def get_artifact(run: Run, path: Annotated[str, InPath(max_length=1024)]) -> FileResponse:
    """One file; nothing outside of the run's folder, and no link."""
    root = run.path.resolve()
    wanted = root / path
    try:
        plain = "\0" not in path and wanted.is_relative_to(root) and os.path.realpath(wanted) == str(wanted)
        there = plain and wanted.is_file()
    except (OSError, ValueError):
        plain = there = False
    if not there:
        raise Problem(404, f"run {run.path.name!r} has no file {redact(path)!r}")
    return FileResponse(wanted, filename=wanted.name)
