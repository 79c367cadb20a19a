"""Registered models over HTTP: names, and versions of them that are a run's model states by digest."""

import time
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict, StringConstraints
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from posttrain.pipeline.results import Result, damaged_output, read_result
from posttrain.run import recipe_file
from posttrain.run.folder import NAME, RunFolder
from posttrain.serve import control
from posttrain.serve.problems import RESPONSES, Problem
from posttrain.serve.settings import Serving
from posttrain.serve.store import Store, Stored
from posttrain.serve.tables import ModelRow, ModelVersionRow

router = APIRouter(prefix="/api/models", tags=["models"], responses=RESPONSES)
Name = Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$")]
ModelName = Annotated[str, InPath(pattern=f"^{NAME.pattern}$")]
Described = Annotated[str, StringConstraints(max_length=2000, pattern=r"^[^\x00]*$")]
TRIES = 20


class NewModel(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Name
    description: Described | None = None


class NewVersion(BaseModel):
    model_config = ConfigDict(extra="forbid")

    run: Name
    phase: Name | None = None
    """Whose model state it is; else the one that an export would take."""
    version: Name | None = None
    """Else `v` and the next number."""
    description: Described | None = None


class Version(BaseModel):
    model: str
    version: str
    run: str
    phase: str
    sha256: str
    state: dict[str, Any]
    bytes: int
    metrics: dict[str, Any]
    description: str | None
    created_at: datetime
    fault: str | None = None
    """Why the files are no longer what was registered; only where one version is asked for."""


class Model(BaseModel):
    name: str
    description: str | None
    created_at: datetime
    versions: list[Version]


@router.post("", status_code=201)
def create_model(store: Stored, asked: NewModel) -> Model:
    row = ModelRow(name=asked.name, description=asked.description, created_at=time.time())
    try:
        with store.write() as session:
            session.add(row)
            session.flush()
            session.expunge_all()
    except IntegrityError:
        raise Problem(409, f"there is a model {asked.name!r} already") from None
    return _model(row, [])


@router.get("")
def list_models(store: Stored) -> list[Model]:
    with store.read() as session:
        versions = list(session.scalars(select(ModelVersionRow).order_by(ModelVersionRow.seq)))
        rows = session.scalars(select(ModelRow).order_by(ModelRow.name))
        return [_model(row, [one for one in versions if one.model == row.name]) for row in rows]


@router.get("/{model}")
def get_model(store: Stored, model: ModelName) -> Model:
    with store.read() as session:
        row = _found(session, model)
        of_it = select(ModelVersionRow).where(ModelVersionRow.model == model).order_by(ModelVersionRow.seq)
        return _model(row, list(session.scalars(of_it)))


@router.post("/{model}/versions", status_code=201)
def add_version(settings: Serving, store: Stored, model: ModelName, asked: NewVersion) -> Version:
    """A label is given once, and what it names never changes."""
    run = control.run_of(settings, asked.run)
    phase, result = _state_of(run, asked.phase)
    state = result["state"]
    made = [output for output in result["outputs"] if output["path"].startswith("final/")]
    row = {
        "model": model,
        "run": run.path.name,
        "phase": phase,
        "sha256": state["adapter_digest"] or state["base_digest"],
        "state": state,
        "bytes": sum(output["bytes"] for output in made),
        "metrics": result["metrics"],
        "description": asked.description,
        "created_at": time.time(),
    }
    with store.read() as session:
        _found(session, model)
    return _version(_labelled(store, row, asked.version))


@router.get("/{model}/versions/{version}")
def get_version(settings: Serving, store: Stored, model: ModelName, version: ModelName) -> Version:
    """With a look at whether its files are still what was registered."""
    with store.read() as session:
        _found(session, model)
        query = select(ModelVersionRow).where(ModelVersionRow.model == model, ModelVersionRow.version == version)
        row = session.scalar(query)
        if row is None:
            raise Problem(404, f"model {model!r} has no version {version!r}")
        told = _version(row)
    return told.model_copy(update={"fault": _fault(settings.runs_dir / told.run, told)})


def _state_of(run: RunFolder, asked: str | None) -> tuple[str, Result]:
    """The phase and its result; Problem where it made no model state, or its files are damaged."""
    from posttrain.phases.export_command import best_state, results_of  # it imports torch

    name = asked
    if name is None:
        recipe = recipe_file.load(run.recipe)
        best = best_state(recipe, results_of(run, recipe))
        if best is None:
            raise Problem(409, f"run {run.path.name!r} has made no model yet")
        name = best[0]
    result, fault = read_result(run.phase(name))
    if result is None or result["state"] is None:
        raise Problem(409, f"phase {name!r} of run {run.path.name!r} has no model state: {fault or 'it made none'}")
    damage = damaged_output(run.phase(name), result)
    if damage is not None:
        raise Problem(409, f"phase {name!r} of run {run.path.name!r}: its output {damage.fault}")
    return name, result


def _fault(path: Any, told: Version) -> str | None:
    folder = RunFolder(path).phase(told.phase)
    result, fault = read_result(folder)
    if result is None:
        return fault or f"run {told.run} has no result of phase {told.phase}"
    if result["state"] != told.state:
        return "the phase was done again since, with another result"
    damage = damaged_output(folder, result)
    return None if damage is None else f"its output {damage.fault}"


def _labelled(store: Store, row: dict[str, Any], label: str | None) -> ModelVersionRow:
    for further in range(1, TRIES):
        try:
            with store.write() as session:
                count = select(func.count()).select_from(ModelVersionRow).where(ModelVersionRow.model == row["model"])
                entry = ModelVersionRow(**row, version=label or f"v{(session.scalar(count) or 0) + further}")
                session.add(entry)
                session.flush()
                session.expunge_all()
                return entry
        except IntegrityError:
            if label is not None:
                raise Problem(409, f"model {row['model']!r} has a version {label!r} already; choose another") from None
    raise Problem(409, f"model {row['model']!r}: no number was free; give a version")


def _found(session: Session, name: str) -> ModelRow:
    row = session.get(ModelRow, name)
    if row is None:
        raise Problem(404, f"there is no model {name!r}; POST /api/models makes one")
    return row


def _model(row: ModelRow, versions: list[ModelVersionRow]) -> Model:
    created = datetime.fromtimestamp(row.created_at, UTC)
    return Model(name=row.name, description=row.description, created_at=created, versions=list(map(_version, versions)))


def _version(row: ModelVersionRow) -> Version:
    fields = ("model", "version", "run", "phase", "sha256", "state", "bytes", "metrics", "description")
    created = datetime.fromtimestamp(row.created_at, UTC)
    return Version(**{name: getattr(row, name) for name in fields}, created_at=created)
