from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GptOssConfig

from posttrain.export.expected import expected_bytes, expected_shapes
from tests.export.toys import toy_base


def test_shapes_are_those_of_a_saved_model(tmp_path: Path) -> None:
    base = toy_base(tmp_path / "base")
    saved = load_file(base / "model.safetensors")
    shapes = expected_shapes(base)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert expected_bytes(shapes, torch.bfloat16) == sum(tensor.numel() for tensor in saved.values()) * 2


def test_the_real_20b_has_its_published_parameter_count(tmp_path: Path) -> None:
    GptOssConfig(num_hidden_layers=24, num_local_experts=32).save_pretrained(tmp_path)
    assert expected_bytes(expected_shapes(tmp_path), torch.int8) == 20_914_757_184
