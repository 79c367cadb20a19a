"""Named, versioned datasets on disk: `<registry>/<name>/<version>/` with rows and manifest, never written twice."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.recipe.spelling import did_you_mean
from posttrain.run.folder import digest_file, digest_json, fsync_folder, write_json_atomic

FOLDER = "POSTTRAIN_REGISTRY"
"""Names the registry's folder; else it is `posttrain/datasets` in the user's data folder."""
PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Stored:
    """One version of a dataset, as it lies on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.manifest['name']}@{self.manifest['version']}"

    @property
    def content(self) -> str:
        return str(self.manifest["content"])

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    def read(self) -> Iterator[dict[str, Any]]:
        """Its rows as they are stored."""
        with open(self.rows, encoding="utf-8", newline="\n") as file:
            for line in file:
                yield json.loads(line)

    def faults(self) -> list[str]:
        """What is not as the manifest says; empty when all is."""
        wanted = self.manifest.get("files", {})
        found = []
        for name, digest in wanted.items():
            path = self.folder / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif digest_file(path) != digest:
                found.append(f"{name} has changed since it was built")
        if content_digest(self.content, wanted) != self.digest:
            found.append("manifest.json does not have the digest of its own files")
        return found


def content_digest(content: str, files: dict[str, str]) -> str:
    """A dataset's digest: of its content and its rows' bytes, and of nothing that depends on where it was built."""
    return digest_json({"schema_version": SCHEMA_VERSION, "content": content, "rows": files.get("rows.jsonl")})


def split_key(key: str) -> tuple[str, str]:
    """`name@version` as its parts; DataError where it is no such key."""
    name, at, version = key.partition("@")
    if not at or not PART.fullmatch(name) or not PART.fullmatch(version):
        raise DataError(
            f"{key!r} is no dataset's name: write NAME@VERSION, each of lower-case letters, digits, '.', '_' and '-', "
            "at most 64, starting with a letter or digit"
        )
    return name, version


@dataclass(frozen=True)
class Registry:
    folder: Path

    @classmethod
    def default(cls) -> "Registry":
        if given := os.environ.get(FOLDER):
            return cls(Path(given))
        home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        return cls(Path(home) / "posttrain" / "datasets")

    def all_keys(self) -> list[str]:
        return sorted(f"{path.parent.parent.name}@{path.parent.name}" for path in self.folder.glob("*/*/manifest.json"))

    def place(self, key: str) -> Path:
        name, version = split_key(key)
        return self.folder / name / version

    def find(self, key: str) -> Stored:
        """The dataset; DataError with the nearest names when there is none, or when its manifest cannot be read."""
        folder = self.place(key)
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except OSError:
            keys = self.all_keys()
            raise DataError(
                f"there is no dataset {key!r} in {self.folder}{did_you_mean(key, keys)}; "
                f"there are {', '.join(keys[:12]) or 'none'}; `posttrain data build` makes one"
            ) from None
        except ValueError as error:
            raise DataError(f"{folder / 'manifest.json'} is not JSON: {error}") from error
        if not isinstance(manifest, dict) or not {"name", "version", "content", "digest"} <= manifest.keys():
            raise DataError(f"{folder / 'manifest.json'} is no dataset's manifest")
        return Stored(folder, manifest)

    def commit(self, key: str, temporary: Path, manifest: dict[str, Any]) -> tuple[Stored, bool]:
        """Move what was built in `temporary` to its place, unless the same is there; and whether it was new.

        A version that exists with other rows is refused: two that build at once cannot both win.
        """
        name, version = split_key(key)
        files = {path.name: digest_file(path) for path in sorted(temporary.iterdir())}
        digest = content_digest(manifest["content"], files)
        head = {"name": name, "version": version, "schema_version": SCHEMA_VERSION, "digest": digest, "files": files}
        write_json_atomic(temporary / "manifest.json", head | manifest)
        place = self.place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.rename(place)
        except OSError:
            if not place.is_dir():
                raise
            shutil.rmtree(temporary)
            there = self.find(key)
            if there.digest != digest:
                raise DataError(
                    f"{key} exists with other rows ({there.digest[:12]}, now {digest[:12]}) and is never overwritten; "
                    "give the new rows a new version"
                ) from None
            return there, False
        fsync_folder(place.parent)
        return self.find(key), True
