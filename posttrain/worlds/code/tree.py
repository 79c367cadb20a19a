"""A source tree as text by path, and patches between two versions of a file."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import DataError
from posttrain.run.folder import ASSETS, digest_json
from posttrain.scoring.toolchains import TOOLCHAINS
from posttrain.worlds.code.syntax import syntax_of

NOT_SOURCE = re.compile(r"\..*|node_modules|target|__pycache__|venv|dist|build|.*\.egg-info")
"""Folders that hold what tools made or fetched."""
MOST_BYTES = 2**18
"""A task carries its tree, so that it can be played anywhere."""
SHIPPED = "shipped:"


@dataclass(frozen=True)
class Tree:
    files: dict[str, str]
    digest: str
    left_out: Counter[str]


def folder_of(repo: str) -> Path:
    """`shipped:LANGUAGE` is the small tree inside the package."""
    if repo.startswith(SHIPPED):
        return ASSETS / "trees" / repo.removeprefix(SHIPPED)
    return Path(repo).expanduser()


def read_tree(repo: str) -> Tree:
    """Every text file below the folder; links and binary files are left out and counted.

    DataError where there is no folder, or more text than a task can carry.
    """
    folder, files, left_out = folder_of(repo), dict[str, str](), Counter[str]()
    if not folder.is_dir():
        raise DataError(f"{repo}: there is no such folder")
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not NOT_SOURCE.fullmatch(name))
        for name in sorted(names):
            path = Path(at, name)
            if path.is_symlink() or not path.is_file():
                left_out["links"] += 1
            elif (text := _text(path)) is None:
                left_out["binary files"] += 1
            else:
                files[path.relative_to(folder).as_posix()] = text
    size = sum(map(len, files.values()))
    if size > MOST_BYTES:
        raise DataError(
            f"{repo}: {size:,} characters of text, at most {MOST_BYTES:,} are allowed, because every task carries its "
            f"tree; name a package inside it"
        )
    if not files:
        raise DataError(f"{repo}: there is no text file in it")
    return Tree(files, digest_json(files), left_out)


def _text(path: Path) -> str | None:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def sources(files: Mapping[str, str], language: str) -> list[str]:
    """Names of the files that a mutant may change: the language's own, without its tests."""
    own, tests = re.compile(syntax_of(language).sources), re.compile(TOOLCHAINS[language].protected)
    return sorted(name for name in files if own.fullmatch(name) and not tests.fullmatch(name))


def patch_between(before: str, after: str) -> dict[str, str]:
    """The arguments `old` and `new` of a patch: whole lines, as few as make `old` the only one of its kind."""
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    last = 0
    while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
        last += 1
    while before.count("".join(old[first : len(old) - last])) != 1 and (first or last):
        if first:
            first -= 1
        if last and before.count("".join(old[first : len(old) - last])) != 1:
            last -= 1
    return {"old": "".join(old[first : len(old) - last]), "new": "".join(new[first : len(new) - last])}
