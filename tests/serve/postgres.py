"""A PostgreSQL server of our own in a temporary folder, as the user `postgres` where we are root."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

USER = "posttrain"


def program(name: str) -> str | None:
    """On the path, or where Debian keeps it; the newest."""
    there = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)]
    return shutil.which(name) or (there[0] if there else None)


def _as_whom() -> dict[str, object]:
    """PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return {}
    try:
        found = pwd.getpwnam("postgres")
    except KeyError:
        found = pwd.getpwnam("nobody")
    return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}


def missing() -> str | None:
    """What a test says that has to be skipped."""
    absent = [name for name in ("initdb", "pg_ctl") if program(name) is None]
    return f"PostgreSQL is not installed ({', '.join(absent)}): apt-get install postgresql" if absent else None


class Postgres:
    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.url = f"postgresql://{USER}@/postgres?host={folder}"

    def _call(self, *words: str) -> None:
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
        subprocess.run(words, check=True, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, **_as_whom())  # type: ignore[call-overload]

    def create(self) -> None:
        words = ("--auth=trust", f"--username={USER}", "--encoding=UTF8", "--no-sync")
        self._call(str(program("initdb")), *words, "-D", str(self.data))

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off -c max_connections=120"
        log = str(self.folder / "log")
        self._call(str(program("pg_ctl")), "-D", str(self.data), "-w", "-l", log, "-o", options, "start")

    def stop(self) -> None:
        self._call(str(program("pg_ctl")), "-D", str(self.data), "-w", "-m", "immediate", "stop")

    def fresh(self, name: str) -> str:
        """The URL of a new database; names are ours."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return f"postgresql://{USER}@/{name}?host={self.folder}"


@contextlib.contextmanager
def running() -> Iterator[Postgres]:
    # Sockets have short paths, and the other user must get there.
    folder = Path(tempfile.mkdtemp(prefix="pt-pg-", dir="/tmp"))
    whom = _as_whom()
    if whom:
        os.chown(folder, whom["user"], whom["group"])  # type: ignore[arg-type]
    server = Postgres(folder)
    try:
        server.create()
        server.start()
        try:
            yield server
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):
                server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
