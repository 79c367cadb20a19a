"""Prepared data is shared between runs, and rows filled with samples train like the samples alone."""

import json
import shutil
from pathlib import Path

import pytest

from posttrain.data.shard import Shard
from posttrain.host.cache import cache_folder
from posttrain.run.journal import read_lines
from tests.end_to_end.runs import KILLED, posttrain

SMALL = str(Path(__file__).parent / "recipes" / "small_sft.py")
WRITTEN = "prepare.dataset_written"


def run_small(runs_dir: Path, name: str, *flags: object, fault: str | None = None) -> int:
    words = ["run", SMALL, "--name", name, "--runs-dir", runs_dir, "--threads", "2", *flags]
    done = posttrain(*map(str, words), fault=fault)
    assert done.returncode in (0, KILLED), done.stdout + done.stderr
    return done.returncode


def losses(runs_dir: Path, name: str) -> list[float]:
    return [row["loss"] for row in read_lines(runs_dir / name / "phases" / "train" / "metrics.jsonl")]


def test_a_second_run_uses_what_the_first_one_made_and_outlives_the_cache(tmp_path: Path) -> None:
    assert run_small(tmp_path, "first") == 0
    # It would be killed if it wrote a dataset, and it goes on until its first step.
    assert run_small(tmp_path, "second", "--learning-rate", "0.002", fault=f"{WRITTEN}:kill") == 0
    tokens = [tmp_path / name / "phases" / "data" / "data" / "own" / "tokens.npy" for name in ("first", "second")]
    assert tokens[0].samefile(tokens[1])
    results = [
        json.loads((tmp_path / name / "phases" / "data" / "result.json").read_text()) for name in ("first", "second")
    ]
    digests = [result["details"]["datasets"]["own"]["digest"] for result in results]
    assert digests[0] == digests[1]

    shutil.rmtree(cache_folder())
    again = posttrain("run", SMALL, "--name", "first", "--runs-dir", str(tmp_path))
    assert again.returncode == 0 and "nothing left to do" in again.stdout
    # One that was damaged is not used.
    assert run_small(tmp_path, "third", "--learning-rate", "0.003") == 0
    [entry] = (cache_folder() / "shards").glob("[!.]*")
    (entry / "targets.npy").write_bytes(b"damaged")
    assert run_small(tmp_path, "fourth", "--learning-rate", "0.004", fault=f"{WRITTEN}:kill") == KILLED


def test_a_batch_in_rows_is_full_and_the_same_however_it_is_carried_out(tmp_path: Path) -> None:
    limits = ("--row-tokens", "1100")
    assert run_small(tmp_path, "whole", *limits) == 0
    assert run_small(tmp_path, "pieces", *limits, "--micro-batch-tokens", "1100") == 0
    assert losses(tmp_path, "pieces") == pytest.approx(losses(tmp_path, "whole"), abs=1e-5)
    phases = tmp_path / "whole" / "phases"
    lengths = Shard(phases / "data" / "data" / "own").lengths()
    rows = list(read_lines(phases / "train" / "metrics.jsonl"))
    # Eight samples in rows of 1100 tokens: three fit into each but the last.
    assert max(row["fill"] for row in rows) == max(row["tokens"] for row in rows) / 2200 > 0.7
    assert all(row["tokens"] > 2 * lengths.max() for row in rows)
    assert json.loads((phases / "train" / "result.json").read_text())["counts"]["samples_read"] > 6
