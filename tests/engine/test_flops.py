"""FLOPs against torch's own counter on stock transformers, and by hand."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from posttrain.engine import adapters
from posttrain.engine.flops import FlopCount, head_dim, peak_flops, visible_pairs
from posttrain.engine.model import load_model, unfreeze_adapter
from posttrain.engine.packing import Item
from posttrain.recipe.types import Lora
from tests.engine.toys import ARCHITECTURES, save_toy

LENGTH = 24


def document(length: int, prefix: int = 0) -> Item:
    return Item(np.arange(2, 2 + prefix), (np.arange(2, 2 + length),), (np.arange(length) > 0,))


@pytest.mark.parametrize(
    ("before", "length", "window", "pairs"),
    [
        (0, 4, None, 1 + 2 + 3 + 4),
        (3, 2, None, 4 + 5),
        (0, 5, 2, 1 + 2 + 2 + 2 + 2),
        (3, 3, 5, 4 + 5 + 5),
        (9, 3, 5, 5 + 5 + 5),
        (0, 0, 5, 0),
    ],
)
def test_pairs_by_hand(before: int, length: int, window: int | None, pairs: int) -> None:
    assert visible_pairs(before, length, window) == pairs


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss", "qwen3_moe", "mixtral", "gemma3_text"])
def test_a_full_step_costs_what_torch_counts_on_the_stock_model(architecture: str, tmp_path) -> None:
    folder = save_toy(tmp_path, architecture=architecture)
    model = load_model(folder)
    model.requires_grad_(True)
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    ids = torch.arange(2, 2 + LENGTH)[None]
    with FlopCounterMode(display=False) as counter:
        stock(input_ids=ids, use_cache=False).logits.sum().backward()
    config = model.config
    # Stock attention computes every pair of positions, and logits at the last position too.
    all_pairs = 12 * config.num_attention_heads * head_dim(config) * LENGTH**2 * config.num_hidden_layers
    windows = [8 if kind == "sliding_attention" else None for kind in getattr(config, "layer_types", None) or []]
    windows = windows or [ARCHITECTURES[architecture].get("sliding_window")] * config.num_hidden_layers
    seen = sum(visible_pairs(0, LENGTH, window) for window in windows)
    ours = FlopCount(model).of_step([document(LENGTH)])
    expected = counter.get_total_flops() - all_pairs
    expected += 12 * config.num_attention_heads * head_dim(config) * seen - 6 * config.vocab_size * config.hidden_size
    assert ours == pytest.approx(expected, rel=1e-6)


def test_an_adapter_trains_its_factors_and_only_passes_through_the_base(tmp_path) -> None:
    """By hand: hidden 64, 4 query and 2 key-value heads of 16, 4 experts top-2 of size 64, 2 layers, 512 tokens."""
    model = load_model(save_toy(tmp_path))
    adapters.attach(model, Lora(kind="lora", rank=4, alpha=8, targets=("q_proj", "experts")))
    unfreeze_adapter(model)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 64 * 4 + 2 * (64 * 128 + 64 * 64)
    factors = 4 * (64 + 64) + 2 * 4 * (64 + 128) + 2 * 4 * (64 + 64)
    token = 2 * (4 * layer + 6 * factors)
    pairs = visible_pairs(0, 3, None) + visible_pairs(3, 10, None) + visible_pairs(0, 3, 8) + visible_pairs(3, 10, 8)
    expected = 13 * token + 9 * 4 * 512 * 64 + 12 * 4 * 16 * pairs
    assert FlopCount(model).of_step([document(10, prefix=3)]) == expected


def test_a_known_gpu_has_its_data_sheets_peak_and_an_unknown_one_none(monkeypatch) -> None:
    names = iter(["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "Some GPU"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    peaks = [peak_flops(torch.device("cuda"), "bfloat16") for _ in range(4)]
    assert peaks == [989.4e12, 989.4e12, 756.4e12, None]


def test_a_cpu_is_measured_once() -> None:
    first = peak_flops(torch.device("cpu"), "float32")
    assert first is not None and first > 1e9
    assert peak_flops(torch.device("cpu"), "float32") == first
    assert peak_flops(torch.device("cpu"), "bfloat16") != first
