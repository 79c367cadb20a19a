"""Attention over packed rows: documents, shared prefixes, sliding windows and sinks, without a T×T matrix.

A plan cuts the row into blocks of queries, each with the key ranges it may see: one flash call per block forward,
products written out backward. Sinks are folded in afterwards through the log-sum-exp, which is exact in both directions
(see `_PackedAttention`). On CUDA in half precision one kernel takes all segments at once (`posttrain.engine.varlen`).

Axes: T row position, Q query of a block, S key position, H query head, K key-value head, G query heads per key-value
head, M pair of a query and its head (as many as Q times G), D head size, E that and one more, B slot of a decode batch.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface

from posttrain.engine.varlen import FLASH, Lanes, VarlenAttention, lanes

if TYPE_CHECKING:
    from posttrain.engine.slots import Prefill, SlotCache

NAME = "posttrain_packed"
"""Registered with transformers. The name must not contain `sdpa` or `flash`: transformers tests for these."""

PLAIN_LOGITS = {"cpu": 2**19, "cuda": 2**26}
"""Logits of one block where the products are written out, about: on a CPU so many as its caches hold."""
FEWEST_QUERIES, MOST_QUERIES = 16, 256

LOG2_E = math.log2(math.e)
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Segment:
    """Tokens `start:stop` of the row that see themselves causally and, whole, an earlier `prefix` of the row."""

    start: int
    stop: int
    prefix: tuple[int, int] | None = None

    @property
    def num_keys(self) -> int:
        start, stop = self.prefix or (0, 0)
        return stop - start + self.stop - self.start


@dataclass(frozen=True)
class Block:
    queries: tuple[int, int]
    keys: tuple[tuple[int, int], ...]
    """Ranges of the row, in position order: at most the prefix and the segment's own."""
    first: int
    """Position of the first query, counted from the first key."""
    window: int | None

    @property
    def is_causal(self) -> bool:
        """Whether the block is square and plainly causal."""
        length = self.queries[1] - self.queries[0]
        return self.keys == (self.queries,) and (self.window is None or length <= self.window)

    def bias(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What hides keys from queries when it is added to their logits, [Q, S]."""
        queries = self.queries[1] - self.queries[0]
        key_S = torch.arange(self.first + queries, device=device)
        query_Q1 = key_S[self.first :, None]
        hidden_QS = key_S > query_Q1
        if self.window:
            hidden_QS |= key_S <= query_Q1 - self.window
        return torch.zeros(hidden_QS.shape, dtype=dtype, device=device).masked_fill_(hidden_QS, float("-inf"))


@dataclass(frozen=True)
class AttentionPlan:
    """The blocks of one packed row, cut once per window size and shared by all layers."""

    segments: tuple[Segment, ...]
    _blocks: dict[tuple[int | None, int | None], tuple[Block, ...]] = field(default_factory=dict)
    _lanes: dict[torch.device, Lanes] = field(default_factory=dict)

    def blocks(self, window: int | None, most_queries: int | None = None) -> tuple[Block, ...]:
        key = window, most_queries
        if key not in self._blocks:
            self._blocks[key] = tuple(
                block for segment in self.segments for block in _cut(segment, window, most_queries)
            )
        return self._blocks[key]

    def lanes(self, device: torch.device) -> Lanes:
        """The segments as a kernel for all of them takes them."""
        if device not in self._lanes:
            segments = [(segment.start, segment.stop, segment.prefix) for segment in self.segments]
            self._lanes[device] = lanes(segments, device)
        return self._lanes[device]


def _cut(segment: Segment, window: int | None, most_queries: int | None) -> list[Block]:
    """Blocks of one segment: a single one without limits, else chunks of one window's length or `most_queries`."""
    prefix_start, prefix_stop = segment.prefix or (segment.start, segment.start)
    prefix_length = prefix_stop - prefix_start
    length = segment.stop - segment.start
    chunk = min(length, window or length, most_queries or length)
    blocks = []
    for begin in range(0, length, chunk):
        end = min(begin + chunk, length)
        first_position = prefix_length + begin
        oldest = max(0, first_position - window + 1) if window else 0
        keys = []
        if oldest < prefix_length:
            keys.append((prefix_start + oldest, prefix_stop))
        keys.append((segment.start + max(0, oldest - prefix_length), segment.start + end))
        queries = (segment.start + begin, segment.start + end)
        blocks.append(Block(queries, tuple(keys), first_position - oldest, window))
    return blocks


def _gather(x_KTD: torch.Tensor, ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    parts = [x_KTD[:, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass(frozen=True)
class _Logits:
    """How a query and a key become a logit: scaled, then soft-capped (Gemma 2) where there is a cap."""

    scale: float
    softcap: float | None


def _attend(
    q_1HQD: torch.Tensor, k_1KSD: torch.Tensor, v_1KSD: torch.Tensor, block: Block, rule: _Logits
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block's output [1, H, Q, D] and float32 log-sum-exp [1, H, Q]."""
    if rule.softcap is None and q_1HQD.device.type == "cpu":
        bias = None if block.is_causal else block.bias(q_1HQD.dtype, q_1HQD.device)
        return _flash(q_1HQD, k_1KSD, v_1KSD, 0.0, bias is None, attn_mask=bias, scale=rule.scale)
    q_KGQD = q_1HQD[0].unflatten(0, (k_1KSD.shape[1], -1))
    exact = torch.promote_types(q_1HQD.dtype, torch.float32)
    logits_KGQS = (q_KGQD @ k_1KSD[0, :, None].transpose(2, 3)).to(exact) * rule.scale
    if rule.softcap is not None:
        logits_KGQS = torch.tanh(logits_KGQS / rule.softcap) * rule.softcap
    logits_KGQS += block.bias(exact, q_1HQD.device)
    lse_KGQ = torch.logsumexp(logits_KGQS, dim=-1)
    # MKL's exponential, which `exp` takes on a processor, is thirty times slower where it meets -inf.
    weights_KGQS = logits_KGQS.sub_(lse_KGQ[..., None]).mul_(LOG2_E).exp2_().to(v_1KSD.dtype)
    return (weights_KGQS @ v_1KSD[0, :, None]).reshape(q_1HQD.shape), lse_KGQ.reshape(q_1HQD.shape[:3])


@dataclass(frozen=True)
class _Backward:
    """A row's attention differentiated block by block, in float32 whatever the type.

    On a processor that is faster than the flash op's backward pass, which is slower still in bfloat16.

    What a query's logits are diminished by before they become probabilities, and d probabilities before they become
    d logits, is one more component that meets a key's or a value's 1.
    """

    q_KTGE: torch.Tensor
    """Scaled and to base 2; last comes minus the log-sum-exp."""
    k_KTE: torch.Tensor
    v_KTE: torch.Tensor
    grad_KTGE: torch.Tensor
    """Of the output; last comes minus its overlap with the output."""
    softcap: float | None

    def add(self, block: Block, dq_KTGD: torch.Tensor, dk_KTD: torch.Tensor, dv_KTD: torch.Tensor) -> None:
        """Set the gradients of the block's queries and add those of keys and values; without the scale."""
        span = slice(*block.queries)
        q_KME, grad_KME = self.q_KTGE[:, span].flatten(1, 2), self.grad_KTGE[:, span].flatten(1, 2)
        k_KSE, v_KSE = _gather(self.k_KTE, block.keys), _gather(self.v_KTE, block.keys)
        slope_KMS = None
        if self.softcap is None:
            logits_KMS = q_KME @ k_KSE.transpose(1, 2)
        else:
            bent_KMS = torch.tanh((q_KME[..., :-1] @ k_KSE[..., :-1].transpose(1, 2)) / (self.softcap * LOG2_E))
            logits_KMS = bent_KMS * (self.softcap * LOG2_E) + q_KME[..., -1:]
            slope_KMS = 1 - bent_KMS * bent_KMS
        bias_Q1S = block.bias(logits_KMS.dtype, logits_KMS.device)[:, None]
        logits_KMS.view(len(q_KME), len(bias_Q1S), -1, bias_Q1S.shape[-1]).add_(bias_Q1S)
        weights_KMS = logits_KMS.exp2_()
        dv_KSD = weights_KMS.transpose(1, 2) @ grad_KME[..., :-1]
        grad_logits_KMS = (grad_KME @ v_KSE.transpose(1, 2)).mul_(weights_KMS)
        if slope_KMS is not None:
            grad_logits_KMS *= slope_KMS
        torch.bmm(grad_logits_KMS, k_KSE[..., :-1], out=dq_KTGD[:, span].flatten(1, 2))
        dk_KSD = grad_logits_KMS.transpose(1, 2) @ q_KME[..., :-1]
        offset = 0
        for begin, end in block.keys:
            dk_KTD[:, begin:end] += dk_KSD[:, offset : offset + end - begin]
            dv_KTD[:, begin:end] += dv_KSD[:, offset : offset + end - begin]
            offset += end - begin


class _PackedAttention(torch.autograd.Function):
    """Attention block by block, with sinks.

    A sink is one more key with zero value whose logit is `sinks[h]`. With lse the log-sum-exp over the real keys and
    lse' = logaddexp(lse, sink), the output is out' = out · exp(lse − lse'). The standard backward formula needs only
    (out', lse'): P = exp(qk − lse') are the true probabilities, and the sink's value being zero it adds nothing to
    rowsum(dO · out'). The sink's own gradient is −Σ exp(sink − lse') · rowsum(dO · out').
    """

    @staticmethod
    def forward(ctx, q_1HTD, k_1KTD, v_1KTD, sinks_H, blocks, backward_blocks, rule):  # type: ignore[no-untyped-def, override]
        _, heads, length, size = q_1HTD.shape
        out_1HTD = q_1HTD.new_empty(1, length, heads, size).transpose(1, 2)
        exact = torch.promote_types(q_1HTD.dtype, torch.float32)
        lse_HT = torch.empty(heads, length, dtype=exact, device=q_1HTD.device)
        for block in blocks:
            start, stop = block.queries
            keys, values = (_gather(x_1KTD[0], block.keys)[None] for x_1KTD in (k_1KTD, v_1KTD))
            out, lse = _attend(q_1HTD[:, :, start:stop], keys, values, block, rule)
            out_1HTD[:, :, start:stop] = out
            lse_HT[:, start:stop] = lse[0]
        if sinks_H is not None:
            with_sink_HT = torch.logaddexp(lse_HT, sinks_H.to(lse_HT.dtype)[:, None])
            out_1HTD.mul_(torch.exp(lse_HT - with_sink_HT)[None, :, :, None].to(out_1HTD.dtype))
            lse_HT = with_sink_HT
        ctx.save_for_backward(q_1HTD, k_1KTD, v_1KTD, sinks_H, out_1HTD, lse_HT)
        ctx.blocks, ctx.rule = backward_blocks, rule
        return out_1HTD

    @staticmethod
    def backward(ctx, grad_1HTD):  # type: ignore[no-untyped-def, override]
        q_1HTD, k_1KTD, v_1KTD, sinks_H, out_1HTD, lse_HT = ctx.saved_tensors
        rule, kv_heads = ctx.rule, k_1KTD.shape[1]

        def by_key(x_HTX: torch.Tensor) -> torch.Tensor:
            return x_HTX.unflatten(0, (kv_heads, -1)).transpose(1, 2).to(lse_HT.dtype)

        def met_by_one(x_KTX: torch.Tensor) -> torch.Tensor:
            x_KTX = x_KTX.to(lse_HT.dtype)
            return torch.cat((x_KTX, torch.ones_like(x_KTX[..., :1])), -1)

        grad_KTGD, overlap_HT = by_key(grad_1HTD[0]), (grad_1HTD[0].to(lse_HT.dtype) * out_1HTD[0]).sum(-1)
        backward = _Backward(
            torch.cat((by_key(q_1HTD[0]) * (rule.scale * LOG2_E), by_key(lse_HT[..., None] * -LOG2_E)), -1),
            met_by_one(k_1KTD[0]),
            met_by_one(v_1KTD[0]),
            torch.cat((grad_KTGD, by_key(-overlap_HT[..., None])), -1),
            rule.softcap,
        )
        dq_KTGD = torch.empty_like(grad_KTGD, memory_format=torch.contiguous_format)
        dk_KTD, dv_KTD = (torch.zeros(k_1KTD.shape[1:], dtype=lse_HT.dtype, device=lse_HT.device) for _ in range(2))
        for block in ctx.blocks:
            backward.add(block, dq_KTGD, dk_KTD, dv_KTD)
        grad_q = (dq_KTGD * rule.scale).transpose(1, 2).flatten(0, 1).to(q_1HTD.dtype)
        grad_sinks = None
        if sinks_H is not None and ctx.needs_input_grad[3]:
            grad_sinks = -(torch.exp(sinks_H.to(lse_HT.dtype)[:, None] - lse_HT) * overlap_HT).sum(-1).to(sinks_H.dtype)
        # The queries carried base 2's factor beside the scale.
        grads = grad_q[None], (dk_KTD / LOG2_E)[None].to(k_1KTD.dtype), dv_KTD[None].to(v_1KTD.dtype)
        return *grads, grad_sinks, None, None, None


def packed_attention(module, query, key, value, attention_mask, *, scaling, **kwargs):  # type: ignore[no-untyped-def]
    """transformers' attention interface: query [1, H, T, D] with `plan` or `prefill`, or [B, H, 1, D] with `cache`.

    Returns ([batch, T, H, D], None).
    """
    window = kwargs.get("sliding_window")
    sinks = kwargs.get("s_aux")
    rule = _Logits(scaling, kwargs.get("softcap"))
    # Under autocast the rotary embedding leaves queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    cache: SlotCache | None = kwargs.get("cache")
    if cache is not None:
        out = cache.attend(module.layer_idx, query, key, value, sinks, scaling, rule.softcap)
        return out.transpose(1, 2), None
    prefill: Prefill | None = kwargs.get("prefill")
    plan: AttentionPlan | None = kwargs.get("plan") if prefill is None else prefill.plan
    if prefill is not None:
        prefill.note(key, value)
    elif plan is None:
        raise RuntimeError("packed attention was called without an AttentionPlan: pass plan= to the model")
    half = rule.softcap is None and query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16)
    if half and plan is not None:
        out = VarlenAttention.apply(query, key, value, sinks, plan.lanes(query.device), window, scaling, FLASH)
        return out.transpose(1, 2), None
    kind = query.device.type
    written_out = rule.softcap is not None or kind != "cpu"
    if plan is not None:
        most_keys = max(segment.num_keys for segment in plan.segments)
        fitting = PLAIN_LOGITS[kind] // (query.shape[1] * most_keys)
        most_queries = min(MOST_QUERIES, max(FEWEST_QUERIES, fitting))
        backward_blocks = plan.blocks(window, most_queries)
        blocks = backward_blocks if written_out else plan.blocks(window)
    else:
        assert prefill is not None
        backward_blocks = ()
        most_queries = MOST_QUERIES if written_out else None
        key, value, blocks = prefill.behind_cached(module.layer_idx, key, value, window, most_queries)
    out = _PackedAttention.apply(query, key, value, sinks, blocks, backward_blocks, rule)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)
