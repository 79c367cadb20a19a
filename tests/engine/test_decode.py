"""The decode program against the modules it stands in for."""

import numpy as np
import pytest
import torch
from torch import nn

from posttrain.engine import adapters, decode
from posttrain.engine.decode import _Experts, decode_program
from posttrain.engine.forward import hidden_states
from posttrain.engine.model import load_model
from posttrain.engine.packing import Item, pack
from posttrain.engine.slots import empty_cache
from posttrain.recipe.types import Lora
from posttrain.run.folder import ASSETS
from tests.engine.toys import save_toy

LENGTH = 12
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
WITHOUT_EXPERTS = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    place = tmp_path_factory.mktemp("toys")
    return {name: save_toy(place / name, architecture=name) for name in decode.ARCHITECTURES}


def adapted_model(toys, name="gpt_oss"):
    model = load_model(toys[name])
    targets = (*ATTENTION, *(("gate_proj", "up_proj", "down_proj") if name in WITHOUT_EXPERTS else ("experts",)))
    adapters.attach(model, Lora(kind="lora", rank=4, alpha=8, targets=targets))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, module in adapters.adapted(model):
            for factor in (module.lora_A, module.lora_B):
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def by_steps(model, ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of the program, every token a step of its own."""
    program = decode_program(model, len(ids_BT))
    cache = empty_cache(model, len(ids_BT), LENGTH, program.order)
    return torch.stack([program.step(ids_B, cache) for ids_B in ids_BT.T], 1)


@torch.no_grad()
def by_modules(model, ids_BT: torch.Tensor) -> torch.Tensor:
    nothing = np.zeros(0, np.int64)
    rows = [pack([Item(nothing, (ids.numpy(),), (np.zeros(LENGTH, bool),))], 0) for ids in ids_BT]
    return torch.stack([model.lm_head(hidden_states(model, row)) for row in rows])


@pytest.mark.parametrize("name", decode.ARCHITECTURES)
@pytest.mark.parametrize("packed_from", [1, 1 << 18], ids=["oneDNN", "plain"])
@pytest.mark.parametrize("dense_slots", [0, 16], ids=["chosen", "every"])
def test_its_steps_give_the_logits_of_the_modules_adapter_included(toys, name, packed_from, dense_slots, monkeypatch):
    monkeypatch.setattr(decode, "PACKED_ELEMENTS", packed_from)
    monkeypatch.setattr(decode, "PACKED_ROWS", 0)
    monkeypatch.setattr(decode, "DENSE_SLOTS", dense_slots)
    model = adapted_model(toys, name)
    ids_BT = torch.randint(2, 512, (5, LENGTH), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(by_steps(model, ids_BT), by_modules(model, ids_BT), atol=5e-5, rtol=0)


def test_a_turned_copy_serves_later_programs_until_the_weights_are_others(toys, monkeypatch):
    monkeypatch.setattr(decode, "DENSE_ELEMENTS", 0)
    monkeypatch.setattr(decode, "TURNED_ROWS", (0, 5))
    model = load_model(toys["gpt_oss"])
    ids_BT = torch.randint(2, 512, (5, LENGTH), generator=torch.Generator().manual_seed(1))
    first, second = (decode_program(model, 5).layers[0].mlp.up_EHG for _ in range(2))
    experts = model.get_decoder().layers[0].mlp.experts
    assert second.data_ptr() == first.data_ptr() != experts.gate_up_proj.data_ptr()
    torch.testing.assert_close(by_steps(model, ids_BT), by_modules(model, ids_BT), atol=5e-5, rtol=0)
    # As a fused optimizer changes them: in place, without counting a version.
    version = experts.gate_up_proj._version
    experts.gate_up_proj.data.mul_(1.5)
    assert experts.gate_up_proj._version == version
    torch.testing.assert_close(by_steps(model, ids_BT), by_modules(model, ids_BT), atol=5e-5, rtol=0)


def test_weights_that_are_trained_are_read_where_they_are(toys, monkeypatch):
    monkeypatch.setattr(decode, "DENSE_ELEMENTS", 0)
    monkeypatch.setattr(decode, "TURNED_ROWS", (0, 5))
    model = load_model(toys["gpt_oss"]).requires_grad_(True)
    experts = model.get_decoder().layers[0].mlp.experts
    assert decode_program(model, 5).layers[0].mlp.up_EHG.data_ptr() == experts.gate_up_proj.data_ptr()


def test_where_it_does_not_apply_the_modules_run(toys):
    assert decode_program(load_model(toys["gpt_oss"]).double(), 1) is None


@pytest.mark.parametrize("slots", [16, 21, 32])
def test_chosen_experts_in_a_kernel_equal_all_experts_asked(slots):
    model = load_model(ASSETS / "tiny_base")
    layer = model.get_decoder().layers[1]
    draw = torch.Generator().manual_seed(slots)
    x_BI = nn.functional.normalize(torch.randn(slots, 128, generator=draw), dim=-1)
    x_BI = nn.functional.pad(x_BI, (0, 1), value=1.0)
    sum_BH = torch.randn(slots, 128, generator=draw)
    with torch.no_grad():
        layer.mlp.experts.gate_up_proj *= 30  # Some gates and ups beyond their limits.
        experts = _Experts(layer.mlp, layer.post_attention_layernorm, slots)
        assert experts.few and experts.in_kernel
        score_Bk, expert_Bk = experts._choose(experts.route(x_BI))
        expert_Bk[:, 0] = 3  # One expert is chosen by all, one by nobody.
        expert_Bk[:, 1] = torch.arange(slots) % 3
        expected = experts._ask_all(sum_BH.clone(), x_BI, score_Bk, expert_Bk)
        found = experts._ask_few(sum_BH.clone(), x_BI, score_Bk, expert_Bk)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
