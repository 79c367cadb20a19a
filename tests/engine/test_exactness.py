"""Our forward and backward passes against stock transformers and PEFT."""

import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.engine import adapters
from posttrain.engine.device import prepare_device
from posttrain.engine.forward import batch_logprobs, hidden_states, next_logits
from posttrain.engine.model import hold_frozen, load_model, trainable, unfreeze_adapter
from posttrain.engine.packing import Item, pack
from posttrain.errors import MachineError, ModelError
from posttrain.phases.loop import require_training_memory
from posttrain.recipe.types import Execution, Lora
from tests.engine.toys import ARCHITECTURES, save_toy

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = ("gate_proj", "up_proj", "down_proj")
MIXTURES = ("gpt_oss", "mixtral", "qwen3_moe")


def lora_for(architecture: str) -> Lora:
    return Lora(kind="lora", rank=3, alpha=6, targets=ATTENTION + (("experts",) if architecture in MIXTURES else DENSE))


def random_adapter(toy, lora: Lora, folder):
    """An adapter folder with both factors random."""
    model = load_model(toy)
    adapters.attach(model, lora)
    generator = torch.Generator().manual_seed(3)
    adapters.initialise(model, generator)
    with torch.no_grad():
        for _, module in adapters.adapted(model):
            module.lora_B.copy_(torch.randn(module.lora_B.shape, generator=generator) * 0.1)
    adapters.save(model, folder, str(toy))
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def toy_adapter(toy, tmp_path_factory):
    return random_adapter(toy, lora_for("gpt_oss"), tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def any_toy(request, tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp(request.param), architecture=request.param)


@pytest.fixture(scope="module")
def any_adapter(any_toy, tmp_path_factory):
    architecture = load_model(any_toy).config.model_type
    return random_adapter(any_toy, lora_for(architecture), tmp_path_factory.mktemp("adapter"))


def stock_model(toy):
    return AutoModelForCausalLM.from_pretrained(
        toy, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def documents(seed: int, lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 512, size=length).astype(np.int32) for length in lengths]


def as_item(ids: np.ndarray) -> Item:
    return Item(np.empty(0, np.int32), (ids,), (np.ones(len(ids), bool),))


def stock_logits(model, ids: np.ndarray) -> torch.Tensor:
    return model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]


def test_packed_documents_equal_each_alone_in_stock_transformers(any_toy):
    stock = stock_model(any_toy)
    model = load_model(any_toy)
    docs = documents(0, [5, 30, 1, 17, 9])
    batch = pack([as_item(ids) for ids in docs], 0)
    with torch.no_grad():
        ours = next_logits(model, hidden_states(model, batch))
        alone = torch.cat([stock_logits(stock, ids) for ids in docs])
    assert alone.abs().max() > 1
    torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)


def test_every_gradient_of_a_packed_row_equals_stock_transformers(any_toy):
    stock = stock_model(any_toy)
    model = load_model(any_toy).requires_grad_(True)
    docs = documents(1, [12, 26, 7])
    logprobs = batch_logprobs(model, pack([as_item(ids) for ids in docs], 0), "float32")
    logprobs.sum().backward()
    expected = 0.0
    for ids in docs:
        logits = stock_logits(stock, ids)
        labels = torch.from_numpy(ids.astype(np.int64))
        expected = expected - torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    expected.backward()
    torch.testing.assert_close(logprobs.sum(), expected, atol=1e-4, rtol=1e-6)
    reference = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - reference[name].grad).norm() / reference[name].grad.norm()
        assert difference < 1e-5, (name, difference)


