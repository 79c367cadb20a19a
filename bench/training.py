"""What the training benches share: cells, the check that both sides compute the same, alternating timing, the table."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.toy import make_toy, toy_config
from posttrain.host import machine
from posttrain.run.manifest import package_versions

RESULTS = Path(__file__).parent / "results"
THREADS = "2"
CHOOSING = 2
"""Steps by which the peer's best cell is chosen: one alone may be lucky in its padding."""
WARM_UP = 8
"""Steps before the timed ones, whose rates are reported apart: oneDNN compiles a kernel for every shape it meets."""
Request = dict[str, Any]


class Side:
    """A worker process that does steps on request."""

    def __init__(self, **spec: Any) -> None:
        self.spec = spec
        machine.set_thread_environment(int(THREADS))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("BENCH_SHOW") else None,
            text=True,
        )
        self._answer()

    def step(self, request: Request) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker {self.spec} ended: exit {self.process.wait()}; BENCH_SHOW=1 shows why")
        answer: dict[str, float] = json.loads(line)
        return answer

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def cells(objective: str, full: bool) -> list[dict[str, Any]]:
    """The peer's cells; without `full` those without recompute, which only costs time."""
    found: list[dict[str, Any]] = []
    for packed in (False, True) if objective == "sft" else (False,):
        for recompute in (False, True) if full else (False,):
            for experts in ("eager", "grouped_mm"):
                found.append({"packed": packed, "recompute": recompute, "experts": experts, "precision": "bfloat16"})
    found.append({"packed": False, "recompute": False, "experts": "eager", "precision": "float32"})
    # The reference's pass over all pairs before the first step, or over each step's pairs with it.
    return [cell | {"ahead": ahead} for ahead in (False, True)[: 1 + (objective == "preference")] for cell in found]


def name_of(cell: dict[str, Any]) -> str:
    layout = "packed*" if cell["packed"] else "padded"
    more = "".join(f"{name} " for name in ("ahead", "recompute") if cell[name])
    return f"TRL {layout} {cell['experts']} {more}{cell['precision']}"


def check(folder: Path, objective: str, request: Request) -> dict[str, float]:
    """Loss and gradients of both sides in float32 on the same rows; raises where they differ."""
    stored, losses = {}, {}
    peer = {"side": "trl", "packed": False, "recompute": False, "experts": "eager", "ahead": False}
    for name, spec in (("ours", {"side": "ours"}), ("trl", peer)):
        with Side(folder=str(folder), objective=objective, precision="float32", **spec) as side:
            path = folder / f"{name}.safetensors"
            losses[name] = side.step({**request, "gradients": str(path)})["loss"]
            stored[name] = load_file(path)
    assert stored["ours"].keys() == stored["trl"].keys()
    flat = {name: torch.cat([grads[key].flatten() for key in sorted(grads)]).double() for name, grads in stored.items()}
    cosine = torch.nn.functional.cosine_similarity(flat["ours"], flat["trl"], dim=0).item()
    difference = abs(losses["ours"] - losses["trl"])
    if difference > 1e-5 * max(1.0, abs(losses["trl"])) or cosine < 0.9999:
        raise RuntimeError(f"the two sides differ: losses {losses}, gradient cosine {cosine}")
    return {"loss_difference": difference, "gradient_cosine": cosine}


def run(
    name: str,
    objective: str,
    unit: str,
    size: tuple[int, int],
    requests: list[Request],
    units: list[int],
    full: bool,
    warm_up: int = WARM_UP,
) -> None:
    """Check, some timed requests of every cell, then ours and the best cell in turn; prints and stores it all.

    `units` counts what each request holds. The first `warm_up` requests warm up the sides that go in turn.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_toy(folder, *size)
        agreement = check(folder, objective, requests[0])
        print(f"float32: loss differs by {agreement['loss_difference']:.1e}, cosine {agreement['gradient_cosine']:.7f}")
        rows: list[dict[str, Any]] = []
        for cell in cells(objective, full):
            with Side(folder=place, objective=objective, side="trl", **cell) as side:
                side.step(requests[0])
                seconds = 0.0
                for request in requests[1 : 1 + CHOOSING]:
                    answer = side.step(request)
                    seconds += answer["seconds"]
            rows.append({"name": name_of(cell), "cell": cell, "rates": [sum(units[1 : 1 + CHOOSING]) / seconds]})
            rows[-1]["peak_bytes"] = answer["peak_bytes"]
            print(f"{rows[-1]['name']:40} {rows[-1]['rates'][0]:8.1f} {unit}/s", flush=True)
        best = max(rows, key=lambda row: row["rates"][0])
        ours = {
            precision: {"name": f"posttrain {precision}", "rates": [], "peak_bytes": 0}
            for precision in ("bfloat16", "float32")
        }
        with (
            Side(folder=place, objective=objective, side="trl", **best["cell"]) as peer,
            Side(folder=place, objective=objective, side="ours", precision="bfloat16") as half,
            Side(folder=place, objective=objective, side="ours", precision="float32") as single,
        ):
            sides = ((best, peer), (ours["bfloat16"], half), (ours["float32"], single))
            for row, _ in sides:
                row["rates"], row["cold_rates"] = [], []
            for number, (request, count) in enumerate(zip(requests, units, strict=True)):
                for row, side in sides:
                    answer = side.step(request)
                    row["cold_rates" if number < warm_up else "rates"].append(count / answer["seconds"])
                    row["peak_bytes"] = answer["peak_bytes"]
    report(name, unit, [*ours.values(), *rows], best, agreement, size, warm_up)


def report(
    name: str,
    unit: str,
    rows: list[dict[str, Any]],
    best: dict[str, Any],
    agreement: dict[str, float],
    size: tuple[int, int],
    warm_up: int,
) -> None:
    print(
        f"\n{name}, {THREADS} threads; median (least to most) over {len(best['rates'])} alternating requests, "
        f"after {warm_up} (cold)"
    )
    for row in rows:
        paired = len(row["rates"]) == len(best["rates"])
        ratios = [a / b for a, b in zip(row["rates"], best["rates"], strict=True)] if paired else []
        row["median"] = statistics.median(row["rates"])
        row["ratio"] = statistics.median(ratios) if ratios else None
        row["ratio_range"] = [min(ratios), max(ratios)] if ratios else None
        row["memory_share"] = row["peak_bytes"] / best["peak_bytes"]
        spread = f"({min(row['rates']):.1f} to {max(row['rates']):.1f})" if paired else f"(over {CHOOSING} steps)"
        ratio = f"{row['ratio']:5.2f}x ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        peak = f"{row['peak_bytes'] / 2**20:6.0f} MiB = {row['memory_share']:4.0%}"
        cold = f"  cold {statistics.median(row['cold_rates']):.1f}" if paired else ""
        print(f"{row['name']:40} {row['median']:8.1f} {unit}/s {spread:22} {peak} {ratio}{cold}")
    print("* TRL's packed GPT-OSS row lets documents see each other: it computes something else")
    load = os.getloadavg()[0]
    print(f"load average after: {load:.2f} on {os.cpu_count()} processors")
    RESULTS.mkdir(exist_ok=True)
    facts = {"hardware": machine.facts(), "load_after": load, "packages": package_versions()}
    facts |= {"toy": toy_config(*size), "best_cell": best["name"], "agreement": agreement}
    (RESULTS / f"{name}.json").write_text(json.dumps({**facts, "unit": unit, "rows": rows}, indent=2) + "\n")
