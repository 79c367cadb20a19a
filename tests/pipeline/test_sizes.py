"""Parameter counts from shapes alone, against the same model built by transformers and adapters by PEFT."""

from pathlib import Path

import pytest

from posttrain.pipeline.sizes import model_size
from posttrain.recipe.types import FolderBase, Lora
from posttrain.run.folder import RunFolder
from tests.pipeline.small_recipe import small_recipe

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def model():
    from transformers import GptOssConfig, GptOssForCausalLM

    base = small_recipe(fresh=True).base
    return GptOssForCausalLM(
        GptOssConfig(
            hidden_size=base.hidden_size,
            num_hidden_layers=base.num_layers,
            num_attention_heads=base.num_heads,
            num_key_value_heads=base.num_kv_heads,
            head_dim=base.head_dim,
            num_local_experts=base.num_experts,
            num_experts_per_tok=base.experts_per_token,
            intermediate_size=base.expert_size,
            vocab_size=base.vocab_size,
        )
    )


def test_fresh_and_saved_models_are_counted_as_transformers_counts_them(model, tmp_path: Path) -> None:
    recipe, run = small_recipe(fresh=True), RunFolder(tmp_path / "run")
    assert model_size(recipe, run).parameters == model.num_parameters()
    model.save_pretrained(tmp_path / "saved")
    folder = recipe.model_copy(update={"base": FolderBase(kind="folder", path=str(tmp_path / "saved"))})
    assert model_size(folder, run).shapes == model_size(recipe, run).shapes


def test_adapters_are_counted_as_peft_counts_them(model, tmp_path: Path) -> None:
    import peft

    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    stock = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(TARGETS), target_parameters=experts)
    )
    trainable, _ = stock.get_nb_trainable_parameters()
    adapter = Lora(kind="lora", rank=3, alpha=6, targets=(*TARGETS, "experts"))
    size = model_size(small_recipe(fresh=True), RunFolder(tmp_path))
    assert size.adapter_parameters(adapter) == trainable
