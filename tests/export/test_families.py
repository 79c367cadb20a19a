"""Every family's merge against PEFT's own, and MXFP4 in and out."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from posttrain.engine import mxfp4
from posttrain.errors import ModelError
from posttrain.export.merge import apply_merge, plan_merge
from posttrain.export.survival import Survival, Survivals
from tests.export.toys import FAMILIES, any_adapter, dense_base, toy_base

EVERY = ("gpt_oss", *FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter of every family."""
    root = tmp_path_factory.mktemp("families")
    for family in EVERY:
        base = root / family / "base"
        toy_base(base) if family == "gpt_oss" else dense_base(base, family)
        any_adapter(base, root / family / "adapter")
    return root


def merge(base: Path, adapter: Path | None, target: Path, dtype: torch.dtype, mxfp4_experts: bool = False) -> Survivals:
    target.mkdir(parents=True)
    return apply_merge(plan_merge(base, adapter, dtype, mxfp4_experts), target)


def state(folder: Path, dtype: torch.dtype, **settings: object) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings).state_dict()


def bfloat16_steps(merged: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """How many bfloat16 numbers lie between two tensors; none where only float32's rounding of weights near 1 does,
    as in a sum that cancels to almost nothing."""
    steps = (merged.view(torch.int16).int() - exact.bfloat16().view(torch.int16).int()).abs()
    return torch.where((merged.double() - exact.double()).abs() <= 2**-23, 0, steps)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_equals_pefts_own_merge(folders: Path, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    base, adapter = folders / family / "base", folders / family / "adapter"
    merge(base, adapter, tmp_path / "merged", dtype)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(stock, adapter).merge_and_unload().state_dict()
    merged, before = state(tmp_path / "merged", dtype), state(base, torch.float32)
    assert merged.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        if dtype == torch.bfloat16:
            steps = bfloat16_steps(merged[name], tensor)
            assert steps.max() <= 1, name
            assert (steps == 0).float().mean() > 0.999, name
        else:
            torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
        changed += not torch.equal(tensor, before[name])
    assert changed == {"gpt_oss": 4 * 6, "qwen3_moe": 3 * 6}.get(family, 3 * 7)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3_text", "llama"])
def test_the_files_keep_the_names_of_the_base(folders: Path, tmp_path: Path, family: str) -> None:
    base = folders / family / "base"
    merge(base, folders / family / "adapter", tmp_path / "merged", torch.bfloat16)
    before, merged = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in before.items()}


# ---------------------------------------------------------------- MXFP4


def test_codes_by_hand() -> None:
    """2^-1 shared: 6·½ = 3 is the largest value, so the exponent is floor(log2 3) - 2 = -1, its byte 126."""
    values = torch.zeros(1, 32)
    values[0, :9] = torch.tensor([3.0, -3.0, 0.25, 0.125, -0.5, 0.13, 1.25, 1.75, -2.6])
    blocks, scales = mxfp4.encode(values)
    # In halves: 6, -6, .5, .25, -1, .26, 2.5, 3.5, -5.2. Ties go to the smaller number: .25 to 0, 2.5 to 2, 3.5 to 3.
    codes = [7, 15, 1, 0, 10, 1, 4, 5, 15, 0]
    assert scales.tolist() == [[126]]
    assert blocks[0, 0, :5].tolist() == [codes[2 * index] | codes[2 * index + 1] << 4 for index in range(5)]
    decoded = mxfp4.decode(blocks, scales)[0, :9].tolist()
    assert decoded == [3.0, -3.0, 0.25, 0.0, -0.5, 0.25, 1.0, 1.5, -3.0]


def test_decoding_is_transformers_own_for_every_code() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (8, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (8, 4), generator=generator, dtype=torch.uint8)
    stock = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].T
    assert torch.equal(mxfp4.decode(blocks, scales), stock)


def random_mxfp4_base(source: Path, target: Path) -> Path:
    """The toy with random MXFP4 codes for experts, negative zeros and coarse scales among them."""
    target.mkdir()
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(4)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, size_in, size_out = tensors.pop(name).shape
        shape = (experts, size_out, size_in // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 124, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def packed(folders: Path) -> Path:
    return random_mxfp4_base(folders / "gpt_oss" / "base", folders / "packed")


def test_untouched_blocks_come_back_code_for_code(folders: Path, packed: Path, tmp_path: Path) -> None:
    attention = any_adapter(folders / "gpt_oss" / "base", tmp_path / "adapter", target_parameters=None)
    survivals = merge(packed, attention, tmp_path / "merged", torch.bfloat16, mxfp4_experts=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "merged"))
    codes = [name for name in before if name.endswith(("_blocks", "_scales"))]
    assert len(codes) == 4 * 4
    assert all(torch.equal(before[name], after[name]) for name in codes)
    assert not torch.equal(
        before["model.layers.0.self_attn.q_proj.weight"].bfloat16(), after["model.layers.0.self_attn.q_proj.weight"]
    )
    assert survivals.by_weight == {}


