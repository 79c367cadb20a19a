"""Many clients at once against `posttrain serve`: nothing acknowledged is lost, no version is made twice.

python -m tests.serve.soak [--clients 64] [--calls 20000] [--postgresql]
"""

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.serve import postgres

TOKEN = "a-token-for-the-tests"
VERSIONS = 40
"""Of one dataset, which all clients try to build; each has other rows."""


@contextlib.contextmanager
def served(folder: Path, database_url: str | None = None) -> Iterator[str]:
    """`posttrain serve` as a process of its own; its address, as it prints it."""
    environment = os.environ | {"POSTTRAIN_TOKEN": TOKEN}
    environment |= {"POSTTRAIN_DATABASE_URL": database_url} if database_url else {}
    words = ["--port", "0", "--data-dir", str(folder / "data"), "--runs-dir", str(folder / "runs")]
    words += ["--registry-dir", str(folder / "datasets")]
    command = [sys.executable, "-m", "posttrain", "serve", *words]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline() + process.stdout.readline()
        found = re.search(r"(http://\S+?)/\?token=(\S+)", said)
        assert found and found[2] == TOKEN, f"posttrain serve said: {said}"
        yield found[1]
    finally:
        process.terminate()
        process.wait(30)


@dataclass
class Told:
    """What the server acknowledged to one client."""

    statuses: Counter[str] = field(default_factory=Counter)
    traces: list[str] = field(default_factory=list)
    scores: Counter[str] = field(default_factory=Counter)
    datasets: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def trace(number: int) -> dict[str, Any]:
    steps = [{"i": place, "type": "thought", "content": f"step {place} of {number}"} for place in range(4)]
    meta = {"source": "soak", "game": f"g{number % 7}", "expected_answer": str(number)}
    return {"trace_version": "1.0", "prompt": f"p{number}", "final_answer": str(number), "steps": steps, "meta": meta}


class Caller:
    def __init__(self, url: str, number: int) -> None:
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120)
        self.number, self.random, self.told = number, random.Random(number), Told()

    def ask(self, kind: str, method: str, path: str, **more: Any) -> Any:
        began = time.perf_counter()
        answer = self.http.request(method, path, **more)
        self.told.seconds.append(time.perf_counter() - began)
        self.told.statuses[f"{kind} {answer.status_code}"] += 1
        return answer.json() if answer.status_code in (200, 201) else None

    def call(self, count: int) -> Told:
        kinds = (self.add, self.batch, self.list, self.get, self.score, self.build, self.version)
        with self.http:
            for _ in range(count):
                self.random.choices(kinds, (30, 5, 20, 25, 12, 3, 5))[0]()
        return self.told

    def add(self) -> None:
        made = self.ask("add", "POST", "/api/traces", json=trace(self.random.randrange(10**6)))
        self.told.traces += [made["id"]] if made else []

    def batch(self) -> None:
        many = [trace(self.random.randrange(10**6)) for _ in range(5)]
        made = self.ask("batch", "POST", "/api/traces/batch", json=many)
        self.told.traces += [one["id"] for one in made["traces"]] if made else []

    def list(self) -> None:
        asked = {"limit": 50, "game": f"g{self.random.randrange(7)}", "source": "soak"}
        self.ask("list", "GET", "/api/traces", params=asked)

    def get(self) -> None:
        if not self.told.traces:
            return self.add()
        found = self.ask("get", "GET", f"/api/traces/{self.random.choice(self.told.traces)}")
        assert found is not None, "a trace that was acknowledged is not there"

    def score(self) -> None:
        if not self.told.traces:
            return self.add()
        identity = self.random.choice(self.told.traces)
        if self.ask("score", "POST", f"/api/traces/{identity}/score", json={}) is not None:
            self.told.scores[identity] += 1

    def build(self) -> None:
        version = f"v{self.random.randrange(VERSIONS)}"
        asked = {"dataset_name": "soak", "dataset_version": version, "selection_strategy": "random", "limit": 20}
        asked |= {"seed": self.random.randrange(2**31)}
        made = self.ask("build", "POST", "/api/datasets/build", json=asked)
        self.told.datasets += [made["dataset"]] if made and made["is_new"] else []

    def version(self) -> None:
        name = f"m{self.random.randrange(30)}"
        if self.ask("model", "POST", "/api/models", json={"name": name}) is not None:
            self.told.models.append(name)


def soak(url: str, clients: int, calls: int) -> dict[str, Any]:
    """The tally; AssertionError where something was lost or made twice."""
    callers = [Caller(url, number) for number in range(clients)]
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        told = list(pool.map(lambda caller: caller.call(-(-calls // clients)), callers))
    seconds = time.perf_counter() - began
    statuses = sum((one.statuses for one in told), Counter[str]())
    assert not [name for name in statuses if name.split()[1][0] == "5"], statuses
    acknowledged = [identity for one in told for identity in one.traces]
    datasets = [key for one in told for key in one.datasets]
    models = [name for one in told for name in one.models]
    scores = sum((one.scores for one in told), Counter[str]())
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120) as http:
        assert sorted(all_of(http, "/api/traces", "id")) == sorted(acknowledged), "traces were lost or kept twice"
        assert sorted(all_of(http, "/api/datasets", "dataset")) == sorted(datasets), "versions were lost or made twice"
        assert sorted(one["name"] for one in http.get("/api/models").json()) == sorted(models)
        for identity in list(scores)[:200]:
            kept = http.get(f"/api/traces/{identity}").json()["scores"]
            assert [score["score"] for score in kept] == [1.0], identity
    ordered = sorted(second for one in told for second in one.seconds)
    return {
        "clients": clients,
        "calls": len(ordered),
        "seconds": round(seconds, 2),
        "calls_per_second": round(len(ordered) / seconds, 1),
        "p95_ms": round(1000 * ordered[int(0.95 * len(ordered))], 1),
        "statuses": dict(sorted(statuses.items())),
        "traces": len(acknowledged),
        "dataset_versions": len(datasets),
        "models": len(models),
    }


def all_of(http: httpx.Client, path: str, field_name: str) -> list[str]:
    found: list[str] = []
    offset: int | None = 0
    while offset is not None:
        page = http.get(path, params={"limit": 100, "offset": offset}).json()
        found += [line[field_name] for line in page["data"]]
        offset = page["pagination"]["next_offset"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.serve.soak", description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--postgresql", action="store_true", help="on a server of its own; else SQLite")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(postgres.running()).fresh("soak") if given.postgresql else None
        address = stack.enter_context(served(folder, url))
        tally = {"database": "postgresql" if url else "sqlite", **soak(address, given.clients, given.calls)}
    print(json.dumps(tally, indent=2))


if __name__ == "__main__":
    main()
