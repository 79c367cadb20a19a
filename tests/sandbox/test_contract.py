"""One contract for every level: what the abusive programs may not do, and that honest ones are not disturbed."""

import os
import platform
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from posttrain.sandbox.confine import LADDER
from posttrain.sandbox.slots import Budget, Finished, Pool, Room
from tests.sandbox.abuse import ISOLATION, NUMBERS, PRELUDE, RESOURCES
from tests.sandbox.levels import need

BUDGET = Budget(
    wall_s=2.0, cpu_s=1, memory_bytes=2**27, file_bytes=2**23, open_files=64, processes=24, output_bytes=2**16
)
HOME = os.path.realpath(sys.base_prefix)
ROOM = Room(roots=(HOME,), bytes=2**24, files=500)
PYTHON = HOME + "/" + os.path.relpath(os.path.realpath(sys.executable), HOME)
LEFT_IN = ("/dev/shm", "/tmp", "/var/tmp", "/run/lock", "/etc", "/usr/bin", str(Path(os.__file__).parent / "json"))
PROGRAM = f"program-{os.getpid()}.py"
"""Of this test process alone: others may run beside it."""
HONEST = "import json\nprint(json.dumps(sum(range({n}))))"


@dataclass
class Targets:
    """What must stay untouched: a secret in the environment and in files, and listeners."""

    token: str
    folder: Path
    listeners: list[socket.socket] = field(default_factory=list)
    places: dict[str, object] = field(default_factory=dict)

    def heard(self) -> list[bytes]:
        found = []
        for listener in self.listeners:
            listener.setblocking(False)
            try:
                if listener.type == socket.SOCK_STREAM:
                    listener.accept()[0].close()
                    found.append(b"a connection")
                else:
                    found.append(listener.recv(100))
            except BlockingIOError:
                continue
        return found


@pytest.fixture(scope="module")
def targets() -> Iterator[Targets]:
    """Readable for everyone, so that only the sandbox stands between a program and the secret."""
    token = "s3cret" + secrets.token_hex(8)
    os.environ["POSTTRAIN_TEST_SECRET"] = token
    with tempfile.TemporaryDirectory(prefix="abuse-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "secret").write_text(token)
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)
        made = Targets(token, folder)
        addresses: dict[str, tuple[int, int, object]] = {
            "tcp": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "udp": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "unix": (socket.AF_UNIX, socket.SOCK_STREAM, f"{name}/stream"),
            "unix_datagram": (socket.AF_UNIX, socket.SOCK_DGRAM, f"{name}/datagram"),
            "abstract": (socket.AF_UNIX, socket.SOCK_STREAM, b"\0a" + token.encode()),
            "abstract_datagram": (socket.AF_UNIX, socket.SOCK_DGRAM, b"\0d" + token.encode()),
        }
        for kind, (family, type_, address) in addresses.items():
            listener = socket.socket(family, type_)
            listener.bind(address)
            if type_ == socket.SOCK_STREAM:
                listener.listen()
            made.listeners.append(listener)
            made.places[kind] = listener.getsockname()[1] if family == socket.AF_INET else address
        for kind in ("unix", "unix_datagram"):
            os.chmod(str(made.places[kind]), 0o777)
        made.places |= {"abstract": "a" + token, "abstract_datagram": "d" + token}
        made.places |= {
            "folder": name,
            "other": name,
            "temporary": tempfile.gettempdir(),
            "open": f"{name}/open",
            "token": token,
            "parent": os.getpid(),
        }
        yield made
        for listener in made.listeners:
            listener.close()
    del os.environ["POSTTRAIN_TEST_SECRET"]


@pytest.fixture(scope="module", params=LADDER)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with Pool(need(request.param), 1) as made:
        with made.session(ROOM) as session:  # so that the worker's number is known
            session.run(["true"])
        yield made


def run(pool: Pool, source: str, budget: Budget = BUDGET) -> Finished:
    with pool.session(ROOM) as session:
        session.write({PROGRAM: source})
        return session.run([session.place(PYTHON), "-S", PROGRAM], budget)


def filled(source: str, targets: Targets, worker: int) -> str:
    places = {**targets.places, "worker": worker, **NUMBERS[platform.machine()]}
    for name, value in places.items():
        source = source.replace("{" + name + "}", str(value))
    return PRELUDE + source


