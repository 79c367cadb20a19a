"""SFT steps of a GPT-OSS-20B of random weights on one GPU: `python -m bench.gpu.sft [CELL …]`.

Every row is one document of full length and every token of it a target: the most work that so many tokens can be.
"""

import argparse
import json
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu import model as shape
from posttrain.engine.activations import keep_activations
from posttrain.engine.device import fuse_layers, keep_vocabulary_on_cpu, prepare_device
from posttrain.engine.objectives import sft_sum
from posttrain.engine.packing import Item
from posttrain.engine.step import train_step
from posttrain.host import machine
from posttrain.recipe.types import Execution
from posttrain.run.manifest import package_versions


@dataclass(frozen=True)
class Cell:
    tokens: int
    packed: bool
    execution: dict[str, Any]
    aim: str
    """What the project wants on an H200."""


CELLS = {
    "8k": Cell(8192, False, {}, ">= 16000 tok/s"),
    "8k-selective": Cell(8192, False, {"recompute": "selective"}, ""),
    "8k-full": Cell(8192, False, {"recompute": "full"}, ""),
    "32k": Cell(32768, False, {"recompute": "selective"}, ">= 9000 tok/s"),
    "32k-full": Cell(32768, False, {"recompute": "full"}, ""),
    "mxfp4-8k": Cell(8192, True, {"recompute": "full"}, ">= 11000 tok/s in <= 30 GB"),
    "128k": Cell(131072, False, {"recompute": "full", "mlp_tile_tokens": 16384}, "runs"),
}


def document(tokens: int, seed: int) -> Item:
    ids = np.random.default_rng(seed).integers(2, 200_000, tokens)
    return Item(np.empty(0, np.int64), (ids,), (np.ones(tokens, bool),))


def measure(name: str, cell: Cell, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    execution = Execution(device="cuda", micro_batch_tokens=cell.tokens, compile=options.compile, **cell.execution)
    prepare_device(execution, "bfloat16")
    shape.clear()
    model = shape.make(options.layers, options.rank, cell.packed)
    if execution.vocabulary == "cpu":
        keep_vocabulary_on_cpu(model)
    fuse_layers(model, "bfloat16")
    keep_activations(model, execution)
    optimizer = shape.optimizer_of(model)
    seconds, losses = [], []

    def step(number: int) -> None:
        report = train_step(
            model,
            optimizer,
            [document(cell.tokens, number)],
            lambda logprob_N, batch: (sft_sum(logprob_N), {}),
            denominator=cell.tokens - 1,
            learning_rate=1e-5,
            clip_norm=1.0,
            precision="bfloat16",
            micro_batch_tokens=cell.tokens,
            step=number,
        )
        torch.cuda.synchronize()
        losses.append(report.loss)

    started = time.perf_counter()
    step(0)
    first = time.perf_counter() - started
    for number in range(1, options.warm):
        step(number)
    if options.steps:
        torch.cuda.reset_peak_memory_stats()
    for number in range(options.warm, options.warm + options.steps):
        started = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated()
    # With no further step the first one counts, compilation and all.
    rates = [cell.tokens / second for second in seconds or [first]]
    row = {
        "cell": name,
        **asdict(cell),
        "layers": options.layers,
        "rank": options.rank,
        "tokens_per_second": statistics.median(rates),
        "range": [min(rates), max(rates)],
        "first_step_s": first,
        "peak_bytes": peak,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "losses": losses,
    }
    print(
        f"{name:14} {row['tokens_per_second']:9.0f} tok/s ({min(rates):.0f} to {max(rates):.0f})  "
        f"peak {peak / 1e9:6.1f} GB  first step {first:5.1f} s  loss {losses[0]:.3f}  {cell.aim}",
        flush=True,
    )
    if options.profile:
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            step(100)
        table = seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=110)
        (out / f"profile_{name}.txt").write_text(table)
    return row


def facts() -> dict[str, Any]:
    """Hardware, versions and commit of a result."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {"hardware": machine.facts(), "packages": package_versions(), "commit": commit or None}
    return found | {"cuda": torch.version.cuda, "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sft", description=__doc__)
    parser.add_argument("cells", nargs="*", default=["8k", "32k", "mxfp4-8k", "128k"], help=", ".join(CELLS))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm", type=int, default=2, help="steps before those that count, the first one included")
    parser.add_argument("--compile", choices=("auto", "off"), default="auto")
    parser.add_argument("--profile", action="store_true", help="write a table of kernels beside the results")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    machine.set_thread_environment(8)
    rows = []
    for name in options.cells:
        try:
            rows.append(measure(name, CELLS[name], options, options.out))
        except torch.OutOfMemoryError as error:
            print(f"{name:14} out of memory: {str(error)[:160]}", flush=True)
            rows.append({"cell": name, **asdict(CELLS[name]), "out_of_memory": str(error)})
    (options.out / "gpu_sft.json").write_text(json.dumps({**facts(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
