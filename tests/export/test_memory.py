"""Exports hold an expert's matrix per thread, not a model: peak memory of a process at the 20B model's own shapes."""

from pathlib import Path

import pytest

from bench.export import make_model, run_child

EXPERTS = 6
"""More than the parts in flight, so that holding a layer would show; more of them would only take longer."""
GIGABYTE = 10**9


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layer") / "source"
    make_model(folder, {"num_hidden_layers": 1, "num_local_experts": EXPERTS, "vocab_size": 4096})
    return folder


@pytest.mark.parametrize("what", ["merge", "mxfp4", "gguf q8_0", "gguf auto"])
def test_peak_memory_stays_below_a_gigabyte(source: Path, tmp_path: Path, what: str) -> None:
    measured = run_child(what, source, tmp_path / "target")
    assert measured["peak_bytes"] <= GIGABYTE, measured
