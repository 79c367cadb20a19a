"""FLOPs of a training step, and what the machine could do at most.

A multiplication with its addition counts 2. Counted are the matrix products that the model's shapes ask for, forward
and backward, attention by the pairs of positions that see each other; what is computed again to save memory is not.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from posttrain.engine import adapters
from posttrain.engine.experts import ExpertAdapter
from posttrain.engine.packing import Item
from posttrain.host.cache import cache_folder
from posttrain.host.machine import cpu_model
from posttrain.recipe.types import Precision
from posttrain.run.folder import write_json_atomic

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 2, 2, 2
"""Per weight and token."""
PEAK_TFLOPS = {
    "B200": {"bfloat16": 2250.0, "float32": 75.0},
    "H200": {"bfloat16": 989.4, "float32": 66.9},
    "H100 NVL": {"bfloat16": 835.5, "float32": 60.0},
    "H100 PCIe": {"bfloat16": 756.4, "float32": 51.2},
    "H100": {"bfloat16": 989.4, "float32": 66.9},
    "A100": {"bfloat16": 311.9, "float32": 19.5},
    "L40S": {"bfloat16": 362.0, "float32": 91.6},
    "L4": {"bfloat16": 121.0, "float32": 30.3},
}
"""Dense products by a part of the GPU's name, first match; NVIDIA's data sheets."""
SIDE, TRIES = 1024, 8
"""Of the square matrices multiplied to measure a CPU; the fastest try counts."""


class FlopCount:
    """What a step of a model costs, by its configuration and by what of it is trained."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        factors = sum(factor_weights(module, experts_per_token(config)) for _, module in adapters.adapted(model))
        trained = FORWARD + INPUT_GRADIENT + WEIGHT_GRADIENT
        base = FORWARD + INPUT_GRADIENT if factors else trained
        self._token = base * layer_weights(config) + trained * factors
        self._target = base * config.vocab_size * config.hidden_size
        # Two products forward, four backward, each of 2 FLOPs per head, pair of positions and head dimension.
        self._pair = 12 * config.num_attention_heads * head_dim(config)
        self._windows = windows(config)

    def of_step(self, items: Iterable[Item]) -> float:
        total = 0.0
        for item in items:
            prefix = len(item.prefix)
            total += self._token * item.size + self._target * item.num_targets
            for window in self._windows:
                pairs = visible_pairs(0, prefix, window)
                pairs += sum(visible_pairs(prefix, len(tokens), window) for tokens in item.tokens)
                total += self._pair * pairs
        return total


def visible_pairs(before: int, length: int, window: int | None) -> int:
    """Keys that `length` queries after `before` positions see in all, causally and at most `window` each."""
    last = before + length
    full = min(last, window or last)
    growing = max(0, full - before)
    return growing * (2 * before + growing + 1) // 2 + (length - growing) * (window or 0)


def layer_weights(config: PreTrainedConfig) -> int:
    """Weights of all layers that one token is multiplied with."""
    hidden, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    expert_size = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    dense = 3 * hidden * config.intermediate_size
    sparse = hidden * (experts or 0) + experts_per_token(config) * 3 * hidden * expert_size
    return sum(
        2 * hidden * heads * head_dim(config) + (sparse if experts and is_sparse(config, layer) else dense)
        for layer in range(config.num_hidden_layers)
    )


def is_sparse(config: PreTrainedConfig, layer: int) -> bool:
    """Whether a layer of a mixture-of-experts model has experts (Qwen's may be dense)."""
    step = getattr(config, "decoder_sparse_step", 1)
    return layer not in (getattr(config, "mlp_only_layers", None) or ()) and (layer + 1) % step == 0


def experts_per_token(config: PreTrainedConfig) -> int:
    return getattr(config, "num_experts_per_tok", None) or 1


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def windows(config: PreTrainedConfig) -> list[int | None]:
    """Sliding window of each layer; None sees everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def factor_weights(module: adapters.LoraLinear | ExpertAdapter, chosen: int) -> int:
    """Weights of an adapter that one token is multiplied with."""
    a, b = module.lora_A, module.lora_B
    if isinstance(module, ExpertAdapter):
        return chosen * (a[0].numel() + b[0].numel())
    return a.numel() + b.numel()


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """FLOP/s of dense products at most: of a known GPU by its data sheet, of a CPU measured once and remembered."""
    dtype = "float32" if precision == "float32" else "bfloat16"
    if device.type == "cpu":
        return _measured(dtype)
    name = torch.cuda.get_device_name(device)
    return next((peaks[dtype] * 1e12 for part, peaks in PEAK_TFLOPS.items() if part in name), None)


def _measured(dtype: str) -> float:
    cache = cache_folder() / "peak_flops.json"
    key = f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}"
    try:
        known: dict[str, Any] = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}
    if key in known:
        return float(known[key])
    matrix = torch.ones(SIDE, SIDE, dtype=getattr(torch, dtype))
    best = math.inf
    for _ in range(TRIES):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    peak = 2 * SIDE**3 / best
    with contextlib.suppress(OSError):
        write_json_atomic(cache, known | {key: peak})
    return peak
