"""GGUF files of every family: bytes against the format's documentation, tokens against llama.cpp."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoModelForCausalLM

from posttrain.engine import mxfp4
from posttrain.errors import MachineError, ModelError, PhaseFault
from posttrain.export.formats import Model, gguf_piece
from posttrain.export.gguf import write_gguf
from posttrain.export.gguf_adapter import write_adapter
from posttrain.export.gguf_types import GgufType
from posttrain.export.llama import ask_llama
from posttrain.export.merge import apply_merge, plan_merge
from posttrain.recipe.types import USUAL_TOLERANCES
from tests.export.test_families import EVERY, folders, packed  # noqa: F401 (fixtures)
from tests.export.test_gguf import NEW_TOKENS, greedy, needs_llama
from tests.export.toys import any_adapter, dense_base

# ---------------------------------------------------------------- bytes


def reference_q8_0(row: np.ndarray) -> bytes:
    """ggml's block_q8_0: for 32 values a half-precision step d = max|x| / 127, then round(x / d) as signed bytes."""
    written = b""
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        step = np.float32(max(abs(value) for value in block)) / np.float32(127)
        inverse = np.float32(1) / step if step else np.float32(0)
        scaled = [np.float32(value) * inverse for value in block]
        # C's roundf: halves away from zero.
        whole = [int(math.copysign(math.floor(abs(float(value)) + 0.5), value)) for value in scaled]
        written += struct.pack("<e32b", np.float16(step), *whole)
    return written


def reference_bytes(matrix: torch.Tensor, kind: str) -> bytes:
    """Rows one after the other, the fastest dimension inside."""
    rows = matrix.float().reshape(-1, matrix.shape[-1]).numpy()
    if kind == "f16":
        return rows.astype("<f2").tobytes()
    if kind == "bf16":  # the upper half of float32, rounded to nearest, ties to even
        bits = rows.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return b"".join(reference_q8_0(row) for row in rows)


