"""Folders that appear whole or not at all, with a note of what they were made from."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import InputError, Stopped
from posttrain.run import faults
from posttrain.run.folder import digest_folder, digest_json, files_below, fsync_folder, write_json_atomic


def _note(target: Path) -> Path:
    return target.with_name(f"{target.name}.made.json")


def _read_note(target: Path) -> dict[str, Any]:
    try:
        note = json.loads(_note(target).read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def is_committed(target: Path, made_from: dict[str, Any]) -> bool:
    """Whether `target` was made from exactly this and still has the bytes it was committed with."""
    note = _read_note(target)
    if note.get("made_from") != digest_json(made_from) or not target.is_dir():
        return False
    return note.get("digest") == digest_folder(target)


def refuse_foreign(target: Path) -> None:
    """Raise InputError where `target` holds something that no commit of ours put there."""
    if target.exists() and not _read_note(target):
        raise InputError(
            f"{target} exists and was not written by an export: it is left alone. Move it away, or choose another "
            f"folder with --output"
        )


@contextmanager
def committing(target: Path, made_from: dict[str, Any], point: str) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends well; `point` is reached just before that.

    A kill leaves either the old state or the new one, and beside it what was begun: the next block that is to make the
    same from the same finds its files again, any other finds the folder empty. A failure, a full disk among them,
    leaves nothing of it. One process at a time writes to a run.
    """
    refuse_foreign(target)
    partial = target.with_name(f".{target.name}.partial")
    if _read_note(partial).get("made_from") != digest_json(made_from):
        _remove(partial)
        partial.mkdir(parents=True)
        write_json_atomic(_note(partial), {"made_from": digest_json(made_from)})
    partial.mkdir(exist_ok=True)
    try:
        yield partial
        _sync(partial)
        note = {"made_from": digest_json(made_from), "digest": digest_folder(partial)}
        faults.reach(point)
        # The note first: with it and without the folder nothing is claimed, the other way round it would be foreign.
        write_json_atomic(_note(target), note)
        faults.reach("export.note_written")
        _note(partial).unlink()
        if target.exists():
            shutil.rmtree(target)
        os.rename(partial, target)
        fsync_folder(target.parent)
        faults.reach("export.renamed")
    except Stopped:
        raise
    except Exception:
        _remove(partial)
        raise


def _remove(partial: Path) -> None:
    _note(partial).unlink(missing_ok=True)
    shutil.rmtree(partial, ignore_errors=True)


def _sync(folder: Path) -> None:
    for file in files_below(folder):
        if file.name.endswith(".part"):  # half a file of a killed attempt
            file.unlink()
            continue
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for inner in sorted(entry for entry in folder.rglob("*") if entry.is_dir()):
        fsync_folder(inner)
    fsync_folder(folder)
