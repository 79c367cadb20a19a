"""Routing metrics on choices that are set by hand, and the sorting of rows."""

import pytest
import torch

from posttrain.engine.forward import batch_logprobs
from posttrain.engine.joined import plan_blocks, route
from posttrain.engine.model import load_model
from posttrain.engine.packing import filled_up, pack, row_multiple
from posttrain.engine.routing import RoutingWatch
from tests.engine.test_exactness import as_item, documents
from tests.engine.toys import save_toy


def test_a_router_that_prefers_two_experts(tmp_path):
    model = load_model(save_toy(tmp_path))
    for layer in model.get_decoder().layers:
        layer.mlp.router.weight.data.zero_()
        layer.mlp.router.bias.data.copy_(torch.log(torch.tensor([4.0, 4.0, 1.0, 1.0])))
    watch = RoutingWatch(model)
    batch = pack([as_item(ids) for ids in documents(0, [9, 14])], 0)
    with torch.no_grad():
        batch_logprobs(model, batch, "float32")
    assert watch.take() == {}
    batch_logprobs(model, batch, "float32")
    values = watch.take()
    # Every token chooses experts 0 and 1: each has half of the choices where a quarter is even; 2 of 4 dead, 2 layers.
    assert values["expert_load_max"] == pytest.approx(2.0)
    assert values["dead_experts"] == 4
    # Entropy of .4, .4, .1, .1
    assert values["router_entropy"] == pytest.approx(1.19355, abs=1e-4)
    assert watch.take() == {}


def test_a_dense_model_has_no_routing(tmp_path):
    model = load_model(save_toy(tmp_path, architecture="llama"))
    watch = RoutingWatch(model)
    batch_logprobs(model, pack([as_item(ids) for ids in documents(0, [9])], 0), "float32")
    assert watch.take() == {}


def test_rows_are_sorted_and_filled_up_with_rows_of_no_weight():
    indices = torch.tensor([[2, 0], [0, 3], [3, 2]] * 16)
    weights = torch.rand(48, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    routing = route(indices, weights, num_experts=4, multiple=8)
    rows = {expert: part for block in routing.blocks for expert, part in block.each(torch.arange(96)[block.rows])}
    assert {expert: len(part) for expert, part in rows.items()} == {0: 32, 2: 32, 3: 32}
    for token in range(48):
        for choice in range(2):
            row, expert = int(routing.place_Tk[token, choice]), int(indices[token, choice])
            assert row in rows[expert]
            assert routing.token_P[row] == token
            assert routing.weight_P1[row] == weights[token, choice]
            assert routing.pair_P[row] == token * 4 + expert
    assert routing.place_Tk.unique().numel() == 96


def test_rows_that_fill_up_have_no_weight_and_no_adapter():
    indices = torch.tensor([[2, 0], [0, 3], [3, 2]])
    routing = route(indices, torch.ones(3, 2), num_experts=4, multiple=8)
    assert [(block.experts, block.sizes) for block in routing.blocks] == [([0, 2, 3], [8, 8, 8])]
    used = torch.zeros(24, dtype=torch.bool)
    used[routing.place_Tk.reshape(-1)] = True
    assert used.sum() == 6
    assert routing.weight_P1[~used].eq(0).all() and routing.token_P[~used].eq(0).all()
    assert routing.pair_P[~used].eq(12).all(), "one more than there are pairs"


def test_blocks_have_a_limit_of_rows_and_cut_the_experts_that_have_more():
    blocks = plan_blocks([600, 0, 300, 200, 2100, 24])
    assert [(block.experts, block.sizes) for block in blocks] == [
        ([0, 2], [600, 300]),
        ([3], [200]),
        ([4], [1024]),
        ([4], [1024]),
        ([4, 5], [52, 24]),
    ]
    assert [block.rows for block in blocks] == [
        slice(0, 900),
        slice(900, 1100),
        slice(1100, 2124),
        slice(2124, 3148),
        slice(3148, 3224),
    ]


@pytest.mark.parametrize(("length", "filled"), [(15, 15), (16, 16), (33, 34), (1000, 1024), (1309, 1344), (4033, 4096)])
def test_rows_get_one_of_few_lengths(length, filled):
    batch = pack([as_item(ids) for ids in documents(0, [length])], 0)
    longer = filled_up(batch)
    assert longer.input_ids_1T.shape == longer.position_ids_1T.shape == (1, filled)
    assert longer.plan.segments[-1].stop == filled
    assert longer.source_N is batch.source_N


@pytest.mark.parametrize(("rows", "experts", "multiple"), [(100, 32, 1), (1024, 32, 8), (17600, 32, 64), (4, 2, 1)])
def test_few_rows_are_wasted(rows, experts, multiple):
    assert row_multiple(rows, experts) == multiple
