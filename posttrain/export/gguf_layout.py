"""What llama.cpp calls each architecture's tensors and settings, and which settings it has fixed.

Every family is one entry: a config that asks for something its graph in llama.cpp does not compute is refused.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType

from posttrain.errors import ModelError
from posttrain.export.weights import read_config

Config = dict[str, Any]
MODEL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
DENSE = {
    **ATTENTION,
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
EXPERTS = {"mlp.experts.gate_up_proj": "ffn_gate_exps ffn_up_exps", "mlp.experts.down_proj": "ffn_down_exps"}
SANDWICH = {
    **DENSE,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GPT_OSS = {
    **ATTENTION,
    **EXPERTS,
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.sinks": "attn_sinks",
    "mlp.router": "ffn_gate_inp",
}
QWEN3_MOE = {**ATTENTION, **EXPERTS, "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp"}


@dataclass(frozen=True)
class Family:
    architecture: str
    """llama.cpp's name."""
    layer_names: dict[str, str]
    fixed: Callable[[Config], dict[str, tuple[Any, Any]]]
    """Settings with the config's value and the one llama.cpp computes with."""
    rope_types: tuple[str, ...] = ("default",)
    norm_offset: float = 0.0
    """Added to norm weights: the checkpoint stores them less 1."""
    rotated_pairs: bool = False
    """Whether llama.cpp rotates neighbouring values of q and k where transformers rotates halves."""
    interleaved: bool = False
    """Whether gate and up alternate in `gate_up_proj`, or stand one after the other."""
    extra: dict[str, str] = field(default_factory=dict)
    """Further settings: config name to the writer's method."""


def _alternating(config: Config, kinds: list[str]) -> tuple[Any, Any]:
    wanted = [kinds[layer % len(kinds)] for layer in range(config["num_hidden_layers"])]
    return config.get("layer_types") or wanted, wanted


def _full_attention(config: Config) -> dict[str, tuple[Any, Any]]:
    return {"layer_types": _alternating(config, ["full_attention"]), "hidden_act": (config["hidden_act"], "silu")}


def _gpt_oss(config: Config) -> dict[str, tuple[Any, Any]]:
    return {
        "layer_types": _alternating(config, ["sliding_attention", "full_attention"]),
        "swiglu_alpha": (config.get("swiglu_alpha", 1.702), 1.702),
        "swiglu_limit": (config.get("swiglu_limit", 7.0), 7.0),
    }


def _qwen3_moe(config: Config) -> dict[str, tuple[Any, Any]]:
    return {
        **_full_attention(config),
        "norm_topk_prob": (config.get("norm_topk_prob", False), True),
        "decoder_sparse_step": (config.get("decoder_sparse_step", 1), 1),
        "mlp_only_layers": (config.get("mlp_only_layers") or [], []),
    }


def _gemma(config: Config) -> dict[str, tuple[Any, Any]]:
    activation = config.get("hidden_activation") or config.get("hidden_act")
    return {
        "hidden_activation": (activation, "gelu_pytorch_tanh"),
        "use_bidirectional_attention": (config.get("use_bidirectional_attention") or False, False),
    }


def _gemma_2(config: Config) -> dict[str, tuple[Any, Any]]:
    return {
        **_gemma(config),
        "layer_types": _alternating(config, ["sliding_attention", "full_attention"]),
        "query_pre_attn_scalar": (config["query_pre_attn_scalar"], config["head_dim"]),
    }


def _gemma_3(config: Config) -> dict[str, tuple[Any, Any]]:
    local = (config.get("rope_parameters") or {}).get("sliding_attention", {})
    return {
        **_gemma(config),
        "layer_types": _alternating(config, ["sliding_attention"] * 5 + ["full_attention"]),
        "query_pre_attn_scalar": (config["query_pre_attn_scalar"], config["head_dim"]),
        "rope_theta of sliding attention": (local.get("rope_theta", 10000.0), 10000.0),
        "final_logit_softcapping": (config.get("final_logit_softcapping"), None),
        "attn_logit_softcapping": (config.get("attn_logit_softcapping"), None),
    }


