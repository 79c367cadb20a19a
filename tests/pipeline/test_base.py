"""A base named by its place on the hub: found on this machine, refused with the way out where it is not there."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from posttrain.errors import ModelError
from posttrain.pipeline.base import resolve_base
from posttrain.pipeline.plan import plan_run
from posttrain.recipe.types import Execution, HubBase, Recipe
from posttrain.run.folder import RunFolder
from tests.pipeline.small_recipe import small_recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("POSTTRAIN_HUB_DIR", str(tmp_path / "copies"))
    return small_recipe().model_copy(update={"base": HubBase(kind="hub", repo="some/model", revision=None)})


def test_a_copy_on_this_machine_is_the_base(recipe: Recipe, tmp_path: Path) -> None:
    copy = tmp_path / "copies" / "some" / "model"
    copy.mkdir(parents=True)
    (copy / "config.json").write_text("{}")
    state = resolve_base(recipe, RunFolder(tmp_path / "run"))
    assert state.base == str(copy) and state.base_digest


def test_a_plan_of_a_base_that_is_far_away_downloads_nothing(recipe: Recipe, tmp_path: Path) -> None:
    plan = plan_run(RunFolder(tmp_path / "run"), recipe, Execution())
    assert plan.base == "some/model on the hub, size not known"
    assert [row.will for row in plan.phases] == ["run"] * len(recipe.phases)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_run_says_how_to_bring_a_base_that_cannot_be_reached(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'some/model'.*HF_TOKEN.*\$POSTTRAIN_HUB_DIR/some/model"):
        resolve_base(recipe, RunFolder(tmp_path / "run"))