def running(pool: Pool) -> list[str]:
    """Processes in the sandbox: those below the workers. What has left its tree still has the program's name."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes()
            state, parent = (entry / "stat").read_text().rpartition(") ")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if PROGRAM.encode() in words or (int(parent) in pool.pids() and state != "Z"):
            found.append(f"{entry.name} {words!r}")
    return found


def nothing_left(pool: Pool, targets: Targets) -> None:
    assert running(pool) == []
    assert targets.heard() == []
    for folder in (*LEFT_IN, str(targets.folder / "open")):
        assert [name for name in os.listdir(folder) if targets.token in name] == [], folder
    for stage in pool.stages():
        assert os.listdir(stage) == ["empty"] and os.listdir(f"{stage}/empty") == []
    for table in ("shm", "msg", "sem"):
        assert all(
            str(4242) not in line.split()[:1] for line in Path(f"/proc/sysvipc/{table}").read_text().splitlines()
        )


@pytest.mark.parametrize("name", sorted(RESOURCES))
def test_resources_are_bounded(pool: Pool, targets: Targets, name: str) -> None:
    started = time.monotonic()
    done = run(pool, filled(RESOURCES[name], targets, 0))
    assert time.monotonic() - started < BUDGET.wall_s + 20
    harmless = ("zombie", "daemon", "setsid")
    assert (done.exit == 0) == (name in harmless), done
    assert done.peak_bytes < 3 * BUDGET.memory_bytes
    assert len(done.stdout) <= BUDGET.output_bytes and len(done.stderr) <= BUDGET.output_bytes
    nothing_left(pool, targets)


@pytest.mark.parametrize("name", sorted(ISOLATION))
def test_nothing_outside_is_reached(pool: Pool, targets: Targets, name: str) -> None:
    done = run(pool, filled(ISOLATION[name], targets, pool.pids()[0]))
    said = done.stdout + done.stderr + done.answers
    assert targets.token.encode() not in said.replace(b"Traceback", b""), said
    assert b"ESCAPED" not in said, said
    assert b"SyntaxError" not in done.stderr and b"NameError" not in done.stderr, done.stderr
    nothing_left(pool, targets)
    assert run(pool, HONEST.format(n=10)).stdout == b"45\n"


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("memory in many", ("memory",)),
        ("memory in a memory file", ("memory", "disk")),
        ("sleep", ("wall time",)),
        ("log flood", ("output",)),
    ],
)
def test_the_limit_is_named(pool: Pool, targets: Targets, name: str, limit: tuple[str, ...]) -> None:
    wide = Budget(wall_s=20.0, cpu_s=20, memory_bytes=2**26, file_bytes=2**30, processes=100, output_bytes=2**16)
    budget = BUDGET if name == "sleep" else wide
    done = run(pool, filled(RESOURCES[name], targets, 0), budget)
    assert done.limit is not None and done.limit.startswith(limit)


def test_a_session_keeps_its_files_and_the_next_has_none_of_them(pool: Pool) -> None:
    with pool.session(ROOM) as session:
        session.write(
            {"a/b.txt": "one", "run.sh": "cat a/b.txt; echo two > c.txt; echo three >&3; echo four >&2; exit 5"}
        )
        done = session.run(["sh", "run.sh"])
        assert (done.exit, done.stdout, done.answers, done.stderr) == (5, b"one", b"three\n", b"four\n")
        assert session.read(["c.txt", "a/b.txt", "none"]) == {"c.txt": b"two\n", "a/b.txt": b"one"}
    with pool.session(ROOM) as session:
        assert session.run(["ls", "-A"]).stdout == b""


def test_links_that_a_program_leaves_lead_nowhere(pool: Pool, targets: Targets) -> None:
    with pool.session(ROOM) as session:
        session.run(["ln", "-s", f"{targets.folder}/secret", "secret"])
        session.run(["ln", "-s", str(targets.folder / "open"), "way"])
        assert session.read(["secret", "way/x", "../../etc/passwd"][:2]) == {}
        with pytest.raises(Exception, match="could not be written"):
            session.write({"way/x": "y"})
    assert (targets.folder / "secret").read_text() == targets.token
    assert os.listdir(targets.folder / "open") == []


def test_two_hundred_honest_programs_pass(pool: Pool) -> None:
    with pool.session(ROOM) as session:
        session.write({f"p{n}.py": HONEST.format(n=n) for n in range(200)})
        for n in range(200):
            done = session.run([session.place(PYTHON), "-S", f"p{n}.py"])
            assert (done.exit, done.stdout, done.limit) == (0, f"{sum(range(n))}\n".encode(), None)


def test_sixty_four_at_once(pool: Pool, targets: Targets) -> None:
    names = [("fork bomb", "memory in one process", "kill all", "one big file")[n % 4] for n in range(32)]
    sources = [filled({**RESOURCES, **ISOLATION}[name], targets, 0) for name in names]
    honest = [HONEST.format(n=n) for n in range(32)]
    wide = Budget(wall_s=60.0, cpu_s=1, memory_bytes=2**26, file_bytes=2**22, processes=8)
    budgets = [Budget(wall_s=4.0, cpu_s=1, memory_bytes=2**26, file_bytes=2**22, processes=8)] * 32 + [wide] * 32
    with Pool(pool.level, 64) as many:
        with ThreadPoolExecutor(64) as threads:
            ended = list(threads.map(lambda pair: run(many, *pair), zip([*sources, *honest], budgets, strict=True)))
        assert len(many.pids()) > 1
        nothing_left(many, targets)
        stages = many.stages()
    assert [one.stdout for one in ended[32:]] == [f"{sum(range(n))}\n".encode() for n in range(32)]
    assert all(one.exit != 0 for one, name in zip(ended, names, strict=False) if name != "kill all")
    assert not any(Path(stage).exists() for stage in stages)
