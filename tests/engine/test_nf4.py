"""Frozen matrices in NF4 against the same values written out in bfloat16."""

import bitsandbytes
import pytest
import torch
from torch import nn

from posttrain.engine.forward import batch_logprobs
from posttrain.engine.model import hold_frozen, load_model, trainable, unfreeze_adapter
from posttrain.engine.packing import pack
from posttrain.errors import MachineError, ModelError
from tests.engine.test_exactness import as_item, documents, lora_for, random_adapter
from tests.engine.toys import save_toy


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def folders(request, tmp_path_factory):
    toy = save_toy(tmp_path_factory.mktemp("toy"), architecture=request.param)
    return toy, random_adapter(toy, lora_for(request.param), tmp_path_factory.mktemp("adapter"))


def packed(folders):
    model = load_model(*folders, precision="nf4")
    unfreeze_adapter(model)
    hold_frozen(model, "nf4")
    return model


def written_out(model):
    """The model with every NF4 matrix as the numbers it stands for."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                values = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                plain.weight = nn.Parameter(values.to(torch.bfloat16), requires_grad=False)
                plain.bias = module.bias
                setattr(parent, name, plain)
    return model


def outcome(model, precision):
    logprob_N = batch_logprobs(model, pack([as_item(ids) for ids in documents(3, [40, 25])], 0), precision)
    logprob_N.sum().backward()
    return logprob_N.detach(), {name: parameter.grad for name, parameter in trainable(model).items()}


def test_an_adapter_trains_on_nf4_as_on_its_values(folders):
    model = packed(folders)
    held = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(held) == 2 * 7
    assert all(module.weight.dtype == torch.uint8 for module in held)
    ours, gradients = outcome(model, "nf4")
    reference, expected = outcome(written_out(packed(folders)), "bfloat16")
    assert (ours - reference).abs().max() <= 1e-3 * float(reference.max() - reference.min())
    assert gradients.keys() == expected.keys() and gradients
    for name, gradient in gradients.items():
        assert nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.9999


def test_the_head_and_the_embedding_stay(folders):
    model = packed(folders)
    assert model.get_output_embeddings().weight.is_floating_point()
    assert model.get_input_embeddings().weight.is_floating_point()


def test_experts_are_refused_with_what_to_use(tmp_path):
    model = load_model(save_toy(tmp_path))
    with pytest.raises(ModelError, match="--base-weights packed"):
        hold_frozen(model, "nf4")


def test_without_the_library_its_extra_is_named(folders, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(MachineError, match=r"pip install 'posttrain\[cuda\]'"):
        packed(folders)
