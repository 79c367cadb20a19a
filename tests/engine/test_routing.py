"""Routing metrics on choices that are set by hand, and the sorting of rows."""

import pytest
import torch

from posttrain.engine.batched import plan_groups, route
from posttrain.engine.forward import batch_logprobs
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
    routing = route(indices, weights, num_experts=4)
    rows = {}
    for group in routing.groups:
        members = group.of(torch.arange(len(routing.token_P))[group.rows, None])[..., 0]
        assert members.shape[1] % row_multiple(96, 4) == 0
        rows |= dict(zip(routing.expert_E[group.experts].tolist(), members.tolist(), strict=True))
    assert rows.keys() == {0, 2, 3}, "expert 1 has no rows"
    assert sorted(row for own in rows.values() for row in own) == list(range(len(routing.token_P)))
    for token in range(48):
        for choice in range(2):
            row = int(routing.place_Tk[token, choice])
            assert row in rows[int(indices[token, choice])]
            assert routing.token_P[row] == token
            assert routing.weight_P[row] == weights[token, choice]
    used = torch.zeros(len(routing.token_P), dtype=torch.bool)
    used[routing.place_Tk.reshape(-1)] = True
    assert used.sum() == 96
    assert routing.weight_P[~used].eq(0).all()


def test_experts_with_like_loads_share_a_group():
    groups, start_E = plan_groups([500, 490, 240, 230, 220, 200, 5, 3, 0], multiple=64)
    # 512 and 512 rows; 256 (four are as many as fit); 64 and 64; nothing.
    assert [(group.experts, group.rows) for group in groups] == [
        (slice(0, 2), slice(0, 1024)),
        (slice(2, 6), slice(1024, 2048)),
        (slice(6, 8), slice(2048, 2176)),
    ]
    assert start_E == [0, 512, 1024, 1280, 1536, 1792, 2048, 2112, 2176]


def test_experts_of_unlike_loads_do_not():
    groups, _ = plan_groups([500, 300, 290], multiple=64)
    assert [group.experts for group in groups] == [slice(0, 1), slice(1, 3)]


def test_a_group_has_a_limit_of_rows():
    groups, _ = plan_groups([1100, 1090, 600, 600], multiple=64)
    assert [group.experts for group in groups] == [slice(number, number + 1) for number in range(4)]


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
