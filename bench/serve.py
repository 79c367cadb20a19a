"""How long reads from `posttrain serve` take with many traces in its database, one client and several at once.

`python -m bench.serve [--postgresql]` fills a database of its own, starts the server as a process, asks every kind of
read in turn, prints a table and writes `bench/results/serve_<database>.json`.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from posttrain.host import machine
from posttrain.run.manifest import package_versions
from posttrain.serve.store import open_store
from posttrain.serve.traces import Trace, add_traces
from posttrain.worlds import duel
from tests.serve import postgres
from tests.serve.soak import TOKEN, served

RESULTS = Path(__file__).parent / "results"
CLIENTS = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__)
    parser.add_argument("--traces", type=int, default=100_000)
    parser.add_argument("--reads", type=int, default=150, help="of each kind, by each client")
    parser.add_argument("--postgresql", action="store_true", help="on a server of its own; else SQLite")
    given = parser.parse_args()
    database = "postgresql" if given.postgresql else "sqlite"
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(postgres.running()).fresh("bench") if given.postgresql else None
        fill_s, ids = fill(url, folder, given.traces)
        address = stack.enter_context(served(folder, url))
        build(address)
        rows = [row for clients in CLIENTS for row in measured(address, clients, given.reads, ids)]
    print(f"{given.traces:,} traces in {database}, written in {fill_s:.1f} s; load average before: {load:.2f}")
    print(f"{'read':34} {'clients':>7} {'median ms':>10} {'p95 ms':>8} {'max ms':>8}")
    for row in rows:
        print(
            f"{row['read']:34} {row['clients']:7d} {row['median_ms']:10.2f} {row['p95_ms']:8.2f} {row['max_ms']:8.2f}"
        )
    facts = {"hardware": machine.facts(), "load_before": load, "python": sys.version.split()[0]}
    facts |= {"packages": package_versions(), "database": database, "traces": given.traces, "fill_s": round(fill_s, 2)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"serve_{database}.json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


def fill(url: str | None, folder: Path, count: int) -> tuple[float, list[str]]:
    """Duels, and one in a thousand of a rare source; the seconds it took, and their ids."""
    began, ids = time.perf_counter(), []
    store = open_store(url, folder / "data")
    for begin in range(0, count, 1000):
        made = duel.traces(min(1000, count - begin), begin)
        made[0]["meta"]["source"] = "rare"
        with store.write() as session:
            ids += [row.id for row in add_traces(session, [Trace.model_validate(one) for one in made])]
    store.close()
    return time.perf_counter() - began, ids


def build(address: str) -> None:
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as http:
        for version in range(20):
            asked = {"dataset_name": "bench", "dataset_version": f"v{version}", "limit": 100}
            assert http.post("/api/datasets/build", json=asked).status_code == 201


def reads(ids: list[str], rng: random.Random) -> dict[str, Callable[[], str]]:
    """Name of each kind, and what makes the next address of it."""
    deep = len(ids) - 100
    return {
        "traces, newest 100": lambda: "/api/traces?limit=100",
        "traces, the last page": lambda: f"/api/traces?limit=100&offset={deep}",
        "traces, a page anywhere": lambda: f"/api/traces?limit=20&offset={rng.randrange(deep)}",
        "traces, filtered, common": lambda: "/api/traces?limit=20&source=ungar&game=high_card_duel",
        "traces, filtered, rare": lambda: "/api/traces?limit=20&source=rare",
        "traces, filtered, none": lambda: "/api/traces?limit=20&game=none",
        "one trace": lambda: f"/api/traces/{rng.choice(ids)}",
        "compare two": lambda: f"/api/traces/compare?base={rng.choice(ids)}&other={rng.choice(ids)}",
        "datasets": lambda: "/api/datasets?limit=100",
        "a manifest": lambda: "/api/datasets/bench-v3/manifest",
        "an export of 100": lambda: "/api/datasets/bench-v3/export.jsonl?format=tunix_sft",
        "models": lambda: "/api/models",
        "runs": lambda: "/api/runs",
    }


def measured(address: str, clients: int, count: int, ids: list[str]) -> Iterator[dict[str, Any]]:
    for name in reads(ids, random.Random(0)):
        with ThreadPoolExecutor(clients) as pool:
            parts = pool.map(lambda number, name=name: timed(address, name, count, ids, number), range(clients))
            ordered = sorted(second for part in parts for second in part)
        row: dict[str, Any] = {"read": name, "clients": clients, "count": len(ordered)}
        for key, place in (("median_ms", 0.5), ("p95_ms", 0.95), ("max_ms", 1.0)):
            row[key] = round(1000 * ordered[min(len(ordered) - 1, int(place * len(ordered)))], 2)
        yield row


def timed(address: str, name: str, count: int, ids: list[str], number: int) -> list[float]:
    """Seconds of each read, the first few left out: the connection is made in them."""
    seconds, make = [], reads(ids, random.Random(number))[name]
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as http:
        for _ in range(count + 3):
            path = make()
            began = time.perf_counter()
            answer = http.get(path)
            seconds.append(time.perf_counter() - began)
            assert answer.status_code == 200, (path, answer.text)
    return seconds[3:]


if __name__ == "__main__":
    main()
