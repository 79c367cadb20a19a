"""The engine on a GPU against itself on the CPU, where other tests hold it to stock transformers and PEFT."""

import pytest
import torch

from posttrain.engine.activations import keep_activations
from posttrain.engine.device import fuse_layers, prepare_device
from posttrain.engine.forward import batch_logprobs
from posttrain.engine.model import hold_frozen, load_model, trainable, unfreeze_adapter
from posttrain.engine.packing import Item, pack
from posttrain.recipe.types import Execution
from tests.engine.test_exactness import as_item, documents, lora_for, random_adapter
from tests.engine.test_mxfp4 import pack_experts
from tests.engine.toys import ARCHITECTURES, save_toy

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folders(request, tmp_path_factory):
    toy = save_toy(tmp_path_factory.mktemp("toy"), architecture=request.param)
    return toy, random_adapter(toy, lora_for(request.param), tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    toy = save_toy(tmp_path_factory.mktemp("toy"))
    return toy, random_adapter(toy, lora_for("gpt_oss"), tmp_path_factory.mktemp("adapter"))


def a_batch():
    """Documents, and two sequences that share a prefix."""
    alone, prefix, first, second = documents(4, [70, 30, 25, 12])
    everything = tuple(ids > 0 for ids in (first, second))
    return pack([as_item(alone), Item(prefix, (first, second), everything)], 0)


def outcome(folders, device: str, precision: str, **execution):
    """Log-probabilities and the adapter's gradients, all on the CPU in float32."""
    asked = Execution(device=device, **execution)
    place = prepare_device(asked, precision)
    packed = asked.base_weights == "packed"
    model = load_model(*folders, device=place, precision=precision, packed=packed)
    unfreeze_adapter(model)
    hold_frozen(model, precision)
    fuse_layers(model, precision)
    keep_activations(model, asked)
    logprob_N = batch_logprobs(model, a_batch(), precision)
    (logprob_N * torch.linspace(-1, 1, len(logprob_N))).sum().backward()
    gradients = {name: parameter.grad.float().cpu() for name, parameter in trainable(model).items()}
    return logprob_N.detach(), gradients


def cosine(left, right) -> float:
    flat = [torch.cat([one[name].flatten() for name in sorted(one)]).double() for one in (left, right)]
    return torch.nn.functional.cosine_similarity(*flat, dim=0).item()


def test_float32_equals_the_cpu(folders):
    (ours, gradients), (reference, expected) = (outcome(folders, device, "float32") for device in ("cuda", "cpu"))
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
    assert cosine(gradients, expected) > 0.99999


@pytest.mark.parametrize("compile_kernels", ["auto", "off"])
def test_bfloat16_is_as_near_to_float32_as_the_cpus_is(folders, compile_kernels):
    exact, expected = outcome(folders, "cpu", "float32")
    on_cpu, cpu_gradients = outcome(folders, "cpu", "bfloat16")
    ours, gradients = outcome(folders, "cuda", "bfloat16", compile=compile_kernels)
    assert (ours - exact).abs().mean() < 1.5 * (on_cpu - exact).abs().mean()
    assert 1 - cosine(gradients, expected) < 1.5 * (1 - cosine(cpu_gradients, expected))


@pytest.mark.parametrize(
    "execution",
    [{}, {"recompute": "full"}, {"recompute": "selective"}, {"activation_offload": "cpu"}],
    ids=["again", "full", "selective", "offload"],
)
def test_the_same_bits_whenever_and_however_activations_are_kept(gpt_oss, execution):
    first, gradients = outcome(gpt_oss, "cuda", "bfloat16")
    again, others = outcome(gpt_oss, "cuda", "bfloat16", **execution)
    assert torch.equal(first, again)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_a_packed_base_gives_the_bits_of_the_unpacked_one(gpt_oss, tmp_path):
    packed = pack_experts(gpt_oss[0], tmp_path / "model"), gpt_oss[1]
    left = outcome(packed, "cuda", "bfloat16", base_weights="packed")
    right = outcome(packed, "cuda", "bfloat16")
    assert torch.equal(left[0], right[0])
    assert all(torch.equal(left[1][name], right[1][name]) for name in left[1])
