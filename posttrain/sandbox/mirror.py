"""Makes a folder readable for the sandbox's own user where it lies under a private home folder.

Only the dropped-user level needs it: with namespaces a bind mount shows any folder. The mirror is a tree of hard links
(copies across file systems) in the temporary folder, owned by us, made once per content and kept.
"""

import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from posttrain.errors import MachineError
from posttrain.sandbox.confine import DROPPED_USER

COPIED_AT_MOST_BYTES = 2**29
LEFT_OUT = ("site-packages", "dist-packages", "test", "idlelib", "ensurepip")
"""Folders below the root that no program is started with; packages are a root of their own where they are wanted."""


def readable(root: str, level: str) -> str:
    """`root`, or the mirror of it that others can read."""
    root = os.path.realpath(root)
    if level != DROPPED_USER or _open_to_all(root):
        return root
    facts = os.stat(root)
    key = hashlib.sha256(f"{root} {facts.st_dev} {facts.st_ino} {facts.st_mtime_ns}".encode()).hexdigest()[:16]
    place = Path(tempfile.gettempdir()) / f"posttrain-mirror-{os.getuid()}-{key}"
    if not place.exists():
        _make(Path(root), place)
    found = place.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise MachineError(f"{place} is not a folder of ours that only we can write; remove it and try again")
    return str(place)


def _open_to_all(root: str) -> bool:
    above = [Path(root), *Path(root).parents]
    return all(folder.stat().st_mode & 0o001 for folder in above if folder.is_dir()) and bool(
        os.stat(root).st_mode & 0o004
    )


def _make(root: Path, place: Path) -> None:
    half = Path(tempfile.mkdtemp(prefix=".posttrain-mirror-", dir=place.parent))
    copied = 0

    def link(source: str, target: str) -> str:
        nonlocal copied
        if not os.stat(source, follow_symlinks=False).st_mode & 0o004:
            return target  # private in itself: not for others to read
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            copied += os.stat(source).st_size
            if copied > COPIED_AT_MOST_BYTES:
                raise MachineError(
                    f"{root} is closed to the sandbox's user and too large to copy; install it outside a home folder"
                ) from None
            shutil.copy2(source, target, follow_symlinks=False)
        return target

    try:
        ignore = shutil.ignore_patterns(*LEFT_OUT)
        shutil.copytree(root, half, symlinks=True, ignore=ignore, copy_function=link, dirs_exist_ok=True)
        for folder, _, _ in os.walk(half):
            os.chmod(folder, 0o755)
        os.rename(half, place)
    except (OSError, shutil.Error) as error:
        if not place.exists():
            raise MachineError(f"{root} is closed to the sandbox's user and cannot be mirrored: {error}") from error
    finally:
        shutil.rmtree(half, ignore_errors=True)
