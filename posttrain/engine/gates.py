"""What stands between an expert's two products, with its derivative written out.

Tensors that take part live in float32 and in the processor's caches; what is read and written has the type of the
products. Backward passes take the row's router weight as well, because they meet both gradients here.

Axes: M routed row, F expert size, G twice that: gate and up of every unit.
"""

from typing import Any, Protocol

import torch

Tensor = torch.Tensor


class Gate(Protocol):
    """Gated activation of routed rows."""

    def forward(self, gate_up_MG: Tensor) -> Tensor: ...

    def backward(self, gate_up_MG: Tensor, grad_MF: Tensor, weight_M1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The activation [M, F], the gradient of gate and up [M, G] and Σ grad · activation of every row.

        `grad_MF` is the gradient of the activation without the router's weight, which goes on [M, G] alone.
        """
        ...


class ClampedSwiglu:
    """GPT-OSS: (up + 1) · gate · sigmoid(alpha · gate) of clamped values, gate and up alternating."""

    def __init__(self, alpha: float, limit: float) -> None:
        self.alpha = alpha
        # Clamped here, a value is told from one that stands at the limit: only the former stops its gradient.
        bound = torch.tensor(limit, dtype=torch.float32)
        self.bound = torch.nextafter(bound, bound.new_tensor(torch.inf)).item()

    def _parts(self, gate_up_MG: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = _apart(gate_up_MG)
        return gate.clamp_(max=self.bound), up.clamp_(-self.bound, self.bound)

    def forward(self, gate_up_MG: Tensor) -> Tensor:
        gate, up = self._parts(gate_up_MG)
        glu = torch.mul(gate, self.alpha).sigmoid_().mul_(gate)
        return torch.addcmul(glu, glu, up, out=glu).to(gate_up_MG.dtype)

    def backward(self, gate_up_MG: Tensor, grad_MF: Tensor, weight_M1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Results go where what they are made of is not needed any more: fewer tensors stay in the caches.
        gate, up = self._parts(gate_up_MG)
        sigmoid = torch.mul(gate, self.alpha).sigmoid_()
        glu = gate * sigmoid
        grad = grad_MF.to(glu.dtype, copy=True)
        other = torch.addcmul(glu, glu, up)
        act = other.to(grad_MF.dtype, copy=True)
        total_M = other.mul_(grad).sum(-1)
        grad.mul_(weight_M1)
        # d(gate · sigmoid(alpha · gate)) = sigmoid + alpha · glu · (1 - sigmoid)
        torch.sub(torch.ones_like(total_M[:1]), sigmoid, out=other)
        slope = torch.addcmul(sigmoid, glu, other, value=self.alpha, out=sigmoid).mul_(grad)
        torch.addcmul(slope, slope, up, out=slope)
        torch.ops.aten.hardtanh_backward(slope, gate, -torch.inf, self.bound, grad_input=gate)
        torch.ops.aten.hardtanh_backward(grad.mul_(glu), up, -self.bound, self.bound, grad_input=up)
        return act, _together(gate, up, grad_MF.dtype), total_M


class Plain:
    """Any gate that a model's experts define, differentiated by autograd."""

    def __init__(self, apply: Any) -> None:
        self.apply = apply

    def forward(self, gate_up_MG: Tensor) -> Tensor:
        return self.apply(gate_up_MG)

    def backward(self, gate_up_MG: Tensor, grad_MF: Tensor, weight_M1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            given = gate_up_MG.detach().requires_grad_()
            act = self.apply(given)
        exact = torch.promote_types(grad_MF.dtype, torch.float32)
        total_M = (grad_MF.to(exact) * act.detach().to(exact)).sum(-1)
        (grad_gate_up_MG,) = torch.autograd.grad(act, given, grad_MF * weight_M1.to(grad_MF.dtype))
        return act.detach(), grad_gate_up_MG, total_M


def gate_of(experts: Any) -> Gate:
    if not experts.is_concatenated and hasattr(experts, "alpha") and hasattr(experts, "limit"):
        return ClampedSwiglu(experts.alpha, experts.limit)
    return Plain(experts._apply_gate)


def _apart(gate_up_MG: Tensor) -> tuple[Tensor, Tensor]:
    """Alternating values as two tensors of their own, bfloat16 in float32."""
    if gate_up_MG.dtype != torch.bfloat16:
        return gate_up_MG[:, ::2].contiguous(), gate_up_MG[:, 1::2].contiguous()
    # A pair of bfloat16 is the upper halves of two float32: shifts of whole words are vectorised, strides of two not.
    pairs = gate_up_MG.view(torch.int32)
    return (pairs << 16).view(torch.float32), (pairs & -65536).view(torch.float32)


def _together(gate_MF: Tensor, up_MF: Tensor, dtype: torch.dtype) -> Tensor:
    """The reverse; overwrites what it is given."""
    if dtype != torch.bfloat16:
        return torch.view_as_real(torch.complex(gate_MF, up_MF)).flatten(1)
    # Adding half of the last kept bit rounds to nearest.
    low, high = gate_MF.view(torch.int32), up_MF.view(torch.int32)
    low.add_(32768).bitwise_right_shift_(16).bitwise_and_(65535)
    return high.add_(32768).bitwise_and_(-65536).bitwise_or_(low).view(torch.bfloat16)