def reference_tensors(family: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Some matrices of layer 1 under llama.cpp's names, taken from the checkpoint by hand."""
    at = "model.layers.1."
    q = tensors[at + "self_attn.q_proj.weight"]
    if family == "llama":
        # 4 heads of 16: llama.cpp rotates values 2i and 2i+1 of a head, transformers i and i+8.
        q = torch.stack([q[16 * head + half * 8 + i] for head in range(4) for i in range(8) for half in range(2)])
    found = {"blk.1.attn_q.weight": q, "token_embd.weight": tensors["model.embed_tokens.weight"]}
    if family == "gpt_oss":
        gate_up, down = tensors[at + "mlp.experts.gate_up_proj"], tensors[at + "mlp.experts.down_proj"]
        found["blk.1.ffn_gate_exps.weight"] = torch.stack([expert[:, 0::2].T for expert in gate_up])
        found["blk.1.ffn_up_exps.weight"] = torch.stack([expert[:, 1::2].T for expert in gate_up])
        found["blk.1.ffn_down_exps.weight"] = torch.stack([expert.T for expert in down])
    elif family == "qwen3_moe":
        for part in ("gate", "up", "down"):
            experts = [tensors[f"{at}mlp.experts.{index}.{part}_proj.weight"] for index in range(4)]
            found[f"blk.1.ffn_{part}_exps.weight"] = torch.stack(experts)
    else:
        found |= {f"blk.1.ffn_{part}.weight": tensors[f"{at}mlp.{part}_proj.weight"] for part in ("gate", "up", "down")}
    return found


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_tensors_are_those_of_the_documented_format(
    folders: Path,  # noqa: F811
    tmp_path: Path,
    family: str,
    kind: GgufType,
) -> None:
    base = folders / family / "base"
    write_gguf(base, tmp_path / "toy.gguf", kind, "toy")
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "toy.gguf").tensors}
    tensors = load_file(base / "model.safetensors")
    for name, matrix in reference_tensors(family, tensors).items():
        assert stored[name].tensor_type.name == kind.upper(), name
        assert [int(size) for size in stored[name].shape] == list(reversed(matrix.shape)), name
        assert stored[name].data.tobytes() == reference_bytes(matrix, kind), name
    norm = dequantize(stored["blk.1.attn_norm.weight"].data, stored["blk.1.attn_norm.weight"].tensor_type)
    offset = 1.0 if family.startswith("gemma") else 0.0
    np.testing.assert_array_equal(norm, tensors["model.layers.1.input_layernorm.weight"].numpy() + np.float32(offset))
    tied = family in ("qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
    assert ("output.weight" in stored) is not tied
    count = sum(tensor.numel() for tensor in tensors.values()) + (8 if family == "llama" else 0)
    assert sum(tensor.n_elements for tensor in stored.values()) == count


def test_an_adapter_is_merged_on_the_way(folders: Path, tmp_path: Path) -> None:  # noqa: F811
    """One pass over base and adapter gives the file that merging first gives."""
    for family in ("gpt_oss", "qwen3_moe", "llama"):
        base, adapter = folders / family / "base", folders / family / "adapter"
        (tmp_path / family).mkdir()
        apply_merge(plan_merge(base, adapter, torch.float32), tmp_path / family)
        write_gguf(tmp_path / family, tmp_path / "two.gguf", "q8_0", "toy")
        write_gguf(base, tmp_path / "one.gguf", "q8_0", "toy", adapter=adapter)
        assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes(), family


def test_auto_is_mxfp4_experts_and_q8_0_elsewhere(folders: Path, packed: Path, tmp_path: Path) -> None:  # noqa: F811
    """And codes of an MXFP4 base stand in the file as they stood in the base, gate and up apart."""
    write_gguf(packed, tmp_path / "toy.gguf", "auto", "toy")
    reader = GGUFReader(tmp_path / "toy.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {name.split(".", 2)[-1]: tensor.tensor_type.name for name, tensor in stored.items() if "blk.0" in name}
    assert {name for name, kind in kinds.items() if kind == "MXFP4"} == {
        f"ffn_{part}_exps.weight" for part in ("gate", "up", "down")
    }
    assert {name for name, kind in kinds.items() if kind == "Q8_0"} == {
        f"attn_{part}.weight" for part in ("q", "k", "v", "output")
    }
    assert stored["token_embd.weight"].tensor_type.name == "Q8_0"
    assert reader.fields["general.file_type"].contents() == 38
    tensors = load_file(packed / "model.safetensors")
    blocks = tensors["model.layers.1.mlp.experts.gate_up_proj_blocks"]
    scales = tensors["model.layers.1.mlp.experts.gate_up_proj_scales"]
    for half, part in enumerate(("gate", "up")):
        block = stored[f"blk.1.ffn_{part}_exps.weight"].data.reshape(4, 96, 2, 17)[3, 5, 1]
        row = 2 * 5 + half
        assert block[0] == scales[3, row, 1]
        codes = [code for byte in blocks[3, row, 1].tolist() for code in (byte & 15, byte >> 4)]
        assert block[1:].tolist() == [codes[index] | codes[index + 16] << 4 for index in range(16)]
    write_gguf(folders / "qwen3_moe" / "base", tmp_path / "qwen.gguf", "auto", "toy")
    assert {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "qwen.gguf").tensors} == {"Q8_0", "F32"}


def test_a_full_disk_and_a_kill_leave_no_file(folders: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("POSTTRAIN_FAULT", "gguf.tensor_written#9:full")
    with pytest.raises(OSError, match="No space left"):
        write_gguf(folders / "llama" / "base", tmp_path / "toy.gguf", "f32", "toy")
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_float16_are_named(folders: Path, tmp_path: Path) -> None:  # noqa: F811
    base = dense_base(tmp_path / "base", "qwen3")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(PhaseFault, match=r"blk\.0\.ffn_up\.weight has values beyond float16"):
        write_gguf(base, tmp_path / "toy.gguf", "f16", "toy")


def test_what_llama_cpp_does_not_compute_is_refused(tmp_path: Path) -> None:
    base = dense_base(tmp_path / "moe", "qwen3_moe", norm_topk_prob=False)
    with pytest.raises(ModelError, match="norm_topk_prob is False"):
        write_gguf(base, tmp_path / "toy.gguf", "f32", "toy")
    base = dense_base(tmp_path / "gemma", "gemma2", query_pre_attn_scalar=32)
    with pytest.raises(ModelError, match=r"query_pre_attn_scalar is 32, but llama\.cpp's gemma2 computes with 16"):
        write_gguf(base, tmp_path / "toy.gguf", "f32", "toy")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(
        ModelError, match=r"model type 'mamba'; known are gpt_oss, llama, qwen2, qwen3, qwen3_moe, gemma"
    ):
        write_gguf(tmp_path, tmp_path / "toy.gguf", "f32", "toy")
    base = dense_base(tmp_path / "dense", "qwen3")
    with pytest.raises(ModelError, match="mxfp4 is for experts; qwen3 has none"):
        write_gguf(base, tmp_path / "toy.gguf", "mxfp4", "toy")


# ---------------------------------------------------------------- llama.cpp


def prompts() -> list[list[int]]:
    """Some longer than the toys' windows and original contexts."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 320, (length,), generator=generator).tolist() for length in (2, 5, 14, 39, 100)]


@needs_llama
@pytest.mark.parametrize("family", EVERY)
def test_llama_cpp_gives_the_merged_models_greedy_tokens(
    folders: Path,  # noqa: F811
    tmp_path: Path,
    family: str,
) -> None:
    base, adapter = folders / family / "base", folders / family / "adapter"
    if family == "gemma3_text":  # six layers, so that one has full attention
        base = dense_base(tmp_path / "base", family, num_hidden_layers=6)
        adapter = any_adapter(base, tmp_path / "adapter")
    write_gguf(base, tmp_path / "toy.gguf", "f32", "toy", adapter=adapter)
    (tmp_path / "merged").mkdir()
    apply_merge(plan_merge(base, adapter, torch.float32), tmp_path / "merged")
    answer = ask_llama(tmp_path / "toy.gguf", prompts(), NEW_TOKENS, [])
    assert answer.greedy == greedy(tmp_path / "merged", prompts())
    assert answer.greedy != greedy(base, prompts())


@needs_llama
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "llama"])
def test_llama_cpp_puts_the_adapter_on_the_base(folders: Path, tmp_path: Path, family: str) -> None:  # noqa: F811
    """Base file and adapter file together give the merged model's tokens, experts and reordered heads included."""
    base, adapter = folders / family / "base", folders / family / "adapter"
    write_gguf(base, tmp_path / "base.gguf", "f32", "toy")
    write_adapter(base, adapter, tmp_path / "adapter.gguf", "toy")
    (tmp_path / "merged").mkdir()
    apply_merge(plan_merge(base, adapter, torch.float32), tmp_path / "merged")
    answer = ask_llama(tmp_path / "base.gguf", prompts(), NEW_TOKENS, [], adapter=tmp_path / "adapter.gguf")
    assert answer.greedy == greedy(tmp_path / "merged", prompts())
    assert answer.greedy != greedy(base, prompts())


@needs_llama
@pytest.mark.parametrize("kind", ["auto", "q8_0", "q4_0"])
def test_llama_cpp_computes_what_the_quantized_numbers_say(
    folders: Path,  # noqa: F811
    tmp_path: Path,
    kind: GgufType,
) -> None:
    """The oracle is stock transformers on the numbers the file holds; llama.cpp rounds activations besides."""
    base = folders / "gpt_oss" / "base"
    write_gguf(base, tmp_path / "toy.gguf", kind, "toy")
    held = {
        tensor.name: torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        for tensor in GGUFReader(tmp_path / "toy.gguf").tensors
    }
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    for layer, block in enumerate(model.model.layers):
        at = f"blk.{layer}"
        for letter, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
            getattr(block.self_attn, f"{letter}_proj").weight.data = held[f"{at}.attn_{name}.weight"]
        experts = block.mlp.experts
        experts.gate_up_proj.data[..., 0::2] = held[f"{at}.ffn_gate_exps.weight"].transpose(1, 2)
        experts.gate_up_proj.data[..., 1::2] = held[f"{at}.ffn_up_exps.weight"].transpose(1, 2)
        experts.down_proj.data = held[f"{at}.ffn_down_exps.weight"].transpose(1, 2).contiguous()
    model.model.embed_tokens.weight.data = held["token_embd.weight"]
    model.lm_head.weight.data = held["output.weight"]
    answer = ask_llama(tmp_path / "toy.gguf", prompts(), 1, [])
    for prompt, (token,) in zip(prompts(), answer.greedy, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        assert float(logits.max() - logits[token]) <= USUAL_TOLERANCES.gguf_near_tie["q8_0"]


@needs_llama
def test_q4_k_m_is_made_by_llama_cpps_own_quantizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = dense_base(tmp_path / "base", "llama", hidden_size=256, intermediate_size=512)
    adapter = any_adapter(base, tmp_path / "adapter")
    model = Model("toy", base, adapter, {"base": "b", "adapter": "a"})
    piece = gguf_piece(model, "q4_k_m")
    assert piece.write(model, tmp_path)
    file = tmp_path / "gguf-q4_k_m" / "toy-q4_k_m.gguf"
    assert list(file.parent.iterdir()) == [file]
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    assert stored["blk.0.ffn_gate.weight"].tensor_type.name == "Q4_K"
    (tmp_path / "merged").mkdir()
    apply_merge(plan_merge(base, adapter, torch.float32), tmp_path / "merged")
    exact = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"].numpy()
    found = dequantize(stored["blk.0.ffn_gate.weight"].data, stored["blk.0.ffn_gate.weight"].tensor_type)
    assert np.abs(found - exact).mean() < 0.1 * np.abs(exact).mean()
    assert len(ask_llama(file, prompts(), 1, []).greedy) == len(prompts())
    monkeypatch.setattr("posttrain.export.llama_quantize.tool_folders", lambda: [tmp_path])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MachineError, match=r"q4_k_m is written by llama\.cpp's quantizer, and there is none"):
        gguf_piece(model, "q4_k_m")


@needs_llama
def test_a_sentencepiece_vocabulary_is_read_as_it_is(tmp_path: Path) -> None:
    """Gemma's kind: spaces are ▁, unknown characters fall back to bytes, pairs merge by their piece's score."""
    base = dense_base(tmp_path / "base", "gemma")
    words = ["▁the", "▁th", "▁t", "he", "th", "in", "ing", "▁r", "▁ru", "▁run", "nn", "run", "ru"]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz▁,.") - {"x"})
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    ranked = [(index, text) for text, index in vocabulary.items() if text in words]
    merges = [
        (text[:cut], text[cut:])
        for _, text in sorted(ranked)
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    tokenizer.save(str(base / "tokenizer.json"))
    write_gguf(base, tmp_path / "toy.gguf", "f32", "toy")
    texts = ["the running thing", "run, run.  the", "xé日 in", "t"]
    answer = ask_llama(tmp_path / "toy.gguf", [[300]], 1, texts)
    assert answer.tokens == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def test_mxfp4_experts_in_a_gguf_hold_the_values_of_the_mxfp4_folder(folders: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two ways from one model, one set of numbers."""
    base, adapter = folders / "gpt_oss" / "base", folders / "gpt_oss" / "adapter"
    (tmp_path / "hf").mkdir()
    apply_merge(plan_merge(base, adapter, torch.bfloat16, mxfp4_experts=True), tmp_path / "hf")
    write_gguf(base, tmp_path / "toy.gguf", "mxfp4", "toy", adapter=adapter)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.2.mlp.experts.down_proj"
    for tensor in GGUFReader(tmp_path / "toy.gguf").tensors:
        if tensor.name == "blk.2.ffn_down_exps.weight":
            values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
    for expert in range(4):
        blocks, scales = tensors[f"{name}_blocks"][expert], tensors[f"{name}_scales"][expert]
        assert torch.equal(values[expert], mxfp4.decode(blocks, scales))
