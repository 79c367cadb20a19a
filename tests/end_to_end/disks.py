"""Disks of a few megabytes, which can be full or read-only."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MS_RDONLY, MS_REMOUNT = 1, 32


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of two megabytes at `folder`; the test is skipped where nothing may be mounted."""
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=2m"):
        pytest.skip("the right to mount is missing (CAP_SYS_ADMIN): a small disk cannot be made")
    try:
        yield folder
    finally:
        libc.umount2(os.fsencode(folder), 2)


def make_read_only(folder: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", MS_REMOUNT | MS_RDONLY, b"size=2m") == 0
