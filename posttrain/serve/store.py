"""The database behind the server: SQLite in WAL mode, or PostgreSQL by URL; its schema is brought up to date."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from alembic import command
from alembic.config import Config
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from fastapi import Depends
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.orm import Session
from starlette.requests import HTTPConnection

from posttrain.errors import InputError, MachineError
from posttrain.run.redaction import redact
from posttrain.serve.settings import DATABASE_URL

BUSY_S = 30
"""How long a writer waits for another process that writes to the same SQLite file."""
NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "lustre", "fuse.sshfs", "9p"}


class Store:
    """Reads see what is committed; writes take turns where the database knows one writer only."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._writing = threading.Lock() if engine.dialect.name == "sqlite" else None

    @property
    def dialect(self) -> str:
        return self.engine.dialect.name

    @contextmanager
    def read(self) -> Iterator[Session]:
        with Session(self.engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction, committed at the end of the context."""
        if self._writing is not None:
            with self._writing, Session(self.engine) as session, session.begin():
                # At once, not at the first change: a reader that becomes a writer cannot wait for another one.
                session.execute(text("BEGIN IMMEDIATE"))
                yield session
        else:
            with Session(self.engine) as session, session.begin():
                yield session

    def close(self) -> None:
        self.engine.dispose()


def open_store(url: str | None, data_dir: Path) -> Store:
    """InputError where the URL names no such database, MachineError where it cannot be had."""
    parsed = _parsed(url, data_dir)
    shown = parsed.render_as_string(hide_password=True)
    if parsed.get_backend_name() == "sqlite":
        engine = _sqlite(parsed)
    else:
        engine = create_engine(parsed, pool_size=40, max_overflow=8, pool_pre_ping=True)
    try:
        _upgrade(engine)
    except DBAPIError as error:
        said = redact(str(error.orig)).strip().splitlines()[0]
        raise MachineError(f"the database {shown} cannot be opened: {said}") from error
    except (CommandError, ResolutionError) as error:
        raise MachineError(
            f"the database {shown} was written by another version of posttrain: {error}; install the newest"
        ) from error
    return Store(engine)


def _parsed(url: str | None, data_dir: Path) -> URL:
    if url is None:
        data_dir.mkdir(parents=True, exist_ok=True)
        return URL.create("sqlite", database=str(data_dir / "serve.sqlite"))
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InputError(f"{DATABASE_URL} is no URL; write postgresql://USER@HOST/NAME or sqlite:////FILE") from None
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername != "sqlite" or not parsed.database:
        raise InputError(f"{DATABASE_URL}: {parsed.drivername!r} is not served; postgresql and sqlite with a file are")
    return parsed


def _sqlite(url: URL) -> Engine:
    path = Path(str(url.database)).absolute()
    kind = _file_system(path.parent)
    if kind in NETWORK_FILE_SYSTEMS:
        raise MachineError(
            f"{path} lies on {kind}, where SQLite can lose what is written: choose a local --data-dir, or PostgreSQL "
            f"with {DATABASE_URL}"
        )
    # With its own transactions switched off, the driver leaves BEGIN IMMEDIATE to us.
    engine = create_engine(url, connect_args={"timeout": BUSY_S, "isolation_level": None, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {setting}")

    return engine


def _file_system(folder: Path) -> str:
    """Its kind, of the longest mount point that holds the folder; empty where that is not known."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in mounts:
        point, found = line.split()[1:3]
        if folder.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind


def _upgrade(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", "posttrain.serve:migrations")
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.execute(text("BEGIN IMMEDIATE"))
        else:
            # Two servers that start at once: the second waits and finds nothing to do.
            connection.execute(text("SELECT pg_advisory_xact_lock(20261126)"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _store_of(connection: HTTPConnection) -> Store:
    store: Store = connection.app.state.store
    return store


Stored = Annotated[Store, Depends(_store_of)]
"""As a parameter of an endpoint: the database of the server that was asked."""
