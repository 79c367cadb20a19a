"""What a process does to itself before it runs code that a model wrote, at each level. Standard library only.

`enter_namespaces` and `build_root` are for the first level, `drop` is the last step at every level.
"""

import os
import resource
import signal
from dataclasses import dataclass
from typing import NoReturn

from posttrain.sandbox import kernel, landlock, seccomp

NAMESPACES, DROPPED_USER, UNPRIVILEGED, OFF = "namespaces", "dropped-user", "unprivileged", "off"
LADDER = (NAMESPACES, DROPPED_USER, UNPRIVILEGED)
"""Best first. OFF is no rung: it has to be asked for by name."""

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/nsswitch.conf", "/etc/ssl/openssl.cnf")
MACHINE_FACTS = ("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/vm/overcommit_memory")
"""All of /proc that is open where Landlock is what hides the rest."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
BASE = "/sandbox"
"""Where the working folder lies at the namespaces level."""
ALL_NAMESPACES = (
    kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
)
FIRST_UID = 0x70000000
"""Users made of this and the worker's process number belong to nobody else on a machine."""


@dataclass(frozen=True)
class Limits:
    """Of one process, by the kernel. Totals over processes are the watcher's."""

    cpu_s: int
    address_bytes: int | None
    """None for runtimes that reserve far more addresses than they use (node, go)."""
    file_bytes: int
    open_files: int
    processes: int
    """0: neither processes nor threads."""

    def apply(self) -> None:
        """All but the number of processes, which counts for the user and is set once the user is the right one."""
        for kind, value in (
            (resource.RLIMIT_CPU, self.cpu_s),
            (resource.RLIMIT_AS, self.address_bytes),
            (resource.RLIMIT_FSIZE, self.file_bytes),
            (resource.RLIMIT_NOFILE, self.open_files),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 2**16),
        ):
            if value is None:
                continue
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


def sandbox_uid(level: str) -> int:
    """The user that programs of this worker run as: one of its own where we are root."""
    if os.getuid() != 0 or level == OFF:
        return os.getuid()
    with open("/proc/self/uid_map") as file:
        spans = [[int(word) for word in line.split()] for line in file]
    highest = max(inside + count for inside, _, count in spans)
    if highest > FIRST_UID + 2**23:
        return FIRST_UID + os.getpid()
    if highest < 60_000:
        raise OSError(f"this container has only {highest} users, too few for one per worker")
    return 20_000 + os.getpid() % 40_000


def enter_namespaces() -> None:
    """New mount, process, network, IPC and host-name namespaces, as root, or inside a user namespace of our own.

    The process namespace begins with the next child.
    """
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        kernel.unshare(ALL_NAMESPACES)
        return
    kernel.unshare(kernel.CLONE_NEWUSER | ALL_NAMESPACES)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def build_root(stage: str, roots: list[str], uid: int, room_bytes: int, room_files: int, proc: bool) -> None:
    """Make a root of read-only binds and one memory-backed working folder, and move into it.

    `stage` is an empty folder to build in. Only inside `enter_namespaces`, and `proc` only in its first child.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", stage, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,nr_inodes=4k,mode=755")
    shown: list[str] = []
    for path in (*SYSTEM, *SETTINGS, *sorted(roots)):
        if not any(path == one or path.startswith(one + "/") for one in shown):
            _show(stage, path)
            shown.append(path)
    for device in DEVICES:
        _place_file(stage + device)
        kernel.mount(device, stage + device, None, kernel.MS_BIND)
    os.symlink(BASE + "/tmp", stage + "/dev/shm")
    if not os.path.exists(stage + "/tmp"):  # unless a root lies below it
        os.symlink(BASE + "/tmp", stage + "/tmp")
    with open(stage + "/etc/passwd", "w") as file:
        file.write(f"sandbox:x:{uid}:{uid}::{BASE}/tmp:/bin/sh\n")
    if proc:
        os.mkdir(stage + "/proc")
        kernel.mount("proc", stage + "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    os.mkdir(stage + BASE)
    room = f"size={room_bytes},nr_inodes={room_files},mode=755"
    kernel.mount("tmpfs", stage + BASE, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, room)
    make_room(stage + BASE, uid)
    read_only = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("none", stage, None, read_only)
    kernel.pivot_root(stage)


def make_room(base: str, uid: int) -> None:
    """The program's two folders: the one it starts in and one for temporary files."""
    for name in ("work", "tmp"):
        os.mkdir(f"{base}/{name}", 0o700)
        if os.getuid() == 0:
            os.chown(f"{base}/{name}", uid, uid)


def _place_file(path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "w").close()


def _show(stage: str, path: str) -> None:
    if os.path.islink(path):
        os.makedirs(os.path.dirname(stage + path), exist_ok=True)
        os.symlink(os.readlink(path), stage + path)
    elif os.path.isdir(path):
        os.makedirs(stage + path, exist_ok=True)
        kernel.bind_read_only(path, stage + path)
    elif os.path.exists(path):
        _place_file(stage + path)
        kernel.bind_read_only(path, stage + path)


@dataclass(frozen=True)
class Cell:
    """What `drop` needs to know of a level."""

    level: str
    uid: int
    readable: list[str]
    """Beside the system's folders; counts where Landlock is what hides the rest."""
    writable: list[str]


def drop(cell: Cell, limits: Limits) -> None:
    """Give up everything, in the order in which each step is still allowed; nothing but the program comes after."""
    limits.apply()
    if os.getuid() == 0 and cell.uid != 0:
        os.setgroups([])
        os.setresgid(cell.uid, cell.uid, cell.uid)
        os.setresuid(cell.uid, cell.uid, cell.uid)
    if cell.level == OFF:
        return
    kernel.drop_capabilities()
    kernel.die_with_parent()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    processes = limits.processes
    if cell.level == UNPRIVILEGED and processes:
        processes += _own_tasks()
    if cell.level != NAMESPACES:
        landlock.restrict([*SYSTEM, *SETTINGS, *MACHINE_FACTS, *cell.readable], cell.writable, list(DEVICES))
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    processes = processes if hard == resource.RLIM_INFINITY else min(processes, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    seccomp.install(seccomp.program(limits.processes > 0))


def _own_tasks() -> int:
    """Processes and threads of our user: the kernel counts per user, and here the program's user is ours."""
    count = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return count


def close_all_but(kept: tuple[int, ...]) -> None:
    """Close every descriptor above the kept ones, which must be numbered without a gap from 0."""
    os.closerange(len(kept), 2**16)


def default_signals() -> None:
    """As a program expects to find them."""
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def leave(code: int) -> NoReturn:
    os._exit(code)