def test_sequences_behind_a_shared_prefix_equal_unshared_ones(any_toy):
    model = load_model(any_toy).requires_grad_(True)
    prefix, *tails = documents(2, [21, 4, 19, 1])
    shared = Item(prefix, tuple(tails), tuple(np.ones(len(tail), bool) for tail in tails))
    plain = [
        Item(
            np.empty(0, np.int32),
            (np.concatenate([prefix, tail]),),
            (np.arange(len(prefix) + len(tail)) >= len(prefix),),
        )
        for tail in tails
    ]
    weights = torch.randn(sum(map(len, tails)), generator=torch.Generator().manual_seed(0))
    results = []
    for items in ([shared], plain):
        model.zero_grad()
        logprobs = batch_logprobs(model, pack(items, 0), "float32")
        (logprobs * weights).sum().backward()
        results.append((logprobs.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (ours, our_grads), (reference, reference_grads) = results
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    for name, gradient in our_grads.items():
        assert (gradient - reference_grads[name]).norm() < 1e-5 * reference_grads[name].norm(), name


def test_adapter_made_here_gives_the_same_logits_in_stock_peft(any_toy, any_adapter):
    base = stock_model(any_toy)
    docs = documents(3, [11, 24])
    with torch.no_grad():
        without = torch.cat([stock_logits(base, ids) for ids in docs])
        stock = PeftModel.from_pretrained(base, any_adapter)
        expected = torch.cat([stock_logits(stock, ids) for ids in docs])
        model = load_model(any_toy, any_adapter)
        ours = next_logits(model, hidden_states(model, pack([as_item(ids) for ids in docs], 0)))
    assert (expected - without).abs().max() > 0.5
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("held", [False, True], ids=["as loaded", "held for training"])
def test_adapter_gradients_equal_stock_peft(any_toy, any_adapter, held):
    stock = PeftModel.from_pretrained(
        stock_model(any_toy),
        any_adapter,
        is_trainable=True,
    )
    model = load_model(any_toy, any_adapter)
    unfreeze_adapter(model)
    if held:
        hold_frozen(model, "float32")
    ids = documents(4, [25])[0]
    (-batch_logprobs(model, pack([as_item(ids)], 0), "float32").mean()).backward()
    labels = torch.from_numpy(ids.astype(np.int64))
    torch.nn.functional.cross_entropy(stock_logits(stock, ids)[:-1], labels[1:]).backward()
    reference = {name.replace(".default", ""): p.grad for name, p in stock.named_parameters() if p.requires_grad}
    for _, module in adapters.adapted(model):
        module.lora_A.data, module.lora_B.data = module.lora_A.grad, module.lora_B.grad
    ours = adapters.to_peft(model)
    assert ours.keys() == reference.keys()
    for name, gradient in ours.items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), reference[name].flatten(), dim=0)
        assert cosine > 0.9999, (name, cosine)
        assert abs(gradient.norm() / reference[name].norm() - 1) < 1e-4, name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_held_weights_give_the_same_with_every_new_adapter(any_toy, any_adapter, precision):
    docs = [as_item(ids) for ids in documents(4, [25, 60])]
    model, held = (load_model(any_toy, any_adapter) for _ in range(2))
    weights = {name: parameter.clone() for name, parameter in held.named_parameters()}
    hold_frozen(held, precision)
    for factor in (1.0, -2.0):
        with torch.no_grad():
            for _, module in (*adapters.adapted(model), *adapters.adapted(held)):
                module.lora_B.mul_(factor)
            expected, found = (batch_logprobs(one, pack(docs, 0), precision) for one in (model, held))
        torch.testing.assert_close(found, expected, atol=2e-5 if precision == "float32" else 0.05, rtol=1e-5)
    for name, parameter in held.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, weights[name].to(parameter.dtype)), name


def test_only_the_adapter_is_trained(toy, toy_adapter):
    model = load_model(toy, toy_adapter)
    unfreeze_adapter(model)
    assert all(".lora_" in name for name in trainable(model))
    # 2 layers of q, k, v, o and both expert projections, two factors each
    assert len(trainable(model)) == 2 * 6 * 2


def test_adapter_survives_a_round_trip_bit_for_bit(toy, toy_adapter, tmp_path):
    model = load_model(toy, toy_adapter)
    adapters.save(model, tmp_path, str(toy))
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (toy_adapter / name).read_bytes()


def test_two_backward_passes_give_the_same_bits(toy, toy_adapter):
    gradients = []
    for _ in range(3):
        model = load_model(toy, toy_adapter)
        unfreeze_adapter(model)
        batch_logprobs(model, pack([as_item(ids) for ids in documents(5, [40, 33])], 0), "bfloat16").sum().backward()
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    for other in gradients[1:]:
        assert all(torch.equal(gradients[0][name], other[name]) for name in other)


def test_a_target_that_matches_nothing_is_named(toy):
    with pytest.raises(ModelError, match=r"\['gate_proj'\] match no module"):
        adapters.attach(load_model(toy), Lora(kind="lora", rank=2, alpha=2, targets=("q_proj", "gate_proj")))


def test_an_adapter_for_another_model_is_refused(toy_adapter, tmp_path):
    other = save_toy(tmp_path / "other", hidden_size=32)
    with pytest.raises(ModelError, match="not this model's"):
        load_model(other, toy_adapter)


def test_too_little_memory_is_said_before_loading(toy, monkeypatch):
    monkeypatch.setattr("posttrain.engine.model.available_bytes", lambda: 1000)
    with pytest.raises(
        MachineError, match=r"needs 0\.0 GB, and 0\.0 GB of memory are available: choose a smaller base"
    ):
        load_model(toy)


def test_a_model_that_lacks_a_tensor_is_named_with_it(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        ModelError,
        match=r"torn: tensors differ from what config\.json promises: .*layers\.1\.self_attn\.k_proj\.weight",
    ):
        load_model(tmp_path / "torn")


def test_an_adapter_for_fewer_layers_is_refused(toy_adapter, tmp_path):
    deeper = save_toy(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks tensor .*layers\.2.*: it was made for another model"):
        load_model(deeper, toy_adapter)


def test_too_little_memory_for_the_optimizer_is_said_before_the_first_step(toy, monkeypatch):
    model = load_model(toy)
    adapters.attach(model, Lora(kind="lora", rank=2, alpha=2, targets=("q_proj",)))
    unfreeze_adapter(model)
    monkeypatch.setattr("posttrain.engine.model.available_bytes", lambda: 1000)
    with pytest.raises(MachineError, match=r"training 0\.0M parameters needs .* GB, and .* GB of memory.*smaller rank"):
        require_training_memory(trainable(model), torch.device("cpu"))


def test_a_dtype_that_the_machine_lacks_is_refused_before_loading(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    with pytest.raises(MachineError, match="precision bfloat16: Old GPU has no bfloat16 products; use float32"):
        prepare_device(Execution(device="cuda"), "bfloat16")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match=r"--device cuda: .* sees no GPU"):
        prepare_device(Execution(device="cuda"), "float32")


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="'gpt2' is not supported; supported are gemma, gemma2, gemma3_text, gpt_oss"):
        load_model(tmp_path)
