"""Decode rate of the in-process sampler beside transformers' `generate`, greedy, same model and prompts, one process.

`python -m bench.decode [--repeats 5] [--large]` prints a table and writes `bench/results/decode.json`. Rates are of new
tokens, prefill included; the peer runs with each experts implementation, and its best one counts.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GptOssConfig

from posttrain.engine.model import load_model
from posttrain.host import machine
from posttrain.recipe.types import Sampling
from posttrain.rollout.in_process import InProcessSampler
from posttrain.run.manifest import package_versions

RESULTS = Path(__file__).parent / "results" / "decode.json"
TINY = Path(__file__).parents[1] / "posttrain" / "assets" / "tiny_base"
PEER_EXPERTS = ("eager", "grouped_mm")
"""`batched_mm` gathers the weights of every token: 14 tokens/s where the others had 140 (100M, batch 8)."""
PROMPT, NEW = 64, 128


def large_model(folder: Path) -> Path:
    """A random GPT-OSS of 100M parameters."""
    config = GptOssConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=14,
        num_experts_per_tok=4,
        sliding_window=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def peer(folder: Path, experts: str, prompts: list[list[int]]) -> Callable[[], list[list[int]]]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation=experts
    )
    ids = torch.tensor(prompts)

    def generate() -> list[list[int]]:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, PROMPT:].tolist()

    return generate


def ours(folder: Path, prompts: list[list[int]]) -> Callable[[], list[list[int]]]:
    sampler = InProcessSampler(load_model(folder), frozenset(), "float32", 1 << 20)
    sampling = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=NEW, max_turns=1)
    return lambda: [sampled.tokens for sampled in sampler.sample(prompts, [0] * len(prompts), sampling)]


def measure(name: str, folder: Path, batch: int, repeats: int) -> dict[str, Any]:
    """Rates in tokens/s of both, alternating; the greedy tokens must be equal."""
    generator = torch.Generator().manual_seed(batch)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    prompts = torch.randint(2, vocabulary, (batch, PROMPT), generator=generator).tolist()
    cells = {"posttrain": ours(folder, prompts)} | {
        f"transformers {experts}": peer(folder, experts, prompts) for experts in PEER_EXPERTS
    }
    answers = {cell: run() for cell, run in cells.items()}
    rates: dict[str, list[float]] = {cell: [] for cell in cells}
    for _ in range(repeats):
        for cell, run in cells.items():
            started = time.perf_counter()
            run()
            rates[cell].append(batch * NEW / (time.perf_counter() - started))
    return {"model": name, "batch": batch} | beside_the_best(rates, answers)


def beside_the_best(rates: dict[str, list[float]], answers: dict[str, list[Any]]) -> dict[str, Any]:
    """The cell `posttrain` beside the fastest other one: rates, ratio of each turn, and how many answers are equal."""
    ours = "posttrain"
    best = max((cell for cell in rates if cell != ours), key=lambda cell: statistics.median(rates[cell]))
    ratios = [a / b for a, b in zip(rates[ours], rates[best], strict=True)]
    equal = sum(a == b for a, b in zip(answers[ours], answers[best], strict=True))
    return {
        "tokens_per_second": {cell: [round(rate, 1) for rate in values] for cell, values in rates.items()},
        "peer": best,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "equal_sequences": f"{equal}/{len(answers[ours])}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--models", nargs="+", choices=("tiny", "100M"), default=["tiny", "100M"])
    asked = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folders = {"tiny": lambda: TINY, "100M": lambda: large_model(Path(place))}
        for name in asked.models:
            folder = folders[name]()
            for batch in asked.batches:
                row = measure(name, folder, batch, asked.repeats)
                rows.append(row)
                cells = row["tokens_per_second"]
                numbers = "  ".join(f"{cell} {statistics.median(values):8.1f}" for cell, values in cells.items())
                ratio = row["ratio"]
                print(
                    f"{name:5} batch {batch:3d}  {numbers}  ratio {ratio['median']:.2f} "
                    f"({ratio['min']:.2f} to {ratio['max']:.2f}), equal {row['equal_sequences']}",
                    flush=True,
                )
    facts = {"hardware": machine.facts(), "threads": torch.get_num_threads(), "load_before": load}
    facts |= {"python": sys.version.split()[0], "packages": package_versions()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**facts, "prompt": PROMPT, "new_tokens": NEW, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
