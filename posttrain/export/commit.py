"""Folders that appear whole or not at all, with a note of what they were made from."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.run import faults
from posttrain.run.folder import digest_folder, digest_json, files_below, fsync_folder, write_json_atomic


def _note(target: Path) -> Path:
    return target.with_name(f"{target.name}.made.json")


def is_committed(target: Path, made_from: dict[str, Any]) -> bool:
    """Whether `target` was made from exactly this and still has the bytes it was committed with."""
    try:
        note = json.loads(_note(target).read_text())
    except (OSError, ValueError):
        return False
    if note.get("made_from") != digest_json(made_from) or not target.is_dir():
        return False
    return note.get("digest") == digest_folder(target)


@contextmanager
def committing(target: Path, made_from: dict[str, Any], point: str) -> Iterator[Path]:
    """An empty folder that becomes `target` when the block ends well; `point` is reached just before the rename.

    A kill leaves either the old state or the new one. What a killed attempt left half-written is removed first: one
    process at a time writes to a run.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync(partial)
        faults.reach(point)
        _note(target).unlink(missing_ok=True)
        if target.exists():
            shutil.rmtree(target)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync_folder(target.parent)
    write_json_atomic(_note(target), {"made_from": digest_json(made_from), "digest": digest_folder(target)})


def _sync(folder: Path) -> None:
    for file in files_below(folder):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for inner in sorted(entry for entry in folder.rglob("*") if entry.is_dir()):
        fsync_folder(inner)
    fsync_folder(folder)
