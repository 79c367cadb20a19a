"""What `posttrain run smoke` exports is the model it trained, in the programs that will load it."""

import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.engine.forward import head_weight, hidden_states
from posttrain.engine.model import load_model
from posttrain.engine.packing import Item, pack
from posttrain.run.folder import RunFolder
from tests.end_to_end.runs import result, smoke


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


def test_every_export_is_verified_on_twenty_prompts(runs):
    node = Path(os.environ.get("POSTTRAIN_TEST_TOOLS", "")) / "node_modules" / "node-llama-cpp"
    if not node.exists():
        pytest.skip("node-llama-cpp is missing: npm install it and set POSTTRAIN_TEST_TOOLS")
    rows = {row["pair"]: row for row in result(runs, "export")["details"]["verification"]}
    measured = rows.pop("engine / merged in float32")
    assert measured["max_abs"] <= 1e-4
    assert len(rows) == 3
    assert {row["status"] for row in rows.values()} == {"agrees"}, rows
    assert all(row["prompts"] == 20 for row in rows.values())
    assert rows["GGUF f32 in llama.cpp / merged"]["greedy_agreement"] == 1.0
