"""`python -m tests.serve.soak`, smaller."""

from pathlib import Path

from tests.serve.soak import served, soak


def test_many_clients_lose_nothing_and_make_nothing_twice(database_url: str | None, tmp_path: Path) -> None:
    with served(tmp_path, database_url) as url:
        tally = soak(url, clients=16, calls=640)
    assert tally["calls"] > 500 and tally["traces"] > 100 and tally["dataset_versions"] > 3
