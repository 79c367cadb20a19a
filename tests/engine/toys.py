"""Toy models with random weights large enough that a mistake shows."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
    "original_max_position_embeddings": 4096,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ALTERNATING = ["sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt_oss": EXPERTS | {"sliding_window": 8, "rope_parameters": YARN},
    "llama": {},
    "qwen2": {"layer_types": ALTERNATING, "sliding_window": 8, "use_sliding_window": True},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "mixtral": EXPERTS | {"sliding_window": 8},
    "gemma": {},
    "gemma2": {
        "layer_types": ALTERNATING,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"layer_types": ALTERNATING, "sliding_window": 8, "query_pre_attn_scalar": 24},
}
"""What each toy has beyond `COMMON`: windows shorter than the tests' documents, caps low enough to bend the logits."""


def toy_config(architecture: str = "gpt_oss", **changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(architecture, **{**COMMON, **ARCHITECTURES[architecture], **changes})


def save_toy(folder: Path, seed: int = 0, architecture: str = "gpt_oss", **changes: Any) -> Path:
    """A model folder whose matrices, biases and sinks are all random and of some size."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(toy_config(architecture, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "bias" in name or "sinks" in name else 0.12))
    model.save_pretrained(folder)
    return folder
