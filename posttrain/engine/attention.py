"""Attention over packed rows: documents, shared prefixes, sliding windows and sinks, without a T×T matrix.

A plan cuts the row into blocks of queries, each with the key ranges it may see: one flash call per block forward,
products written out backward. Sinks are folded in afterwards through the log-sum-exp, which is exact in both directions
(see `_PackedAttention`). In bfloat16 the backward pass is one kernel on processors with a tile unit
(`posttrain.engine.amx_attention`), and both passes take all segments at once on CUDA (`posttrain.engine.varlen`).

Axes: T row position, Q query of a block, S key position, H query head, K key-value head, G query heads per key-value
head, M pair of a query and its head (as many as Q times G), D head size, E that and one more, B slot of a decode batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from posttrain.engine import fusing
from posttrain.engine.varlen import FLASH, Lanes, VarlenAttention, lanes

if TYPE_CHECKING:
    from posttrain.engine.amx_attention import Families
    from posttrain.engine.slots import Prefill, SlotCache

NAME = "posttrain_packed"
"""Registered with transformers. The name must not contain `sdpa` or `flash`: transformers tests for these."""

PLAIN_LOGITS = {"cpu": 2**19, "cuda": 2**26}
"""Logits of one block where the products are written out, about: on a CPU so many as its caches hold."""
FEWEST_QUERIES, MOST_QUERIES = 16, 256
KEY_MULTIPLE = 16
"""In bfloat16 the flash op takes half as long again where keys are not a multiple of it."""

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
    def num_queries(self) -> int:
        return self.queries[1] - self.queries[0]

    @property
    def num_keys(self) -> int:
        return self.first + self.num_queries

    @property
    def is_causal(self) -> bool:
        """Whether the block begins at its document's first key and is plainly causal."""
        return self.first == 0 and (self.window is None or self.num_queries <= self.window)

    def filled_up(self, length: int) -> tuple[tuple[int, int], ...]:
        """The keys and a few that follow in a row of this length, which none of the queries sees."""
        *others, (begin, end) = self.keys
        missing = -self.num_keys % KEY_MULTIPLE
        return *others, (begin, min(end + missing, length))


class Blocks:
    """All blocks of a row for one window, and what hides keys from their queries.

    That depends on how far a key is behind a query alone, so that one matrix holds it for all of them.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        self.all = tuple(blocks)
        self._most_queries = max(block.num_queries for block in self.all)
        self._most_before = max(block.first for block in self.all)
        self._strips: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def __iter__(self) -> Iterator[Block]:
        return iter(self.all)

    def bias(self, block: Block, num_keys: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What is added to the block's logits, [Q, S]. Keys beyond its own are hidden."""
        before = self._most_before
        if (dtype, device) not in self._strips:
            shape = self._most_queries, before + self._most_queries + KEY_MULTIPLE
            hidden = torch.full(shape, float("-inf"), dtype=dtype, device=device)
            strip = hidden.triu(before + 1)
            if block.window:
                strip += hidden.tril_(before - block.window)
            self._strips[dtype, device] = strip
        columns = slice(before - block.first, before - block.first + num_keys)
        return self._strips[dtype, device][: block.num_queries, columns]


@dataclass(frozen=True)
class AttentionPlan:
    """The blocks of one packed row, cut once per window size and shared by all layers."""

    segments: tuple[Segment, ...]
    _blocks: dict[tuple[int | None, int | None], Blocks] = field(default_factory=dict)
    _lanes: dict[torch.device, Lanes] = field(default_factory=dict)
    _families: list["Families"] = field(default_factory=list)

    def blocks(self, window: int | None, most_logits: int | None = None) -> Blocks:
        """`most_logits`: about so many of one head in a block, where they are written out."""
        key = window, most_logits
        if key not in self._blocks:
            self._blocks[key] = Blocks(
                block for segment in self.segments for block in _cut(segment, window, most_logits)
            )
        return self._blocks[key]

    def families(self) -> "Families":
        """The segments as the kernel for the tile unit takes them."""
        if not self._families:
            from posttrain.engine.amx_attention import Families

            self._families.append(Families.of(self.segments))
        return self._families[0]

    def lanes(self, device: torch.device) -> Lanes:
        """The segments as a kernel for all of them takes them."""
        if device not in self._lanes:
            segments = [(segment.start, segment.stop, segment.prefix) for segment in self.segments]
            self._lanes[device] = lanes(segments, device)
        return self._lanes[device]


