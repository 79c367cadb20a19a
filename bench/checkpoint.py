"""How long a checkpoint holds up a training step, and what resuming costs: `python -m bench.checkpoint`.

Saving: a state of 1 GB (weights and two moments of fused AdamW), steps of matrix products and an update. Ours, a
synchronous `torch.save`, and `torch.distributed.checkpoint.async_save` save in turn, two plain steps between them. The
stall is the time in the call that saves, and what the next update takes beyond its median without a save.

Resuming: the shipped tiny base with the quickstart's adapter of rank 16. Loading the model, then finding, verifying and
restoring the checkpoint; beside it `torch.load` of the same state, which verifies nothing.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from bench.toy import ADAMW
from posttrain.engine import adapters
from posttrain.engine.checkpoint import CheckpointWriter, TrainingState, newest
from posttrain.engine.model import load_model, trainable, unfreeze_adapter
from posttrain.engine.optimizer import make_optimizer
from posttrain.host import machine
from posttrain.recipe.types import Lora
from posttrain.run.folder import ASSETS
from posttrain.run.manifest import package_versions

RESULTS = Path(__file__).parent / "results"
SIDE = 1024
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "experts")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoint", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="weights and moments together")
    parser.add_argument("--step-s", type=float, default=2.0, help="about how long a step's passes take")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the state is and steps are made"
    )
    parser.add_argument("--no-peers", action="store_true", help="ours alone: three checkpoints may not fit on the disk")
    given = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as folder:
        saving = bench_saving(Path(folder), given)
        resuming = bench_resuming(Path(folder), given.rounds)
    load = os.getloadavg()[0]
    show(saving, "saving, seconds: median (least to most)")
    show(resuming, "resuming on the tiny base, seconds: median (least to most)")
    print(f"load average after: {load:.2f} on {os.cpu_count()} processors")
    facts = {"hardware": machine.facts(), "load_after": load, "packages": package_versions()}
    name = "checkpoint.json" if given.device == "cpu" else f"checkpoint_{given.device}.json"
    (RESULTS / name).write_text(
        json.dumps({**facts, "options": vars(given), "rows": saving + resuming}, indent=2) + "\n"
    )


def bench_saving(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    count = round(given.gigabytes * 1e9 / (12 * SIDE * SIDE))
    parameters = {str(number): nn.Parameter(torch.randn(SIDE, SIDE, device=given.device)) for number in range(count)}
    optimizer = make_optimizer(ADAMW, parameters)
    state = TrainingState(parameters, optimizer, "bench")
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    work = passes(given.step_s, given.device)
    writer = CheckpointWriter(state, folder / "ours", keep=1)
    plain: dict[str, Any] = {"what": "no checkpoint", "step_s": [], "update_s": []}
    rows = [plain]
    ways: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
        "posttrain": (lambda: writer.begin(1), lambda _: writer.wait()),
        "torch.save": (lambda: torch_save(state, folder / "state.pt"), lambda _: None),
        "torch.distributed.checkpoint.async_save": (
            lambda: dcp.async_save(as_dict(state), checkpoint_id=folder / "dcp", no_dist=True),
            lambda future: future.result(),
        ),
    }
    if given.no_peers:
        ways = {"posttrain": ways["posttrain"]}
    for what in ways:
        rows.append({"what": what, "call_s": [], "step_s": [], "update_s": [], "committed_s": []})
    for _ in range(given.rounds + 1):
        for row, (save, wait) in zip(rows[1:], ways.values(), strict=True):
            undisturbed = [step(work, optimizer) for _ in range(2)]
            started = time.perf_counter()
            future = save()
            called = time.perf_counter()
            seconds = step(work, optimizer)
            wait(future)
            for step_seconds, update_seconds in undisturbed:
                plain["step_s"].append(step_seconds)
                plain["update_s"].append(update_seconds)
            row["call_s"].append(called - started)
            row["step_s"].append(seconds[0])
            row["update_s"].append(seconds[1])
            row["committed_s"].append(time.perf_counter() - started)
    usual = statistics.median(plain["update_s"])
    for row in rows[1:]:
        row["stall_s"] = [a + max(0.0, b - usual) for a, b in zip(row["call_s"], row["update_s"], strict=True)]
        # The first save also gets its memory; the others are what a run lives with.
        row["first_stall_s"] = row["stall_s"][:1]
        for name in ("stall_s", "call_s", "step_s", "update_s", "committed_s"):
            row[name] = row[name][1:]
    return rows


def passes(seconds: float, device: str) -> Callable[[], None]:
    """Matrix products that take about so long."""
    a, b = (torch.randn(SIDE, SIDE, device=device) for _ in range(2))

    def work(count: int) -> None:
        for _ in range(count):
            a @ b
        arrived(device)

    work(20)
    started = time.perf_counter()
    work(20)
    count = round(seconds / ((time.perf_counter() - started) / 20))
    return lambda: work(count)


def arrived(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def step(work: Callable[[], None], optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Seconds of the whole step and of its update."""
    started = time.perf_counter()
    work()
    passed = time.perf_counter()
    optimizer.step()
    arrived(str(optimizer.param_groups[0]["params"][0].device.type))
    done = time.perf_counter()
    return done - started, done - passed


def as_dict(state: TrainingState) -> dict[str, Any]:
    return {"weights": {k: v.detach() for k, v in state.parameters.items()}, "optimizer": state.optimizer.state_dict()}


def torch_save(state: TrainingState, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(as_dict(state), file)
        file.flush()
        os.fsync(file.fileno())


def bench_resuming(folder: Path, rounds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"what": what, "seconds": []} for what in ("load the model", "find, verify, restore", "torch.load")
    ]
    for turn in range(rounds + 1):
        started = time.perf_counter()
        model = load_model(ASSETS / "tiny_base")
        adapters.attach(model, Lora(kind="lora", rank=16, alpha=32, targets=TARGETS))
        unfreeze_adapter(model)
        parameters = trainable(model)
        state = TrainingState(parameters, make_optimizer(ADAMW, parameters), "bench")
        loaded = time.perf_counter()
        if turn == 0:
            for parameter in parameters.values():
                parameter.grad = torch.randn_like(parameter)
            state.optimizer.step()
            writer = CheckpointWriter(state, folder / "tiny", keep=1)
            writer.begin(1)
            writer.wait()
            torch_save(state, folder / "tiny.pt")
            continue
        found, _ = newest(folder / "tiny")
        assert found is not None and state.restore(found) == 1
        restored = time.perf_counter()
        stored = torch.load(folder / "tiny.pt", weights_only=True)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored["weights"][name])
        state.optimizer.load_state_dict(stored["optimizer"])
        times = (loaded - started, restored - loaded, time.perf_counter() - restored)
        for row, seconds in zip(rows, times, strict=True):
            row["seconds"].append(seconds)
    return rows


def show(rows: list[dict[str, Any]], title: str) -> None:
    names = ("first_stall_s", "stall_s", "call_s", "update_s", "step_s", "committed_s", "seconds")
    columns = [name for name in names if any(name in row for row in rows)]
    print(f"\n{title}\n{'':42}" + "".join(f"{name:>22}" for name in columns))
    for row in rows:
        cells = ""
        for name in columns:
            found = row.get(name)
            told = f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})" if found else ""
            cells += f"{told:>22}"
        print(f"{row['what']:42}{cells}")


if __name__ == "__main__":
    main()
