"""Kernels for the tile unit: as near to float32 as torch in bfloat16, the same bits on any number of threads."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm, apply_rotary_pos_emb

from posttrain.engine.attention import AttentionPlan, Segment, _gradients, _Logits, _PackedAttention
from posttrain.engine.device import fuse_layers, prepare_device
from posttrain.engine.forward import batch_logprobs
from posttrain.engine.gates import ClampedSwiglu, Plain
from posttrain.engine.joined import JoinedExperts, Parts, route
from posttrain.engine.model import hold_frozen, load_model, trainable, unfreeze_adapter
from posttrain.engine.packing import pack
from posttrain.host import machine
from posttrain.recipe.types import Execution
from tests.engine.test_exactness import as_item, documents, lora_for, random_adapter
from tests.engine.toys import save_toy

pytestmark = pytest.mark.skipif(not machine.has_matrix_tiles(), reason="the processor has no tile unit (Intel AMX)")
GATE = ClampedSwiglu(1.702, 7.0)
NAMES = ("output", "hidden", "weight", "up A", "up B", "down A", "down B")


class Layer:
    """Random experts: of 8, one is chosen by nobody, one by everybody."""

    def __init__(self, rank: int, bias: bool, transposed: bool, tokens: int = 300, outlier: float = 1.0) -> None:
        draw = torch.Generator().manual_seed(rank + bias + 2 * transposed)
        hidden, size, experts = 64, 96, 8

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw)

        up, down = normal(experts, hidden, 2 * size) * 0.2, normal(experts, size, hidden) * 0.2
        up, down = ((w if transposed else w.transpose(1, 2)).bfloat16().contiguous() for w in (up, down))
        biases = (normal(experts, 2 * size), normal(experts, hidden)) if bias else (None, None)
        factors = [None] * 4
        if rank:
            shapes = (experts, hidden, rank), (experts, rank, 2 * size), (experts, size, rank), (experts, rank, hidden)
            factors = [(normal(*shape) * 0.2).requires_grad_() for shape in shapes]
        self.tensors = (up, biases[0], *factors[:2], down, biases[1], *factors[2:])
        self.hidden_TH = (normal(tokens, hidden) * outlier).requires_grad_()
        self.grad_TH = normal(tokens, hidden)
        logits = normal(tokens, experts)
        logits[:, 0], logits[:, 1] = 9.0, -9.0
        self.indices_Tk = torch.topk(logits, 3).indices
        self.weights_Tk = torch.softmax(normal(tokens, 3), -1).requires_grad_()
        self.parts = (Parts(0.5, transposed, None, None), Parts(2.0, transposed, None, None))
        self.wanted = [self.hidden_TH, self.weights_Tk, *(factor for factor in factors if factor is not None)]

    def joined(self, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in self.tensors]
        routing = route(self.indices_Tk, self.weights_Tk.detach(), 8, 16 if dtype == torch.bfloat16 else 1)
        given = self.hidden_TH, self.weights_Tk, routing, GATE, True, dtype, self.parts
        return self.outcome(JoinedExperts.apply(*given, *tensors))

    def tiled(self, keep: bool = True) -> list[torch.Tensor]:
        from posttrain.engine.amx_experts import TiledExperts

        assert TiledExperts.takes(GATE, self.tensors[:4], self.tensors[4:])
        routing = route(self.indices_Tk, self.weights_Tk.detach(), 8, 1)
        given = self.hidden_TH, self.weights_Tk, routing, GATE, keep, self.parts
        out_TH = TiledExperts.apply(*given, *self.tensors)
        return self.outcome(out_TH) if keep else [out_TH]

    def outcome(self, out_TH: torch.Tensor) -> list[torch.Tensor]:
        return [out_TH.detach(), *torch.autograd.grad(out_TH, self.wanted, self.grad_TH.to(out_TH.dtype))]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((found.detach().float() - exact).norm() / exact.norm()).detach())


def assert_near(layer: Layer, most: float) -> None:
    exact, onednn, ours = layer.joined(torch.float32), layer.joined(torch.bfloat16), layer.tiled()
    for name, found, other, reference in zip(NAMES[: len(ours)], ours, onednn, exact, strict=True):
        assert error(found, reference) < min(most, 1.3 * error(other, reference)), name


@pytest.mark.parametrize("transposed", [True, False], ids=["in-out", "out-in"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rank", [0, 5, 16, 40])
def test_outputs_and_gradients_are_as_near_to_float32_as_onednns(rank, bias, transposed):
    layer = Layer(rank, bias, transposed)
    assert_near(layer, 0.012)
    assert len(layer.wanted) == (6 if rank else 2)


def test_one_thread_and_a_pass_without_gradients_give_the_same_bits():
    layer = Layer(16, True, True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(layer.tiled())
            with torch.no_grad():
                assert torch.equal(layer.tiled(keep=False)[0], results[-1][0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_values_beyond_the_limits_are_clamped_and_stop_their_gradients():
    # Rounding moves values over a limit, and with them a whole gradient.
    assert_near(Layer(16, True, True, outlier=30.0), 0.2)


def test_what_is_not_a_number_is_seen():
    layer = Layer(16, True, True)
    with torch.no_grad():
        layer.hidden_TH[7, 3] = torch.nan
    out_TH, grad_TH, *_ = layer.tiled()
    assert out_TH[7].isnan().any() and not out_TH[:7].isnan().any()
    assert grad_TH[7].isnan().any() and not grad_TH[8:].isnan().any()


def test_kernels_are_left_out_where_compilation_is_off(tmp_path, monkeypatch):
    from posttrain.engine.amx_experts import TiledExperts

    calls = []
    monkeypatch.setattr(TiledExperts, "takes", lambda *layer: calls.append(layer))
    model = load_model(save_toy(tmp_path))
    batch = pack([as_item(ids) for ids in documents(8, [30])], 0)
    try:
        for compiled in ("auto", "off"):
            prepare_device(Execution(device="cpu", compile=compiled), "bfloat16")
            batch_logprobs(model, batch, "bfloat16")
    finally:
        prepare_device(Execution(device="cpu"), "bfloat16")
    assert len(calls) == len(model.get_decoder().layers)


def test_products_of_torch_on_the_same_threads_stay_right():
    left, right = torch.randn(200, 300).bfloat16(), torch.randn(300, 400).bfloat16()
    before = left @ right
    Layer(16, True, True).tiled()
    assert torch.equal(left @ right, before)


def test_other_gates_and_trained_weights_are_left_to_others():
    from posttrain.engine.amx_experts import TiledExperts

    up, up_bias, up_A, up_B, down, *rest = Layer(16, True, True).tensors
    first, second = (up, up_bias, up_A, up_B), (down, *rest)
    assert TiledExperts.takes(GATE, first, second)
    assert not TiledExperts.takes(Plain(torch.relu), first, second)
    assert not TiledExperts.takes(GATE, first, (None, *rest))
    assert not TiledExperts.takes(GATE, (up[:, :40], *first[1:]), second)
    assert not TiledExperts.takes(GATE, first, (down.clone().requires_grad_(), *rest))


def test_sigmoid_is_as_exact_as_float32_can_be():
    from posttrain.engine.amx_experts import _sigmoid

    values = np.concatenate([np.linspace(-120, 120, 4001), np.random.default_rng(0).normal(size=2000)]).astype(
        np.float32
    )
    found = np.array([_sigmoid(value) for value in values], np.float64)
    exact = 1 / (1 + np.exp(-values.astype(np.float64)))
    assert np.abs(found - exact).max() < 1e-7
    near = values > -80
    assert (np.abs(found - exact) / exact)[near].max() < 4e-7


def packed_row(lengths: list[int], shared: bool) -> tuple[Segment, ...]:
    """Documents one after another; where they share, every third is a prefix that the next two see."""
    segments: list[Segment] = []
    for number, length in enumerate(lengths):
        start = segments[-1].stop if segments else 0
        first = segments[number // 3 * 3] if number % 3 else None
        prefix = (first.start, first.stop) if shared and first else None
        segments.append(Segment(start, start + length, prefix))
    return tuple(segments)


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no-sinks"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("shared", [True, False], ids=["prefixes", "documents"])
def test_gradients_of_attention_are_as_near_to_float32_as_blocks_in_bfloat16(shared, window, sinks):
    from posttrain.engine.amx_attention import gradients

    plan = AttentionPlan(packed_row([130, 70, 33, 1, 64, 300, 31], shared))
    draw, length = torch.Generator().manual_seed(0), plan.segments[-1].stop
    # As projections leave them: heads side by side in a token.
    q, k, v, grad = (
        torch.randn(1, length, heads, 64, generator=draw).transpose(1, 2).requires_grad_() for heads in (6, 2, 2, 6)
    )
    sinks_H = torch.randn(6, generator=draw).requires_grad_() if sinks else None
    rule = _Logits(0.125, None)
    blocks = partial(_gradients, blocks=plan.blocks(window, 4096), rule=rule)
    tiled = partial(gradients, families=plan.families(), window=window, scale=rule.scale)

    def outcome(dtype: torch.dtype, differentiate: Any) -> list[torch.Tensor]:
        given = (q.to(dtype), k.to(dtype), v.to(dtype), sinks_H, plan.blocks(window), rule, differentiate)
        wanted = [x for x in (q, k, v, sinks_H) if x is not None]
        return list(torch.autograd.grad(_PackedAttention.apply(*given), wanted, grad.to(dtype)))

    exact, rounded = outcome(torch.float32, blocks), outcome(torch.bfloat16, blocks)
    ours, again = outcome(torch.bfloat16, tiled), outcome(torch.bfloat16, tiled)
    for name, found, other, reference in zip("qkvs", ours, rounded, exact, strict=False):
        assert error(found, reference) < min(0.007, 1.3 * error(other, reference)), name
    assert all(torch.equal(left, right) for left, right in zip(ours, again, strict=True))


def test_norms_and_rotary_embeddings_equal_transformers_own_up_to_bfloat16():
    from posttrain.engine.elementwise import Norm, Rotation

    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 150, 96, generator=draw) * 3).requires_grad_()
    module = GptOssRMSNorm(96, eps=1e-5).requires_grad_(False)
    module.weight.copy_(torch.randn(96, generator=draw))
    grad = torch.randn(1, 150, 96, generator=draw).bfloat16()
    ours, theirs = Norm.apply(x, module.weight, 1e-5), module(x)
    assert ours.dtype == torch.bfloat16 and error(ours, theirs) < 2e-3
    assert (ours != theirs.bfloat16()).float().mean() < 1e-3
    (found,), (expected,) = (torch.autograd.grad(out, x, grad.to(out.dtype)) for out in (ours, theirs))
    assert error(found, expected) < 1e-6

    q = torch.randn(1, 150, 6, 32, generator=draw).bfloat16().transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(1, 150, 16, generator=draw), torch.randn(1, 150, 16, generator=draw)
    grad = torch.randn(1, 6, 150, 32, generator=draw).bfloat16()
    exact = q.detach().float().requires_grad_()
    ours, (theirs, _) = Rotation.apply(q, cos, sin), apply_rotary_pos_emb(exact, exact, cos, sin)
    assert torch.equal(ours, theirs.bfloat16())
    (found,) = torch.autograd.grad(ours, q, grad)
    (expected,) = torch.autograd.grad(theirs, exact, grad.float())
    assert error(found, expected) < 2e-3


@pytest.mark.parametrize("architecture", ["gpt_oss", "qwen3_moe", "llama", "gemma", "gemma2"])
def test_fused_layers_are_as_near_to_float32_as_transformers_own(architecture, tmp_path_factory):
    folders = (
        save_toy(tmp_path_factory.mktemp("toy"), architecture=architecture),
        tmp_path_factory.mktemp("adapter"),
    )
    random_adapter(folders[0], lora_for(architecture), folders[1])
    results = []
    for precision, fused in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        model = load_model(*folders)
        unfreeze_adapter(model)
        hold_frozen(model, precision)
        if fused:
            fuse_layers(model, precision)
        batch = pack([as_item(ids) for ids in documents(8, [30, 18, 60])], 0)
        (-batch_logprobs(model, batch, precision).sum()).backward()
        results.append(torch.cat([parameter.grad.flatten() for parameter in trainable(model).values()]))
    exact, plain, ours = results
    assert error(ours, exact) < 1.2 * error(plain, exact)
