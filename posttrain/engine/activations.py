"""How activations are kept for the backward pass: recomputed per layer, moved to the CPU, or made tile by tile.

None of it changes a number: the same products run on the same rows, only later or in another place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
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
        decoder.forward = _offloaded(decoder.forward)


def _offloaded(forward: Callable[..., Any]) -> Callable[..., Any]:
    def aside(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
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