def test_a_change_of_nothing_keeps_the_codes_of_its_groups(folders: Path, packed: Path, tmp_path: Path) -> None:
    """An adapter whose B is zero but for one expert and one output changes that row and no other."""
    adapter = any_adapter(folders / "gpt_oss" / "base", tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()
    key = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
    tensors[key][5, 2] = 3.0  # output 5 of expert 2
    save_file(tensors, file)
    merge(packed, adapter, tmp_path / "merged", torch.bfloat16, mxfp4_experts=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "merged"))
    name = "model.layers.1.mlp.experts.gate_up_proj_blocks"
    differs = (before[name] != after[name]).flatten(2).any(-1)
    assert differs.nonzero().tolist() == [[2, 5]]
    assert all(torch.equal(before[other], after[other]) for other in before if "_blocks" in other and other != name)


def test_an_mxfp4_base_merges_into_bfloat16_as_its_dequantized_self(
    folders: Path, packed: Path, tmp_path: Path
) -> None:
    adapter = folders / "gpt_oss" / "adapter"
    merge(packed, adapter, tmp_path / "merged", torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(
        packed, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    expected = PeftModel.from_pretrained(plain.float(), adapter).merge_and_unload().state_dict()
    merged = state(tmp_path / "merged", torch.bfloat16)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    for name, tensor in expected.items():
        assert bfloat16_steps(merged[name], tensor).max() <= 1, name


def test_an_mxfp4_folder_loads_in_stock_transformers(folders: Path, tmp_path: Path) -> None:
    base, adapter = folders / "gpt_oss" / "base", folders / "gpt_oss" / "adapter"
    survivals = merge(base, adapter, tmp_path / "merged", torch.bfloat16, mxfp4_experts=True)
    merge(base, adapter, tmp_path / "exact", torch.float32)
    loaded = state(tmp_path / "merged", torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True))
    exact, before = load_file(tmp_path / "exact" / "model.safetensors"), load_file(base / "model.safetensors")
    kept = asked = 0.0
    for layer in range(4):
        for part in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{part}"
            for expert in range(4):
                rounded = mxfp4.decode(*mxfp4.encode(exact[name][expert].T.contiguous()))
                assert torch.equal(loaded[name][expert].float(), rounded.T), name
                change = (exact[name] - before[name])[expert].T.double()
                ground = mxfp4.decode(*mxfp4.encode(before[name][expert].T.contiguous()))
                kept += float(((rounded - ground).double() * change).sum())
                asked += float((change**2).sum())
    assert survivals.overall.share == pytest.approx(kept / asked, rel=1e-4)
    assert len(survivals.by_weight) == 8
    stored = json.loads((tmp_path / "merged" / "quantization.json").read_text())
    assert stored["share"] == survivals.overall.share
    assert 0.5 < stored["share"] < 1.1


def test_a_change_far_below_the_grid_is_measured_as_lost(folders: Path, packed: Path, tmp_path: Path) -> None:
    tiny = any_adapter(folders / "gpt_oss" / "base", tmp_path / "tiny", lora_alpha=0.01)
    large = any_adapter(folders / "gpt_oss" / "base", tmp_path / "large", lora_alpha=200)
    shares = [
        merge(packed, adapter, tmp_path / name, torch.bfloat16, mxfp4_experts=True).overall.share
        for name, adapter in (("a", tiny), ("b", large))
    ]
    assert shares[0] < 0.1
    assert shares[1] == pytest.approx(1.0, abs=0.05)


def test_survival_by_hand() -> None:
    """Of the change (3, 4) only the second half arrives: 16 of 25."""
    survival = Survival.measured(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0], [4.0]]))
    assert survival == Survival(16.0, 25.0)
    assert (survival + Survival(9.0, 0.0)).share == 1.0
    assert math.isclose(survival.share, 0.64)


def test_mxfp4_is_refused_where_no_loader_reads_it(folders: Path) -> None:
    with pytest.raises(ModelError, match="'qwen3_moe' has no MXFP4 experts"):
        plan_merge(folders / "qwen3_moe" / "base", None, torch.bfloat16, mxfp4_experts=True)


# ---------------------------------------------------------------- folders that are not whole


def test_missing_and_truncated_shards_are_named(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.export.merge.split_shards.__defaults__", (50_000,))
    base = tmp_path / "base"
    merge(folders / "llama" / "base", None, base, torch.float32)
    shard = sorted(base.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(
        ModelError, match=rf"{shard.name} .* has {len(whole) - 7} bytes, its header promises {len(whole)}"
    ):
        plan_merge(base, None, torch.float32)
    shard.write_bytes(whole[:5])
    with pytest.raises(ModelError, match=rf"{shard.name} is no readable safetensors file"):
        plan_merge(base, None, torch.float32)
    shard.unlink()
    with pytest.raises(ModelError, match=rf"lacks {shard.name}, which model.safetensors.index.json names"):
        plan_merge(base, None, torch.float32)


def test_an_expert_that_is_missing_is_named(folders: Path, tmp_path: Path) -> None:
    tensors = load_file(folders / "qwen3_moe" / "base" / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(ModelError, match=r"expert 2 of model\.layers\.1\.mlp\.experts\.gate_up_proj lacks its up_proj"):
        plan_merge(tmp_path, None, torch.float32)
