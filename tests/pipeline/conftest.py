"""A model folder that is made once and copied into each test's folder."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.data.vocabulary import make_fresh_base
from tests.pipeline.small_recipe import small_recipe


@pytest.fixture(scope="session")
def place_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    """Puts the folder `model` (configuration and vocabulary, no weights) into a folder."""
    made = tmp_path_factory.mktemp("vocabulary")
    make_fresh_base(small_recipe(fresh=True), made)
    return lambda folder: shutil.copytree(made, folder / "model") and None
