"""How fast models are merged and written as GGUF, beside the disk and beside PEFT, and how much memory that takes.

`python -m bench.export` makes a random GPT-OSS of 2 GB in a temporary folder, merges an adapter into it and writes it
as GGUF, in turn with plain writes of as many bytes (`disk` past the page cache, the fastest seen; `disk, cached`
through it and synced at the end, as most programs do); then PEFT's `merge_and_unload` and `save_pretrained` on the
same files, the types that arithmetic limits, and computations without a disk (`compute ...`). `--one-layer` takes one
layer of the 20B model's shapes instead, with its embedding and head. Everything is a process of its own, timed inside
after its imports; files are synced before the clock stops, the model that is read has just been read. Prints tables
and writes `bench/results/export*.json`.
"""

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posttrain.host import machine
from posttrain.run.manifest import package_versions

RESULTS = Path(__file__).parent / "results"
RANK = 16
TOY = {
    "hidden_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 32768,
    "sliding_window": 128,
}
ONE_LAYER = {"num_hidden_layers": 1}
"""Of the 20B model, whose other shapes are the config's defaults."""
WRITTEN = ("disk", "disk, cached", "merge", "gguf bf16")
"""What the disk is meant to limit: in turn, several times."""
COMPUTED = ("mxfp4", "gguf q8_0", "gguf auto", "compute merge", "compute gguf bf16", "compute gguf q8_0")
"""What arithmetic limits, and arithmetic alone."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.export", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often the disk and what it limits alternate")
    parser.add_argument("--layers", type=int, default=TOY["num_hidden_layers"], help="of the random model, 0.2 GB each")
    parser.add_argument("--one-layer", action="store_true", help="one layer of the 20B shape")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(2)
    machine.keep_freed_memory()
    if given.child:
        what, source, target = given.child
        print(json.dumps(child(what, Path(source), Path(target))))
        return
    with tempfile.TemporaryDirectory(prefix="bench-export-") as folder:
        source = Path(folder) / "source"
        make_model(source, ONE_LAYER if given.one_layer else TOY | {"num_hidden_layers": given.layers})
        plan = [*WRITTEN * given.rounds, *(() if given.one_layer else ("peft",) * 2), *COMPUTED]
        measured: dict[str, list[dict[str, float]]] = {}
        for what in plan:
            found = run_child(what, source, Path(folder) / "target")
            print(f"{what}: {found['seconds']:.2f} s", flush=True)
            measured.setdefault(what, []).append(found)
    rows = [summary(what, found) for what, found in measured.items()]
    show(rows)
    facts: dict[str, Any] = {"hardware": machine.facts(), "load": os.getloadavg()[0], "packages": package_versions()}
    RESULTS.mkdir(exist_ok=True)
    name = "export_one_layer.json" if given.one_layer else "export.json"
    (RESULTS / name).write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


def make_model(source: Path, settings: dict[str, Any]) -> None:
    """A random bfloat16 base and a float32 adapter on attention and experts, written tensor by tensor."""
    from transformers import GptOssConfig

    from posttrain.export.expected import expected_shapes
    from posttrain.export.tensors import ShardWriter, TensorFolder, TensorSpec
    from posttrain.export.weights import find_weights, read_config

    base, adapter = source / "base", source / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    GptOssConfig(tie_word_embeddings=False, **settings).save_pretrained(base)
    write_vocabulary(base)
    noise = torch.randn(1 << 22).mul_(0.02)
    shapes = expected_shapes(base)
    specs = [TensorSpec(name, shape, torch.bfloat16) for name, shape in sorted(shapes.items())]
    write_random(base / "model.safetensors", specs, noise.bfloat16(), ShardWriter)
    factors = []
    for weight in find_weights(TensorFolder(base), read_config(base)).values():
        attention = weight.name.endswith("_proj.weight") and "self_attn" in weight.name
        if not (weight.experts or attention) or weight.name.endswith("bias"):
            continue
        nested = ".base_layer" if weight.name.endswith("gate_up_proj") else ""
        key = f"base_model.model.{weight.name.rpartition('.')[0]}{nested}"
        experts = max(weight.experts, 1)
        factors.append(TensorSpec(f"{key}.lora_A.weight", (experts * RANK, weight.columns), torch.float32))
        factors.append(TensorSpec(f"{key}.lora_B.weight", (weight.rows, RANK * experts), torch.float32))
    write_random(adapter / "adapter_model.safetensors", factors, noise, ShardWriter)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def write_vocabulary(base: Path) -> None:
    """The smallest byte-level vocabulary a GGUF file can be given."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({text: index for index, text in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(base / "tokenizer.json"))


