"""Tokens per second of `posttrain serve` beside `transformers serve`, for 1, 8 and 32 clients at once.

`python -m bench.serve_openai [--repeats 3] [--models tiny 100M]` prints a table and writes
`bench/results/serve_openai.json`. Both are servers of their own on loopback and are sent the same requests to
`/v1/completions`, greedy, one after another by each client; servers take turns, and while one is asked the others are
idle. The peer runs with continuous batching and without, and its better cell counts. Tokens are those that the server
says it wrote.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai

from bench.decode import RESULTS as DECODE_RESULTS
from bench.decode import TINY, beside_the_best, large_model
from posttrain.host import machine
from posttrain.run.manifest import package_versions

RESULTS = DECODE_RESULTS.with_name("serve_openai.json")
TOKEN = "a-token-of-the-bench"
CLIENTS = (1, 8, 32)
NEW, ROUNDS = 128, 2
"""Tokens of an answer, and requests of each client in a turn."""
START_S = 180
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
OURS = "posttrain"


def command(cell: str, folder: Path, port: int, place: Path) -> list[str]:
    if cell == OURS:
        where = ["--port", str(port), "--runs-dir", str(place / "runs"), "--data-dir", str(place / "data")]
        return [sys.executable, "-m", "posttrain", "serve", "--model", str(folder), "--device", "cpu", *where]
    words = ["serve", str(folder), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    batching = "--continuous-batching" if cell.endswith("continuous") else "--no-continuous-batching"
    return [str(Path(sys.executable).with_name("transformers")), *words, batching]


@contextmanager
def served(cell: str, folder: Path, place: Path) -> Iterator[tuple[openai.OpenAI, str]]:
    """A client of a server that has answered once, and the model's name there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = os.environ | {"POSTTRAIN_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    with open(place / f"{cell}.log", "w") as log:
        server = subprocess.Popen(command(cell, folder, port, place), env=env, stdout=log, stderr=subprocess.STDOUT)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0, timeout=600)
    name = folder.name if cell == OURS else str(folder)
    try:
        _wait(client, name, server, place / f"{cell}.log")
        yield client, name
    finally:
        server.terminate()
        server.wait()


def _wait(client: openai.OpenAI, name: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while True:
        try:
            client.completions.create(model=name, prompt="a", max_tokens=2, temperature=0)
            return
        except openai.APIConnectionError:
            if server.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}") from None
            time.sleep(0.5)


def turn(client: openai.OpenAI, name: str, prompts: list[str], clients: int) -> tuple[float, list[str]]:
    """Tokens per second of all clients together, and the answers."""

    def ask(prompt: str) -> tuple[int, str]:
        answer = client.completions.create(model=name, prompt=prompt, max_tokens=NEW, temperature=0)
        assert answer.usage is not None
        return answer.usage.completion_tokens, answer.choices[0].text

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, prompts))
    rate = sum(tokens for tokens, _ in answers) / (time.perf_counter() - started)
    return rate, [text for _, text in answers]


def measure(model: str, folder: Path, cells: list[str], repeats: int, place: Path) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        servers = {cell: stack.enter_context(served(cell, folder, place)) for cell in cells}
        for clients in CLIENTS:
            prompts = [f"word {number} of the list and code {7 * number}" for number in range(clients * ROUNDS)]
            rates: dict[str, list[float]] = {cell: [] for cell in cells}
            texts: dict[str, list[str]] = {}
            for _ in range(repeats):
                for cell, (client, name) in servers.items():
                    rate, texts[cell] = turn(client, name, prompts, clients)
                    rates[cell].append(rate)
            yield {"model": model, "clients": clients} | beside_the_best(rates, texts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serve_openai", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=("tiny", "100M"), default=["tiny", "100M"])
    parser.add_argument("--peers", nargs="+", default=["transformers continuous", "transformers one by one"])
    asked = parser.parse_args()
    load, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for model in asked.models:
            folder = TINY if model == "tiny" else large_model(place / "large")
            if model != "tiny":
                for file in TOKENIZER_FILES:
                    shutil.copy(TINY / file, folder)
            for row in measure(model, folder, [OURS, *asked.peers], asked.repeats, place):
                rows.append(row)
                cells = row["tokens_per_second"]
                numbers = "  ".join(f"{cell} {statistics.median(values):8.1f}" for cell, values in cells.items())
                ratio = row["ratio"]
                print(
                    f"{model:5} clients {row['clients']:3d}  {numbers}  ratio {ratio['median']:.2f} "
                    f"({ratio['min']:.2f} to {ratio['max']:.2f}), equal {row['equal_sequences']}",
                    flush=True,
                )
    facts = {"hardware": machine.facts(), "threads": 2, "load_before": load, "new_tokens": NEW, "rounds": ROUNDS}
    facts |= {"python": sys.version.split()[0], "packages": package_versions()}
    RESULTS.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
