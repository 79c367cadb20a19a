"""The toy that training benches share: a GPT-OSS of reference shares, an adapter on it, and rows of token ids.

Both sides of a comparison read the same folders, so that weights, adapter and rows are the same tensors.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from posttrain.engine import adapters
from posttrain.engine.model import load_model
from posttrain.recipe.types import AdamW, Lora

VOCABULARY = 4096
LORA = Lora(kind="lora", rank=16, alpha=32, targets=("q_proj", "k_proj", "v_proj", "o_proj", "experts"))
ADAMW = AdamW(
    learning_rate=1e-4,
    weight_decay=0.0,
    beta1=0.9,
    beta2=0.999,
    epsilon=1e-8,
    clip_norm=1.0,
    schedule="constant",
    warmup_share=0.0,
    final_share=1.0,
    groups=(),
    moments="float32",
)


def toy_config(hidden_size: int, num_layers: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "head_dim": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "intermediate_size": hidden_size,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": VOCABULARY,
        "sliding_window": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def make_toy(folder: Path, hidden_size: int, num_layers: int) -> None:
    """Write `folder/base` and `folder/adapter`: random weights, and an adapter with both factors set."""
    torch.manual_seed(0)
    GptOssForCausalLM(GptOssConfig(**toy_config(hidden_size, num_layers))).save_pretrained(folder / "base")
    model = load_model(folder / "base")
    adapters.attach(model, LORA)
    generator = torch.Generator().manual_seed(1)
    adapters.initialise(model, generator)
    with torch.no_grad():
        for _, module in adapters.adapted(model):
            module.lora_B.copy_(torch.randn(module.lora_B.shape, generator=generator) * 0.01)
    adapters.save(model, folder / "adapter", str(folder / "base"))


def ragged_lengths(count: int, seed: int) -> list[int]:
    """Lognormal with median 200 and sigma 0.9, cut to 50 to 2000."""
    drawn = np.random.default_rng(seed).lognormal(np.log(200), 0.9, count)
    return np.clip(drawn, 50, 2000).astype(int).tolist()


def random_rows(lengths: list[int], seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCABULARY, length).tolist() for length in lengths]