def write_random(file: Path, specs: list[Any], noise: torch.Tensor, writer_type: Callable[..., Any]) -> None:
    with writer_type(file, specs) as writer:
        for spec in specs:
            left = spec.bytes // spec.dtype.itemsize
            while left:
                part = noise[: min(left, noise.numel())]
                writer.write(part)
                left -= part.numel()


def child(what: str, source: Path, target: Path) -> dict[str, float]:
    """Do one thing; seconds, bytes written, and the peak memory of this process."""
    target.mkdir()
    work = prepare(what, source, target)
    before = machine.peak_bytes()
    started = time.perf_counter()
    work()
    for file in target.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    seconds = time.perf_counter() - started
    written = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return {"seconds": seconds, "bytes": written, "peak_bytes": machine.peak_bytes(), "imports_bytes": before}


def prepare(what: str, source: Path, target: Path) -> Callable[[], None]:
    """Import what is needed, and return the work to be timed."""
    base, adapter = source / "base", source / "adapter"
    if what.startswith("disk"):
        size, direct = (base / "model.safetensors").stat().st_size, what == "disk"
        return lambda: write_plainly(target / "plain", size, direct)
    if what == "peft":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        def merge() -> None:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
            PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)

        return merge
    from posttrain.export import gguf
    from posttrain.export import merge as merging

    if what in ("merge", "mxfp4"):
        plan = merging.plan_merge(base, adapter, torch.bfloat16, what == "mxfp4")
        return lambda: merging.apply_merge(plan, target) and None
    if what.startswith("gguf "):
        kind: Any = what.removeprefix("gguf ")
        return lambda: gguf.write_gguf(base, target / "model.gguf", kind, "bench", adapter)
    return lambda: compute(what.removeprefix("compute "), base, adapter)


def write_plainly(file: Path, size: int, direct: bool) -> None:
    """In sequence, nothing computed: past the page cache, or through it and synced at the end, as programs do."""
    part = mmap.mmap(-1, 16 << 20)
    part.write(os.urandom(len(part)))
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0))
    for _ in range(0, size, len(part)):
        os.write(descriptor, part)
    os.ftruncate(descriptor, size)
    os.fsync(descriptor)
    os.close(descriptor)


def compute(what: str, base: Path, adapter: Path) -> None:
    """Read, merge and encode everything, and write nothing."""
    from posttrain.export.gguf import plan_gguf
    from posttrain.export.merge import MergedWeights, plan_merge, written_parts
    from posttrain.export.stream import in_order
    from posttrain.export.survival import Survivals

    if what == "merge":
        weights, survivals = MergedWeights(base, adapter), Survivals(base)
        for tensor in plan_merge(base, adapter, torch.bfloat16).tensors:
            for _ in written_parts(tensor, weights, survivals):
                pass
        return
    kind: Any = what.removeprefix("gguf ")
    for stored in plan_gguf(base, kind, adapter).tensors:
        for _ in in_order(stored.parts()):
            pass


def run_child(what: str, source: Path, target: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.export", "--child", what, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    subprocess.run(["rm", "-rf", str(target)], check=True)
    if done.returncode:
        raise RuntimeError(f"{what} failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(what: str, found: list[dict[str, float]]) -> dict[str, Any]:
    seconds = [round(one["seconds"], 3) for one in found]
    median = statistics.median(seconds)
    return {
        "what": what,
        "seconds": seconds,
        "median_s": median,
        "bytes": found[0]["bytes"],
        "bytes_per_s": found[0]["bytes"] / median,
        "peak_bytes": max(one["peak_bytes"] for one in found),
        "imports_bytes": max(one["imports_bytes"] for one in found),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """`of disk`: the bytes written per second over those of a plain write; without a disk, seconds alone count."""
    by_name = {row["what"]: row for row in rows}
    disk = by_name["disk"]["bytes_per_s"]
    heads = f"{'what':17} {'median s':>9} {'all s':>28} {'GB':>6} {'MB/s':>7} {'of disk':>8}"
    print(f"{heads} {'peak MB':>8} {'imports MB':>10}")
    for row in rows:
        every = " ".join(f"{one:.2f}" for one in row["seconds"])
        rate = f"{row['bytes_per_s'] / 1e6:7.0f} {row['bytes_per_s'] / disk:8.0%}"
        memory = f"{row['peak_bytes'] / 1e6:8.0f} {row['imports_bytes'] / 1e6:10.0f}"
        print(f"{row['what']:17} {row['median_s']:9.2f} {every:>28} {row['bytes'] / 1e9:6.2f} {rate} {memory}")
    if "peft" in by_name:
        print(f"merge beside PEFT: {by_name['peft']['median_s'] / by_name['merge']['median_s']:.1f} times as fast")


if __name__ == "__main__":
    main()