SCALED = ("default", "linear", "yarn")
FAMILIES = {
    "gpt_oss": Family(
        "gpt-oss",
        GPT_OSS,
        _gpt_oss,
        rope_types=("default", "yarn"),
        interleaved=True,
        extra={
            "intermediate_size": "add_expert_feed_forward_length",
            "num_local_experts": "add_expert_count",
            "num_experts_per_tok": "add_expert_used_count",
            "sliding_window": "add_sliding_window",
        },
    ),
    "llama": Family("llama", DENSE, _full_attention, rope_types=(*SCALED, "llama3"), rotated_pairs=True),
    "qwen2": Family("qwen2", DENSE, _full_attention, rope_types=SCALED),
    "qwen3": Family("qwen3", DENSE, _full_attention, rope_types=SCALED),
    "qwen3_moe": Family(
        "qwen3moe",
        QWEN3_MOE,
        _qwen3_moe,
        rope_types=SCALED,
        extra={
            "moe_intermediate_size": "add_expert_feed_forward_length",
            "num_experts": "add_expert_count",
            "num_local_experts": "add_expert_count",  # what transformers 5 writes for it
            "num_experts_per_tok": "add_expert_used_count",
        },
    ),
    "gemma": Family("gemma", DENSE, _gemma, norm_offset=1.0),
    "gemma2": Family(
        "gemma2",
        SANDWICH,
        _gemma_2,
        norm_offset=1.0,
        extra={
            "sliding_window": "add_sliding_window",
            "attn_logit_softcapping": "add_attn_logit_softcapping",
            "final_logit_softcapping": "add_final_logit_softcapping",
        },
    ),
    "gemma3_text": Family(
        "gemma3",
        SANDWICH,
        _gemma_3,
        rope_types=("default", "linear"),
        norm_offset=1.0,
        extra={"sliding_window": "add_sliding_window"},
    ),
}


def family_of(folder: Path) -> tuple[Family, Config]:
    """The family and config of a model folder; ModelError where llama.cpp would compute something else than it says."""
    config = read_config(folder)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(
            f"{folder}: a GGUF file cannot be written for model type {kind!r}; known are {', '.join(FAMILIES)}. "
            f"The format hf takes every architecture"
        )
    family = FAMILIES[str(kind)]
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for setting, (value, wanted) in family.fixed(config).items():
        if value != wanted:
            raise ModelError(
                f"GGUF: {setting} is {value!r}, but llama.cpp's {family.architecture} computes with {wanted!r}"
            )
    rope = rope_settings(config)
    if rope_type(rope) not in family.rope_types:
        raise ModelError(
            f"GGUF: rope_type is {rope_type(rope)!r}; {family.architecture} files can hold {family.rope_types}"
        )
    for setting in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(setting) is not None:
            raise ModelError(f"GGUF: rope setting {setting} is {rope[setting]}; llama.cpp has the default fixed")
    return family, config


def rope_settings(config: Config) -> Config:
    """RoPE's settings, from where transformers 5 or 4 put them; of full attention where the kinds differ."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention", rope))
    rope.setdefault("rope_theta", config.get("rope_theta", 150000.0 if config["model_type"] == "gpt_oss" else 10000.0))
    return rope


def rope_type(rope: Config) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def yarn_is_rounded(folder: Path) -> bool:
    """Whether the model computes YaRN's correction range as llama.cpp does, which rounds it."""
    rope = rope_settings(json.loads((folder / "config.json").read_text()))
    return rope_type(rope) != "yarn" or rope.get("truncate", True)


def rope_factors(config: Config) -> torch.Tensor | None:
    """Llama 3's divisor of every rotation's frequency, the tensor `rope_freqs.weight`; None for other kinds.

    Waves shorter than the original context over `high_freq_factor` stay, those longer than it over `low_freq_factor`
    are stretched by `factor`, between them the two are mixed.
    """
    rope = rope_settings(config)
    if rope_type(rope) != "llama3":
        return None
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    context, size = rope["original_max_position_embeddings"], config["head_dim"]
    divisors = []
    for index in range(0, size, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (index / size)
        share = min(max((context / wave - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - share) / factor + share))
    return torch.tensor(divisors, dtype=torch.float32)


def add_hyperparameters(writer: GGUFWriter, family: Family, config: Config) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for name, method in family.extra.items():
        if config.get(name) is not None:
            getattr(writer, method)(config[name])
    _add_rope(writer, config)


def _add_rope(writer: GGUFWriter, config: Config) -> None:
    rope = rope_settings(config)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope_type(rope) == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    elif rope_type(rope) == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    else:
        writer.add_rope_scaling_type(RopeScalingType.NONE)
