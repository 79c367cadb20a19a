"""`run.json`: what a run is made of and with what each attempt at it was carried out."""

import json
import platform
import subprocess
import time
import uuid
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from posttrain.recipe.inputs import keys_trained_on
from posttrain.recipe.types import Execution, Recipe
from posttrain.run import recipe_file
from posttrain.run.folder import RunFolder, write_json_atomic
from posttrain.run.redaction import redact_json, without_secrets

RECORDED_PACKAGES = (
    "posttrain", "torch", "transformers", "tokenizers", "safetensors", "datasets", "huggingface_hub", "gguf", "numpy",
    "pydantic", "click", "rich", "peft",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Installed versions of what a run may use, read from metadata: nothing is imported."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_state() -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout this package runs from; None when it is installed without one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, env=without_secrets())
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def read(run: RunFolder) -> dict[str, Any]:
    """The manifest; empty when there is none or it cannot be read (it is never needed to continue)."""
    try:
        found = json.loads(run.manifest.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def begin_attempt(run: RunFolder, recipe: Recipe, source: str, execution: Execution, hardware: dict[str, Any]) -> int:
    """Record a new attempt and return its number, counted from 1."""
    manifest = read(run) or {
        "run_id": uuid.uuid4().hex,
        "name": run.path.name,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source,
        "recipe": recipe.name,
        "recipe_digest": recipe_file.digest(recipe),
        "training_config": recipe.flags,
        "dataset_key": " ".join(keys_trained_on(recipe)) or None,
        "seed": recipe.seed,
        "model_digest": None,
        "datasets": {},
        "attempts": [],
    }
    versions = package_versions()
    hardware = hardware | {"python": platform.python_version()}
    git = git_state()
    manifest |= {"git": git, "git_sha": git and git["commit"], "packages": versions, "hardware": hardware}
    manifest |= {"artifacts_path": str(run.path.absolute())}
    attempts = manifest.setdefault("attempts", [])
    number = 1 + max((attempt.get("number", 0) for attempt in attempts), default=0)
    attempt: dict[str, Any] = {"number": number, "started": time.time(), "finished": None, "outcome": None}
    attempt |= {"execution": execution.model_dump(mode="json"), "git": git, "packages": versions}
    attempt |= {"hardware": hardware}
    attempts.append(attempt)
    write_json_atomic(run.manifest, redact_json(manifest))
    return number


def record(run: RunFolder, **fields: Any) -> None:
    """Set top-level fields."""
    write_json_atomic(run.manifest, redact_json(read(run) | fields))


def end_attempt(run: RunFolder, number: int, outcome: str) -> None:
    manifest = read(run)
    for attempt in manifest.get("attempts", ()):
        if attempt.get("number") == number:
            attempt |= {"finished": time.time(), "outcome": outcome}
    write_json_atomic(run.manifest, redact_json(manifest))
