"""Models from Hugging Face folders, run through our attention and experts."""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from posttrain.engine import adapters
from posttrain.engine.attention import NAME as ATTENTION
from posttrain.engine.experts import NAME as EXPERTS
from posttrain.engine.experts import make_room
from posttrain.engine.mxfp4 import PACKED_EXPANSION, PackedExperts
from posttrain.engine.nf4 import hold_nf4
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
CPU = torch.device("cpu")


def load_model(
    base: Path,
    adapter: Path | None = None,
    fresh_seed: int | None = None,
    *,
    device: torch.device = CPU,
    precision: Precision = "float32",
    packed: bool = False,
) -> PreTrainedModel:
    """The model in `base` with the adapter attached, everything frozen: in float32, unless `precision` is another and
    bfloat16 is how it is stored. MXFP4 experts are unpacked, or with `packed` kept as they are.

    A folder without weights is initialised from `fresh_seed`. Raises ModelError for a folder that is not a model,
    an architecture that is not supported, or weights other than its config promises, and MachineError for a device
    that is not there or too small.
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
    files = sorted(base.glob("*.safetensors"))
    if files:
        stored = _stored(files)
        dtype = torch.bfloat16 if precision != "float32" and stored.dtypes == {"BF16"} else torch.float32
        mxfp4 = _is_mxfp4(config)
        smaller = "--base-weights packed for MXFP4" if device.type == "cuda" else "precision bfloat16"
        require_memory(str(base), stored.bytes(dtype, packed and mxfp4), device, f"a smaller base, {smaller}")
        model = read_packed(base, files, config, device) if mxfp4 and packed else _read(base, config, dtype, mxfp4)
    elif fresh_seed is not None:
        torch.manual_seed(fresh_seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        raise ModelError(f"{base} holds a config but no *.safetensors: the weights are missing")
    model.requires_grad_(False)
    model.eval()
    if device.type != "cpu":
        model.to(device)
    if adapter is not None:
        adapters.load(model, adapter)
    return model


@dataclass(frozen=True)
class _Stored:
    """What a folder's weights are, by their files' headers."""

    values: int
    """Numbers outside of MXFP4 blocks."""
    packed_bytes: int
    dtypes: set[str]
    """Of the tensors outside of MXFP4 blocks, as safetensors names them."""

    def bytes(self, dtype: torch.dtype, packed: bool) -> int:
        """Memory that they need in `dtype`, MXFP4 blocks as they are or unpacked."""
        unpacked = self.packed_bytes if packed else self.packed_bytes * PACKED_EXPANSION * dtype.itemsize
        return self.values * dtype.itemsize + int(unpacked)


def _stored(files: Sequence[Path]) -> _Stored:
    values, packed_bytes, dtypes = 0, 0, set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                if part.get_dtype() == "U8":
                    packed_bytes += math.prod(part.get_shape())
                else:
                    values += math.prod(part.get_shape())
                    dtypes.add(part.get_dtype())
    return _Stored(values, packed_bytes, dtypes)


def require_memory(what: str, needed: int, device: torch.device, remedy: str) -> None:
    """Raise MachineError for what does not fit, with what is needed, what there is, and `remedy`."""
    on_gpu = device.type == "cuda"
    available = available_bytes()
    if on_gpu:
        # What an earlier phase gave back is still held by torch, for whoever asks next.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        available = torch.cuda.mem_get_info(device)[0] + kept
    if needed > available:
        place = "the GPU" if on_gpu else "memory"
        raise MachineError(
            f"{what} needs {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB of {place} are available: "
            f"choose {remedy}, or a machine with more"
        )


def _is_mxfp4(config: PreTrainedConfig) -> bool:
    return (getattr(config, "quantization_config", None) or {}).get("quant_method") == "mxfp4"


def _read(base: Path, config: PreTrainedConfig, dtype: torch.dtype, mxfp4: bool) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        base,
        config=config,
        dtype=dtype,
        **({"quantization_config": Mxfp4Config(dequantize=True)} if mxfp4 else {}),
        attn_implementation=ATTENTION,
        experts_implementation=EXPERTS,
        output_loading_info=True,
    )
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *(row[0] for row in report["mismatched_keys"])]
    _require_all(base, wrong)
    # A product's last bit depends on the alignment of its weight: copy into memory that torch allocated.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _require_all(base: Path, wrong: Sequence[str]) -> None:
    if wrong:
        raise ModelError(f"{base}: tensors differ from what config.json promises: {sorted(wrong)[:5]}")


def read_packed(base: Path, files: Sequence[Path], config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """A GPT-OSS whose MXFP4 blocks stay as they are stored, read straight to the device."""
    model = empty_packed(config)
    tensors = {}
    for file in files:
        for name, tensor in load_file(file, device=str(device)).items():
            tensors[re.sub("_(blocks|scales)$", r".\1", name)] = tensor
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{base}: tensors differ from what config.json promises: {error}") from error
    _require_all(base, [*missing, *unexpected])
    decoder = model.get_decoder()
    # Its frequencies are no tensors of the checkpoint: made on the meta device they have no values.
    decoder.rotary_emb = type(decoder.rotary_emb)(config)
    return model


def empty_packed(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without values, its experts as MXFP4."""
    config = copy.deepcopy(config)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for module in filter(adapters.is_experts, model.modules()):
            for part in adapters.EXPERT_PROJECTIONS:
                shape = getattr(module, part).shape
                delattr(module, part)
                setattr(module, part, PackedExperts(*shape))
    return model


def save_model(model: nn.Module, folder: Path) -> None:
    """Write a model's weights in float32; the config and tokenizer files beside them are the caller's."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def hold_frozen(model: PreTrainedModel, precision: Precision) -> None:
    """Keep frozen matrices in the type that products take them in: the same bits, half the memory, no casts. All other
    parameters are float32. In `nf4` those of the layers are rounded to four bits."""
    if precision == "nf4":
        hold_nf4(model)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    # An embedding stored in bfloat16 stays: what is looked up is widened. A tied head is the embedding.
    kept = {
        id(module.weight): module
        for module in embeddings
        if module.weight.dtype == torch.bfloat16 and precision != "float32" and not module.weight.requires_grad
    }
    for embedding in kept.values():
        embedding.register_forward_hook(lambda module, arguments, found: found.float())
    residual = {id(module.weight) for module in embeddings}
    for module in model.modules():
        matrices = isinstance(module, nn.Linear) or adapters.is_experts(module)
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in kept and parameter.is_floating_point():
                frozen = not parameter.requires_grad and id(parameter) not in residual
                lower = precision != "float32" and matrices and frozen
                parameter.data = parameter.data.to(torch.bfloat16 if lower else torch.float32)
        if adapters.is_experts(module):
            make_room(module)


def unfreeze_adapter(model: nn.Module) -> None:
    """Make the adapter's factors trainable and nothing else."""
    for _, module in adapters.adapted(model):
        module.lora_A.requires_grad_(True)
        module.lora_B.requires_grad_(True)
