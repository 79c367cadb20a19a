"""All faults of a recipe at once, each with its path, its value and what is allowed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import InputError, RecipeError
from posttrain.recipe.difference import difference
from posttrain.recipe.flags import flags_of
from posttrain.recipe.load import FoundRecipe, find, shipped_names
from posttrain.recipe.types import (
    Dataset,
    FileSource,
    FullParameters,
    GemmaFormat,
    HeldOut,
    HeldOutTasks,
    Recipe,
    RowBatch,
    Selection,
    TemplateFormat,
)
from posttrain.recipes.smoke import smoke
from posttrain.recipes.tiny_base import tiny_base
from posttrain.run import recipe_file


def build(recipe_function: Callable[[], Any]) -> Recipe:
    return FoundRecipe("mine", recipe_function, []).build({})


def changed(**phase_fields: dict[str, Any]) -> Callable[[], Recipe]:
    """The smoke recipe with fields of its phases replaced, built as a recipe function builds it: by constructors."""

    def recipe() -> Recipe:
        whole = smoke()
        phases = []
        for phase in whole.phases:
            fields = dict(phase.__dict__) | phase_fields.get(phase.name, {})
            phases.append(type(phase)(**fields))
        return Recipe(**(dict(whole.__dict__) | {"phases": tuple(phases)}))

    return recipe


def first(kind: str) -> Any:
    return next(phase for phase in smoke().phases if phase.kind == kind)


def test_three_faults_of_single_fields_are_reported_together() -> None:
    sft = first("sft")
    with pytest.raises(RecipeError) as caught:
        build(changed(**{sft.name: {"steps": 0, "precision": "float23", "learning": 1}}))
    message = str(caught.value)
    assert message.startswith("recipe 'smoke' has 3 faults:")
    assert f"phases[{sft.name}].steps: 0 is not allowed: input should be greater than or equal to 1" in message
    assert f"phases[{sft.name}].precision: 'float23' is not allowed" in message and "did you mean float32" in message
    assert f"phases[{sft.name}].learning: there is no such field" in message


def test_three_faults_between_fields_are_reported_together() -> None:
    sft, merge = first("sft"), first("merge")
    gated = next(phase for phase in smoke().phases if phase.kind == "sft" and phase.gates)
    gate = gated.gates[0].model_copy(update={"metric": "los", "reduction": "mean_last"})
    fields: dict[str, Any] = {gated.name: {"gates": (gate,)}, merge.name: {"model": smoke().phases[-1].name}}
    fields[sft.name] = fields.get(sft.name, {}) | {"dataset": sft.dataset + "x"}
    with pytest.raises(RecipeError) as caught:
        build(changed(**fields))
    message = str(caught.value)
    assert f"phases[{sft.name}].dataset: '{sft.dataset}x' is not allowed" in message
    assert f"did you mean {sft.dataset}" in message
    assert (
        f"phases[{gated.name}].gates[{gate.name}].metric: 'los' is no metric of a sft phase (did you mean loss"
        in message
    )
    assert f"phases[{merge.name}].model:" in message and "that phase does not come earlier" in message


def test_a_dataset_of_the_wrong_content_is_named_with_those_that_fit() -> None:
    with pytest.raises(RecipeError, match=r"its content is conversations, a phase of kind preference reads pairs"):
        build(changed(**{first("preference").name: {"dataset": first("sft").dataset}}))


def test_a_base_has_no_adapter_to_continue() -> None:
    with pytest.raises(RecipeError, match="'base' carries no adapter to continue"):
        build(changed(**{first("preference").name: {"model": "base"}}))


def test_names_must_be_unique() -> None:
    def twice() -> Recipe:
        whole = smoke()
        return whole.model_copy(update={"phases": (*whole.phases, whole.phases[0])})

    with pytest.raises(RecipeError, match="is used 2 times; names must be unique"):
        build(twice)


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_recipe_is_without_fault_and_survives_json(name: str, tmp_path: Path) -> None:
    found = find(name)
    recipe = found.build({flag.name: flag.default for flag in found.flags})
    recipe_file.save(recipe, tmp_path / "recipe.json")
    again = recipe_file.load(tmp_path / "recipe.json")
    assert again == recipe
    assert recipe_file.digest(again) == recipe_file.digest(recipe)
    assert set(recipe.flags) == {flag.name for flag in found.flags}
    assert all(flag.help for flag in found.flags)


def test_a_vote_needs_samples_that_can_differ() -> None:
    evaluation = first("evaluate")
    vote = {"samples": 4, "counts": "majority", "pass_mark": 1.0, "pass_at": (1, 5)}
    with pytest.raises(RecipeError) as caught:
        build(changed(**{evaluation.name: {"vote": vote}}))
    message = str(caught.value)
    assert f"phases[{evaluation.name}].sampling.temperature: 0 gives 4 equal samples" in message
    assert f"phases[{evaluation.name}].vote.pass_at: 5 is more than the 4 samples" in message


@pytest.mark.parametrize(
    ("mode", "phases"),
    [
        ("sft+rl", ["data", "eval_base", "sft", "eval_sft", "rl", "eval_rl"]),
        ("sft", ["data", "eval_base", "sft", "eval_sft"]),
        ("rl", ["data", "eval_base", "rl", "eval_rl"]),
    ],
)
@pytest.mark.parametrize("quick_test", [True, False])
def test_sft_rl_has_the_phases_of_its_mode(mode: str, phases: list[str], quick_test: bool) -> None:
    recipe = find("sft_rl").build({"mode": mode, "quick_test": quick_test})
    assert [phase.name for phase in recipe.phases] == phases
    prepared = {dataset.name for dataset in recipe.phases[0].datasets}
    assert prepared == {"heldout"} | ({"mixture"} if "sft" in mode else set()) | (
        {"problems"} if "rl" in mode else set()
    )


def test_tes_reads_a_table_where_one_is_given() -> None:
    recipe = find("tes").build({"table": "q.csv", "heldout_table": "held.csv"})
    sources = {dataset.name: dataset.sources[0] for dataset in recipe.phases[0].datasets}
    assert {name: source.path for name, source in sources.items()} == {"decisions": "q.csv", "heldout": "held.csv"}
    assert {source.tau for source in sources.values()} == {0.05}


def test_the_difference_names_fields_with_both_values() -> None:
    assert difference(smoke(), smoke()) == []
    lines = difference(smoke(seed=0), smoke(seed=5))
    assert "seed: 0 -> 5" in lines and "flags.seed: 0 -> 5" in lines


def test_default_run_names_show_changed_flags_only() -> None:
    found = find("smoke")
    assert found.default_run_name({"seed": 0}) == "smoke"
    assert found.default_run_name({"seed": 3}) == "smoke-seed-3"


def test_an_unknown_recipe_offers_the_nearest_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recipe 'quikstart' \(did you mean quickstart"):
        find("quikstart")
    (tmp_path / "mine.py").write_text("def first_try(): ...\n")
    with pytest.raises(InputError, match=r"no function 'first_tri' \(did you mean first_try"):
        find(f"{tmp_path}/mine.py:first_tri")
    with pytest.raises(InputError, match="there is no recipe file"):
        find(f"{tmp_path}/other.py")
    (tmp_path / "torn.py").write_text("def torn(:\n")
    with pytest.raises(RecipeError, match=r"torn.py cannot be imported: SyntaxError"):
        find(f"{tmp_path}/torn.py")


def test_a_parameter_that_cannot_be_a_flag_is_refused() -> None:
    def without_default(steps: int) -> Recipe:
        raise AssertionError

    with pytest.raises(RecipeError, match="'steps': it has no default"):
        flags_of(without_default)


def test_data_that_a_phase_cannot_read_as_asked_is_named() -> None:
    data = first("prepare")
    train = first("sft")
    weighed = Selection(max_samples=None, seed=None, repeat=1, weight=2.0)
    file = FileSource(kind="file", path="x", format="rows", filters=(), selection=weighed, reasoning_effort=None)
    datasets = []
    for dataset in data.datasets:
        fields = dict(dataset.__dict__)
        if dataset.content == "pairs":
            fields["too_long"] = "cut_at_turn"
        if dataset.name == train.dataset:
            fields["sources"] = (*dataset.sources, file)
        datasets.append(Dataset(**fields))
    batch = RowBatch(kind="rows", rows=2, row_tokens=1000)
    with pytest.raises(RecipeError) as refused:
        build(changed(**{data.name: {"datasets": tuple(datasets)}, train.name: {"batch": batch}}))
    message = str(refused.value)
    assert (
        "phases[data].datasets[pairs].too_long: 'cut_at_turn' is not allowed: pairs have no turns to cut at" in message
    )
    assert f"phases[data].datasets[{train.dataset}].sources[0]: it has no weight and others have" in message
    small = f"phases[{train.name}].batch.row_tokens: 1000 is too small for dataset '{train.dataset}'"
    assert f"{small}: its samples may have max_tokens=1024" in message


def test_the_chat_format_is_one_of_three_and_fits_the_base() -> None:
    misspelt = {"kind": "gema", "reasoning": "dropped"}
    with pytest.raises(RecipeError, match=r"chat\.kind: 'gema' is not allowed.*did you mean gemma"):
        build(lambda: Recipe(**(dict(tiny_base().__dict__) | {"chat": misspelt})))
    gemma = GemmaFormat(kind="gemma", reasoning="dropped")
    with pytest.raises(RecipeError, match=r"chat\.kind: 'gemma' is not allowed: a fresh base is a GPT-OSS"):
        build(lambda: Recipe(**(dict(tiny_base().__dict__) | {"chat": gemma})))
    undated = {"kind": "template", "template": None, "reasoning": "dropped", "date": "today", "variables": {}}
    with pytest.raises(RecipeError, match=r"chat\.date: 'today' is not allowed"):
        build(lambda: Recipe(**(dict(smoke().__dict__) | {"chat": undated})))


def test_a_recipe_with_a_chat_template_loads_back_equal(tmp_path: Path) -> None:
    chat = TemplateFormat(
        kind="template", template="{{ x }}\n", reasoning="template", date="2026-01-31", variables={"x": 1}
    )
    recipe = smoke().model_copy(update={"chat": chat})
    recipe_file.save(recipe, tmp_path / "recipe.json")
    assert recipe_file.load(tmp_path / "recipe.json") == recipe


def test_a_held_out_dataset_is_another_one_of_the_same_content() -> None:
    sft = first("sft")
    for dataset, said in (
        (sft.dataset, f"held_out.dataset: '{sft.dataset}' is what the phase trains on"),
        ("preferences", "its content is pairs, a phase of kind sft reads conversations or text"),
        ("tool_calls_held", "there is no such dataset (did you mean tool_calls_heldout"),
    ):
        with pytest.raises(RecipeError) as caught:
            build(changed(**{sft.name: {"held_out": HeldOut(dataset=dataset, every_steps=1)}}))
        assert f"phases[{sft.name}]." in str(caught.value) and said in str(caught.value)


def test_a_gate_on_what_is_never_computed_is_refused() -> None:
    sft = first("sft")
    gate = sft.gates[0].model_copy(update={"metric": "held_out_loss"})
    with pytest.raises(RecipeError, match="'held_out_loss' is never computed: this phase's held_out is null"):
        build(changed(**{sft.name: {"held_out": None, "gates": (gate,)}}))
    build(changed(**{sft.name: {"gates": (gate,)}}))


def test_a_rank_of_0_is_refused_with_its_path() -> None:
    lora = {"kind": "lora", "rank": 0, "alpha": 2.0, "targets": ("q_proj",)}
    with pytest.raises(
        RecipeError, match=r"trainable\.rank: 0 is not allowed: input should be greater than or equal to 1"
    ):
        build(changed(**{first("sft").name: {"trainable": lora}}))


def test_four_bit_weights_cannot_be_trained_whole() -> None:
    sft = first("sft")
    with pytest.raises(RecipeError, match=r"precision: nf4 keeps frozen weights, and .*trainable trains all"):
        build(changed(**{sft.name: {"precision": "nf4", "trainable": FullParameters(kind="full")}}))


def test_tasks_asked_in_training_are_tasks_that_are_not_trained_on() -> None:
    sft, grpo, sampling = first("sft"), first("grpo"), first("evaluate").sampling
    asked = HeldOutTasks(dataset="tools", every_steps=2, sampling=sampling)
    gate = sft.gates[0].model_copy(update={"metric": "held_out_exact", "minimum_steps": 0})
    built = build(changed(**{sft.name: {"held_out": asked, "gates": (gate,)}}))
    assert next(phase for phase in built.phases if phase.name == sft.name).held_out == asked
    for phase, dataset, said in (
        (sft, sft.dataset, f"'{sft.dataset}' is what the phase trains on"),
        (sft, "pairs", "its content is pairs, HeldOutTasks reads tasks"),
        (grpo, grpo.dataset, f"'{grpo.dataset}' is what the phase trains on"),
        (grpo, "repairs", "there is no such dataset"),
    ):
        with pytest.raises(RecipeError, match=re.escape(said)):
            build(changed(**{phase.name: {"held_out": asked.model_copy(update={"dataset": dataset})}}))
    with pytest.raises(RecipeError, match=r"held_out.*sampling.*field is required"):
        build(changed(**{grpo.name: {"held_out": {"dataset": "tools", "every_steps": 1}}}))
