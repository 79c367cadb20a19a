"""A GPT-OSS-20B of random weights, made on the GPU: shapes, types and adapter are those of the real one."""

import gc

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel

from bench.toy import ADAMW
from posttrain.engine import adapters
from posttrain.engine.attention import NAME as ATTENTION
from posttrain.engine.experts import NAME as EXPERTS
from posttrain.engine.model import empty_packed, hold_frozen, trainable, unfreeze_adapter
from posttrain.engine.mxfp4 import PackedExperts
from posttrain.engine.optimizer import make_optimizer
from posttrain.recipe.types import Lora

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "experts")


def config(num_layers: int, stock: bool = False) -> GptOssConfig:
    """transformers' defaults are the 20B model's, but for the number of layers and experts."""
    made = GptOssConfig(num_hidden_layers=num_layers, num_local_experts=32, pad_token_id=0, eos_token_id=1)
    if not stock:
        made._attn_implementation, made._experts_implementation = ATTENTION, EXPERTS
    return made


def fill(model: nn.Module, seed: int) -> None:
    """Values for every parameter and block of a model on the meta device, drawn on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.blocks = torch.randint(
                256, module.blocks.shape, dtype=torch.uint8, device="cuda", generator=generator
            )
            # With two-bit mantissas of about 2 the weights come out near 0.02.
            module.scales = torch.full(module.scales.shape, 120, dtype=torch.uint8, device="cuda")
        matrices = isinstance(module, nn.Linear) or adapters.is_experts(module)
        for name, parameter in module.named_parameters(recurse=False):
            dtype = torch.bfloat16 if matrices else torch.float32
            value = torch.empty(parameter.shape, dtype=dtype, device="cuda")
            value = (
                value.fill_(1.0)
                if "norm" in type(module).__name__.lower()
                else value.normal_(0, 0.02, generator=generator)
            )
            setattr(module, name, nn.Parameter(value, requires_grad=False))


def make(num_layers: int, rank: int, packed: bool) -> PreTrainedModel:
    """Base and adapter, ready to train the adapter in bfloat16."""
    shape = config(num_layers)
    if packed:
        shape.quantization_config = {"quant_method": "mxfp4"}
        model = empty_packed(shape)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    fill(model, 0)
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(shape).to("cuda")
    model.eval()
    adapters.attach(model, Lora(kind="lora", rank=rank, alpha=2 * rank, targets=TARGETS))
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for _, module in adapters.adapted(model):
            for factor in (module.lora_A, module.lora_B):
                factor.normal_(0, 0.01, generator=generator)
    unfreeze_adapter(model)
    hold_frozen(model, "bfloat16")
    return model


def optimizer_of(model: PreTrainedModel) -> torch.optim.Optimizer:
    return make_optimizer(ADAMW, trainable(model))


def clear() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
