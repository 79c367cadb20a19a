"""Paths inside a run folder, atomic files and digests: the one place that knows the layout."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import RunFolderError

ASSETS = Path(__file__).parent.parent / "assets"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
DEFAULT_RUNS_DIR = Path("runs")
EVALUATIONS, BASELINES = "_evaluations", "_baselines"
"""Beside the runs, under names that no run can have: evaluations of model folders, and named baselines."""


@dataclass(frozen=True)
class PhaseFolder:
    path: Path

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def answers(self) -> Path:
        return self.path / "answers.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    def export(self, format_name: str) -> Path:
        return self.path / "exports" / format_name


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @classmethod
    def named(cls, runs_dir: Path, name: str) -> "RunFolder":
        """The folder of run `name`; a name that is no plain name is refused."""
        if not NAME.fullmatch(name):
            raise RunFolderError(
                f"run name {name!r} is not allowed: use lower-case letters, digits, '.', '_' and '-', "
                f"at most 64, starting with a letter or digit. Choose one with --name"
            )
        return cls(runs_dir / name)

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.json"

    @property
    def manifest(self) -> Path:
        return self.path / "run.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def evaluations(self) -> Path:
        """What `posttrain eval` made of this run's states."""
        return self.path / "evaluations"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def model_folder(self, place: str) -> Path:
        """Where a model state's base or adapter lies: `shipped:<name>`, an absolute path, or relative to the run."""
        if place.startswith("shipped:"):
            return ASSETS / f"{place.removeprefix('shipped:')}_base"
        return self.path / place

    def phase(self, name: str) -> PhaseFolder:
        return PhaseFolder(self.path / "phases" / name)

    @property
    def session(self) -> Path:
        """The detached session it was started in."""
        return self.path / "session.json"

    @property
    def heartbeat(self) -> Path:
        """The last sign of life of the process that works on it."""
        return self.path / "heartbeat.json"

    @property
    def words(self) -> str:
        """What to type after `posttrain resume`, `status` or `chat` for it to find this run from the current folder."""
        runs_dir = self.path.absolute().parent
        if runs_dir == DEFAULT_RUNS_DIR.absolute():
            return self.path.name
        return f"{self.path.name} --runs-dir {shlex.quote(str(shortest(runs_dir)))}"


def shortest(path: Path) -> Path:
    """Relative to the current folder where that is shorter."""
    relative = Path(os.path.relpath(path))
    return relative if len(str(relative)) < len(str(path)) else path


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside `path`, fsync, rename over it, fsync the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_lines_atomic(path: Path, lines: Iterable[str]) -> int:
    """As `write_atomic`, a line at a time; how many there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    count = 0
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for line in lines:
                file.write(line + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
    return count


def write_json_atomic(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def digest_json(value: Any) -> str:
    """SHA-256 of the value's canonical JSON (sorted keys, no spaces)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def digest_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(path: Path) -> Iterator[Path]:
    """Every file below a folder in sorted order, or the file itself."""
    if path.is_file():
        yield path
    else:
        yield from sorted(entry for entry in path.rglob("*") if entry.is_file())


def digest_folder(path: Path) -> str:
    """SHA-256 over the sorted (relative name, content digest) pairs of a folder, or of one file."""
    if path.is_file():
        return digest_file(path)
    return digest_json([[str(file.relative_to(path)), digest_file(file)] for file in files_below(path)])
