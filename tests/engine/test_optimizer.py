"""Parameter groups by name: who gets which rate and decay, worked by hand."""

from pathlib import Path

import pytest
import torch
from torch import nn

from posttrain.engine.checkpoint import CheckpointWriter, TrainingState
from posttrain.engine.optimizer import make_optimizer, parameter_groups
from posttrain.errors import ModelError
from posttrain.recipe.types import AdamW, ParameterGroup

NAMES = {"layers.0.q_proj.lora_A": (2, 3), "layers.0.q_proj.lora_B": (3, 2), "layers.0.norm.weight": (3,)}


def adamw(*groups: ParameterGroup, moments: str = "float32") -> AdamW:
    return AdamW(
        learning_rate=0.5,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.99,
        epsilon=1e-8,
        clip_norm=1.0,
        schedule="constant",
        warmup_share=0.0,
        final_share=1.0,
        groups=groups,
        moments=moments,
    )


def group(pattern: str, rate: float, decay: float) -> ParameterGroup:
    return ParameterGroup(pattern=pattern, learning_rate_scale=rate, weight_decay_scale=decay)


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in NAMES.items()}


def test_without_groups_matrices_decay_and_vectors_do_not() -> None:
    found = list(parameter_groups(adamw(), parameters()))
    assert [(len(g["params"]), g["weight_decay"], g["learning_rate_scale"]) for g in found] == [
        (2, 0.1, 1.0),
        (1, 0.0, 1.0),
    ]


def test_the_first_group_that_matches_counts_and_scales_both() -> None:
    named = parameters()
    spec = adamw(group("*.lora_B", 16.0, 0.0), group("*q_proj*", 2.0, 3.0))
    found = list(parameter_groups(spec, named))
    assert [[id(p) for p in g["params"]] for g in found] == [[id(parameter)] for parameter in (
        named["layers.0.q_proj.lora_B"], named["layers.0.q_proj.lora_A"], named["layers.0.norm.weight"]
    )]  # fmt: skip
    assert [g["learning_rate_scale"] for g in found] == [16.0, 2.0, 1.0]
    assert [g["weight_decay"] for g in found] == pytest.approx([0.0, 0.3, 0.0])


def test_a_step_moves_each_group_at_its_own_rate() -> None:
    """AdamW's first step is its rate, by the gradient's sign; decay takes rate times decay of the weight before."""
    named = parameters()
    optimizer = make_optimizer(adamw(group("*.lora_B", 2.0, 0.0)), named)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    for one in optimizer.param_groups:
        one["lr"] = 0.01 * one["learning_rate_scale"]
    optimizer.step()
    moved = {name.rpartition(".")[2]: float(1 - parameter.detach().flatten()[0]) for name, parameter in named.items()}
    assert moved == pytest.approx({"lora_A": 0.01 + 0.01 * 0.1, "lora_B": 0.02, "weight": 0.01}, rel=1e-4)


@pytest.mark.parametrize("groups", [(group("*.lora_C", 2.0, 1.0),), (group("*lora*", 2.0, 1.0), group("*_B", 1, 1))])
def test_a_pattern_without_a_parameter_is_refused_with_names_that_there_are(groups: tuple[ParameterGroup, ...]) -> None:
    with pytest.raises(ModelError, match=r"optimizer.groups: '.*_[BC]' matches no trained parameter.*layers\.0\."):
        make_optimizer(adamw(*groups), parameters())


def test_eight_bit_moments_move_weights_as_float32_ones_do_and_resume_with_the_same_bits(tmp_path: Path) -> None:
    """Over steps with gradients of their own; what 4096 numbers or more are kept in is a byte each."""

    def train(state: TrainingState, steps: range) -> torch.Tensor:
        for number in steps:
            weight = state.parameters["weight"]
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            state.optimizer.step()
        return state.parameters["weight"].detach().clone()

    def begun(moments: str) -> TrainingState:
        parameters = {"weight": nn.Parameter(torch.ones(64, 128))}
        return TrainingState(parameters, make_optimizer(adamw(moments=moments), parameters), "")

    exact, short = train(begun("float32"), range(4)), begun("8bit")
    ours = train(short, range(2))
    writer = CheckpointWriter(short, tmp_path, keep=1)
    writer.begin(2)
    writer.wait()
    ours = train(short, range(2, 4))
    kept = short.optimizer.state[short.parameters["weight"]]
    assert kept["state1"].dtype == kept["state2"].dtype == torch.uint8
    assert (ours - exact).abs().mean() < 0.05 * (exact - 1).abs().mean()

    resumed = begun("8bit")
    assert resumed.restore(tmp_path / "checkpoint-2") == 2
    assert torch.equal(train(resumed, range(2, 4)), ours)
