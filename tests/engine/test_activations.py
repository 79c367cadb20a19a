"""Recompute, offload, tiles and chunks change where numbers are kept, never the numbers."""

import pytest
import torch

from posttrain.engine import head
from posttrain.engine.activations import keep_activations
from posttrain.engine.forward import batch_logprobs
from posttrain.engine.model import hold_frozen, load_model, trainable, unfreeze_adapter
from posttrain.engine.packing import pack
from posttrain.recipe.types import Execution
from tests.engine.test_exactness import as_item, documents, lora_for, random_adapter
from tests.engine.toys import save_toy


@pytest.fixture(scope="module", params=["gpt_oss", "qwen3_moe", "gemma2"])
def folders(request, tmp_path_factory):
    toy = save_toy(tmp_path_factory.mktemp(request.param), architecture=request.param)
    return toy, random_adapter(toy, lora_for(request.param), tmp_path_factory.mktemp("adapter"))


def loss_and_gradients(folders, execution: Execution, precision: str = "float32"):
    model = load_model(*folders)
    unfreeze_adapter(model)
    keep_activations(model, execution)
    batch = pack([as_item(ids) for ids in documents(7, [40, 21, 33])], 0)
    loss = -batch_logprobs(model, batch, precision).sum()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in trainable(model).items()}


def assert_same(ours, reference, tolerance: float = 0.0):
    torch.testing.assert_close(ours[0], reference[0], rtol=tolerance, atol=0)
    for name, gradient in reference[1].items():
        assert gradient.abs().max() > 0
        assert (ours[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize(
    "changed", [{"recompute": "selective"}, {"recompute": "full"}, {"activation_offload": "cpu"}], ids=str
)
def test_loss_and_gradients_keep_their_bits(folders, changed):
    assert_same(loss_and_gradients(folders, Execution(**changed)), loss_and_gradients(folders, Execution()))


class Seen(torch.autograd.Function):
    """The identity; notes what its backward pass is given."""

    given: tuple[torch.Tensor, torch.Tensor]

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden.transpose(1, 2), weight.T)
        return hidden.clone()

    @staticmethod
    def backward(ctx, grad):
        Seen.given = ctx.saved_tensors
        return grad, None


def test_offloaded_tensors_keep_strides_and_parameters_stay(folders):
    model = load_model(*folders)
    keep_activations(model, Execution(activation_offload="cpu"))
    weight = model.get_input_embeddings().weight
    before = torch.randn(1, 4, 6, requires_grad=True)
    model.get_decoder().layers[0].register_forward_hook(lambda *_: Seen.apply(before, weight).sum().backward())
    batch_logprobs(model, pack([as_item(documents(7, [40])[0])], 0), "float32")
    hidden, transposed = Seen.given
    assert torch.equal(hidden, before.transpose(1, 2)) and hidden.stride() == before.transpose(1, 2).stride()
    assert hidden.data_ptr() != before.data_ptr() and transposed.data_ptr() == weight.data_ptr()


def test_tiles_change_the_order_of_sums_only(folders):
    tiled = loss_and_gradients(folders, Execution(mlp_tile_tokens=16))
    assert_same(tiled, loss_and_gradients(folders, Execution()), tolerance=1e-5)


def test_head_chunks_change_nothing(folders, monkeypatch):
    whole = loss_and_gradients(folders, Execution())
    monkeypatch.setattr(head, "SMALLEST_CHUNK", 7)
    monkeypatch.setattr(head, "CHUNK_LOGITS", {"cpu": 1})
    assert_same(loss_and_gradients(folders, Execution()), whole, tolerance=1e-5)


def test_frozen_matrices_in_bfloat16_are_what_autocast_makes_of_them(folders):
    results = []
    for held in (False, True):
        model = load_model(*folders)
        unfreeze_adapter(model)
        if held:
            hold_frozen(model, "bfloat16")
        batch = pack([as_item(ids) for ids in documents(8, [30, 18])], 0)
        loss = -batch_logprobs(model, batch, "bfloat16").sum()
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in trainable(model).items()}))
    assert_same(results[1], results[0])
