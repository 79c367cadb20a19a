"""Held-out losses of the smoke run against the stock libraries and against the evaluation after the phase."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from posttrain.data.shard import Shard
from posttrain.run.folder import ASSETS
from posttrain.run.journal import read_lines
from tests.end_to_end.runs import KILLED, result, smoke


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke run up to GRPO."""
    runs = tmp_path_factory.mktemp("runs")
    assert smoke(runs, fault="train.step#12:kill").returncode == KILLED
    return runs


def rows(run: Path, phase: str) -> dict[int, dict]:
    return {row["step"]: row for row in read_lines(run / "smoke" / "phases" / phase / "metrics.jsonl")}


def test_it_is_the_cross_entropy_of_the_saved_adapter_on_the_held_out_set(run: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_base", dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, run / "smoke" / "phases" / "tool_sft" / "final").eval()
    shard = Shard(run / "smoke" / "phases" / "data" / "data" / "tool_calls_heldout")
    total, count = 0.0, 0
    for sample in range(len(shard)):
        ids = torch.from_numpy(shard.tokens(sample).astype("int64"))
        mask = torch.from_numpy(shard.targets(sample).astype(bool))[1:]
        with torch.no_grad():
            logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        total -= float(logprobs.gather(1, ids[1:, None])[:, 0][mask].sum())
        count += int(mask.sum())
    found = rows(run, "tool_sft")
    assert [step for step, row in found.items() if "held_out_loss" in row] == [2, 4]
    assert found[4]["held_out_loss"] == pytest.approx(total / count, abs=1e-5)
    assert result(run, "tool_sft")["metrics"]["held_out_loss"] == found[4]["held_out_loss"]


def test_of_pairs_it_agrees_with_the_evaluation_of_the_state(run: Path) -> None:
    last = rows(run, "preference")[3]
    evaluated = result(run, "eval_preference")["metrics"]
    assert last["held_out_accuracy"] == evaluated["preferences.accuracy"]
    assert last["held_out_margin"] == pytest.approx(evaluated["preferences.margin"], rel=1e-4)
