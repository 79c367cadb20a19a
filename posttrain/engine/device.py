"""The device a model is on, and what has to be arranged before anything is put there."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from posttrain.engine import fusing
from posttrain.engine.forward import device_of
from posttrain.engine.fusing import fused
from posttrain.errors import InputError, MachineError
from posttrain.host import machine
from posttrain.recipe.types import Execution, Precision


def prepare_device(execution: Execution, precision: Precision) -> torch.device:
    """The device that `execution` asks for, set up so that the same work gives the same bits.

    Raises MachineError where it is not there or lacks the precision.
    """
    torch.set_num_threads(execution.threads)
    there = torch.cuda.is_available()
    if execution.device == "cuda" and not there:
        built = torch.version.cuda or "none"
        raise MachineError(
            f"--device cuda: torch {torch.__version__} (CUDA build: {built}) sees no GPU; see nvidia-smi, or use "
            f"--device cpu"
        )
    if execution.device == "cpu" or not there:
        fusing.switch(execution.compile == "auto")
        return torch.device("cpu")
    if precision != "float32" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise MachineError(f"precision {precision}: {name} has no bfloat16 products; use float32, or another GPU")
    fusing.switch(execution.compile == "auto" and fusing.has_compiler())
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.device("cuda", torch.cuda.current_device())


def take_peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU's memory at most since the last call, of the process's memory at most in its phase."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return machine.peak_bytes()


_ROTARY_FUSED: set[str] = set()
"""Modules of transformers whose rotary embedding is ours."""


def fuse_layers(model: PreTrainedModel, precision: Precision) -> None:
    """Norms and rotary embeddings of layers as one kernel each, written in the type of the products that read them:
    these would round them the same way. On a GPU, and in bfloat16 on processors whose experts are one kernel, too.
    """
    on_cpu = device_of(model).type == "cpu"
    if on_cpu and (precision == "float32" or not fusing.has_tile_kernels()):
        return
    # Gemma's further norms add to the residual stream, which stays float32.
    layers = model.get_decoder().layers
    products_only = not hasattr(layers[0], "pre_feedforward_layernorm") and precision != "float32"
    if on_cpu:
        from posttrain.engine import elementwise

        _replace_rotary(model, elementwise.rotary)
    else:
        _replace_rotary(model, _rotary)
    for layer in layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            if not on_cpu:
                norm.forward = _norm(norm.forward, torch.bfloat16 if products_only else torch.float32)
            elif products_only and hasattr(norm, "variance_epsilon"):  # Gemma's weights are counted from 1.
                norm.forward = elementwise.norm(norm, norm.forward)


def _replace_rotary(model: PreTrainedModel, by: Callable[..., Callable[..., Any]]) -> None:
    # transformers has registries for attention and experts, but its rotary embedding is a function of the module.
    modeling: Any = sys.modules[type(model.get_decoder().layers[0].self_attn).__module__]
    if modeling.__name__ not in _ROTARY_FUSED:
        _ROTARY_FUSED.add(modeling.__name__)
        modeling.apply_rotary_pos_emb = by(modeling.apply_rotary_pos_emb)


def _rotary(apply: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., Any]:
    def rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        q_rotated, k_rotated = apply(q, k, cos, sin)
        return q_rotated.to(q.dtype), k_rotated.to(k.dtype)

    return fused(rotated)


def _norm(forward: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> Callable[[torch.Tensor], Any]:
    return fused(lambda hidden: forward(hidden).to(dtype))


def keep_vocabulary_on_cpu(model: PreTrainedModel) -> None:
    """Move the embedding and the output head to the CPU's memory; raises InputError where they are trained.

    Tokens are looked up there; `posttrain.engine.forward.head_weight` brings the head over when it is used.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    device = embedding.weight.device
    for module in (embedding, head):
        if module.weight.requires_grad:
            raise InputError("--vocabulary cpu: embedding and head are trained here; use --vocabulary device")
        module.to("cpu")
        if device.type == "cuda":
            module.weight.data = module.weight.data.pin_memory()
    if head.weight.data_ptr() != embedding.weight.data_ptr() and model.config.tie_word_embeddings:
        head.weight = embedding.weight
    forward = embedding.forward

    def looked_up(input_ids: torch.Tensor) -> Any:
        return forward(input_ids.cpu()).to(device)

    embedding.forward = looked_up
