"""What `posttrain run smoke` exports is the model it trained, in the programs that will load it and in our commands."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.cli.main import main
from posttrain.engine.forward import head_weight, hidden_states
from posttrain.engine.model import load_model
from posttrain.engine.packing import Item, pack
from posttrain.phases.chosen_model import of_run
from posttrain.pipeline.base import resolve_base
from posttrain.recipe.types import Execution
from posttrain.run import recipe_file
from posttrain.run.folder import RunFolder, digest_folder
from tests.end_to_end.runs import KILLED, posttrain, result, smoke
from tests.export.test_gguf import needs_llama


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs_dir = tmp_path_factory.mktemp("runs")
    done = smoke(runs_dir, "--cases", "20", "--name", "smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    return runs_dir


def test_folder_and_adapter_load_in_stock_libraries_with_the_logits_of_training(runs):
    run = RunFolder(runs / "smoke")
    state = result(runs, "grpo")["state"]
    exports = run.phase("export").path / "exports"
    merged = AutoModelForCausalLM.from_pretrained(exports / "hf", dtype=torch.float32, attn_implementation="eager")
    bare = AutoModelForCausalLM.from_pretrained(
        run.model_folder(state["base"]), dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(exports / "hf")
    trained = load_model(run.model_folder(state["base"]), run.model_folder(state["adapter"]))
    for text in ("Please find the velmo in torko.", 'def f(a, b):\n    """a plus b"""\n    return a - b\n'):
        ids = tokenizer(text, return_tensors="np")["input_ids"][0]
        row = torch.tensor(ids)[None]
        with torch.no_grad():
            batch = pack([Item(ids[:0], (ids,), (ids >= 0,))], 0)
            ours = hidden_states(trained, batch) @ head_weight(trained).T
            torch.testing.assert_close(merged(row).logits[0], ours, atol=1e-4, rtol=0)
    adapted = PeftModel.from_pretrained(bare, exports / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(adapted(row).logits[0], ours, atol=1e-4, rtol=0)


@needs_llama
def test_every_export_is_verified_on_twenty_prompts(runs):
    rows = {row["pair"]: row for row in result(runs, "export")["details"]["verification"]}
    measured = rows.pop("engine / merged in float32")
    assert measured["max_abs"] <= 1e-4
    assert len(rows) == 3
    assert {row["status"] for row in rows.values()} == {"agrees"}, rows
    assert all(row["prompts"] == 20 for row in rows.values())
    assert rows["GGUF f32 in llama.cpp / merged"]["greedy_agreement"] == 1.0
    for row in rows.values():
        assert row["left_perplexity"] == pytest.approx(row["right_perplexity"], rel=1e-3), row


@needs_llama
def test_a_gguf_that_fails_is_said_and_tried_again_by_the_next_run(tmp_path, monkeypatch):
    """llama.cpp that breaks stands for what can go wrong with the file; the run itself is none the worse."""
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "node").write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    (broken / "node").chmod(0o755)
    whole = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{broken}:{whole}")
    flags = ("--cases", "4", "--name", "smoke")
    done = smoke(tmp_path, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    failed = result(tmp_path, "export")
    assert failed["details"]["unfinished"] == ["gguf"] and failed["metrics"]["gguf_ok"] == 0
    assert any("GGUF failed" in note and "broken" in note for note in failed["notes"])
    again = smoke(tmp_path, *flags)
    assert again.returncode == 0 and "export (export): resuming" in again.stdout
    monkeypatch.setenv("PATH", whole)
    assert smoke(tmp_path, *flags).returncode == 0
    mended = result(tmp_path, "export")
    assert mended["details"]["unfinished"] == [] and mended["metrics"]["gguf_ok"] == 1
    assert "nothing left to do" in smoke(tmp_path, *flags).stdout


def test_a_runs_best_model_is_exported_killed_or_not(runs):
    def export(output: Path, fault: str | None = None):
        words = ("--formats", "hf,mxfp4,gguf,ollama", "--gguf", "q8_0", "--output", str(output), "--threads", "1")
        return posttrain("export", "smoke", "--runs-dir", str(runs), *words, fault=fault)

    whole = export(runs / "whole")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert f"exporting {result(runs, 'export')['details']['chosen']}: the best of" in whole.stdout
    for point in ("merge.tensor_written#9", "gguf.tensor_written#9", "export.gguf_written", "export.ollama_written"):
        assert export(runs / "killed", f"{point}:kill").returncode == KILLED, point
        final = {entry.name for entry in (runs / "killed").rglob("*.gguf")}
        assert all(not name.startswith(".") for name in final)
    assert export(runs / "killed").returncode == 0
    for folder in ("hf", "mxfp4", "gguf-q8_0", "ollama"):
        assert digest_folder(runs / "killed" / folder) == digest_folder(runs / "whole" / folder), folder


def test_a_push_asks_first_and_brings_the_runs_card(runs, monkeypatch):
    calls: list[dict[str, Any]] = []

    class Hub:
        def create_repo(self, repo_id: str, **settings: Any) -> None:
            calls.append({"repo_id": repo_id, **settings})

        def upload_folder(self, **settings: Any) -> None:
            calls.append(settings)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    words = ["push", "smoke", "--runs-dir", str(runs), "--repo", "me/model"]
    refused = CliRunner().invoke(main, words, input="n\n")
    assert refused.exit_code == 0 and "nothing was pushed" in refused.output and calls == []
    done = CliRunner().invoke(main, [*words, "--yes"])
    assert done.exit_code == 0, done.output
    assert calls[0] == {"repo_id": "me/model", "private": True, "exist_ok": True}
    card = (Path(calls[1]["folder_path"]) / "README.md").read_text()
    assert card.startswith("---\nlicense: ")
    for part in ("## Exports", "engine / merged", "left perplexity", "## Recipe", '"seed"'):
        assert part in card, part
    missing = CliRunner().invoke(main, [*words, "--export", "gguf-q4_0"])
    assert missing.exit_code == 2 and "has no export 'gguf-q4_0'; it has " in missing.output


def answers(path: Path) -> dict[str, tuple[object, ...]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["id"]: (row["completion"], row["score"], row["parts"]) for row in rows if row["dataset"] == "tools"}


def test_a_state_answers_the_eval_command_as_it_answered_its_evaluation_phase(runs):
    asked = ("--set", "tools", "--limit", "20", "--max-new-tokens", "96", "--max-turns", "2", "--threads", "1")
    done = posttrain("eval", "smoke", "--runs-dir", str(runs), "--state", "tool_sft", "--device", "cpu", *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunFolder(runs / "smoke")
    found = answers(run.evaluations / "tool_sft-tools" / "answers.jsonl")
    assert len(found) == 20 and found == answers(run.phase("eval_tool_sft").answers)
    words = ("report", "--runs-dir", str(runs), "--before", "smoke/eval_tool_sft", "--after", "smoke/tool_sft-tools")
    assert "Nothing changed: all 20 cases score the same." in posttrain(*words, "--gate").stdout


def test_a_checkpoint_can_be_asked_too(runs, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Please find the velmo in torko.\n")
    words = ("generate", "--model", "smoke", "--runs-dir", str(runs), "--prompts", str(prompts))
    words = (*words, "--max-new-tokens", "4", "--device", "cpu", "--threads", "1", "--state")
    done = posttrain(*words, "tool_sft/checkpoint-2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["new_tokens"] == 4
    refused = posttrain(*words, "tool_sft/checkpoint-3")
    assert refused.returncode == 2 and "tool_sft/checkpoint-2" in refused.stderr


def test_a_checkpoint_is_loaded_whole(runs):
    run = RunFolder(runs / "smoke")
    recipe = recipe_file.load(run.recipe)
    for name in ("tool_sft/checkpoint-2", "agent_sft/checkpoint-2"):
        model = of_run(run, resolve_base(recipe, run), name).load(Execution(device="cpu", threads=1), "float32")
        phase, folder = name.split("/")
        stored = load_file(run.phase(phase).path / folder / "trainable.safetensors")
        assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in stored.items())
        for tensor_name, tensor in stored.items():
            assert torch.equal(model.get_parameter(tensor_name), tensor)


def test_tasks_asked_while_a_phase_trains_score_as_in_the_evaluation_after_it(runs):
    rows = [json.loads(line) for line in RunFolder(runs / "smoke").phase("grpo").metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if "held_out_score" in row] == [1, 2, 3]
    evaluated = result(runs, "eval_grpo")["metrics"]
    parts = {name.removeprefix("repair."): value for name, value in evaluated.items() if name.startswith("repair.")}
    assert parts == {part: rows[-1][f"held_out_{part}"] for part in parts} and "hidden" in parts
    assert result(runs, "grpo")["metrics"]["held_out_score"] == parts["score"]
