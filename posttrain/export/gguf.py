"""Write a merged GPT-OSS folder as one GGUF file that llama.cpp loads (architecture `gpt-oss`).

Tensor names, hyper-parameters and types follow what llama.cpp reads for this architecture: expert weights are stored
(expert, out, in), gate and up apart, sinks under `.weight`; norms, biases, sinks and the router stay float32.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from gguf.quants import quant_shape_to_byte_shape, quantize

from posttrain.errors import ModelError
from posttrain.export.gguf_vocabulary import add_vocabulary, read_vocabulary
from posttrain.export.tensors import TensorFolder

GgufType = Literal["f32", "bf16", "q8_0"]
STORED = {
    "f32": GGMLQuantizationType.F32,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
ARCHITECTURE = "gpt-oss"
MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
}
KEPT_FLOAT32 = (".bias", "norm.weight", "sinks.weight", "ffn_gate_inp.weight")
Read = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file; `read` gives it in float32 in the shape GGUF stores, slowest dimension first."""

    name: str
    shape: tuple[int, ...]
    stored: GGMLQuantizationType
    read: Read

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return quant_shape_to_byte_shape(self.shape, self.stored)

    @property
    def bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.stored]
        return int(np.prod(self.shape, dtype=np.int64)) // block * size


def plan_gguf(folder: Path, gguf_type: GgufType) -> list[GgufTensor]:
    """Every tensor of the GGUF file; raises ModelError for a tensor that has no place in it."""
    tensors = TensorFolder(folder)
    plan: list[GgufTensor] = []
    for name, spec in tensors.specs.items():
        for gguf_name, shape, read in _translated(name, spec.shape, tensors):
            plan.append(GgufTensor(gguf_name, shape, _stored_type(gguf_name, shape, gguf_type), read))
    return sorted(plan, key=lambda tensor: tensor.name)


def _translated(
    name: str, shape: tuple[int, ...], tensors: TensorFolder
) -> Iterator[tuple[str, tuple[int, ...], Read]]:
    def whole() -> torch.Tensor:
        return tensors.read(name).float()

    if name in MODEL_NAMES:
        yield MODEL_NAMES[name], shape, whole
        return
    prefix, _, rest = name.removeprefix("model.layers.").partition(".")
    block = f"blk.{prefix}"
    if rest in ("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"):
        # Gate is the even columns and up the odd ones.
        for start, half in enumerate(("gate", "up")):
            if rest.endswith("_bias"):
                yield f"{block}.ffn_{half}_exps.bias", (shape[0], shape[1] // 2), _half(whole, start)
            else:
                halved = (shape[0], shape[2] // 2, shape[1])
                yield f"{block}.ffn_{half}_exps.weight", halved, _half(whole, start, transposed=True)
    elif rest == "mlp.experts.down_proj":
        yield f"{block}.{LAYER_NAMES[rest]}", (shape[0], shape[2], shape[1]), lambda: whole().transpose(1, 2)
    elif rest in LAYER_NAMES:
        yield f"{block}.{LAYER_NAMES[rest]}", shape, whole
    else:
        module, _, kind = rest.rpartition(".")
        if module not in LAYER_NAMES or kind not in ("weight", "bias"):
            raise ModelError(f"tensor {name} of {tensors.path} has no place in a {ARCHITECTURE} GGUF file")
        yield f"{block}.{LAYER_NAMES[module]}.{kind}", shape, whole


def _half(whole: Read, start: int, transposed: bool = False) -> Read:
    def read() -> torch.Tensor:
        half = whole()[..., start::2]
        return half.transpose(1, 2) if transposed else half

    return read


def _stored_type(name: str, shape: tuple[int, ...], gguf_type: GgufType) -> GGMLQuantizationType:
    wanted = STORED[gguf_type]
    if name.endswith(KEPT_FLOAT32) or shape[-1] % GGML_QUANT_SIZES[wanted][0] != 0:
        return GGMLQuantizationType.F32
    return wanted


def write_gguf(folder: Path, file: Path, gguf_type: GgufType, name: str) -> None:
    """Write `file` from the merged model in `folder`, one tensor in memory at a time.

    Raises ModelError for a model whose settings llama.cpp has fixed otherwise.
    """
    config = json.loads((folder / "config.json").read_text())
    check_config(config)
    plan = plan_gguf(folder, gguf_type)
    vocabulary = read_vocabulary(folder, config["vocab_size"])
    writer = GGUFWriter(file, ARCHITECTURE)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[gguf_type])
        writer.add_quantization_version(2)
        _add_hyperparameters(writer, config)
        add_vocabulary(writer, vocabulary, config, folder)
        for tensor in plan:
            dtype = np.dtype(np.float32 if tensor.stored == GGMLQuantizationType.F32 else np.uint8)
            shape = tensor.shape if tensor.stored == GGMLQuantizationType.F32 else tensor.byte_shape
            writer.add_tensor_info(tensor.name, shape, dtype, tensor.bytes, raw_dtype=tensor.stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan:
            writer.write_tensor_data(quantize(tensor.read().contiguous().numpy(), tensor.stored))
        writer.flush()
    finally:
        writer.close()


def check_config(config: dict[str, Any]) -> None:
    """Raise ModelError where llama.cpp's gpt-oss graph would compute something else than this config says."""
    layers = config["num_hidden_layers"]
    alternating = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
    fixed = {
        "model_type": (config.get("model_type"), "gpt_oss"),
        "layer_types": (config.get("layer_types") or alternating, alternating),
        "swiglu_alpha": (config.get("swiglu_alpha", 1.702), 1.702),
        "swiglu_limit": (config.get("swiglu_limit", 7.0), 7.0),
    }
    for setting, (value, wanted) in fixed.items():
        if value != wanted:
            raise ModelError(f"GGUF: {setting} is {value!r}, but llama.cpp's {ARCHITECTURE} computes with {wanted!r}")
    rope = rope_settings(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("yarn", "default"):
        raise ModelError(f"GGUF: rope_type is {kind!r}; {ARCHITECTURE} files can hold 'yarn' and 'default'")
    for setting in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(setting) is not None:
            raise ModelError(f"GGUF: rope setting {setting} is {rope[setting]}; llama.cpp has the default fixed")


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE's settings, from where transformers 5 or 4 put them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 150000.0))
    return rope


def yarn_is_rounded(folder: Path) -> bool:
    """Whether the model computes YaRN's correction range as llama.cpp does, which rounds it."""
    rope = rope_settings(json.loads((folder / "config.json").read_text()))
    return rope.get("rope_type") != "yarn" or rope.get("truncate", True)


def _add_hyperparameters(writer: GGUFWriter, config: dict[str, Any]) -> None:
    rope = rope_settings(config)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    else:
        writer.add_rope_scaling_type(RopeScalingType.NONE)
