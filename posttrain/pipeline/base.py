"""The model state that a recipe begins with."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from posttrain.data.hub import MIRROR
from posttrain.errors import ModelError
from posttrain.phases.context import ModelState
from posttrain.recipe.types import FolderBase, FreshBase, HubBase, Recipe
from posttrain.run.folder import (
    RunFolder,
    digest_file,
    digest_json,
    files_below,
    fsync_folder,
    write_json_atomic,
)

FRESH = "base"
"""Where a fresh base's configuration and vocabulary lie, relative to the run folder."""
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")
CACHE = "base.json"
"""Where the base was found, and the digests of its files."""


def resolve_base(recipe: Recipe, run: RunFolder) -> ModelState:
    """The recipe's base with its digest; a fresh one is made in the run folder, once."""
    if isinstance(recipe.base, FreshBase):
        asked = place = FRESH
        if not (run.path / FRESH).exists():
            _make_fresh(recipe, run)
    elif isinstance(recipe.base, HubBase):
        asked = f"{recipe.base.repo}@{recipe.base.revision or 'newest'}"
        place = _placed_before(run, asked) or str(hub_folder(recipe.base))
        _require_model(asked, run.model_folder(place))
    else:
        asked, place = recipe.base.path, existing_place(recipe.base, run)
        _require_model(recipe.base.path, run.model_folder(place))
    digest = _digest(run, asked, place)
    return ModelState(base=place, base_digest=digest, adapter=None, adapter_digest=None, phase="base")


def existing_place(base: FolderBase, run: RunFolder) -> str:
    """The base's folder as model states name it: found once, then the same wherever the run is resumed from."""
    if base.path.startswith("shipped:"):
        return base.path
    return _placed_before(run, base.path) or os.path.abspath(os.path.expanduser(base.path))


def _placed_before(run: RunFolder, asked: str) -> str | None:
    stored = _stored(run.path / CACHE)
    return str(stored["place"]) if stored.get("asked") == asked else None


def on_this_machine(base: HubBase) -> Path | None:
    """The copy below `POSTTRAIN_HUB_DIR` or the snapshot in the hub's cache, if there is one; asks no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if MIRROR in os.environ and (copy := Path(os.environ[MIRROR], *base.repo.split("/"))).is_dir():
        return copy.absolute()
    try:
        return Path(snapshot_download(base.repo, revision=base.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def hub_folder(base: HubBase) -> Path:
    """The copy on this machine, else downloaded."""
    return on_this_machine(base) or _download(base)


def _download(base: HubBase) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(base.repo, revision=base.revision, allow_patterns=list(MODEL_FILES)))
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"base model {base.repo!r}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}; check the "
            f"name, the network and HF_TOKEN, or put a copy at ${MIRROR}/{base.repo}"
        ) from error


def _require_model(asked: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"base model {asked!r}: there is no config.json in {folder}. Give the folder of a Hugging Face model "
            f"(config.json, tokenizer.json, *.safetensors), or shipped:tiny for the one inside the package"
        )


def _make_fresh(recipe: Recipe, run: RunFolder) -> None:
    from posttrain.data.vocabulary import make_fresh_base

    final = run.path / FRESH
    temporary = final.with_name(f".{FRESH}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    make_fresh_base(recipe, temporary)
    for file in files_below(temporary):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    os.rename(temporary, final)
    fsync_folder(final.parent)


def _digest(run: RunFolder, asked: str, place: str) -> str:
    """Digest of the folder's files; those with the size and time recorded earlier are not read again."""
    folder = run.model_folder(place)
    stored = _stored(run.path / CACHE)
    known = {file["path"]: file for file in stored.get("files", []) if stored["place"] == place}
    files = []
    for file in files_below(folder):
        status = file.stat()
        fact: dict[str, Any] = {"path": str(file.relative_to(folder)), "bytes": status.st_size}
        fact["mtime_ns"] = status.st_mtime_ns
        before = known.get(fact["path"], {})
        unchanged = before.items() >= fact.items()
        files.append(fact | {"sha256": before["sha256"] if unchanged else digest_file(file)})
    digest = digest_json([[file["path"], file["sha256"]] for file in files])
    facts = {"asked": asked, "place": place, "digest": digest, "files": files}
    if facts != stored and run.path.exists():
        write_json_atomic(run.path / CACHE, facts)
    return digest


def _stored(cache: Path) -> dict[str, Any]:
    try:
        stored = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    complete = isinstance(stored, dict) and stored.keys() >= {"asked", "place", "digest", "files"}
    return stored if complete else {}
