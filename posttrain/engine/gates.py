"""What stands between an expert's two products, with its derivative written out.

Tensors that take part live in float32 and in the processor's caches; what is read and written has the type of the
products. Backward passes take the row's router weight as well, because they meet both gradients here.

Axes: P routed row, M those that are worked on at once, F expert size, G twice that: gate and up of every unit.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch

ROWS_AT_ONCE = 1024
"""What the gate works on stays in the caches."""
Tensor = torch.Tensor


class Gate(Protocol):
    """Gated activation of routed rows."""

    def forward(self, gate_up_PG: Tensor) -> Tensor: ...

    def backward(self, gate_up_PG: Tensor, grad_PF: Tensor, weight_P1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The activation [P, F], the gradient of gate and up [P, G] and Σ grad · activation of every row [P].

        `grad_PF` is the gradient of the activation without the router's weight, which goes on [P, G] alone.
        """
        ...


class ClampedSwiglu:
    """GPT-OSS: (up + 1) · gate · sigmoid(alpha · gate) of clamped values, gate and up alternating."""

    def __init__(self, alpha: float, limit: float) -> None:
        self.alpha = alpha
        # Clamped here, a value is told from one that stands at the limit: only the former stops its gradient.
        bound = torch.tensor(limit, dtype=torch.float32)
        self.bound = torch.nextafter(bound, bound.new_tensor(torch.inf)).item()

    def _blocks(self, gate_up_PG: Tensor, more: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """Rows with gate and up, clamped, and `more` tensors like them, all of them the same memory every time."""
        rows, exact = len(gate_up_PG), torch.promote_types(gate_up_PG.dtype, torch.float32)
        size = min(rows, ROWS_AT_ONCE), gate_up_PG.shape[1] // 2
        memory = [gate_up_PG.new_empty(size, dtype=exact) for _ in range(2 + more)]
        for start in range(0, rows, ROWS_AT_ONCE):
            block = slice(start, min(start + ROWS_AT_ONCE, rows))
            gate, up, *rest = (part[: block.stop - start] for part in memory)
            _part(gate_up_PG[block], gate, up)
            gate.clamp_(max=self.bound)
            up.clamp_(-self.bound, self.bound)
            yield block, [gate, up, *rest]

    def forward(self, gate_up_PG: Tensor) -> Tensor:
        act_PF = gate_up_PG.new_empty(len(gate_up_PG), gate_up_PG.shape[1] // 2)
        for block, (gate, up, glu) in self._blocks(gate_up_PG, 1):
            torch.mul(gate, self.alpha, out=glu).sigmoid_().mul_(gate)
            act_PF[block] = torch.addcmul(glu, glu, up, out=glu)
        return act_PF

    def backward(self, gate_up_PG: Tensor, grad_PF: Tensor, weight_P1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        act_PF, grad_PG = torch.empty_like(grad_PF), torch.empty_like(gate_up_PG)
        total_P = grad_PF.new_empty(len(grad_PF), dtype=torch.promote_types(grad_PF.dtype, torch.float32))
        one = torch.ones_like(total_P[:1])
        for block, (gate, up, sigmoid, glu, grad, other) in self._blocks(gate_up_PG, 4):
            torch.mul(gate, self.alpha, out=sigmoid).sigmoid_()
            torch.mul(gate, sigmoid, out=glu)
            grad.copy_(grad_PF[block])
            act_PF[block] = torch.addcmul(glu, glu, up, out=other)
            torch.sum(other.mul_(grad), -1, out=total_P[block])
            grad *= weight_P1[block]
            # d(gate · sigmoid(alpha · gate)) = sigmoid + alpha · glu · (1 - sigmoid)
            torch.sub(one, sigmoid, out=other)
            slope = torch.addcmul(sigmoid, glu, other, value=self.alpha, out=sigmoid).mul_(grad)
            torch.addcmul(slope, slope, up, out=slope)
            torch.ops.aten.hardtanh_backward(slope, gate, -torch.inf, self.bound, grad_input=gate)
            torch.ops.aten.hardtanh_backward(grad.mul_(glu), up, -self.bound, self.bound, grad_input=up)
            _join(gate, up, grad_PG[block])
        return act_PF, grad_PG, total_P


class Plain:
    """Any gate that a model's experts define, differentiated by autograd."""

    def __init__(self, apply: Any) -> None:
        self.apply = apply

    def forward(self, gate_up_PG: Tensor) -> Tensor:
        return torch.cat([self.apply(gate_up_MG) for gate_up_MG in gate_up_PG.split(ROWS_AT_ONCE)])

    def backward(self, gate_up_PG: Tensor, grad_PF: Tensor, weight_P1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = zip(*(rows.split(ROWS_AT_ONCE) for rows in (gate_up_PG, grad_PF, weight_P1)), strict=True)
        act, grad, total = zip(*(self._backward(*part) for part in parts), strict=True)
        return torch.cat(act), torch.cat(grad), torch.cat(total)

    def _backward(self, gate_up_MG: Tensor, grad_MF: Tensor, weight_M1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def _part(gate_up_MG: Tensor, gate_MF: Tensor, up_MF: Tensor) -> None:
    """Alternating values into two tensors, bfloat16 into float32."""
    if gate_up_MG.dtype == torch.bfloat16:
        # A pair of bfloat16 is the upper halves of two float32: whole words are vectorised, strides of two are not.
        pairs = gate_up_MG.view(torch.int32)
        torch.bitwise_left_shift(pairs, 16, out=gate_MF.view(torch.int32))
        torch.bitwise_and(pairs, -65536, out=up_MF.view(torch.int32))
    else:
        gate_MF.copy_(gate_up_MG[:, ::2])
        up_MF.copy_(gate_up_MG[:, 1::2])


def _join(gate_MF: Tensor, up_MF: Tensor, gate_up_MG: Tensor) -> None:
    """The reverse; overwrites what it is given."""
    if gate_up_MG.dtype == torch.bfloat16:
        # Adding half of the last kept bit rounds to nearest.
        low, high = gate_MF.view(torch.int32), up_MF.view(torch.int32)
        low.add_(32768).bitwise_right_shift_(16).bitwise_and_(65535)
        high.add_(32768).bitwise_and_(-65536)
        torch.bitwise_or(low, high, out=gate_up_MG.view(torch.int32))
    else:
        torch.complex(gate_MF, up_MF, out=torch.view_as_complex(gate_up_MG.unflatten(1, (-1, 2))))
