"""The model's step for one new token per slot, as a straight line of products.

With few tokens a step costs what its operations cost to start, not what they compute. So the modules' own forward is
left out: projections of the same input are one product, adapters are merged, and what is constant is worked into the
weights (norms' weights, the scale of queries, the parts of the gate) where these are copied anyway. Used on the
processor in float32; elsewhere the modules run.

Axes: B slot, K key-value head, X its queries, key and value, N slots' key-value heads, or in `_Experts` routed rows
(B × experts per token, sorted by expert), k experts per token, H hidden, I that and a 1, E expert, F its units, G gates
and ups; key components and columns as in `slots`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.engine.adapters import LoraLinear
from posttrain.engine.slots import HIDDEN, SlotCache

if TYPE_CHECKING:
    from posttrain.engine.few_experts import ChosenExperts

ARCHITECTURES = ("gpt_oss", "llama", "mixtral", "qwen2", "qwen3", "qwen3_moe")
"""Two norms a layer, rotary embedding over the whole head, gated MLP or experts: what `DecodeProgram` spells out."""
PACKED_ELEMENTS = 1 << 20
"""Weights from this size on go to oneDNN, whose start costs more than it saves on smaller ones."""
PACKED_ROWS = 5
"""Fewer rows go to the plain product, which is faster with them."""
DENSE_ELEMENTS = 1 << 20
"""Layers whose experts have no more weights than this, and steps of no more than `DENSE_SLOTS`, ask every expert."""
DENSE_SLOTS = 32
KERNEL_SLOTS = 16
"""From so many on, small experts are one kernel (`posttrain.engine.few_experts`)."""
TURNED_ROWS = (2, 12)
"""With so many rows per expert, at least and at most in the mean, products read turned weights faster."""
TURNED_ELEMENTS = 1 << 24
"""Larger up projections are not copied for that."""
Tensor = torch.Tensor
Map = Callable[[torch.Tensor], torch.Tensor]
AddTo = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(what to add to [B, H], in place, input) → sum."""


@dataclass(frozen=True)
class _Linear:
    """x · Wᵀ + b; weight [out, in]."""

    weight: Tensor
    bias: Tensor | None

    def after_norm(self, norm: Any, rows: int) -> Map:
        """The product of states [B, I] as `DecodeProgram._normed` leaves them, laid out for about so many rows.

        The norm's weight and √H are worked in; the bias, which `addmm` first copies to every row, meets the 1.
        """
        weight, bias = self.weight * (norm.weight * math.sqrt(len(norm.weight))), self.bias
        if weight.numel() >= PACKED_ELEMENTS and rows >= PACKED_ROWS:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
            return lambda x_BI: torch.ops.mkldnn._linear_pointwise(x_BI[:, :-1], packed, bias, "none", [], "")
        turned = _with_bias(weight.T, bias)
        return lambda x_BI: torch.mm(x_BI, turned)

    def added(self) -> AddTo:
        turned, bias = self.weight.T.contiguous(), self.bias
        if bias is None:
            return lambda sum_BH, x: sum_BH.addmm_(x, turned)
        return lambda sum_BH, x: sum_BH.addmm_(x, turned).add_(bias)


def _with_bias(weight_HX: Tensor, bias_X: Tensor | None) -> Tensor:
    """[I, X]: the bias, or zeros, below the weights."""
    return torch.cat((weight_HX, (weight_HX.new_zeros(weight_HX.shape[1]) if bias_X is None else bias_X)[None]))


def _merged(module: Any) -> _Linear:
    """A linear layer with its adapter in it; a router as well."""
    if isinstance(module, LoraLinear):
        return _Linear(module.base.weight + module.scale * (module.lora_B @ module.lora_A), module.base.bias)
    return _Linear(module.weight, getattr(module, "bias", None))


def _joined(linears: list[_Linear]) -> _Linear:
    """Several projections of the same input as one."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears))
    return _Linear(torch.cat([linear.weight for linear in linears]), torch.cat(biases) if biases else None)


def _dense(mlp: Any, norm: Any, slots: int) -> AddTo:
    gate_up = _joined([_merged(mlp.gate_proj), _merged(mlp.up_proj)]).after_norm(norm, slots)
    down, activation = _merged(mlp.down_proj).added(), mlp.act_fn

    def add(sum_BH: Tensor, x_BI: Tensor) -> Tensor:
        gate, up = gate_up(x_BI).chunk(2, dim=-1)
        return down(sum_BH, activation(gate) * up)

    return add


@dataclass(frozen=True)
class _Turned:
    """A copy of a layer's up projection with its outputs outermost, all gates in front of all ups."""

    weight_EGH: Tensor
    source: Tensor
    """What was copied; held, so that nothing else can come to lie where it does."""
    sum_E: Tensor

    def is_of(self, source: Tensor) -> bool:
        return source.data_ptr() == self.source.data_ptr() and torch.equal(_sum_of_bits(source), self.sum_E)


