"""python -m bench.dashboard: how long a large run's pages take to open, 100k steps and 50k episodes of 8 kB.

No peer: trackers keep metrics only, and none opens these files. Times are a headless browser's on the same machine,
until a page's first data are seen: in a server that has read nothing yet, and in one that has.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.prepare import prepare_dataset
from posttrain.host import machine
from posttrain.recipe.load import find
from posttrain.recipe.types import PreparePhase, Recipe
from posttrain.run import recipe_file
from posttrain.run.folder import ASSETS, RunFolder
from posttrain.run.journal import Journal
from posttrain.run.manifest import package_versions

RESULTS = Path(__file__).parent / "results" / "dashboard.json"
CHROMIUM, TOKEN, NAME = "/usr/bin/chromium", "a-token-of-the-bench", "large"
PAGES = {
    "runs": ("/", "table.list a"),
    "overview, phases": (f"/run/{NAME}", "li[data-phase=grpo]"),
    "overview, curves": (f"/run/{NAME}", "figure path.smooth"),
    "episodes": (f"/run/{NAME}/episodes", ".opened article"),
    "data": (f"/run/{NAME}/data", "pre.tokens mark"),
    "report": (f"/run/{NAME}/report", "iframe"),
    "datasets": ("/datasets", "#content .note, table.list"),
}
"""Path, and what is seen once the first data are there."""


def make_run(runs_dir: Path, steps: int, episodes: int) -> None:
    """A run of the smoke recipe with as much in its files; its data are really prepared."""
    run, found = RunFolder.named(runs_dir, NAME), find("smoke")
    recipe = found.build({flag.name: flag.default for flag in found.flags})
    recipe_file.save(recipe, run.recipe)
    journal, chance = Journal(run.events), random.Random(0)
    journal.write("attempt_started", attempt=1)
    for phase in ("tool_sft", "grpo"):
        journal.write("phase_started", phase=phase, fingerprint="0")
        run.phase(phase).path.mkdir(parents=True)
    with open(run.phase("tool_sft").metrics, "w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(_step(step, chance)) + "\n")
    with open(run.phase("grpo").metrics, "w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(_step(step, chance) | {"reward": chance.random(), "zero_spread_groups": 1}) + "\n")
    with open(run.phase("grpo").samples, "w") as file:
        for number in range(episodes):
            file.write(json.dumps(_episode(number, chance)) + "\n")
    _prepare(run, recipe)


def _prepare(run: RunFolder, recipe: Recipe) -> None:
    tokenizer = Tokenizer.load(ASSETS / "tiny_base")
    (phase,) = (phase for phase in recipe.phases if isinstance(phase, PreparePhase))
    folder = run.phase(phase.name).data / phase.datasets[0].name
    prepare_dataset(phase.datasets[0], recipe.chat, tokenizer, folder, "0", 1, lambda done: None)


def _step(step: int, chance: random.Random) -> dict[str, Any]:
    names = ("gradient_norm", "learning_rate", "seconds", "tokens_per_second", "peak_flops_share", "expert_load_max")
    names += ("dead_experts", "router_entropy")
    numbers = {name: chance.random() for name in names}
    return {"step": step, "loss": 4 / step**0.2 + chance.gauss(0, 0.1), "tokens": 4096, "target_tokens": 512} | numbers


TOKENS = {
    "prompt_tokens": [number * 7 % 1024 for number in range(300)],
    "tokens": [number * 5 % 1024 for number in range(500)],
    "sampled": [1] * 500, "logprobs": [-number / 512 for number in range(500)],
}  # fmt: skip
"""Of every episode the same: nothing reads them."""


def _episode(number: int, chance: random.Random) -> dict[str, Any]:
    said = "word " * 200
    return {
        "step": number // 32, "place": number % 32, "task": f"repair-train-{number % 997}",
        "prompt": f"<|start|>user<|message|>{said}<|end|><|start|>assistant",
        "completion": f"<|channel|>analysis<|message|>{said}<|end|><|start|>assistant<|channel|>final<|message|>{said}",
        "score": chance.random() if number % 10 else None, "parts": {"format": 1.0, "hidden": 0.5},
        "reason": None if number % 10 else "truncated", "ended": "done",
    } | TOKENS  # fmt: skip


@contextmanager
def serving(runs_dir: Path, data_dir: Path) -> Iterator[str]:
    """The address of a server that has read nothing yet."""
    words = ["serve", "--port=0", f"--runs-dir={runs_dir}", f"--data-dir={data_dir}"]
    words.append(f"--registry-dir={data_dir}/registry")
    environment = os.environ | {"POSTTRAIN_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "posttrain", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        told = (re.search(r"http://[\d.]+:\d+", line) for line in process.stdout)
        yield next(found.group() for found in told if found)
    finally:
        process.terminate()
        process.wait(20)


def seconds_until_seen(page: Page, address: str, name: str) -> tuple[float, float]:
    """Until the page is there, and until its first data are."""
    path, seen = PAGES[name]
    began = time.perf_counter()
    page.goto(f"{address}/dashboard{path}", wait_until="domcontentloaded")
    opened = time.perf_counter() - began
    place = page.frame_locator("iframe").locator("h1") if name == "report" else page.locator(seen).first
    place.wait_for(timeout=120_000)
    return opened, time.perf_counter() - began


def measure(browser: Browser, runs_dir: Path, data_dir: Path, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name in PAGES:
        with serving(runs_dir, data_dir) as address:
            page = browser.new_page()
            page.goto(f"{address}/?token={TOKEN}")
            page.locator("#content").wait_for()
            _, first = seconds_until_seen(page, address, name)
            later = [seconds_until_seen(page, address, name) for _ in range(repeats)]
            page.close()
        opened, seen = (statistics.median(times) for times in zip(*later, strict=True))
        most = max(seen for _, seen in later)
        row = {"page": name, "first_s": first, "opened_s": opened, "later_s": seen, "later_max_s": most}
        rows.append(row)
        print(f"{name:20} {first:8.2f} {opened:9.2f} {seen:9.2f} {most:9.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.dashboard", description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--episodes", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=5, help="times that each page is opened again")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        runs_dir, data_dir = Path(folder, "runs"), Path(folder, "data")
        make_run(runs_dir, given.steps, given.episodes)
        size = sum(file.stat().st_size for file in runs_dir.rglob("*") if file.is_file())
        print(
            f"{given.steps:,} steps in two phases each, {given.episodes:,} episodes, {size / 1e6:,.0f} MB of files",
            flush=True,
        )
        print(f"{'page':20} {'first s':>8} {'opened s':>9} {'later s':>9} {'largest s':>9}")
        options = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        rows = measure(browser, runs_dir, data_dir, given.repeats)
        browser.close()
    print(f"load average before: {load:.2f} on {os.cpu_count()} processors")
    facts = {"hardware": machine.facts(), "load_before": load, "steps": given.steps, "episodes": given.episodes}
    facts |= {"bytes": size, "packages": package_versions()}
    RESULTS.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
