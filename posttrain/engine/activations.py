"""How activations are kept for the backward pass: recomputed per layer, moved to the CPU, or made tile by tile.

None of it changes a number: the same products run on the same rows, only later or in another place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from posttrain.recipe.types import Execution


def keep_activations(model: PreTrainedModel, execution: Execution) -> None:
    """Arrange what `execution` asks for on the layers of a loaded model.

    Selective recompute runs the feed-forward half again, which holds most of a layer's activations and none of its
    quadratic work; full recompute keeps a layer's input alone.
    """
    for layer in model.get_decoder().layers:
        if execution.mlp_tile_tokens is not None:
            layer.mlp.forward = partial(_tiled, layer.mlp.forward, execution.mlp_tile_tokens)
        elif execution.recompute == "selective":
            layer.mlp.forward = _recomputed(layer.mlp.forward)
        if execution.recompute == "full":
            layer.forward = _recomputed(layer.forward)
    if execution.activation_offload == "cpu":
        decoder = model.get_decoder()
        decoder.forward = _offloaded(decoder, decoder.forward)


def _offloaded(decoder: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """What the backward pass needs waits in the CPU's memory, but for parameters and views of them, which stay anyway.

    `torch.autograd.graph.save_on_cpu` moves these too, and gives a tensor back with other strides than compiled
    kernels were made for.
    """

    def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.device, torch.Tensor]:
        if tensor.untyped_storage().data_ptr() in held:
            return tensor
        kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, kept.copy_(tensor)

    def unpack(packed: torch.Tensor | tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed[1].to(packed[0], non_blocking=True)

    held: set[int] = set()

    def aside(*args: Any, **kwargs: Any) -> Any:
        held.clear()
        held.update(parameter.untyped_storage().data_ptr() for parameter in decoder.parameters())
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    return aside


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # No random numbers are drawn in a layer: there is no dropout.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return again


def _tiled(forward: Callable[..., Any], tile: int, hidden_1TH: torch.Tensor) -> Any:
    """A feed-forward block on `tile` tokens at a time, each recomputed: its activations never exist at once."""
    once = _recomputed(forward)
    parts = [once(part) for part in hidden_1TH.split(tile, dim=1)]
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(same, dim=1 if same[0].ndim == 3 else 0) for same in zip(*parts, strict=True))
    return torch.cat(parts, dim=1)