def _cut(segment: Segment, window: int | None, most_logits: int | None) -> list[Block]:
    """Blocks of one segment, of about equal length: a window's, or what the limits allow."""
    prefix_start, prefix_stop = segment.prefix or (segment.start, segment.start)
    prefix_length = prefix_stop - prefix_start
    length = segment.stop - segment.start
    chunk = min(MOST_QUERIES, window or MOST_QUERIES)
    if most_logits is not None:
        most_keys = min(segment.num_keys, 2 * window if window else segment.num_keys)
        chunk = min(chunk, max(FEWEST_QUERIES, most_logits // most_keys))
    chunk = math.ceil(length / max(1, round(length / chunk)))
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
    q_1HQD: torch.Tensor, k_1KSD: torch.Tensor, v_1KSD: torch.Tensor, block: Block, blocks: Blocks, rule: _Logits
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block's output [1, H, Q, D] and float32 log-sum-exp [1, H, Q]."""
    num_keys = k_1KSD.shape[2]
    if rule.softcap is None and q_1HQD.device.type == "cpu":
        bias = None if block.is_causal else blocks.bias(block, num_keys, q_1HQD.dtype, q_1HQD.device)
        return _flash(q_1HQD, k_1KSD, v_1KSD, 0.0, bias is None, attn_mask=bias, scale=rule.scale)
    q_KGQD = q_1HQD[0].unflatten(0, (k_1KSD.shape[1], -1))
    exact = torch.promote_types(q_1HQD.dtype, torch.float32)
    logits_KGQS = (q_KGQD @ k_1KSD[0, :, None].transpose(2, 3)).to(exact) * rule.scale
    if rule.softcap is not None:
        logits_KGQS = torch.tanh(logits_KGQS / rule.softcap) * rule.softcap
    logits_KGQS += blocks.bias(block, num_keys, exact, q_1HQD.device)
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
    """Last comes minus the log-sum-exp, to base 2."""
    kv_KTE: torch.Tensor
    """Keys, scaled and to base 2, and a 1; then values and a 1, both divided by log2 e."""
    grad_KTGE: torch.Tensor
    """Of the output; last comes minus its overlap with the output."""
    softcap: float | None

    def add(self, block: Block, blocks: Blocks, dk_KTD: torch.Tensor, dv_KTD: torch.Tensor) -> torch.Tensor:
        """Add the block's gradients of values, and of keys without scale; returns those of the queries.

        Here K is left out where it is 1: a batch of one product is slower than the product.
        """
        span = slice(*block.queries)
        q_KME, grad_KME = (x_KTGE[:, span].flatten(1, 2).squeeze(0) for x_KTGE in (self.q_KTGE, self.grad_KTGE))
        k_KSE, v_KSE = _gather(self.kv_KTE, block.keys).squeeze(0).chunk(2, -1)
        q_KMD, k_KSD = q_KME[..., :-1], k_KSE[..., :-1]
        slope_KMS = None
        if self.softcap is None:
            logits_KMS = q_KME @ k_KSE.mT
        else:
            cap = self.softcap * LOG2_E
            bent_KMS = torch.tanh((q_KMD @ k_KSD.mT) / cap)
            logits_KMS = bent_KMS * cap + q_KME[..., -1:]
            slope_KMS = 1 - bent_KMS * bent_KMS
        # Without a window, all see what comes before the first query.
        begin = 0 if block.window else block.first
        bias_QS = blocks.bias(block, block.num_keys, logits_KMS.dtype, logits_KMS.device)[:, begin:]
        logits_KMS.unflatten(-2, (block.num_queries, -1))[..., begin:].add_(bias_QS[:, None])
        weights_KMS = logits_KMS.exp2_()
        dv_KSD = weights_KMS.mT @ grad_KME[..., :-1]
        grad_logits_KMS = (grad_KME @ v_KSE.mT).mul_(weights_KMS)
        if slope_KMS is not None:
            grad_logits_KMS *= slope_KMS
        dk_KSD = grad_logits_KMS.mT @ q_KMD
        offset = 0
        for begin, end in block.keys:
            rows = slice(offset, offset + end - begin)
            dk_KTD[:, begin:end].add_(dk_KSD[..., rows, :])
            dv_KTD[:, begin:end].add_(dv_KSD[..., rows, :])
            offset = rows.stop
        return grad_logits_KMS @ k_KSD


def _gradients(
    q_1HTD: torch.Tensor,
    k_1KTD: torch.Tensor,
    v_1KTD: torch.Tensor,
    out_1HTD: torch.Tensor,
    lse_HT: torch.Tensor,
    grad_1HTD: torch.Tensor,
    blocks: Blocks,
    rule: _Logits,
) -> tuple[torch.Tensor, ...]:
    """Gradients of queries, keys and values, and Σ grad · out [H, T]."""
    kv_heads, size = k_1KTD.shape[1], k_1KTD.shape[3]

    def by_key(x_HTX: torch.Tensor) -> torch.Tensor:
        return x_HTX.unflatten(0, (kv_heads, -1)).transpose(1, 2)

    def with_last(x_HTD: torch.Tensor) -> torch.Tensor:
        """[K, T, G, E] whose last component is still to be set."""
        x_KTGD = by_key(x_HTD)
        x_KTGE = lse_HT.new_empty(*x_KTGD.shape[:3], size + 1)
        x_KTGE[..., :size] = x_KTGD
        return x_KTGE

    q_KTGE, grad_KTGE = with_last(q_1HTD[0]), with_last(grad_1HTD[0])
    overlap_KTG = (grad_KTGE[..., :size] * by_key(out_1HTD[0])).sum(-1)
    q_KTGE[..., size] = by_key(lse_HT) * -LOG2_E
    torch.neg(overlap_KTG, out=grad_KTGE[..., size])
    k_KTD, v_KTD = k_1KTD[0].to(lse_HT.dtype), v_1KTD[0].to(lse_HT.dtype)
    one_KT1 = torch.ones_like(k_KTD[..., :1])
    kv_KTE = torch.cat((k_KTD * (rule.scale * LOG2_E), one_KT1, v_KTD / LOG2_E, one_KT1 / LOG2_E), -1)
    backward = _Backward(q_KTGE, kv_KTE, grad_KTGE, rule.softcap)
    dk_KTD, dv_KTD = torch.zeros_like(k_KTD), torch.zeros_like(k_KTD)
    dq_KXD = torch.cat([backward.add(block, blocks, dk_KTD, dv_KTD) for block in blocks], -2)
    dq_KTGD = dq_KXD.view(*q_KTGE.shape[:3], size)
    grad_q = dq_KTGD.transpose(1, 2).flatten(0, 1).to(q_1HTD.dtype)
    grads = grad_q, (dk_KTD * (rule.scale * LOG2_E)).to(k_1KTD.dtype), dv_KTD.to(v_1KTD.dtype)
    return *(grad[None] for grad in grads), overlap_KTG.transpose(1, 2).flatten(0, 1)


class _PackedAttention(torch.autograd.Function):
    """Attention block by block, with sinks.

    A sink is one more key with zero value whose logit is `sinks[h]`. With lse the log-sum-exp over the real keys and
    lse' = logaddexp(lse, sink), the output is out' = out · exp(lse − lse'). The standard backward formula needs only
    (out', lse'): P = exp(qk − lse') are the true probabilities, and the sink's value being zero it adds nothing to
    rowsum(dO · out'). The sink's own gradient is −Σ exp(sink − lse') · rowsum(dO · out').
    """

    @staticmethod
    def forward(ctx, q_1HTD, k_1KTD, v_1KTD, sinks_H, blocks, rule, differentiate):  # type: ignore[no-untyped-def, override]
        outs, lses = [], []
        for block in blocks:
            ranges = block.filled_up(k_1KTD.shape[2])
            keys, values = (_gather(x_1KTD[0], ranges)[None] for x_1KTD in (k_1KTD, v_1KTD))
            out, lse = _attend(q_1HTD[:, :, slice(*block.queries)], keys, values, block, blocks, rule)
            outs.append(out.transpose(1, 2))
            lses.append(lse[0])
        out_1HTD, lse_HT = torch.cat(outs, 1).transpose(1, 2), torch.cat(lses, 1)
        if sinks_H is not None:
            with_sink_HT = torch.logaddexp(lse_HT, sinks_H.to(lse_HT.dtype)[:, None])
            out_1HTD.mul_(torch.exp(lse_HT - with_sink_HT)[None, :, :, None].to(out_1HTD.dtype))
            lse_HT = with_sink_HT
        ctx.save_for_backward(q_1HTD, k_1KTD, v_1KTD, sinks_H, out_1HTD, lse_HT)
        ctx.differentiate = differentiate
        return out_1HTD

    @staticmethod
    def backward(ctx, grad_1HTD):  # type: ignore[no-untyped-def, override]
        q_1HTD, k_1KTD, v_1KTD, sinks_H, out_1HTD, lse_HT = ctx.saved_tensors
        *grads, overlap_HT = ctx.differentiate(q_1HTD, k_1KTD, v_1KTD, out_1HTD, lse_HT, grad_1HTD)
        grad_sinks = None
        if sinks_H is not None and ctx.needs_input_grad[3]:
            share_HT = torch.exp(sinks_H.to(lse_HT.dtype)[:, None] - lse_HT)
            grad_sinks = -(share_HT * overlap_HT).sum(1).to(sinks_H.dtype)
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
    differentiate: Callable[..., Any] | None = None
    if plan is not None:
        small_blocks = plan.blocks(window, PLAIN_LOGITS[kind] // query.shape[1])
        blocks = small_blocks if written_out else plan.blocks(window)
        differentiate = partial(_gradients, blocks=small_blocks, rule=rule)
        if not written_out and query.dtype == torch.bfloat16 and query.shape[3] % 32 == 0 and fusing.has_tile_kernels():
            from posttrain.engine import amx_attention

            differentiate = partial(amx_attention.gradients, families=plan.families(), window=window, scale=rule.scale)
    else:
        assert prefill is not None
        key, value, blocks = prefill.behind_cached(module.layer_idx, key, value, window)
    out = _PackedAttention.apply(query, key, value, sinks, blocks, rule, differentiate)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, packed_attention)
