"""`result.json`: written last and atomically, so that the file itself says that the phase is complete."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import PhaseFault
from posttrain.phases.context import ModelState, PhaseOutcome
from posttrain.run.folder import PhaseFolder, digest_file, digest_json, files_below

Result = dict[str, Any]

FIELDS = frozenset(
    {
        *("phase", "kind", "fingerprint", "inputs", "outputs", "metrics", "counts"),
        *("gates", "state", "notes", "details", "started", "finished", "seconds"),
    }
)


def read_result(folder: PhaseFolder) -> tuple[Result | None, str | None]:
    """The stored result, or None with the reason it cannot be used; (None, None) when there is none."""
    try:
        result = json.loads(folder.result.read_text())
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError) as error:
        return None, f"its result.json cannot be read ({error})"
    if not isinstance(result, dict) or not result.keys() >= FIELDS:
        return None, "its result.json lacks fields"
    return result, None


@dataclass(frozen=True)
class Damage:
    entry: str
    """The entry of the phase's folder that holds the file."""
    fault: str


def damaged_output(folder: PhaseFolder, result: Result) -> Damage | None:
    """The first output that is not what the result says; contents are hashed only where a file was touched."""
    for output in result["outputs"]:
        fault = _fault_of(folder.path / output["path"], output)
        if fault is not None:
            return Damage(Path(output["path"]).parts[0], f"{output['path']} {fault}")
    return None


def _fault_of(path: Path, recorded: dict[str, Any]) -> str | None:
    try:
        status = path.stat()
    except OSError:
        return "is missing"
    if status.st_size != recorded["bytes"]:
        return f"has {status.st_size} bytes instead of {recorded['bytes']}"
    if status.st_mtime_ns != recorded["mtime_ns"] and digest_file(path) != recorded["sha256"]:
        return "was changed"
    return None


def changed_source(result: Result) -> str | None:
    """The first local data file that is not what was read; one that is gone changes nothing that was made of it."""
    for source in result["details"].get("sources", ()):
        if Path(source["path"]).exists() and _fault_of(Path(source["path"]), source) is not None:
            return str(source["path"])
    return None


def list_outputs(folder: PhaseFolder, outputs: Iterable[Path]) -> list[dict[str, Any]]:
    """Every output file with size and digest, in sorted order."""
    listed = {}
    for output in outputs:
        if not output.exists():
            raise PhaseFault(f"phase {folder.path.name!r} names {output} as its output, but there is no such file")
        for file in files_below(output):
            status = file.stat()
            path = str(file.relative_to(folder.path))
            fact = {"path": path, "bytes": status.st_size, "sha256": digest_file(file), "mtime_ns": status.st_mtime_ns}
            listed[path] = fact
    return [listed[path] for path in sorted(listed)]


def identity(result: Result) -> str:
    """Digest of what later phases can see of a result: contents of its outputs and its model state."""
    outputs = [[output["path"], output["sha256"]] for output in result["outputs"]]
    return digest_json({"outputs": outputs, "state": result["state"]})


def state_of(result: Result) -> ModelState | None:
    return None if result["state"] is None else ModelState.model_validate(result["state"])


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: a metric that is not finite is stored as null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def describe(outcome: PhaseOutcome, folder: PhaseFolder) -> Result:
    """The outcome's part of a result."""
    bad = [name for name, value in outcome.metrics.items() if not math.isfinite(value)]
    notes = [*outcome.notes, *(f"metric {name} is not finite" for name in bad)]
    return {
        "outputs": list_outputs(folder, outcome.outputs),
        "metrics": finite(outcome.metrics),
        "counts": outcome.counts,
        "state": None if outcome.state is None else outcome.state.model_dump(mode="json"),
        "notes": notes,
        "details": outcome.details,
    }
