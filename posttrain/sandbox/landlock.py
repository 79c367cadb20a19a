"""Landlock: the kernel's own list of paths a process may open, for processes that may not mount."""

import os
import struct

from posttrain.sandbox import kernel

CREATE, ADD_RULE, RESTRICT_SELF = 444, 445, 446
SCOPED_SINCE = 6
"""The version that also confines signals and abstract sockets to the sandbox."""
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_ALL_V1 = (1 << 13) - 1
_NET = 3
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
READ = EXECUTE | READ_FILE | READ_DIR
DEVICE = READ_FILE | WRITE_FILE


def version() -> int:
    """0 where the kernel has none."""
    try:
        return kernel.syscall("landlock", CREATE, None, 0, 1)
    except OSError:
        return 0


def handled(abi: int) -> int:
    rights = _ALL_V1
    for since, right in ((2, REFER), (3, TRUNCATE), (5, IOCTL_DEV)):
        rights |= right if abi >= since else 0
    return rights


def restrict(readable: list[str], writable: list[str], devices: list[str]) -> None:
    """Leave this process and all it starts these paths, no TCP, and no signal to anyone outside. For good."""
    abi = version()
    rights = handled(abi)
    fields = [rights, _NET if abi >= 4 else 0, 3 if abi >= SCOPED_SINCE else 0]
    attributes = struct.pack("=3Q", *fields)[: 8 if abi < 4 else 16 if abi < SCOPED_SINCE else 24]
    ruleset = kernel.syscall("landlock_create_ruleset", CREATE, attributes, len(attributes), 0)
    everything_written = rights & ~IOCTL_DEV
    for paths, allowed in ((readable, READ), (devices, DEVICE), (writable, everything_written)):
        for path in paths:
            _allow(ruleset, path, allowed & rights)
    kernel.syscall("landlock_restrict_self", RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):
            rights &= _FILE_RIGHTS
        rule = struct.pack("=Qi", rights, opened)
        kernel.syscall("landlock_add_rule", ADD_RULE, ruleset, 1, rule, 0)
    finally:
        os.close(opened)
