from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from posttrain.errors import MachineError, ModelError
from posttrain.export.gguf import write_gguf
from posttrain.export.llama import ask_llama, find_entry
from tests.export.toys import SPECIALS, VOCABULARY, toy_base

NEW_TOKENS = 12
TEXTS = ["Read the file src/app.py, then run 12345 tests.", "there's  a\n\ncity: Ünïcode 日本 {}", ""]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("toy") / "base")


def llama_is_missing() -> str | None:
    try:
        find_entry()
    except MachineError as error:
        return str(error)
    return None


needs_llama = pytest.mark.skipif(llama_is_missing() is not None, reason=str(llama_is_missing()))


def read_tensor(reader: GGUFReader, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
    return dequantize(tensor.data, tensor.tensor_type)


def test_tensors_stand_where_llama_cpp_reads_them(base: Path, tmp_path: Path) -> None:
    write_gguf(base, tmp_path / "toy.gguf", "f32", "toy")
    reader, source = GGUFReader(tmp_path / "toy.gguf"), load_file(base / "model.safetensors")
    gate_up = source["model.layers.1.mlp.experts.gate_up_proj"].numpy()
    np.testing.assert_array_equal(read_tensor(reader, "blk.1.ffn_gate_exps.weight")[3, 5], gate_up[3, :, 10])
    np.testing.assert_array_equal(read_tensor(reader, "blk.1.ffn_up_exps.weight")[3, 5], gate_up[3, :, 11])
    down = source["model.layers.1.mlp.experts.down_proj"].numpy()
    np.testing.assert_array_equal(read_tensor(reader, "blk.1.ffn_down_exps.weight")[2, 7], down[2, :, 7])
    sinks = source["model.layers.1.self_attn.sinks"].numpy()
    np.testing.assert_array_equal(read_tensor(reader, "blk.1.attn_sinks.weight"), sinks)
    assert sum(tensor.n_elements for tensor in reader.tensors) == sum(tensor.numel() for tensor in source.values())
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    control = [index for index, kind in enumerate(types) if kind == 3]
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    assert control == sorted(tokenizer.token_to_id(special) for special in SPECIALS)
    assert types.count(5) == VOCABULARY - tokenizer.get_vocab_size()


def test_q8_0_keeps_what_must_stay_exact_and_rounds_the_rest_within_a_half_step(base: Path, tmp_path: Path) -> None:
    write_gguf(base, tmp_path / "toy.gguf", "q8_0", "toy")
    reader, source = GGUFReader(tmp_path / "toy.gguf"), load_file(base / "model.safetensors")
    stored = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {name for name, kind in stored.items() if kind == "Q8_0" and name.startswith("blk.0.")} == {
        f"blk.0.{part}.weight"
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    }
    weight = source["model.layers.0.self_attn.q_proj.weight"].numpy()
    error = np.abs(read_tensor(reader, "blk.0.attn_q.weight") - weight).reshape(-1, 32)
    step = np.abs(weight).reshape(-1, 32).max(axis=1) / 127
    # The step itself is stored in half precision: 11 bits.
    assert (error <= step[:, None] * (0.5 + 127 * 2**-11) + 1e-9).all()


def greedy(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


@needs_llama
def test_llama_cpp_gives_transformers_greedy_tokens(base: Path, tmp_path: Path) -> None:
    write_gguf(base, tmp_path / "toy.gguf", "f32", "toy")
    generator = torch.Generator().manual_seed(3)
    # Longer than the sliding window, and some longer than the original YaRN context.
    lengths = [*range(2, 14), 17, 22, 30, 39, 47, 58, 70, 100]
    prompts = [torch.randint(0, 320, (length,), generator=generator).tolist() for length in lengths]
    answer = ask_llama(tmp_path / "toy.gguf", prompts, NEW_TOKENS, TEXTS)
    assert answer.greedy == greedy(base, prompts)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    assert answer.tokens == [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


def test_settings_that_llama_cpp_has_fixed_otherwise_are_refused(tmp_path: Path) -> None:
    base = toy_base(tmp_path / "base", layer_types=["full_attention"] * 4)
    with pytest.raises(ModelError, match="layer_types"):
        write_gguf(base, tmp_path / "toy.gguf", "f32", "toy")
