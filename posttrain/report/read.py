"""A run's files as plain data. Everything may be missing, torn or half written; what could not be read is counted."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from posttrain.run import lock
from posttrain.run.folder import RunFolder

Status = Literal["complete", "skipped", "failed gate", "failed", "stopped", "running", "not run"]
Verdict = Literal["passed", "failed", "accepted", "not judged"]
Row = dict[str, Any]

TRAINING_KINDS = ("sft", "preference", "grpo")


@dataclass(frozen=True)
class Answer:
    id: str
    dataset: str
    prompt: str
    completion: str
    score: float | None
    parts: dict[str, float]
    reason: str | None
    category: str | None
    difficulty: str | None

    def value(self, part: str) -> float | None:
        """The score, or one of its parts; none where the answer is unscorable or has no such part."""
        if self.score is None:
            return None
        return self.score if part == "score" else self.parts.get(part)


@dataclass(frozen=True)
class GateRecord:
    phase: str
    name: str
    metric: str
    reduction: str
    comparison: str
    threshold: float | None
    hard: bool
    value: float | None
    verdict: Verdict
    reason: str | None


@dataclass(frozen=True)
class PhaseRecord:
    name: str
    kind: str
    spec: Row
    status: Status
    started: float | None
    finished: float | None
    seconds: float | None
    resumes: int
    result: Row
    """Empty until the phase is complete."""
    metrics: tuple[Row, ...]
    answers: tuple[Answer, ...]
    gates: tuple[GateRecord, ...]
    unreadable: dict[str, int]
    """Lines that could not be read, by file name; files that exist and cannot be read count as one."""

    @property
    def complete(self) -> bool:
        return bool(self.result)

    @property
    def details(self) -> Row:
        return mapping(self.result.get("details"))

    @property
    def counts(self) -> Row:
        return mapping(self.result.get("counts"))

    @property
    def state(self) -> Row:
        return mapping(self.result.get("state"))


@dataclass(frozen=True)
class RunRecord:
    name: str
    recipe: Row
    manifest: Row
    phases: tuple[PhaseRecord, ...]
    events: tuple[Row, ...]
    unreadable: dict[str, int] = field(default_factory=dict)

    def phase(self, name: str) -> PhaseRecord | None:
        return next((phase for phase in self.phases if phase.name == name), None)


def read_run(run: RunFolder, answers: bool = True, metrics: bool = True) -> RunRecord:
    """Everything the report needs from a run folder; on request without its bulk, answers and steps. Never writes."""
    unreadable: dict[str, int] = {}
    recipe = read_object(run.recipe, unreadable)
    recipe = mapping(recipe.get("recipe")) or recipe
    manifest = read_object(run.manifest, unreadable)
    events = tuple(read_rows(run.events, unreadable))
    held = lock.holder(run) is not None
    specs = [spec for spec in listing(recipe.get("phases")) if isinstance(spec, dict) and spec.get("name")]
    return RunRecord(
        name=run.path.name,
        recipe=recipe,
        manifest=manifest,
        phases=tuple(_read_phase(run, spec, events, held, answers, metrics) for spec in specs),
        events=events,
        unreadable=unreadable,
    )


def _read_phase(
    run: RunFolder, spec: Row, events: tuple[Row, ...], held: bool, answers: bool, metrics: bool
) -> PhaseRecord:
    name, kind = str(spec["name"]), str(spec.get("kind"))
    folder = run.phase(name)
    unreadable: dict[str, int] = {}
    result = read_object(folder.result, unreadable)
    own = [event for event in events if event.get("phase") == name]
    gates = _gates(name, spec, result, own)
    started, finished, seconds = _times(result, own)
    return PhaseRecord(
        name=name,
        kind=kind,
        spec=spec,
        status=_status(name, result, gates, events, held),
        started=started,
        finished=finished,
        seconds=seconds,
        resumes=sum(event.get("event") == "phase_resumed" for event in own),
        result=result,
        metrics=_last_per_step(read_rows(folder.metrics, unreadable)) if metrics else (),
        answers=tuple(read_answers(folder.answers, unreadable)) if answers and kind == "evaluate" else (),
        gates=gates,
        unreadable=unreadable,
    )


def _status(name: str, result: Row, gates: tuple[GateRecord, ...], events: tuple[Row, ...], held: bool) -> Status:
    """A phase that began, and of which nothing more was heard, runs only while a process holds the run."""
    if result:
        if any(gate.hard and gate.verdict == "failed" for gate in gates):
            return "failed gate"
        return "skipped" if _skipped_in_last_attempt(name, events) else "complete"
    status: Status = "not run"
    for event in events:
        kind, own = event.get("event"), event.get("phase") == name
        if kind in ("phase_started", "phase_resumed") and own:
            status = "running"
        elif kind in ("phase_completed", "discarded") and own:
            status = "not run"  # its result is gone: it is to be done again
        elif status == "running" and kind in ("attempt_started", "stopped"):
            status = "stopped"
        elif status == "running" and kind == "failed":
            status = "failed"
    return "stopped" if status == "running" and not held else status


def _skipped_in_last_attempt(name: str, events: tuple[Row, ...]) -> bool:
    """Complete before the last attempt began, and not run again by it."""
    attempts = [number for number, event in enumerate(events) if event.get("event") == "attempt_started"]
    if len(attempts) < 2:
        return False
    last = events[attempts[-1] :]
    ran = {"phase_started", "phase_resumed", "phase_completed"}
    return not any(event.get("phase") == name and event.get("event") in ran for event in last)


def _times(result: Row, own: list[Row]) -> tuple[float | None, float | None, float | None]:
    """Unix seconds of begin and end, and the seconds spent."""
    starts = [place for place, event in enumerate(own) if event.get("event") == "phase_started"]
    own = own[starts[-1] :] if starts else own
    begins = [t for e in own if e.get("event") in ("phase_started", "phase_resumed") if (t := number(e.get("time")))]
    if result:
        started, finished = number(result.get("started")), number(result.get("finished"))
        seconds = number(result.get("seconds"))
        if seconds is None and started is not None and finished is not None:
            seconds = finished - started
        return started, finished, seconds
    if not begins:
        return None, None, None
    last = max((t for e in own if (t := number(e.get("time")))), default=begins[0])
    return begins[0], None, last - begins[0] if last > begins[0] else None


def _gates(phase: str, spec: Row, result: Row, own: list[Row]) -> tuple[GateRecord, ...]:
    accepted: set[str] = set()
    for event in own:
        if event.get("event") == "phase_started":
            accepted.clear()  # an acceptance is of one result, not of the next one
        elif event.get("event") == "accepted":
            accepted.add(str(event.get("gate")))
    judged = {
        str(mapping(row.get("gate")).get("name")): row for row in listing(result.get("gates")) if isinstance(row, dict)
    }
    records = []
    for gate in listing(spec.get("gates")):
        if not isinstance(gate, dict):
            continue
        name = str(gate.get("name"))
        row = judged.get(name)
        verdict: Verdict = "not judged"
        if row is not None:
            verdict = "passed" if row.get("passed") else "accepted" if name in accepted else "failed"
        records.append(
            GateRecord(
                phase=phase,
                name=name,
                metric=str(gate.get("metric")),
                reduction=str(gate.get("reduction")),
                comparison=str(gate.get("comparison")),
                threshold=number(gate.get("threshold")),
                hard=bool(gate.get("hard")),
                value=number(row.get("value")) if row else None,
                verdict=verdict,
                reason=str(row["reason"]) if row and row.get("reason") else None,
            )
        )
    return tuple(records)


def _last_per_step(rows: Iterator[Row]) -> tuple[Row, ...]:
    """One row per step: a step that was run again after a kill counts as it was run last."""
    steps = {step: row for row in rows if (step := number(row.get("step"))) is not None}
    return tuple(steps[step] for step in sorted(steps))


def read_answers(path: Path, unreadable: dict[str, int]) -> Iterator[Answer]:
    """An evaluation's lines; what is none of them is counted in `unreadable` under the file's name."""
    for row in read_rows(path, unreadable):
        if "id" not in row or "dataset" not in row:
            unreadable[path.name] = unreadable.get(path.name, 0) + 1
            continue
        parts = mapping(row.get("parts"))
        yield Answer(
            id=str(row["id"]),
            dataset=str(row["dataset"]),
            prompt=str(row.get("prompt") or ""),
            completion=str(row.get("completion") or ""),
            score=number(row.get("score")),
            parts={str(part): value for part, raw in parts.items() if (value := number(raw)) is not None},
            reason=str(row["reason"]) if row.get("reason") else None,
            category=str(row["category"]) if row.get("category") else None,
            difficulty=str(row["difficulty"]) if row.get("difficulty") else None,
        )


def read_object(path: Path, unreadable: dict[str, int]) -> Row:
    """A JSON file's object; {} where the file is missing, and counted where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, OSError):
        value = None
    if not isinstance(value, dict):
        unreadable[path.name] = unreadable.get(path.name, 0) + 1
        return {}
    return value


def read_rows(path: Path, unreadable: dict[str, int]) -> Iterator[Row]:
    """A JSON-lines file's objects; torn lines are skipped and counted, a missing file has none."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            else:
                unreadable[path.name] = unreadable.get(path.name, 0) + 1


def number(value: Any) -> float | None:
    """A finite number, or nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None


def mapping(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def listing(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
