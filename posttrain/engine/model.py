"""Models from Hugging Face folders, run through our attention and experts."""

import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from posttrain.engine import adapters
from posttrain.engine.attention import NAME as ATTENTION
from posttrain.engine.experts import NAME as EXPERTS
from posttrain.errors import MachineError, ModelError
from posttrain.host.machine import available_bytes
from posttrain.recipe.types import Precision

SUPPORTED = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "llama",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
"""Architectures whose logits and gradients the tests compare with stock transformers."""


def load_model(base: Path, adapter: Path | None = None, fresh_seed: int | None = None) -> PreTrainedModel:
    """The model in `base` in float32 with the adapter attached, everything frozen.

    A folder without weights is initialised from `fresh_seed`. Raises ModelError for a folder that is not a model,
    an architecture that is not supported, or weights other than its config promises.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ModelError(f"{base} is not a model folder: {error}") from error
    if config.model_type not in SUPPORTED:
        supported = ", ".join(SUPPORTED)
        raise ModelError(f"{base}: architecture {config.model_type!r} is not supported; supported are {supported}")
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError(f"{base}: use_bidirectional_attention is set; only causal models are supported")
    config._attn_implementation, config._experts_implementation = ATTENTION, EXPERTS
    if list(base.glob("*.safetensors")):
        _require_memory(base)
        model = _read(base, config)
    elif fresh_seed is not None:
        torch.manual_seed(fresh_seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        raise ModelError(f"{base} holds a config but no *.safetensors: the weights are missing")
    model.requires_grad_(False)
    model.eval()
    if adapter is not None:
        adapters.load(model, adapter)
    return model


def _require_memory(base: Path) -> None:
    """Raise MachineError before loading weights that do not fit, with what is needed and what there is."""
    needed = 0
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            needed += sum(4 * math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    available = available_bytes()
    if needed > available:
        raise MachineError(
            f"{base} needs {needed / 1e9:.1f} GB of memory in float32, and {available / 1e9:.1f} GB are available: "
            f"choose a smaller base, or run this on a machine with more memory"
        )


def _read(base: Path, config: PreTrainedConfig) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        base,
        config=config,
        dtype=torch.float32,
        attn_implementation=ATTENTION,
        experts_implementation=EXPERTS,
        output_loading_info=True,
    )
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *(row[0] for row in report["mismatched_keys"])]
    if wrong:
        raise ModelError(f"{base}: tensors differ from what config.json promises: {sorted(wrong)[:5]}")
    # A product's last bit depends on the alignment of its weight: copy into memory that torch allocated.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def save_model(model: nn.Module, folder: Path) -> None:
    """Write a model's weights in float32; the config and tokenizer files beside them are the caller's."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def hold_frozen(model: nn.Module, precision: Precision) -> None:
    """Keep frozen matrices in the type that products take them in: the same bits, half the memory, no casts."""
    if precision == "float32":
        return
    # A tied head is the embedding, whose type is that of the residual stream: it stays.
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) or adapters.is_experts(module):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and id(parameter) not in shared:
                    parameter.data = parameter.data.to(torch.bfloat16)


def unfreeze_adapter(model: nn.Module) -> None:
    """Make the adapter's factors trainable and nothing else."""
    for _, module in adapters.adapted(model):
        module.lora_A.requires_grad_(True)
        module.lora_B.requires_grad_(True)
