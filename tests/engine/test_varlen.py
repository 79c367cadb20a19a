"""One call for all segments, as CUDA's kernel takes them, against attention block by block."""

from functools import partial

import pytest
import torch

from posttrain.engine.attention import AttentionPlan, Segment, _gradients, _Logits, _PackedAttention
from posttrain.engine.varlen import FLASH, VarlenAttention

PLAIN = (Segment(0, 7), Segment(7, 40), Segment(40, 41))
SHARED = (
    Segment(0, 12),
    Segment(12, 20, (0, 12)),
    Segment(20, 35, (0, 12)),
    Segment(35, 60),
    Segment(60, 66, (35, 60)),
)


class WrittenOut:
    """The kernel's contract in plain products: causal to the last key, `window` keys, itself included."""

    def _weights(self, q_THD, k_SKD, v_SKD, lanes, window, scale):
        group = q_THD.shape[1] // k_SKD.shape[1]
        starts_q, starts_k = lanes.starts_q_N.tolist(), lanes.starts_k_N.tolist()
        for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
            assert b - a <= lanes.longest_q and d - c <= lanes.longest_k
            position_Q1 = torch.arange(d - c - (b - a), d - c)[:, None]
            position_S = torch.arange(d - c)
            hidden_QS = position_S > position_Q1
            if window is not None:
                hidden_QS |= position_S <= position_Q1 - window
            keys, values = (x[c:d].repeat_interleave(group, 1) for x in (k_SKD, v_SKD))
            logits_HQS = torch.einsum("qhd,shd->hqs", q_THD[a:b], keys) * scale
            yield (a, b, c, d), logits_HQS.masked_fill(hidden_QS, -torch.inf), keys, values

    def forward(self, q_THD, k_SKD, v_SKD, lanes, window, scale):
        out_THD, lse_HT = torch.empty_like(q_THD), q_THD.new_empty(q_THD.shape[1], len(q_THD))
        for (a, b, *_), logits_HQS, _, values in self._weights(q_THD, k_SKD, v_SKD, lanes, window, scale):
            out_THD[a:b] = torch.einsum("hqs,shd->qhd", logits_HQS.softmax(-1), values)
            lse_HT[:, a:b] = logits_HQS.logsumexp(-1)
        return out_THD, lse_HT

    def backward(self, grad_THD, q_THD, k_SKD, v_SKD, out_THD, lse_HT, lanes, window, scale):
        dq, dk, dv = torch.zeros_like(q_THD), torch.zeros_like(k_SKD), torch.zeros_like(v_SKD)
        heads, size = k_SKD.shape[1:]
        for (a, b, c, d), logits_HQS, keys, values in self._weights(q_THD, k_SKD, v_SKD, lanes, window, scale):
            weights = torch.exp(logits_HQS - lse_HT[:, a:b, None])
            overlap = (grad_THD[a:b] * out_THD[a:b]).sum(-1).T[:, :, None]
            slope = weights * (torch.einsum("qhd,shd->hqs", grad_THD[a:b], values) - overlap) * scale
            dq[a:b] = torch.einsum("hqs,shd->qhd", slope, keys)
            for total, parts in (
                (dk, torch.einsum("hqs,qhd->shd", slope, q_THD[a:b])),
                (dv, torch.einsum("hqs,qhd->shd", weights, grad_THD[a:b])),
            ):
                total[c:d] = parts.view(d - c, heads, -1, size).sum(2)
        return dq, dk, dv


def inputs(length: int, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Queries, keys, values, sinks and the output's gradient."""
    generator = torch.Generator().manual_seed(length)
    shapes = (1, 4, length, 16), (1, 2, length, 16), (1, 2, length, 16), (4,), (1, 4, length, 16)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def outcome(attend, q, k, v, sinks, grad, with_sinks: bool):
    leaves = [x.clone().requires_grad_() for x in ((q, k, v, sinks) if with_sinks else (q, k, v))]
    out = attend(*leaves[:3], leaves[3] if with_sinks else None)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def both(segments, window, with_sinks, given, kernel):
    plan, scale = AttentionPlan(segments), 0.25
    device = given[0].device

    def blocks(q, k, v, sinks):
        rule = _Logits(scale, None)
        differentiate = partial(_gradients, blocks=plan.blocks(window, 99), rule=rule)
        return _PackedAttention.apply(q, k, v, sinks, plan.blocks(window), rule, differentiate)

    def varlen(q, k, v, sinks):
        return VarlenAttention.apply(q, k, v, sinks, plan.lanes(device), window, scale, kernel)

    return outcome(varlen, *given, with_sinks), outcome(blocks, *(x.float().cpu() for x in given), with_sinks)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("segments", [PLAIN, SHARED], ids=["documents", "prefixes"])
def test_one_call_equals_blocks(segments, window, with_sinks, monkeypatch):
    monkeypatch.setattr("posttrain.engine.attention.FEWEST_QUERIES", 3)
    monkeypatch.setattr("posttrain.engine.attention.MOST_QUERIES", 9)
    ours, reference = both(segments, window, with_sinks, inputs(segments[-1].stop), WrittenOut())
    for left, right in zip(ours, reference, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("segments", [PLAIN, SHARED], ids=["documents", "prefixes"])
def test_the_flash_kernel_keeps_the_contract(segments, window, with_sinks):
    ours, reference = both(segments, window, with_sinks, inputs(segments[-1].stop, "cuda", torch.bfloat16), FLASH)
    for left, right in zip(ours, reference, strict=True):
        left = left.float().cpu()
        assert torch.linalg.norm(left - right) / torch.linalg.norm(right) < 1e-2
