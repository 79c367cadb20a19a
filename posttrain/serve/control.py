"""Runs as the endpoints and the dashboard see and steer them, through what the commands do."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from posttrain.launch import here
from posttrain.pipeline.history import read_history
from posttrain.pipeline.watch import read_heartbeat, since_boot
from posttrain.recipe.flags import Flag, FlagValue
from posttrain.recipe.load import FoundRecipe, find, shipped_names
from posttrain.recipe.spelling import did_you_mean
from posttrain.recipe.types import Execution
from posttrain.report.read import mapping
from posttrain.run import manifest, recipe_file
from posttrain.run.existing import run_named, run_names
from posttrain.run.folder import NAME, RunFolder
from posttrain.run.journal import Journal
from posttrain.run.lock import holder
from posttrain.serve.problems import Problem
from posttrain.serve.settings import Settings

State = Literal["running", "finished", "stopped", "failed", "gate_failed", "not begun"]


class RunState(BaseModel):
    name: str
    state: State
    completed: tuple[str, ...]
    """Phases, in the order of their completion."""
    created: float | None
    """Unix seconds."""
    doing: str | None
    """What the process that works on it did last, and is doing."""
    idle_s: float | None
    """Since it last got on."""


def run_of(settings: Settings, name: str) -> RunFolder:
    """The run; Problem 404 where there is none."""
    _require_name(name)
    if not (settings.runs_dir / name / "recipe.json").is_file():
        near = did_you_mean(name, run_names(settings.runs_dir))
        raise Problem(404, f"there is no run {name!r}{near}")
    return run_named(name, settings.runs_dir)


def _require_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise Problem(422, f"run name {name!r} is not allowed: lower-case letters, digits, '.', '_', '-', at most 64")


def newest_names(settings: Settings) -> list[str]:
    """By when their folder was begun."""

    def begun(name: str) -> float:
        try:
            return (settings.runs_dir / name / "recipe.json").stat().st_mtime
        except OSError:
            return 0.0

    return sorted(run_names(settings.runs_dir), key=begun, reverse=True)


def state_of(run: RunFolder) -> RunState:
    journal = Journal(run.events)
    history, stored = read_history(journal), manifest.read(run)
    held = holder(run) is not None
    beat = read_heartbeat(run) if held else None
    done = [event.get("phase") for event in journal.read() if event.get("event") == "phase_completed"]
    return RunState(
        name=run.path.name,
        state="running" if held else "finished" if history.finished else _ended(stored),
        completed=tuple(phase for phase in dict.fromkeys(done) if phase in history.completed),
        created=_unix_seconds(stored.get("created_at")),
        doing=beat.doing if beat else None,
        idle_s=since_boot() - beat.moved if beat else None,
    )


def _unix_seconds(moment: object) -> float | None:
    try:
        return datetime.fromisoformat(str(moment)).timestamp()
    except ValueError:
        return None


def _ended(stored: Mapping[str, Any]) -> State:
    """How the last attempt ended; one that was killed left no note."""
    if not stored.get("attempts"):
        return "not begun"
    outcome = mapping(stored["attempts"][-1]).get("outcome")
    return outcome if outcome in ("stopped", "gate_failed") else "failed"


def start(
    settings: Settings,
    recipe: str,
    flags: Mapping[str, FlagValue],
    name: str | None = None,
    execution: Mapping[str, str | int | None] | None = None,
) -> RunFolder:
    """What `posttrain start RECIPE` does with these flags; files of recipes are not taken from a request."""
    if recipe not in shipped_names():
        raise Problem(404, f"there is no recipe {recipe!r}{did_you_mean(recipe, shipped_names())}")
    if name is not None:
        _require_name(name)
    found = find(recipe)
    checked = _checked(settings, found, flags)
    run = RunFolder.named(settings.runs_dir, name if name is not None else found.default_run_name(checked))
    built = found.build(checked)
    given = {flag.name: checked[flag.name] for flag in found.flags if flag.name in flags}
    words = ["run", recipe, *_words(given), *_execution_words(execution or {})]
    words += [f"--name={run.path.name}", f"--runs-dir={settings.runs_dir}"]
    here.start(run, built, words, settings.session)
    return run


def resume(settings: Settings, name: str, redo_from: str | None = None, accept: tuple[str, ...] = ()) -> RunFolder:
    """What `posttrain start RUN` does."""
    run = run_of(settings, name)
    words = ["resume", name, f"--runs-dir={settings.runs_dir}"]
    words += [f"--from={redo_from}"] * (redo_from is not None) + [f"--accept={one}" for one in accept]
    here.start(run, recipe_file.load(run.recipe), words, settings.session)
    return run


def stop(settings: Settings, name: str, now: bool = False) -> bool:
    """What `posttrain stop RUN` does, without waiting; False where no process works on it."""
    return here.ask_to_stop(run_of(settings, name), now) is not None


def _checked(settings: Settings, found: FoundRecipe, given: Mapping[str, FlagValue]) -> dict[str, FlagValue]:
    """All flags of the recipe, those given in place of their defaults; Problem 422 for what cannot be one."""
    flags = {flag.name: flag for flag in found.flags}
    for name, value in given.items():
        if name not in flags:
            raise Problem(422, f"recipe {found.name!r} has no flag {name!r}{did_you_mean(name, flags)}")
        if fault := _fault(settings, flags[name], value):
            raise Problem(422, f"flag {name}={value!r}: {fault}")
    return {name: given.get(name, flag.default) for name, flag in flags.items()}


def _fault(settings: Settings, flag: Flag, value: FlagValue) -> str | None:
    if value is None:
        return None if flag.default is None else "must not be null"
    if flag.choices:
        return None if value in flag.choices else f"is none of {', '.join(map(str, flag.choices))}"
    right = type(value) in ((int, float) if flag.type is float else (flag.type,))
    if not right:
        return f"is {type(value).__name__}, not {flag.type.__name__}"
    if isinstance(value, str) and (fault := _foreign_path(settings, value)):
        return fault
    return None


def _foreign_path(settings: Settings, text: str) -> str | None:
    """What is wrong with a flag that names a place on this disk outside of the runs and what may be ingested."""
    if "\0" in text:
        return "holds a null character"
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    looks_like_one = text.startswith(("/", "~", ".")) or ".." in path.parts
    try:
        if not looks_like_one and not path.exists():
            return None
        inside = any(path.resolve().is_relative_to(root.resolve()) for root in (settings.runs_dir, settings.ingest))
    except (OSError, RuntimeError) as error:
        return f"is no path: {error}"
    return None if inside else f"lies outside of {settings.runs_dir} and {settings.ingest}"


REFUSED_EXECUTION = ("sandbox", "sampler_url")
"""What decides where a model's code runs, and whom this machine calls, is said on the machine."""


def _execution_words(given: Mapping[str, str | int | None]) -> list[str]:
    for name in given:
        if name in REFUSED_EXECUTION:
            raise Problem(422, f"execution {name!r} is not taken from a request; give it to `posttrain start`")
        if name not in Execution.model_fields:
            raise Problem(422, f"there is no execution option {name!r}{did_you_mean(name, Execution.model_fields)}")
    try:
        Execution.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        raise Problem(422, f"execution {first['loc'][0]}={first['input']!r}: {first['msg']}") from error
    return _words({name: value for name, value in given.items() if value is not None})


def _words(given: Mapping[str, FlagValue]) -> list[str]:
    """As they are typed; null is what a flag without a value stands for."""
    words = []
    for name, value in given.items():
        spelled = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{spelled}" if value else f"--no-{spelled}")
        elif value is not None:
            words.append(f"--{spelled}={value}")
    return words
