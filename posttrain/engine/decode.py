"""The model's step for one new token per slot, as a straight line of products.

With few tokens a step costs what its operations cost to start, not what they compute. So the modules' own forward is
left out: projections of the same input are one product, adapters are merged in float32, and weights are laid out once
for products with few rows (oneDNN). Used on the processor in float32; elsewhere the modules run.

Axes: B slot, N routed row (B × experts per token, sorted by expert), k experts per token, H hidden, X query and
key-value heads together, K key-value head, S key position, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.engine.adapters import LoraLinear
from posttrain.engine.attention import SlotCache

ARCHITECTURES = ("gpt_oss", "llama", "mixtral", "qwen2", "qwen3", "qwen3_moe")
"""Two norms a layer, rotary embedding over the whole head, gated MLP or experts: what `DecodeProgram` spells out."""
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
PACKED_ELEMENTS = 1 << 18
"""Weights from this size on go to oneDNN, whose start costs more than the whole product of a smaller one."""
Tensor = torch.Tensor
Map = Callable[[torch.Tensor], torch.Tensor]


def _product(weight: Tensor, bias: Tensor | None) -> Map:
    """x · Wᵀ + b for a W [out, in] that does not change, laid out for few rows."""
    if weight.numel() >= PACKED_ELEMENTS:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    turned = weight.T.contiguous()
    if bias is None:
        return lambda x: torch.mm(x, turned)
    return lambda x: torch.addmm(bias, x, turned)


def _merged(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a linear layer with its adapter in it."""
    if isinstance(module, LoraLinear):
        return module.base.weight + module.scale * (module.lora_B @ module.lora_A), module.base.bias
    assert isinstance(module, nn.Linear)
    return module.weight, module.bias


def _joined(modules: list[nn.Module]) -> Map:
    """Several projections of the same input as one product."""
    weights, biases = zip(*map(_merged, modules), strict=True)
    return _product(torch.cat(weights), None if biases[0] is None else torch.cat(biases))


def _norm(module: Any) -> Map:
    weight, epsilon = module.weight, module.variance_epsilon
    return lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True).add_(epsilon)) * weight


def _dense(mlp: Any) -> Map:
    gate_up, down, activation = _joined([mlp.gate_proj, mlp.up_proj]), _joined([mlp.down_proj]), mlp.act_fn

    def run(x_BH: Tensor) -> Tensor:
        gate, up = gate_up(x_BH).chunk(2, dim=-1)
        return down(activation(gate) * up)

    return run


def _expert_products(experts: Any, name: str) -> list[Map]:
    weight_E, adapters = getattr(experts, name), getattr(experts, "adapters", None)
    weight_E = weight_E.transpose(1, 2) if experts.is_transposed else weight_E
    if adapters is not None and name in adapters:
        adapter = adapters[name]
        weight_E = weight_E + adapter.scale * (adapter.lora_A @ adapter.lora_B).transpose(1, 2)
    biases = getattr(experts, f"{name}_bias") if experts.has_bias else [None] * len(weight_E)
    return [_product(weight, bias) for weight, bias in zip(weight_E, biases, strict=True)]


def _experts(mlp: Any) -> Map:
    router, experts = getattr(mlp, "router", None) or mlp.gate, mlp.experts
    gate_up, down = _expert_products(experts, "gate_up_proj"), _expert_products(experts, "down_proj")

    def run(x_BH: Tensor) -> Tensor:
        _, score_Bk, expert_Bk = router(x_BH)
        slots, per_token = expert_Bk.shape
        expert_N, order_N = torch.sort(expert_Bk.reshape(-1), stable=True)
        bounds = [0, *torch.bincount(expert_N, minlength=len(down)).cumsum(0).tolist()]
        spans = [(number, span) for number, span in enumerate(pairwise(bounds)) if span[0] < span[1]]
        x_NH = x_BH.index_select(0, order_N // per_token)
        gated_N = experts._apply_gate(torch.cat([gate_up[number](x_NH[a:b]) for number, (a, b) in spans]))
        down_NH = torch.cat([down[number](gated_N[a:b]) for number, (a, b) in spans])
        place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N)))
        by_slot_BkH = down_NH.index_select(0, place_N).view(slots, per_token, -1)
        return torch.bmm(score_Bk.unsqueeze(1), by_slot_BkH)[:, 0]

    return run


@dataclass(frozen=True)
class _Layer:
    before_attention: Map
    qkv: Map
    head_norms: tuple[Map, Map] | None
    sinks_H: Tensor | None
    window: int | None
    scale: float
    out: Map
    before_mlp: Map
    mlp: Map


