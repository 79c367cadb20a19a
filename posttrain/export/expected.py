"""What a model's config promises: names, shapes and bytes of its tensors, worked out without weights."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def expected_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor a folder with this config.json must hold."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        # Tied weights are stored once, under the embedding's name.
        shapes.pop("lm_head.weight", None)
    return shapes


def expected_bytes(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
