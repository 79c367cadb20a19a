"""What the routers of a mixture-of-experts model did during a step.

Axes: T token, k choice of a token, E expert.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class RoutingWatch:
    """Counts choices and adds up entropies in the routers' forward passes, those with gradients only."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._counts: dict[int, torch.Tensor] = {}
        self._entropy, self._tokens = torch.zeros((), dtype=torch.float64), 0
        for number, layer in enumerate(model.get_decoder().layers):
            router = getattr(layer.mlp, "router", None) or getattr(layer.mlp, "gate", None)
            if router is not None and hasattr(layer.mlp, "experts"):
                router.register_forward_hook(self._hook(number))

    def _hook(self, layer: int) -> Any:
        @torch.no_grad()
        def seen(router: nn.Module, arguments: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            logits_TE, _, indices_Tk = output
            logprob_TE = torch.log_softmax(logits_TE.float(), dim=-1)
            # Nothing here waits for the device.
            self._entropy = self._entropy.to(logits_TE.device) - (logprob_TE.exp() * logprob_TE).sum()
            self._tokens += len(logits_TE)
            expert_E1 = torch.arange(logits_TE.shape[-1], device=indices_Tk.device)[:, None]
            count_E = (indices_Tk.reshape(-1) == expert_E1).sum(1)
            self._counts[layer] = self._counts.get(layer, 0) + count_E

        def while_training(router: nn.Module, arguments: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                seen(router, arguments, output)

        return while_training

    def take(self) -> dict[str, float]:
        """The step's values over all layers, then begin anew; empty for a dense model.

        `expert_load_max` is the busiest expert's share of its layer's choices as a multiple of an even share,
        `dead_experts` those that no token chose, `router_entropy` the routers' mean in nats over all experts.
        """
        if not self._tokens:
            return {}
        loads = [count_E / count_E.float().mean() for count_E in self._counts.values()]
        values = {
            "expert_load_max": max(float(load_E.max()) for load_E in loads),
            "dead_experts": float(sum(int((load_E == 0).sum()) for load_E in loads)),
            "router_entropy": float(self._entropy) / self._tokens,
        }
        self._counts, self._entropy, self._tokens = {}, torch.zeros((), dtype=torch.float64), 0
        return values