def _layer(module: Any) -> _Layer:
    attention, mlp = module.self_attn, module.mlp
    norms = (_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
    return _Layer(
        before_attention=_norm(module.input_layernorm),
        qkv=_joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        head_norms=norms,
        sinks_H=getattr(attention, "sinks", None),
        # Mixtral's attention reads its window from the configuration.
        window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
        scale=attention.scaling,
        out=_joined([attention.o_proj]),
        before_mlp=_norm(module.post_attention_layernorm),
        mlp=_experts(mlp) if hasattr(mlp, "experts") else _dense(mlp),
    )


class DecodeProgram:
    """One step for every slot of a cache; the weights are those of the moment it was made."""

    def __init__(self, model: PreTrainedModel) -> None:
        decoder: Any = model.get_decoder()
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.embedding = decoder.embed_tokens.weight
        self.rotary = decoder.rotary_emb
        self.layers = [_layer(layer) for layer in decoder.layers]
        self.last_norm = _norm(decoder.norm)
        self.head = _joined([model.get_output_embeddings()])

    def step(self, token_B: Tensor, cache: SlotCache) -> Tensor:
        """Float32 logits [B, V] after `token_B`; the cache grows by one position."""
        x_BH = self.embedding.index_select(0, token_B)
        cos_B11D, sin_B11D = self._rotation(x_BH, cache.lengths_B)
        place = _Place(cache)
        for number, layer in enumerate(self.layers):
            x_BH = x_BH + layer.out(
                self._attend(number, layer, layer.before_attention(x_BH), cos_B11D, sin_B11D, place)
            )
            x_BH = x_BH + layer.mlp(layer.before_mlp(x_BH))
        cache.lengths_B = cache.lengths_B + 1
        return self.head(self.last_norm(x_BH)).float()

    def _rotation(self, x_BH: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin [B, 1, 2, D/2]: with the halves swapped, rotating is x · cos + swapped · sin."""
        cos, sin = (part[:, 0, : self.size // 2] for part in self.rotary(x_BH, lengths_B[:, None]))
        return torch.stack((cos, cos), 1)[:, None], torch.stack((-sin, sin), 1)[:, None]

    def _attend(
        self, number: int, layer: _Layer, x_BH: Tensor, cos_B12D: Tensor, sin_B12D: Tensor, place: "_Place"
    ) -> Tensor:
        slots, heads, kv_heads, size = len(x_BH), self.heads, self.kv_heads, self.size
        qkv_BXD = layer.qkv(x_BH).view(slots, heads + 2 * kv_heads, size)
        qk_BXD, v_BKD = qkv_BXD[:, : heads + kv_heads], qkv_BXD[:, heads + kv_heads :]
        if layer.head_norms is not None:
            normed = (
                norm(part) for norm, part in zip(layer.head_norms, qk_BXD.split([heads, kv_heads], 1), strict=True)
            )
            qk_BXD = torch.cat(tuple(normed), 1)
        halves_BX2D = qk_BXD.unflatten(2, (2, size // 2))
        qk_BXD = (halves_BX2D * cos_B12D).addcmul_(halves_BX2D.flip(2), sin_B12D).flatten(2)
        keys_BKSD, values_BKSD = place.store(number, qk_BXD[:, heads:], v_BKD)
        out_BH1D, lse_BH1 = _flash(
            qk_BXD[:, :heads, None],
            keys_BKSD,
            values_BKSD,
            0.0,
            False,
            attn_mask=place.mask(layer.window),
            scale=layer.scale,
        )
        if layer.sinks_H is not None:
            # What is left for the real keys beside the sink: exp(lse) / (exp(lse) + exp(sink)).
            out_BH1D = out_BH1D * torch.sigmoid(lse_BH1 - layer.sinks_H[:, None]).unsqueeze(-1)
        return out_BH1D.reshape(slots, heads * size)


class _Place:
    """Where this step's keys and values go, and which keys each slot then sees."""

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self.newest = int(cache.lengths_B.max()) + 1
        self.masks: dict[int | None, Tensor] = {}
        self.rows: Tensor | None = None

    def store(self, layer: int, k_BKD: Tensor, v_BKD: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        assert keys is not None and values is not None
        slots, kv_heads, positions, size = keys.shape
        if self.rows is None:
            first = torch.arange(slots * kv_heads) * positions
            self.rows = first + self.cache.lengths_B.repeat_interleave(kv_heads)
        keys.view(-1, size).index_copy_(0, self.rows, k_BKD.reshape(-1, size))
        values.view(-1, size).index_copy_(0, self.rows, v_BKD.reshape(-1, size))
        return keys[:, :, : self.newest], values[:, :, : self.newest]

    def mask(self, window: int | None) -> Tensor:
        """Additive mask [B, 1, 1, S]."""
        if window not in self.masks:
            lengths_B1, position_S = self.cache.lengths_B[:, None], torch.arange(self.newest)
            hidden_BS = position_S > lengths_B1
            if window is not None:
                hidden_BS |= position_S <= lengths_B1 - window
            mask_BS = torch.zeros(hidden_BS.shape).masked_fill_(hidden_BS, float("-inf"))
            self.masks[window] = mask_BS[:, None, None]
        return self.masks[window]


@torch.no_grad()
def decode_program(model: PreTrainedModel) -> DecodeProgram | None:
    """A program with the model's present weights; None where its modules have to run.

    Made for every batch: that weights have changed cannot be seen, a fused optimizer does not count a tensor's version.
    """
    weight = model.get_input_embeddings().weight
    if model.config.model_type not in ARCHITECTURES or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    return DecodeProgram(model)
