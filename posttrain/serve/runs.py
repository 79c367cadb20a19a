"""Runs over HTTP: list, start, resume, status, stop."""

from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field

from posttrain.run.folder import NAME
from posttrain.serve import control
from posttrain.serve.settings import Serving

router = APIRouter(prefix="/api/runs", tags=["runs"])
RunName = Annotated[str, Path(pattern=f"^{NAME.pattern}$")]
Value = str | int | float | bool | None


class StartRun(BaseModel):
    model_config = ConfigDict(extra="forbid")

    recipe: str
    """A shipped recipe."""
    flags: dict[str, Value] = Field(default_factory=dict)
    """The recipe's own flags, by their names in Python."""
    name: str | None = Field(None, pattern=f"^{NAME.pattern}$")
    """Else the recipe's name and its changed flags."""
    execution: dict[str, str | int | None] = Field(default_factory=dict)


@router.get("")
def list_runs(settings: Serving) -> list[control.RunState]:
    return list(control.all_runs(settings))


@router.post("", status_code=201)
def start_run(settings: Serving, asked: StartRun) -> control.RunState:
    run = control.start(settings, asked.recipe, asked.flags, asked.name, asked.execution)
    return control.state_of(run)


@router.get("/{name}")
def get_run(settings: Serving, name: RunName) -> control.RunState:
    return control.state_of(control.run_of(settings, name))


@router.post("/{name}/cancel", status_code=202)
def cancel_run(settings: Serving, name: RunName) -> dict[str, Any]:
    return {"name": name, "stopping": control.stop(settings, name)}