_TURNED: WeakKeyDictionary[nn.Module, _Turned] = WeakKeyDictionary()
"""By the model's experts, while frozen. A copy costs what some thirty steps gain, and serves later programs as well."""


def _sum_of_bits(weight: Tensor) -> Tensor:
    """Of every expert's weights: a step of training does not leave it as it is."""
    return weight.flatten(1).view(torch.int64).sum(1)


def _turned(experts: Any, halves_EHF: tuple[Tensor, Tensor]) -> Tensor:
    """The up projection [E, G, H] of experts without an adapter, made anew only where the weights have changed."""
    source = experts.gate_up_proj.detach()
    turned = _TURNED.get(experts)
    if turned is None or not turned.is_of(source):
        weight_EGH = torch.cat([half_EHF.transpose(1, 2) for half_EHF in halves_EHF], 1)
        turned = _TURNED[experts] = _Turned(weight_EGH, source, _sum_of_bits(source))
    return turned.weight_EGH


class _Experts:
    """The experts of a layer: every one asked where that is cheaper than finding out whom to ask.

    The chosen ones' weights stay where the model has them, as copying them would cost as much as several steps, unless
    a turned copy serves later programs too: that of weights which are trained, or have an adapter, would not. GPT-OSS
    computes gate · sigmoid(a · gate) · (up + 1) of clamped values, gate and up alternating. That is
    silu(a · gate) · (a · up + a) / a²: so a goes into the norm's weight and the biases, and 1 / a² onto what is added.
    """

    def __init__(self, mlp: Any, norm: Any, slots: int) -> None:
        router, experts = getattr(mlp, "router", None) or mlp.gate, mlp.experts
        self.route = _merged(router).after_norm(norm, slots)
        self.per_token = router.top_k
        self.softmax_first = not getattr(router, "norm_topk_prob", True)
        self.alternating = not experts.is_concatenated
        self.alpha, self.limit = getattr(experts, "alpha", 1.0), getattr(experts, "limit", None)
        self.act = experts.act_fn if self.limit is None else nn.functional.silu
        self.norm_H = norm.weight * (math.sqrt(len(norm.weight)) * self.alpha)
        self.up_EHG, up_bias_EG = _of_every_expert(experts, "gate_up_proj")
        self.down_EFH, down_bias_EH = _of_every_expert(experts, "down_proj")
        self.up_bias_EG: Tensor | None = None
        self.down_bias_EH: Tensor | None = None
        if up_bias_EG is not None and down_bias_EH is not None:
            self.up_bias_EG, self.down_bias_EH = up_bias_EG * self.alpha, down_bias_EH * self.alpha**2
            if self.limit is not None:
                self._halves(self.up_bias_EG)[1].add_(self.alpha)
        self.number_E = torch.arange(len(self.up_EHG))
        self.few = self.up_EHG.numel() + self.down_EFH.numel() <= DENSE_ELEMENTS
        # A process that loads numba pays half a second for it.
        self.in_kernel = slots >= KERNEL_SLOTS and self.limit is not None and self.down_EFH.shape[1] % 16 == 0
        fewest, most = TURNED_ROWS
        fitting = fewest <= slots * self.per_token / len(self.up_EHG) <= most
        frozen = not hasattr(experts, "adapters") and not experts.gate_up_proj.requires_grad
        if not frozen:
            _TURNED.pop(experts, None)
        elif experts.is_transposed and fitting and not self.few and self.up_EHG.numel() <= TURNED_ELEMENTS:
            self._turn(experts)

    def _turn(self, experts: Any) -> None:
        self.up_EHG = _turned(experts, self._halves(self.up_EHG)).transpose(1, 2)
        if self.up_bias_EG is not None:
            self.up_bias_EG = torch.cat(self._halves(self.up_bias_EG), 1)
        self.alternating = False

    def _halves(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        if self.alternating:
            return gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate_up.chunk(2, -1)
        return gate, up

    def _activation(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.limit is None:
            return self.act(gate).mul_(up)
        alpha, limit = self.alpha, self.limit
        # What lies in one piece stays where it is; halves of a row become such a piece, which silu takes faster.
        clamp = Tensor.clamp_ if gate.is_contiguous() else Tensor.clamp
        gate = nn.functional.silu(clamp(gate, max=limit * alpha), inplace=True)
        return gate.mul_(clamp(up, (1 - limit) * alpha, (1 + limit) * alpha))

    @cached_property
    def every(self) -> tuple[Tensor, AddTo]:
        """All gates and all ups [2, I, X], and second projections side by side.

        Where these have biases, each expert has one more unit, which always gives the same and is their weight.
        """
        halves: list[tuple[Tensor, Tensor | None]] = [
            (half_EHF * self.norm_H[:, None], None) for half_EHF in self._halves(self.up_EHG)
        ]
        down_EFH = self.down_EFH
        if self.up_bias_EG is not None and self.down_bias_EH is not None:
            halves = [
                (nn.functional.pad(half_EHF, (0, 1)), nn.functional.pad(half_EF, (0, 1), value=1.0).flatten())
                for (half_EHF, _), half_EF in zip(halves, self._halves(self.up_bias_EG), strict=True)
            ]
            always = self._activation(torch.ones(1), torch.ones(1))
            down_EFH = torch.cat((down_EFH, self.down_bias_EH[:, None] / always), 1)
        up_2IX = torch.stack([_with_bias(half_EHF.transpose(0, 1).flatten(1), bias_X) for half_EHF, bias_X in halves])
        return up_2IX, _Linear(down_EFH.flatten(0, 1).T / self.alpha**2, None).added()

    def _choose(self, logits_BE: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and numbers [B, k] of each slot's experts."""
        if self.softmax_first:
            score_Bk, expert_Bk = torch.topk(torch.softmax(logits_BE, -1), self.per_token)
            return score_Bk, expert_Bk
        logit_Bk, expert_Bk = torch.topk(logits_BE, self.per_token)
        return torch.softmax(logit_Bk, -1), expert_Bk

    def __call__(self, sum_BH: Tensor, x_BI: Tensor) -> Tensor:
        score_Bk, expert_Bk = self._choose(self.route(x_BI))
        ask = self._ask_chosen
        if self.few and x_BI.shape[0] <= DENSE_SLOTS:
            ask = self._ask_few if self.in_kernel else self._ask_all
        return ask(sum_BH, x_BI, score_Bk, expert_Bk)

    def _ask_all(self, sum_BH: Tensor, x_BI: Tensor, score_Bk: Tensor, expert_Bk: Tensor) -> Tensor:
        up_2IX, down = self.every
        score_BE = x_BI.new_zeros(x_BI.shape[0], self.number_E.shape[0]).scatter_(1, expert_Bk, score_Bk)
        gate_BX, up_BX = torch.bmm(x_BI.expand(2, -1, -1), up_2IX)
        gated_BEF = self._activation(gate_BX, up_BX).view(*score_BE.shape, -1).mul_(score_BE.unsqueeze(-1))
        return down(sum_BH, gated_BEF.flatten(1))

    def _ask_few(self, sum_BH: Tensor, x_BI: Tensor, score_Bk: Tensor, expert_Bk: Tensor) -> Tensor:
        return self.every[1](sum_BH, self.chosen(x_BI, expert_Bk, score_Bk))

    @cached_property
    def chosen(self) -> "ChosenExperts":
        from posttrain.engine.few_experts import ChosenExperts

        assert self.limit is not None
        size, always = self.down_EFH.shape[1], float(self._activation(torch.ones(1), torch.ones(1)))
        return ChosenExperts(self.every[0], len(self.down_EFH), size, self.alpha, self.limit, always)

    def _ask_chosen(self, sum_BH: Tensor, x_BI: Tensor, score_Bk: Tensor, expert_Bk: Tensor) -> Tensor:
        expert_N, order_N = torch.sort(expert_Bk.flatten(), stable=True)
        stop_E = torch.searchsorted(expert_N, self.number_E, right=True, out_int32=True)
        slot_N = order_N // self.per_token
        x_NH = (x_BI[:, :-1] * self.norm_H).index_select(0, slot_N)
        gate_up_NG = torch._grouped_mm(x_NH, self.up_EHG, offs=stop_E)
        if self.up_bias_EG is not None:
            gate_up_NG += self.up_bias_EG.index_select(0, expert_N)
        down_NH = torch._grouped_mm(self._activation(*self._halves(gate_up_NG)), self.down_EFH, offs=stop_E)
        if self.down_bias_EH is not None:
            down_NH += self.down_bias_EH.index_select(0, expert_N)
        down_NH *= score_Bk.view(-1, 1).index_select(0, order_N)
        return sum_BH.index_add_(0, slot_N, down_NH, alpha=self.alpha**-2)


def _of_every_expert(experts: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """A projection's weights [E, in, out], an adapter merged into a copy of them, and biases [E, out]."""
    weight_E, adapters = getattr(experts, name), getattr(experts, "adapters", None)
    weight_E = weight_E if experts.is_transposed else weight_E.transpose(1, 2)
    if adapters is not None and name in adapters:
        adapter = adapters[name]
        weight_E = torch.baddbmm(weight_E, adapter.lora_A, adapter.lora_B, alpha=adapter.scale)
    return weight_E, getattr(experts, f"{name}_bias") if experts.has_bias else None


def _length(x: Tensor, floor: Tensor) -> Tensor:
    """√(|x|² + floor²): what an RMS norm divides by, but for its constants, see `_Linear.after_norm`."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)


def _floor(norm: Any) -> Tensor:
    return torch.tensor(math.sqrt(len(norm.weight) * norm.variance_epsilon))


@dataclass(frozen=True)
class _Layer:
    before_attention: Tensor
    qkv: Map
    head_norm: Map | None
    out: AddTo
    before_mlp: Tensor
    mlp: AddTo


class DecodeProgram:
    """One step for every slot of a cache; to be made anew when the model's weights have changed."""

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        self.slots = slots
        decoder: Any = model.get_decoder()
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.group = self.heads // self.kv_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        # The halves that a rotation pairs, side by side, so that it is one complex product.
        self.order = torch.arange(self.size).view(2, -1).T.reshape(-1)
        self.embedding, self.rotary = decoder.embed_tokens.weight, decoder.rotary_emb
        self.layers = [self._layer(layer) for layer in decoder.layers]
        self.last_floor = _floor(decoder.norm)
        self.head = _merged(model.get_output_embeddings()).after_norm(decoder.norm, slots)
        self.rotations = torch.empty(0)
        self.normed_BI = torch.ones(slots, config.hidden_size + 1)
        self.normed_BH = self.normed_BI[:, :-1]

    def _layer(self, module: Any) -> _Layer:
        attention, mlp = module.self_attn, module.mlp
        normed_heads = hasattr(attention, "q_norm")
        sinks = getattr(attention, "sinks", None)
        sink_H = torch.full((self.heads,), HIDDEN) if sinks is None else sinks
        scale = 1.0 if normed_heads else attention.scaling
        query = self._heads(_merged(attention.q_proj), scale, torch.stack((torch.ones_like(sink_H), sink_H), 1))
        key = self._heads(_merged(attention.k_proj), 1.0, torch.zeros(self.kv_heads, 2))
        value = self._heads(_merged(attention.v_proj), 1.0, torch.zeros(self.kv_heads, 2), torch.arange(self.size))
        experts = hasattr(mlp, "experts")
        return _Layer(
            before_attention=_floor(module.input_layernorm),
            qkv=self._by_group([query, key, value]).after_norm(module.input_layernorm, self.slots),
            head_norm=self._head_norm(attention) if normed_heads else None,
            out=_merged(attention.o_proj).added(),
            before_mlp=_floor(module.post_attention_layernorm),
            mlp=(_Experts if experts else _dense)(mlp, module.post_attention_layernorm, self.slots),
        )

    def _heads(self, linear: _Linear, scale: float, more_X2: Tensor, order: Tensor | None = None) -> _Linear:
        """Heads in the cache's order, each with its two further components as biases."""
        order = self.order if order is None else order
        weight_XDH = linear.weight.view(len(more_X2), self.size, -1)[:, order] * scale
        bias = torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias
        bias_XD = bias.view(len(more_X2), self.size)[:, order] * scale
        weight_XEH = nn.functional.pad(weight_XDH, (0, 0, 0, 2))
        return _Linear(weight_XEH.flatten(0, 1), torch.cat((bias_XD, more_X2), 1).flatten())

    def _by_group(self, linears: list[_Linear]) -> _Linear:
        """Each key-value head's queries, key and value, one group behind the other."""
        weights = [linear.weight.view(self.kv_heads, -1, linear.weight.shape[1]) for linear in linears]
        biases = [linear.bias.view(self.kv_heads, -1) for linear in linears if linear.bias is not None]
        return _Linear(torch.cat(weights, 1).flatten(0, 1), torch.cat(biases, 1).flatten())

    def _head_norm(self, attention: Any) -> Callable[[Tensor], Tensor]:
        norms = [attention.q_norm] * self.group + [attention.k_norm]
        weight_XD = torch.stack([norm.weight[self.order] for norm in norms]) * math.sqrt(self.size)
        weight_XD[: self.group] *= attention.scaling
        floor = _floor(attention.q_norm)
        return lambda qk_NXD: qk_NXD.div_(_length(qk_NXD, floor)).mul_(weight_XD)

    def step(self, token_B: Tensor, cache: SlotCache) -> Tensor:
        """Float32 logits [B, V] after `token_B`; the cache grows by one position."""
        x_BH = self.embedding.index_select(0, token_B)
        if x_BH.shape != self.normed_BH.shape:
            self.normed_BI = torch.ones(len(x_BH), x_BH.shape[1] + 1)
            self.normed_BH = self.normed_BI[:, :-1]
        turn_B11C = self._rotations(cache)
        for number, layer in enumerate(self.layers):
            out_BX = self._attend(number, layer, self._normed(x_BH, layer.before_attention), turn_B11C, cache)
            x_BH = layer.out(x_BH, out_BX)
            x_BH = layer.mlp(x_BH, self._normed(x_BH, layer.before_mlp))
        cache.advance()
        return self.head(self._normed(x_BH, self.last_floor))

    def _normed(self, x_BH: Tensor, floor: Tensor) -> Tensor:
        """States divided by their length, a 1 behind them: [B, I], which the next call writes over."""
        torch.div(x_BH, _length(x_BH, floor), out=self.normed_BH)
        return self.normed_BI

    def _rotations(self, cache: SlotCache) -> Tensor:
        """Complex factors [B, 1, 1, E/2] of each slot's next position; 1 for the two further components."""
        if cache.furthest >= len(self.rotations):
            positions = torch.arange(2 * cache.furthest + 64)
            cos, sin = (part[0, :, : self.size // 2] for part in self.rotary(self.embedding[:1], positions[None]))
            self.rotations = nn.functional.pad(torch.complex(cos, sin), (0, 1), value=1.0)[:, None, None]
        return self.rotations.index_select(0, cache.lengths_B)

    def _attend(self, number: int, layer: _Layer, x_BI: Tensor, turn_B11C: Tensor, cache: SlotCache) -> Tensor:
        slots, group, size = x_BI.shape[0], self.group, self.size
        qkv = layer.qkv(x_BI)
        heads_NXE = qkv.view(slots * self.kv_heads, group + 2, size + 2)
        if layer.head_norm is not None:
            layer.head_norm(heads_NXE[:, :-1, :size])
        pairs_BKXC = torch.view_as_complex(qkv.view(slots, self.kv_heads, group + 2, -1, 2))
        pairs_BKXC[:, :, :-1].mul_(turn_B11C)
        keys_NES, values_NSD = cache.store(number, heads_NXE[:, group], heads_NXE[:, group + 1, :size])
        weights_NGS = torch.softmax(torch.bmm(heads_NXE[:, :group], keys_NES), -1)
        return torch.bmm(weights_NGS, values_NSD).view(slots, -1)


@torch.no_grad()
def decode_program(model: PreTrainedModel, slots: int) -> DecodeProgram | None:
    """A program with the model's present weights, for about so many slots; None where its modules have to run.

    Made for every batch: that weights have changed cannot be seen, a fused optimizer does not count a tensor's version.
    """
    weight = model.get_input_embeddings().weight
    rope = getattr(model.config, "rope_parameters", None) or {}
    if (
        model.config.model_type not in ARCHITECTURES
        or weight.device.type != "cpu"
        or weight.dtype != torch.float32
        # Frequencies that depend on the sequence's length.
        or rope.get("rope_type") in ("dynamic", "longrope")
    ):
        return None
    return DecodeProgram(model, slots)
