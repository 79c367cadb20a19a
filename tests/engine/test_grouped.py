"""Grouped products, as CUDA uses them, against the loop over experts, which other tests hold to transformers'."""

import shutil

import pytest
import torch

from posttrain.engine import adapters, experts, fusing, grouped
from posttrain.engine.model import load_model
from tests.engine.test_exactness import MIXTURES, lora_for, random_adapter
from tests.engine.toys import save_toy


@pytest.fixture(scope="module", params=MIXTURES)
def model(request, tmp_path_factory):
    """Everything trainable, so that every gradient there is gets compared."""
    toy = save_toy(tmp_path_factory.mktemp("toy"), architecture=request.param)
    adapter = random_adapter(toy, lora_for(request.param), tmp_path_factory.mktemp("adapter"))
    return load_model(toy, adapter).requires_grad_(True)


def experts_of(model):
    return next(module for module in model.modules() if adapters.is_experts(module))


def routed(tokens: int, num_experts: int, seed: int = 0):
    """Hidden states, choices in which expert 1 gets nothing, and weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, 64, generator=generator)
    score_TE = torch.randn(tokens, num_experts, generator=generator)
    score_TE[:, 1] = -torch.inf
    weights_Tk, indices_Tk = score_TE.softmax(-1).topk(2)
    return hidden_TH, indices_Tk, weights_Tk


def outcome(function, module, hidden_TH, indices_Tk, weights_Tk):
    """Output and every gradient, of a loss that weighs each output differently."""
    inputs = hidden_TH.clone().requires_grad_(), weights_Tk.clone().requires_grad_()
    module.zero_grad()
    out_TH = function(module, inputs[0], indices_Tk, inputs[1])
    (out_TH * torch.linspace(-1, 1, out_TH.numel()).view_as(out_TH)).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return {"out": out_TH.detach(), "hidden": inputs[0].grad, "weights": inputs[1].grad, **gradients}


def by_groups(module, hidden_TH, indices_Tk, weights_Tk):
    up, down = (experts._parameters(module, part) for part in adapters.EXPERT_PROJECTIONS)
    return grouped.grouped_experts(module, hidden_TH, indices_Tk, weights_Tk, hidden_TH.dtype, up, down)


def assert_same(left, right, tolerance=1e-5):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            value, right[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("tokens", [1, 37, 200])
def test_grouped_experts_equal_the_loop(model, tokens):
    module = experts_of(model)
    given = routed(tokens, module.num_experts)
    assert_same(outcome(by_groups, module, *given), outcome(experts.sorted_experts, module, *given))


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++, which torch compiles for the CPU with")
def test_fused_chains_equal_the_operations(model, monkeypatch):
    """Compiled for the CPU here; a second layer and another number of tokens go through the same program."""
    torch._dynamo.reset()
    given = [routed(tokens, 4, seed=tokens) for tokens in (37, 64)]
    modules = [module for module in model.modules() if adapters.is_experts(module)]
    plain = [outcome(by_groups, module, *one) for module in modules for one in given]
    monkeypatch.setattr(fusing, "COMPILED_DEVICES", {"cpu"})
    compiled = [outcome(by_groups, module, *one) for module in modules for one in given]
    for left, right in zip(plain, compiled, strict=True):
        assert_same(left, right)
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["ok"] == counters["frames"]["total"], dict(counters["graph_break"])


def test_every_expert_has_rows_and_every_choice_a_place():
    _, indices_Tk, weights_Tk = routed(50, 4)
    routing = grouped.route_grouped(indices_Tk, weights_Tk, 4)
    places = routing.place_Tk.flatten()
    assert len(set(places.tolist())) == 100
    assert torch.equal(routing.token_P[routing.place_Tk], torch.arange(50)[:, None].expand(50, 2))
    assert torch.equal(routing.expert_P[routing.place_Tk], indices_Tk)
    assert torch.equal(routing.weight_P[routing.place_Tk], weights_Tk)
    assert routing.weight_P.sum() == pytest.approx(float(weights_Tk.sum()))
    stops = routing.stop_E.tolist()
    assert all(after > before for before, after in zip([0, *stops], stops, strict=False))
    assert stops[-1] == len(routing.token_P)
