import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.errors import InputError, ModelError, PhaseFault
from posttrain.export.commit import committing, is_committed
from posttrain.export.merge import apply_merge, plan_merge
from posttrain.export.tensors import ShardWriter, TensorSpec
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
    (base / "config.json").write_text('{"model_type": "gpt_oss"}')
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
    with pytest.raises(PhaseFault, match=r"model\.layers\.0\.mlp\.experts\.down_proj\[2\] would be NaN"):
        merge(base, tmp_path, tmp_path / "merged")


def child(base: Path, adapter: Path, target: Path, fault: str) -> int:
    """One committed merge in a process of its own, with a fault; 0 when it ended well, else signal or code."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.environ["POSTTRAIN_FAULT"] = fault
            with committing(target, {"of": "test"}, "merge.before_commit") as folder:
                apply_merge(plan_merge(base, adapter, torch.float32), folder)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


KILLS = (
    "merge.tensor_written#1",
    "merge.tensor_written#20",
    "merge.shard_written#1",
    "merge.shard_written#3",
    "merge.before_commit",
    "export.note_written",
    "export.renamed",
)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child must not wait for threads it does not have
    monkeypatch.setattr("posttrain.export.merge.split_shards.__defaults__", (150_000,))
    yield
    torch.set_num_threads(threads)


def test_a_kill_anywhere_leaves_nothing_half_done_and_the_next_run_ends_with_the_same_bytes(
    base: Path, adapter: Path, tmp_path: Path, small_shards: None
) -> None:
    assert child(base, adapter, tmp_path / "undisturbed", "") == 0
    whole = digest_folder(tmp_path / "undisturbed")
    target = tmp_path / "final"
    for point in KILLS:
        assert child(base, adapter, target, f"{point}:kill") == -signal.SIGKILL, point
        assert not target.exists() or is_committed(target, {"of": "test"}), point
    assert is_committed(target, {"of": "test"}) and not is_committed(target, {"of": "something else"})
    # Interrupted again and again, then once more from the start of it.
    for points in (KILLS[:1], KILLS[2:4], KILLS[4:6]):
        shutil.rmtree(target)
        for point in points:
            child(base, adapter, target, f"{point}:kill")
        assert child(base, adapter, target, "") == 0
        assert digest_folder(target) == whole
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [
            "final",
            "final.made.json",
            "undisturbed",
            "undisturbed.made.json",
        ]


def test_whole_shards_of_a_killed_merge_are_not_written_again(
    base: Path, adapter: Path, tmp_path: Path, small_shards: None
) -> None:
    target = tmp_path / "final"
    assert child(base, adapter, target, "merge.shard_written#2:kill") == -signal.SIGKILL
    kept = sorted((tmp_path / ".final.partial").glob("*.safetensors"))
    assert len(kept) == 2
    before = [file.stat().st_mtime_ns for file in kept]
    assert child(base, adapter, target, "") == 0
    assert [(target / file.name).stat().st_mtime_ns for file in kept] == before
    # Made from something else, they are.
    assert child(base, adapter, target, "merge.shard_written#2:kill") == -signal.SIGKILL
    with committing(target, {"of": "another"}, "merge.before_commit") as folder:
        assert list(folder.iterdir()) == []
        apply_merge(plan_merge(base, None, torch.float32), folder)
    assert is_committed(target, {"of": "another"})


@pytest.mark.parametrize("point", ["merge.tensor_written#20", "merge.shard_written#2", "merge.before_commit"])
def test_a_full_disk_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None, point: str
) -> None:
    monkeypatch.setenv("POSTTRAIN_FAULT", f"{point}:full")
    with (
        pytest.raises(OSError, match="No space left"),
        committing(tmp_path / "final", {"of": "test"}, "merge.before_commit") as folder,
    ):
        apply_merge(plan_merge(base, adapter, torch.float32), folder)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_under_the_writer_is_told_and_leaves_no_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the writing thread meets a real error of the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    specs = [TensorSpec(f"t{index}", (1024,), torch.float32) for index in range(64)]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(OSError, match="File too large"), ShardWriter(tmp_path / "x.safetensors", specs) as writer:
            for _ in specs:
                writer.write(torch.zeros(1024))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "thesis.txt").write_text("mine")
    with (
        pytest.raises(InputError, match="final exists and was not written by an export"),
        committing(tmp_path / "final", {"of": "test"}, "x"),
    ):
        pass
    assert (tmp_path / "final" / "thesis.txt").read_text() == "mine"
