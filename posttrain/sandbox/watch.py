"""What the kernel's limits do not sum up: memory, disk and processes of all that a command started, and the clock."""

import contextlib
import os
import resource
import signal
import time
from dataclasses import dataclass

from posttrain.sandbox import confine

FIRST_PAUSE_MS, LONGEST_PAUSE_MS = 5, 25
DISK_EVERY_S = 0.1
KILL_ROUNDS = 2000


@dataclass(frozen=True)
class Totals:
    wall_s: float
    memory_bytes: int
    room_bytes: int
    """Of the working folder and the folder for temporary files."""
    room_files: int
    processes: int


class Watcher:
    """`alone`: the caller is the first process of a process namespace, so every other process is the command's."""

    def __init__(self, cell: confine.Cell, base: str, totals: Totals, alone: bool) -> None:
        self.cell, self.base, self.totals, self.alone = cell, base, totals, alone
        self.peak_bytes = 0
        self._pause_ms = FIRST_PAUSE_MS
        self._next_disk_s = DISK_EVERY_S
        self._before = resource.getrusage(resource.RUSAGE_CHILDREN)

    def pause_ms(self) -> int:
        pause, self._pause_ms = self._pause_ms, min(LONGEST_PAUSE_MS, self._pause_ms * 2)
        return pause

    def over(self, elapsed_s: float) -> str | None:
        """The total that is exceeded, in words."""
        totals = self.totals
        if elapsed_s > totals.wall_s:
            return f"wall time of {totals.wall_s:g} s"
        members = self.members()
        if len(members) > totals.processes:
            return f"{totals.processes} processes"
        used = sum(_memory(pid) for pid in members)
        if used > totals.memory_bytes:
            # Pages that a fork shares were counted once per process; the exact count is slow.
            used = sum(_proportional(pid) for pid in members)
        self.peak_bytes = max(self.peak_bytes, used)
        if used > totals.memory_bytes:
            return f"memory of {totals.memory_bytes >> 20} MiB"
        if elapsed_s >= self._next_disk_s:
            started = time.monotonic()
            limit = self._disk(members)
            self._next_disk_s = elapsed_s + max(DISK_EVERY_S, 10 * (time.monotonic() - started))
            return limit
        return None

    def _disk(self, members: list[int]) -> str | None:
        """Files that were deleted and are still open count too, files in memory among them."""
        totals = self.totals
        unlinked = {key: size for pid in members for key, size in _unlinked(pid)}
        in_memory = sum(unlinked.values())
        if in_memory > totals.memory_bytes:
            return f"memory of {totals.memory_bytes >> 20} MiB"
        if self.alone:
            return None  # the file system itself has the limits
        used, count = in_memory, 0
        folders = [self.base]
        while folders:
            try:
                with os.scandir(folders.pop()) as entries:
                    for entry in entries:
                        count += 1
                        used += entry.stat(follow_symlinks=False).st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
            except OSError:
                continue
            if count > totals.room_files:
                return f"{totals.room_files} files"
            if used > totals.room_bytes:
                return f"disk of {totals.room_bytes >> 20} MiB"
        return None

    def members(self) -> list[int]:
        if self.alone:
            return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
        return _below(os.getpid())

    def kill_all(self) -> None:
        """Stop all, so that none can start another meanwhile, then end all, until there is none left."""
        if self.alone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
            return
        for _ in range(KILL_ROUNDS):
            members = _below(os.getpid())
            living = [pid for pid in members if _state(pid) not in ("Z", "X", "")]
            if not living:
                return
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in living:
                    try:
                        os.kill(pid, number)
                    except ProcessLookupError:
                        continue
            time.sleep(0.001)

    def reap(self, child: int) -> tuple[int, float]:
        """Wait for everything: the command's status, and the seconds of CPU all of it took."""
        status = 0
        while True:
            try:
                pid, found = os.wait()
            except ChildProcessError:
                break
            if pid == child:
                status = found
            elif not self.alone:
                self.kill_all()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return status, after.ru_utime + after.ru_stime - self._before.ru_utime - self._before.ru_stime


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _state(pid: int) -> str:
    return _read(f"/proc/{pid}/stat").rpartition(") ")[2][:1]


def _below(ancestor: int) -> list[int]:
    """Every living descendant. As the ancestor adopts orphans, nothing a command starts leaves this tree."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = _read(f"/proc/{name}/stat").rpartition(") ")[2].split()
            if len(fields) > 1:
                children.setdefault(int(fields[1]), []).append(int(name))
    found, todo = [], [ancestor]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _memory(pid: int) -> int:
    """Bytes of memory of its own or shared, without mapped files."""
    total = 0
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            total += int(line.split()[1]) * 1024
    return total


def _proportional(pid: int) -> int:
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return _memory(pid)


def _unlinked(pid: int) -> list[tuple[tuple[int, int], int]]:
    found = []
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return []
    for name in names:
        try:
            facts = os.stat(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
        if facts.st_nlink == 0 and facts.st_blocks:
            found.append(((facts.st_dev, facts.st_ino), facts.st_blocks * 512))
    return found
