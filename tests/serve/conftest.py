"""A server in this process, on both databases."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from posttrain.serve.app import make_app
from posttrain.serve.settings import Settings
from tests.serve import postgres
from tests.serve.postgres import Postgres
from tests.serve.serving import TOKEN, settings_at

Client = TestClient
_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    absent = postgres.missing()
    if absent:
        pytest.skip(absent)
    with postgres.running() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """One that nobody has used; None is SQLite in the data folder."""
    if request.param == "sqlite":
        return None
    server: Postgres = request.getfixturevalue("postgres_server")
    return server.fresh(f"test{next(_numbers)}")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """With the server's own registry also that of what it starts."""
    monkeypatch.setenv("POSTTRAIN_REGISTRY", str(tmp_path / "datasets"))
    (tmp_path / "data" / "ingest").mkdir(parents=True)
    return settings_at(tmp_path)


Serve = Callable[[Settings], Client]


@pytest.fixture
def serve() -> Iterator[Serve]:
    open_ones = []

    def begin(settings: Settings) -> Client:
        client = TestClient(
            make_app(settings), raise_server_exceptions=False, headers={"Authorization": f"Bearer {TOKEN}"}
        )
        client.__enter__()
        open_ones.append(client)
        return client

    yield begin
    for client in open_ones:
        client.__exit__(None, None, None)


@pytest.fixture
def client(settings: Settings, serve: Serve) -> Client:
    """On SQLite."""
    return serve(settings)


@pytest.fixture
def either(settings: Settings, serve: Serve, database_url: str | None) -> Client:
    """On each of the databases in turn."""
    from dataclasses import replace

    return serve(replace(settings, database_url=database_url))
