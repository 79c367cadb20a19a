import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.errors import ModelError, PhaseFault
from posttrain.export.merge import apply_merge, plan_merge
from posttrain.run.folder import digest_folder
from tests.export.toys import toy_adapter, toy_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("toy") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return toy_adapter(base, base.parent / "adapter")


def merge(
    base: Path, adapter: Path | None, target: Path, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    target.mkdir()
    apply_merge(plan_merge(base, adapter, dtype), target)
    return load_file(target / "model.safetensors")


def test_every_tensor_equals_pefts_own_merge(base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = merge(base, adapter, tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(stock, adapter).merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    before = load_file(base / "model.safetensors")
    changed = {name.split(".", 3)[-1] for name in merged if not torch.equal(merged[name], before[name])}
    linears = {f"self_attn.{letter}_proj.weight" for letter in "qkvo"}
    assert changed == linears | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


@pytest.mark.parametrize("parameter", ["experts.gate_up_proj", "experts.down_proj", "mlp.router.weight"])
def test_one_parameter_alone_lands_where_peft_puts_it(base: Path, tmp_path: Path, parameter: str) -> None:
    adapter = toy_adapter(base, tmp_path / "adapter", target_modules=[], target_parameters=[parameter], use_rslora=True)
    merged = merge(base, adapter, tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, tensor in PeftModel.from_pretrained(stock, adapter).merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_bfloat16_is_the_float32_merge_rounded_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    exact = merge(base, adapter, tmp_path / "exact")
    rounded = merge(base, adapter, tmp_path / "rounded", torch.bfloat16)
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in exact.items())
    assert json.loads((tmp_path / "rounded" / "config.json").read_text())["dtype"] == "bfloat16"


def test_expert_factors_by_hand(tmp_path: Path) -> None:
    """Two experts, rank 2, one output: expert e uses rows e*2.. of A and columns e, e+2 of B."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({name: torch.zeros(2, 3, 1)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    a = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    b = torch.tensor([[1.0, 10, 100, 1000]])
    key = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    save_file({key.format("A"): a, key.format("B"): b}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["experts.down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    plan = plan_merge(base, adapter, torch.float32)
    assert list(plan.lines()) == [f"merge {name} [2, 3, 1] float32 rank 2 scale 2"]
    merged = merge(base, adapter, tmp_path / "merged")[name]
    assert merged[0, :, 0].tolist() == [2 * 1, 2 * 100, 0]
    assert merged[1, :, 0].tolist() == [2 * 1000, 2 * 1000, 2 * (10 + 1000)]


def test_without_an_adapter_the_weights_are_copied(base: Path, tmp_path: Path) -> None:
    plan = plan_merge(base, None, torch.float32)
    assert {tensor.action for tensor in plan.tensors} == {"copy"}
    merged = merge(base, None, tmp_path / "copy")
    assert all(torch.equal(merged[name], tensor) for name, tensor in load_file(base / "model.safetensors").items())
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_several_shards_load_as_one_model(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = merge(base, adapter, tmp_path / "whole")
    monkeypatch.setattr("posttrain.export.merge.split_shards.__defaults__", (100_000,))
    (tmp_path / "shards").mkdir()
    apply_merge(plan_merge(base, adapter, torch.float32), tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())


def test_an_adapter_of_another_base_is_refused_by_name_and_shape(base: Path, adapter: Path, tmp_path: Path) -> None:
    wider = toy_base(tmp_path / "wider", hidden_size=48)
    with pytest.raises(ModelError, match=r"lora_A.weight has shape \[\d+, \d+\].*another base"):
        plan_merge(wider, adapter, torch.float32)
    shallower = toy_base(tmp_path / "shallower", num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"tensor base_model\.model\.model\.layers\.2\..* has no place"):
        plan_merge(shallower, adapter, torch.float32)


def test_an_incomplete_adapter_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    with pytest.raises(ModelError, match=r"lacks a lora_A or lora_B tensor for model\.layers\.1\.self_attn\.k_proj"):
        plan_merge(base, tmp_path, torch.float32)


def test_a_setting_that_changes_the_meaning_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ModelError, match="use_dora is True"):
        plan_merge(base, tmp_path, torch.float32)


def test_a_value_that_is_not_finite_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    # Column 2 of lora_B belongs to expert 2 (the expert is fastest).
    tensors["base_model.model.model.layers.0.mlp.experts.lora_B.weight"][0, 2] = float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    with pytest.raises(PhaseFault, match=r"model\.layers\.0\.mlp\.experts\.down_proj\[2\] NaN"):
        merge(base, tmp_path, tmp_path / "merged")


MERGE_PROGRAM = """
import sys, torch
from pathlib import Path
from posttrain.export.commit import committing, is_committed
from posttrain.export.merge import apply_merge, plan_merge
torch.set_num_threads(1)
base, adapter, target = map(Path, sys.argv[1:])
with committing(target, {"of": "test"}, "merge.before_commit") as folder:
    apply_merge(plan_merge(base, adapter, torch.float32), folder)
assert is_committed(target, {"of": "test"}) and not is_committed(target, {"of": "something else"})
"""


def test_a_kill_leaves_nothing_half_done_and_a_second_run_gives_the_same_bytes(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    def run(target: Path, fault: str) -> int:
        command = [sys.executable, "-c", MERGE_PROGRAM, str(base), str(adapter), str(target)]
        return subprocess.run(command, env=os.environ | {"POSTTRAIN_FAULT": fault}, capture_output=True).returncode

    assert run(tmp_path / "undisturbed", "") == 0
    target = tmp_path / "final"
    for point in ("merge.shard_written", "merge.before_commit"):
        assert run(target, f"{point}:kill") == -signal.SIGKILL
        assert not target.exists()
    assert run(target, "merge.before_commit:full") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["undisturbed", "undisturbed.made.json"]
    assert run(target, "") == 0
    assert digest_folder(target) == digest_folder(tmp_path / "undisturbed")
