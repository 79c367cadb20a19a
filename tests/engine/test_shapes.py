"""The real 20B shape on the meta device: what would be trained, without a byte of weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig

from posttrain.engine import adapters
from posttrain.engine.model import trainable, unfreeze_adapter
from posttrain.recipe.types import Lora

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "experts")


@pytest.mark.parametrize(
    ("rank", "targets", "millions"), [(64, TARGETS, 739.6), (128, TARGETS, 1479.3), (64, TARGETS[:4], 31.85)]
)
def test_trainable_parameters_of_gpt_oss_20b(rank, targets, millions):
    config = GptOssConfig(
        num_hidden_layers=24,
        hidden_size=2880,
        intermediate_size=2880,
        num_local_experts=32,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=201088,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapters.attach(model, Lora(kind="lora", rank=rank, alpha=rank, targets=targets))
    unfreeze_adapter(model)
    count = sum(parameter.numel() for parameter in trainable(model).values())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
