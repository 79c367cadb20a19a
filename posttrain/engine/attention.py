"""Attention over packed rows: documents, shared prefixes, sliding windows and sinks, without a T×T matrix.

A plan cuts the row into blocks of queries, each with the key ranges it may see; one flash call per block. Sinks are
folded in afterwards through the log-sum-exp, which is exact in both directions (see `_PackedAttention`). On CUDA in
half precision one kernel takes all segments at once (`posttrain.engine.varlen`).

Axes: T row position, Q query of a block, S key position, H query head, K key-value head, G query heads per key-value
head, D head size, B slot of a decode batch.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface

from posttrain.engine.varlen import FLASH, Lanes, VarlenAttention, lanes

if TYPE_CHECKING:
    from posttrain.engine.slots import Prefill, SlotCache

NAME = "posttrain_packed"
"""Registered with transformers. The name must not contain `sdpa` or `flash`: transformers tests for these."""

PLAIN_CHUNK = 256
"""Queries per block where the products are written out, so that logits stay narrow."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Segment:
    """Tokens `start:stop` of the row that see themselves causally and, whole, an earlier `prefix` of the row."""

    start: int
    stop: int
    prefix: tuple[int, int] | None = None


@dataclass(frozen=True)
class Block:
    queries: tuple[int, int]
    keys: tuple[tuple[int, int], ...]
    """Ranges of the row, in position order: at most the prefix and the segment's own."""
    visible_QS: torch.Tensor | None
    """Which keys each query sees; None where the block is square and plainly causal."""


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
        if keys == [queries] and (window is None or end - begin <= window):
            blocks.append(Block(queries, (queries,), None))
        else:
            query_Q1 = torch.arange(first_position, prefix_length + end)[:, None]
            key_S = torch.arange(oldest, prefix_length + end)
            visible_QS = key_S <= query_Q1
            if window:
                visible_QS &= key_S > query_Q1 - window
            blocks.append(Block(queries, tuple(keys), visible_QS))
    return blocks


