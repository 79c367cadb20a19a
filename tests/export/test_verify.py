import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from posttrain.errors import MachineError
from posttrain.export.gguf import write_gguf
from posttrain.export.llama import ask_llama
from posttrain.export.merge import apply_merge, plan_merge
from posttrain.export.verify import (
    Comparison,
    _stock_model,
    compare,
    first_difference,
    stock_logits,
    verify_folder,
    verify_gguf,
    widen,
)
from posttrain.recipe.types import USUAL_TOLERANCES
from tests.export.test_gguf import needs_llama
from tests.export.toys import toy_adapter, toy_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("toy") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return toy_adapter(base, base.parent / "adapter")


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 320, (3 + 6 * index,), generator=generator).tolist() for index in range(count)]


def merged(base: Path, adapter: Path | None, target: Path, dtype: torch.dtype = torch.float32) -> Path:
    target.mkdir()
    apply_merge(plan_merge(base, adapter, dtype), target)
    return target


def test_numbers_of_a_comparison_by_hand() -> None:
    left = [torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])]
    right = [torch.tensor([[0.0, 0.5]]), torch.tensor([[math.log(3), 0.0]])]
    result = compare("a / b", left, right, [[0], [0]], 0.4)
    # KL of (1/2, 1/2) to softmax(0, 1/2), halved: the second position adds nothing.
    share = 1 / (1 + math.exp(0.5))
    kl = 0.5 * math.log(0.5 / share) + 0.5 * math.log(0.5 / (1 - share))
    assert (result.max_abs, result.mean_abs, result.greedy_agreement) == (0.5, 0.125, 0.5)
    assert result.kl == pytest.approx(kl / 2)
    assert result.status == "differs"
    assert compare("a / b", left, right, [[0], [0]], 0.5).status == "agrees"
    assert compare("a / b", left, [right[0] * math.nan, right[1]], [[0], [0]], 1e9).status == "differs"


def test_perplexity_by_hand() -> None:
    """Of the prompt 2 0 1 the model foretells 0 with 1/2 and 1 with 1/8: the geometric mean is 1/4."""
    logits_TV = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.125, 0.375], [1.0, 1.0, 1.0]]).log()
    row = compare("a / b", [logits_TV], [torch.zeros(3, 3)], [[2, 0, 1]])
    assert row.left_perplexity == pytest.approx(4)
    assert row.right_perplexity == pytest.approx(3)


def test_engine_peft_and_merged_folder_agree(base: Path, adapter: Path, tmp_path: Path) -> None:
    rows, _ = verify_folder(base, adapter, merged(base, adapter, tmp_path / "merged"), prompts(5), 1e-4)
    assert [(row.pair, row.status) for row in rows] == [
        ("engine / merged", "agrees"),
        ("PEFT / merged", "agrees"),
        ("engine / merged in float32", "measured"),
    ]
    assert rows[0].max_abs < 1e-6 and rows[2].max_abs < 1e-4
    assert all(row.greedy_agreement == 1.0 for row in rows)


def test_a_bfloat16_base_is_widened_a_layer_at_a_time_and_exactly(base: Path, adapter: Path, tmp_path: Path) -> None:
    rounded = merged(base, None, tmp_path / "rounded", torch.bfloat16)
    rows, _ = verify_folder(rounded, adapter, merged(rounded, adapter, tmp_path / "merged"), prompts(3), 1e-4)
    assert [row.status for row in rows] == ["agrees", "agrees", "measured"]
    assert max(row.max_abs for row in rows[:2]) < 1e-6

    model = _stock_model(rounded)
    widen(model, torch.float64)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *call: seen.append([next(one.parameters()).dtype for one in layers]))
    layers = list(model.model.layers)
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.dtype == torch.float64
    wide, stored = torch.float64, torch.bfloat16
    assert seen == [[wide if at == number else stored for at in range(len(layers))] for number in range(len(layers))]
    assert {parameter.dtype for parameter in model.model.layers.parameters()} == {stored}


def test_a_merge_of_another_adapter_is_found_out(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = toy_adapter(base, tmp_path / "other", seed=2)
    rows, _ = verify_folder(base, adapter, merged(base, other, tmp_path / "merged"), prompts(2), 1e-4)
    assert [row.status for row in rows] == ["differs", "differs", "measured"]


def test_the_first_difference_counts_up_to_the_end_of_the_reference() -> None:
    assert first_difference([1, 2], [1, 2, 9]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1


@needs_llama
@pytest.mark.parametrize("gguf_type", ["f32", "bf16"])
def test_gguf_agrees_with_its_folder_and_not_with_another(base: Path, adapter: Path, tmp_path: Path, gguf_type) -> None:
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[gguf_type]
    folder = merged(base, adapter, tmp_path / "merged", dtype)
    write_gguf(folder, tmp_path / "toy.gguf", gguf_type, "toy")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    texts = {text: tokenizer.encode(text).ids for text in ("run the tests, then 123456", "city's  \n name")}
    stop = frozenset({tokenizer.token_to_id("<|return|>")})
    exact = stock_logits(folder, None, prompts(4), torch.float64)

    def judged(of: Path, texts: dict[str, list[int]]) -> Comparison:
        return verify_gguf(tmp_path / "toy.gguf", gguf_type, of, prompts(4), 8, stop, texts, 1, USUAL_TOLERANCES, exact)

    result = judged(folder, texts)
    assert result.status == "agrees", result.reason
    assert result.left_perplexity == pytest.approx(result.right_perplexity, rel=1e-4 if gguf_type == "f32" else 0.05)
    assert judged(base, {}).status == "differs"
    assert judged(folder, {"run the tests": [1, 2]}).status == "differs"


def test_without_llama_cpp_the_file_is_unverified_not_failed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POSTTRAIN_TEST_TOOLS", raising=False)
    monkeypatch.setenv("POSTTRAIN_NODE_TOOLS", str(tmp_path / "nowhere"))
    with pytest.raises(MachineError, match="not asked"):
        ask_llama(tmp_path / "toy.gguf", [[1]], 1, [])
    result = verify_gguf(tmp_path / "toy.gguf", "f32", base, [[1]], 1, frozenset(), {}, 1, USUAL_TOLERANCES, [])
    assert (result.status, result.greedy_agreement) == ("unverified", None)
