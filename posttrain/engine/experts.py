"""Experts of a model through this engine: transformers' experts interface, and the adapters that hang on them.

On CUDA in bfloat16 grouped products do the work (`posttrain.engine.grouped`), elsewhere a product per expert
(`posttrain.engine.joined`) or, on processors with a tile unit, one kernel (`posttrain.engine.amx_experts`).

Axes: T token, k choice of a token, E expert, H hidden, R adapter rank, I in, O out.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from posttrain.engine import fusing
from posttrain.engine.gates import gate_of
from posttrain.engine.grouped import grouped_experts
from posttrain.engine.joined import JoinedExperts, Parts, route, with_room
from posttrain.engine.mxfp4 import PackedExperts
from posttrain.engine.packing import row_multiple
from posttrain.errors import ModelError

NAME = "posttrain_sorted"
"""Registered with transformers' experts interface."""


class ExpertAdapter(nn.Module):
    """Low-rank factors of one expert projection: A [E, I, R], B [E, R, O]."""

    def __init__(
        self, num_experts: int, size_in: int, size_out: int, rank: int, scale: float, device: torch.device
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(num_experts, size_in, rank, device=device))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, rank, size_out, device=device))
        self.scale = scale


ROOMS: WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = WeakKeyDictionary()
"""Of modules that `make_room` laid out: the memory of each projection's weight with what is behind it."""


def make_room(experts: Any) -> None:
    """Lay frozen weights on the processor out so that bias and adapter join them without a copy of them.

    One thread alone may then run the module.
    """
    for name, side in (("gate_up_proj", "in"), ("down_proj", "out")):
        tensors, parts = _parameters(experts, name)
        weight, bias, lora_A, _ = tensors
        if weight is None or weight.requires_grad or weight.device.type != "cpu":
            continue
        more = (0 if lora_A is None else lora_A.shape[2]) + (0 if bias is None or side == "out" else 1)
        room = with_room(weight, 1 if parts.transposed == (side == "in") else 2, more)
        weight.data = room[tuple(map(slice, weight.shape))]
        ROOMS.setdefault(experts, {})[name] = room


def _parameters(experts: Any, name: str) -> tuple[tuple[torch.Tensor | None, ...], Parts]:
    """A projection's weight, bias and adapter, and what else it is made from."""
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    adapters = getattr(experts, "adapters", None)
    tensors, scale = (None, None), 1.0
    if adapters is not None and name in adapters:
        tensors, scale = (adapters[name].lora_A, adapters[name].lora_B), adapters[name].scale
    weight = getattr(experts, name)
    if isinstance(weight, PackedExperts):
        return (None, bias, *tensors), Parts(scale, True, weight, None)
    room = ROOMS.get(experts, {}).get(name)
    if room is not None and room.data_ptr() != weight.data_ptr():
        room = None
    return (weight, bias, *tensors), Parts(scale, experts.is_transposed, None, room)


def sorted_experts(
    experts: Any, hidden_TH: torch.Tensor, indices_Tk: torch.Tensor, weights_Tk: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: hidden [T, H], chosen experts and their weights [T, k] → [T, H].

    Nothing here gathers by advanced indexing or adds in an order of its own: that would make the backward pass differ
    from run to run.
    """
    if not experts.has_gate or getattr(experts, "has_post_expert_norm", False):
        raise ModelError(f"{type(experts).__name__} has no gate or a norm after its experts: not supported")
    device = hidden_TH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TH.dtype
    up, up_parts = _parameters(experts, "gate_up_proj")
    down, down_parts = _parameters(experts, "down_proj")
    if device == "cuda" and dtype == torch.bfloat16:
        return grouped_experts(experts, hidden_TH, indices_Tk, weights_Tk, dtype, (up, up_parts), (down, down_parts))
    gate, keep, parts = gate_of(experts), torch.is_grad_enabled(), (up_parts, down_parts)
    if dtype == torch.bfloat16 and fusing.has_tile_kernels():
        from posttrain.engine.amx_experts import TiledExperts

        if TiledExperts.takes(gate, up, down):
            routing = route(indices_Tk, weights_Tk.detach(), experts.num_experts, 1)
            return TiledExperts.apply(hidden_TH, weights_Tk, routing, gate, keep, parts, *up, *down)
    # oneDNN compiles a kernel for every shape in bfloat16 alone.
    multiple = row_multiple(indices_Tk.numel(), experts.num_experts) if dtype == torch.bfloat16 else 1
    routing = route(indices_Tk, weights_Tk.detach(), experts.num_experts, multiple)
    return JoinedExperts.apply(hidden_TH, weights_Tk, routing, gate, keep, dtype, parts, *up, *down)


ExpertsInterface.register(NAME, sorted_experts)
