"""Which level of isolation this machine gives: tried for real, best first, never lowered in silence."""

import os
from dataclasses import dataclass

from posttrain.errors import InputError, MachineError
from posttrain.sandbox.confine import DROPPED_USER, LADDER, NAMESPACES, OFF, UNPRIVILEGED
from posttrain.sandbox.slots import Budget, Pool

AUTO = "auto"
CHOICES = (AUTO, *LADDER, OFF)
COVERS = {
    NAMESPACES: "own users, files, processes, network and memory-backed folder; system call filter, limits",
    DROPPED_USER: "own user, no capabilities, Landlock on files and TCP, system call filter, limits",
    UNPRIVILEGED: "your own user, Landlock on files, TCP and signals, system call filter, limits",
    OFF: "limits only",
}


@dataclass(frozen=True)
class Probe:
    level: str
    works: bool
    reason: str
    """What it covers, or why it cannot be had."""


def probe(level: str) -> Probe:
    """Run a command at this level."""
    try:
        with Pool(level, 1) as pool, pool.session() as session:
            done = session.run(["/bin/sh", "-c", "echo in >&3"], Budget())
    except MachineError as error:
        return Probe(level, False, str(error))
    if done.answers != b"in\n":
        said = done.stderr.decode(errors="replace").strip()
        return Probe(level, False, f"a command in it ended with {done.exit}: {said}")
    return Probe(level, True, COVERS[level])


_wanted = AUTO
_found: dict[tuple[str, int], str] = {}


def use(wanted: str) -> None:
    """From now on in this process: `auto`, a level that must be had, or `off`: a model's code runs as you."""
    global _wanted
    if wanted not in CHOICES:
        raise InputError(f"there is no sandbox level {wanted!r}; levels: {', '.join(CHOICES)}")
    _wanted = wanted


def chosen() -> str:
    """The level in use. MachineError with the ways out where the machine gives none."""
    key = (_wanted, os.getpid())
    if key not in _found:
        _found[key] = _choose()
    return _found[key]


def _choose() -> str:
    if _wanted == OFF:
        return OFF
    tried = []
    for level in LADDER if _wanted == AUTO else (_wanted,):
        result = probe(level)
        if result.works:
            return level
        tried.append(f"{level}: {result.reason}")
    raise MachineError(
        "code that a model wrote is not run here, because no sandbox can be had:\n  "
        + "\n  ".join(tried)
        + "\nWays out: allow user namespaces (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_"
        "userns), run as root in the container, or switch sandboxing off by name with --sandbox off."
    )