def _gather(x_1KTD: torch.Tensor, ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    parts = [x_1KTD[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _bias(block: Block, dtype: torch.dtype) -> torch.Tensor | None:
    if block.visible_QS is None:
        return None
    bias_QS = torch.zeros(block.visible_QS.shape, dtype=dtype)
    return bias_QS.masked_fill_(~block.visible_QS, float("-inf"))


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
        bias = _bias(block, q_1HQD.dtype)
        return _flash(q_1HQD, k_1KSD, v_1KSD, 0.0, bias is None, attn_mask=bias, scale=rule.scale)
    logits_KGQS, _ = _plain_logits(q_1HQD, k_1KSD, block, rule)
    lse_KGQ = torch.logsumexp(logits_KGQS, dim=-1)
    weights_KGQS = torch.exp(logits_KGQS - lse_KGQ[..., None]).to(v_1KSD.dtype)
    return (weights_KGQS @ v_1KSD[0, :, None]).reshape(q_1HQD.shape), lse_KGQ.reshape(q_1HQD.shape[:3])


def _attend_backward(
    grad_1HQD: torch.Tensor,
    q_1HQD: torch.Tensor,
    k_1KSD: torch.Tensor,
    v_1KSD: torch.Tensor,
    out_1HQD: torch.Tensor,
    lse_1HQ: torch.Tensor,
    block: Block,
    rule: _Logits,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one block's queries, keys and values."""
    if rule.softcap is None and q_1HQD.device.type == "cpu":
        # In float32 whatever the type: this op is two to four times slower in bfloat16.
        tensors = [tensor.float() for tensor in (grad_1HQD, q_1HQD, k_1KSD, v_1KSD, out_1HQD)]
        bias = _bias(block, torch.float32)
        return _flash_backward(*tensors, lse_1HQ, 0.0, bias is None, attn_mask=bias, scale=rule.scale)
    logits_KGQS, slope_KGQS = _plain_logits(q_1HQD, k_1KSD, block, rule)
    grouped = (*logits_KGQS.shape[:3], -1)
    grad_KGQD, q_KGQD = grad_1HQD.reshape(grouped), q_1HQD.reshape(grouped)
    weights_KGQS = torch.exp(logits_KGQS - lse_1HQ.reshape(grouped))
    # d logits = P · (dO Vᵀ − rowsum(dO · O)), then through the cap.
    overlap_KGQ1 = (grad_KGQD.float() * out_1HQD.reshape(grouped).float()).sum(-1, keepdim=True)
    grad_weights = (grad_KGQD @ v_1KSD[0, :, None].transpose(2, 3)).float()
    grad_logits = weights_KGQS * (grad_weights - overlap_KGQ1) * rule.scale
    if slope_KGQS is not None:
        grad_logits *= slope_KGQS
    grad_logits = grad_logits.to(q_1HQD.dtype)
    dq = (grad_logits @ k_1KSD[0, :, None]).reshape(q_1HQD.shape)
    dk = (grad_logits.transpose(2, 3) @ q_KGQD).sum(1)[None]
    dv = (weights_KGQS.to(q_1HQD.dtype).transpose(2, 3) @ grad_KGQD).sum(1)[None]
    return dq, dk, dv


def _plain_logits(
    q_1HQD: torch.Tensor, k_1KSD: torch.Tensor, block: Block, rule: _Logits
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Float32 logits [K, G, Q, S], −inf where a key is not visible, and the cap's slope."""
    _, kv_heads, keys, size = k_1KSD.shape
    _, heads, queries, _ = q_1HQD.shape
    q_KGQD = q_1HQD.reshape(kv_heads, heads // kv_heads, queries, size)
    exact = torch.promote_types(q_1HQD.dtype, torch.float32)
    logits = (q_KGQD @ k_1KSD[0, :, None].transpose(2, 3)).to(exact) * rule.scale
    slope = None
    if rule.softcap is not None:
        bent = torch.tanh(logits / rule.softcap)
        logits, slope = bent * rule.softcap, 1 - bent * bent
    visible_QS = block.visible_QS
    if visible_QS is None:
        visible_QS = torch.ones(queries, keys, dtype=torch.bool).tril()
    return logits.masked_fill(~visible_QS.to(logits.device), float("-inf")), slope


class _PackedAttention(torch.autograd.Function):
    """Attention block by block, with sinks.

    A sink is one more key with zero value whose logit is `sinks[h]`. With lse the log-sum-exp over the real keys and
    lse' = logaddexp(lse, sink), the output is out' = out · exp(lse − lse'). The standard backward formula needs only
    (out', lse'): P = exp(qk − lse') are the true probabilities, and the sink's value being zero it adds nothing to
    rowsum(dO · out'). The sink's own gradient is −Σ exp(sink − lse') · rowsum(dO · out').
    """

    @staticmethod
    def forward(ctx, q_1HTD, k_1KTD, v_1KTD, sinks_H, blocks, rule):  # type: ignore[no-untyped-def, override]
        _, heads, length, size = q_1HTD.shape
        out_1HTD = q_1HTD.new_empty(1, length, heads, size).transpose(1, 2)
        exact = torch.promote_types(q_1HTD.dtype, torch.float32)
        lse_HT = torch.empty(heads, length, dtype=exact, device=q_1HTD.device)
        for block in blocks:
            start, stop = block.queries
            keys, values = _gather(k_1KTD, block.keys), _gather(v_1KTD, block.keys)
            out, lse = _attend(q_1HTD[:, :, start:stop], keys, values, block, rule)
            out_1HTD[:, :, start:stop] = out
            lse_HT[:, start:stop] = lse[0]
        if sinks_H is not None:
            with_sink_HT = torch.logaddexp(lse_HT, sinks_H.to(lse_HT.dtype)[:, None])
            out_1HTD.mul_(torch.exp(lse_HT - with_sink_HT)[None, :, :, None].to(out_1HTD.dtype))
            lse_HT = with_sink_HT
        ctx.save_for_backward(q_1HTD, k_1KTD, v_1KTD, sinks_H, out_1HTD, lse_HT)
        ctx.blocks, ctx.rule = blocks, rule
        return out_1HTD

    @staticmethod
    def backward(ctx, grad_1HTD):  # type: ignore[no-untyped-def, override]
        q_1HTD, k_1KTD, v_1KTD, sinks_H, out_1HTD, lse_HT = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q_1HTD), torch.zeros_like(k_1KTD), torch.zeros_like(v_1KTD)
        for block in ctx.blocks:
            start, stop = block.queries
            dq, dk, dv = _attend_backward(
                grad_1HTD[:, :, start:stop],
                q_1HTD[:, :, start:stop],
                _gather(k_1KTD, block.keys),
                _gather(v_1KTD, block.keys),
                out_1HTD[:, :, start:stop],
                lse_HT[None, :, start:stop],
                block,
                ctx.rule,
            )
            grad_q[:, :, start:stop] = dq
            offset = 0
            for begin, end in block.keys:
                grad_k[:, :, begin:end] += dk[:, :, offset : offset + end - begin]
                grad_v[:, :, begin:end] += dv[:, :, offset : offset + end - begin]
                offset += end - begin
        grad_sinks = None
        if sinks_H is not None and ctx.needs_input_grad[3]:
            share_HT = torch.exp(sinks_H.float()[:, None] - lse_HT)
            grad_sinks = -(share_HT * (grad_1HTD.float() * out_1HTD.float()).sum(-1)[0]).sum(-1).to(sinks_H.dtype)
        return grad_q, grad_k, grad_v, grad_sinks, None, None


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
    most_queries = None if rule.softcap is None and query.device.type == "cpu" else PLAIN_CHUNK
    if plan is not None:
        blocks = plan.blocks(window, most_queries)
    else:
        assert prefill is not None
        key, value, blocks = prefill.behind_cached(module.layer_idx, key, value, window, most_queries)
    out = _PackedAttention.apply(query, key, value, sinks, blocks, rule)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)
