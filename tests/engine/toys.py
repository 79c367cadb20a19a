"""Toy models with random weights large enough that a mistake shows."""

from pathlib import Path

import torch
from transformers import GptOssConfig, GptOssForCausalLM


def toy_config(**changes) -> GptOssConfig:
    values = dict(
        hidden_size=64,
        num_hidden_layers=2,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=512,
        sliding_window=8,
        pad_token_id=0,
        eos_token_id=1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
            "original_max_position_embeddings": 4096,
        },
    )
    return GptOssConfig(**{**values, **changes})


def save_toy(folder: Path, seed: int = 0, **changes) -> Path:
    """A GPT-OSS folder whose matrices, biases and sinks are all random and of some size."""
    torch.manual_seed(seed)
    model = GptOssForCausalLM(toy_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "bias" in name or "sinks" in name else 0.12))
    model.save_pretrained(folder)
    return folder
