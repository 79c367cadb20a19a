"""Who may ask, under which name, from which page, and how much."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.serve.settings import MOST_BODY_BYTES, Settings
from tests.serve.conftest import Client, Serve
from tests.serve.serving import TOKEN
from tests.serve.test_traces import TRACE


def test_nothing_is_answered_without_the_token(client: Client) -> None:
    for path in ("/", "/api/traces", "/api/runs", "/openapi.json", "/nowhere", "/?token=wrong", "/api/traces?token="):
        for given in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": TOKEN},
        ):
            client.headers.pop("Authorization", None)
            refused = client.get(path, headers=given)
            assert refused.status_code == 401, (path, given)
            assert refused.headers["www-authenticate"] == "Bearer" and TOKEN not in refused.text
    assert client.post("/api/traces", json=TRACE).status_code == 401
    assert client.get("/api/traces", cookies={"posttrain_8000": "wrong"}).status_code == 401


def test_the_login_link_sets_a_cookie_and_hides_the_token(client: Client) -> None:
    client.headers.pop("Authorization")
    came = client.get(f"/api/traces?limit=5&token={TOKEN}", follow_redirects=False)
    assert came.status_code == 303 and came.headers["location"] == "/api/traces?limit=5"
    cookie = came.headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=lax" in cookie.lower()
    assert client.get("/api/traces").status_code == 200
    away = client.get(f"http://testserver//elsewhere.example/x?token={TOKEN}", follow_redirects=False)
    assert away.headers["location"].startswith("/elsewhere")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[", "10.0.0.1"])
def test_a_foreign_name_for_this_machine_is_refused(client: Client, host: str) -> None:
    assert client.get("/api/traces", headers={"Host": host}).status_code == 421


def test_own_names_are_served_through_a_tunnel_too(client: Client) -> None:
    for host in ("127.0.0.1:8000", "localhost:9999", "[::1]:8000", "testserver"):
        assert client.get("/api/traces", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://localhost:1", "null", "file://", "https://testserver.evil"]
)
def test_a_page_of_another_origin_is_refused(client: Client, origin: str) -> None:
    refused = client.post("/api/traces", json=TRACE, headers={"Origin": origin})
    assert refused.status_code == 403 and refused.headers["content-type"] == "application/problem+json"
    assert client.get("/api/traces").json()["data"] == []
    assert client.post("/api/traces", json=TRACE, headers={"Origin": "http://testserver"}).status_code == 201


def test_a_public_server_is_reached_by_address_and_by_names_that_were_given(settings: Settings, serve: Serve) -> None:
    client = serve(replace(settings, host="0.0.0.0", host_names=("box.example",)))
    status = [
        client.get("/api/traces", headers={"Host": host}).status_code
        for host in ("10.0.0.1:8000", "box.example", "x.example")
    ]
    assert status == [200, 200, 421]


def test_long_bodies_are_refused_however_they_are_sent(client: Client) -> None:
    long = b" " * (MOST_BODY_BYTES + 1)
    headers = {"Content-Type": "application/json"}
    assert client.post("/api/traces", content=long, headers=headers).status_code == 413
    assert client.post("/api/traces", content=iter([long[:-1], b"x"]), headers=headers).status_code == 413
    assert client.post("/api/traces", content=long[:-1], headers=headers).status_code == 422
    for wrong in ("-1", "1e3", "99999999999999999999999"):
        assert client.post("/api/traces", content=b"{}", headers=headers | {"Content-Length": wrong}).status_code == 413


def test_secrets_are_not_told(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "very-secret-value")
    for path in ("/api/runs/x/artifacts/very-secret-value", "/api/datasets/very-secret-value/manifest"):
        answer = client.get(path)
        assert answer.status_code == 404 and "very-secret-value" not in answer.text


def test_errors_are_problem_details(client: Client) -> None:
    answers = [
        client.get("/api/nowhere"),
        client.delete("/api/traces"),
        client.post("/api/traces", content=b"{", headers={"Content-Type": "application/json"}),
        client.get("/api/runs/none"),
    ]
    for answer, status in zip(answers, (404, 405, 422, 404), strict=True):
        told = answer.json()
        assert answer.status_code == told["status"] == status
        assert answer.headers["content-type"] == "application/problem+json"
        assert told["type"] == "about:blank" and told["title"] and told["detail"]


def test_a_database_that_goes_away_is_said_and_comes_back(
    settings: Settings, serve: Serve, postgres_server: Any
) -> None:
    client = serve(replace(settings, database_url=postgres_server.fresh("goes_away")))
    made = client.post("/api/traces", json=TRACE).json()["id"]
    postgres_server.stop()
    try:
        for answer in (client.get("/api/traces"), client.post("/api/traces", json=TRACE)):
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert answer.headers["content-type"] == "application/problem+json"
        assert client.get("/api/runs").status_code == 200
    finally:
        postgres_server.start()
    assert client.get(f"/api/traces/{made}").status_code == 200


def test_a_database_of_another_version_or_kind_is_refused_with_the_reason(settings: Settings, serve: Serve) -> None:
    from sqlalchemy import create_engine, text

    from posttrain.errors import InputError, MachineError
    from posttrain.serve.store import open_store

    open_store(None, settings.data_dir).close()
    engine = create_engine(f"sqlite:///{settings.data_dir}/serve.sqlite")
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(MachineError, match="another version of posttrain"):
        open_store(None, settings.data_dir)
    for url, said in (
        ("mysql://h/d", "'mysql' is not served"),
        ("nonsense", "is no URL"),
        ("sqlite://", "with a file"),
    ):
        with pytest.raises(InputError, match=said):
            open_store(url, settings.data_dir)
    with pytest.raises(MachineError, match="cannot be opened") as refused:
        open_store("postgresql://user:hidden-word@127.0.0.1:1/none", settings.data_dir)
    assert "hidden-word" not in str(refused.value)


def test_the_schema_is_the_one_the_migrations_make(database_url: str | None, tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from posttrain.serve.store import open_store
    from posttrain.serve.tables import Table

    for _ in range(2):
        store = open_store(database_url, tmp_path)
        with store.engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
        store.close()
