"""MXFP4 bases kept in four bits against the same weights unpacked."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.engine import adapters, mxfp4
from posttrain.engine.forward import batch_logprobs, hidden_states, next_logits
from posttrain.engine.model import hold_frozen, load_model, trainable, unfreeze_adapter
from posttrain.engine.packing import pack
from posttrain.errors import ModelError
from tests.engine.test_exactness import as_item, documents, lora_for
from tests.engine.toys import save_toy


def pack_experts(source, folder):
    """The toy with its expert matrices rounded to MXFP4, in Hugging Face's layout."""
    folder.mkdir()
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales = mxfp4.encode(tensor.transpose(1, 2).contiguous())
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def packed_toy(tmp_path_factory):
    return pack_experts(save_toy(tmp_path_factory.mktemp("toy")), tmp_path_factory.mktemp("packed") / "model")


def test_arithmetic_unpacks_every_code_and_scale_as_the_table_does():
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).expand(16, 255, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).expand(16, 255).contiguous()
    table = mxfp4.decode(blocks, scales)
    assert torch.equal(mxfp4.unpack(blocks, scales, torch.float32), table)
    assert torch.equal(mxfp4.unpack(blocks, scales, torch.bfloat16), table.to(torch.bfloat16))


def logits(model, ids):
    batch = pack([as_item(ids)], 0)
    return next_logits(model, hidden_states(model, batch))


@torch.no_grad()
def test_a_packed_base_equals_the_unpacked_one_and_stock_transformers(packed_toy):
    (ids,) = documents(1, [60])
    packed, unpacked = load_model(packed_toy, packed=True), load_model(packed_toy)
    for model in (packed, unpacked):
        hold_frozen(model, "float32")
    assert not [name for name, _ in packed.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    ours, reference = logits(packed, ids), logits(unpacked, ids)
    span = float(reference.max() - reference.min())
    assert (ours - reference).abs().max() <= 1e-3 * span
    from transformers import AutoModelForCausalLM, Mxfp4Config

    stock = AutoModelForCausalLM.from_pretrained(
        packed_toy,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    )
    theirs = stock(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    assert (ours - theirs).abs().max() <= 1e-3 * span


def test_an_adapter_trains_on_a_packed_base_as_on_the_unpacked_one(packed_toy):
    gradients = []
    for packed in (True, False):
        model = load_model(packed_toy, packed=packed)
        adapters.attach(model, lora_for("gpt_oss"))
        adapters.initialise(model, torch.Generator().manual_seed(1))
        with torch.no_grad():
            for _, module in adapters.adapted(model):
                module.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
        unfreeze_adapter(model)
        hold_frozen(model, "float32")
        batch = pack([as_item(ids) for ids in documents(2, [30, 21])], 0)
        batch_logprobs(model, batch, "float32").sum().backward()
        gradients.append({name: parameter.grad for name, parameter in trainable(model).items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-5)


def test_a_packed_base_without_a_tensor_is_refused_by_its_name(packed_toy, tmp_path):
    tensors = load_file(packed_toy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_scales"))
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((packed_toy / "config.json").read_text())
    with pytest.raises(ModelError, match=name.replace("_scales", ".scales")):
        load_model(tmp_path, packed=True)
