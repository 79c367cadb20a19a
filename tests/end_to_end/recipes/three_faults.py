"""A recipe with three faults in three places: a misspelt choice, a negative rate and a field that does not exist."""

from posttrain.recipe.types import (
    NOTHING_SUGGESTED,
    AdamW,
    Dataset,
    FolderBase,
    PreparePhase,
    Recipe,
    SftPhase,
    WorldSource,
)
from posttrain.recipes.quickstart import CHAT
from tests.end_to_end.recipes.small_sft import small_sft


def three_faults() -> Recipe:
    """Cannot run."""
    train = small_sft().phases[1]
    assert isinstance(train, SftPhase)
    kept = {name: getattr(train, name) for name in SftPhase.model_fields}
    optimizer = {name: getattr(train.optimizer, name) for name in AdamW.model_fields}
    source = WorldSource(kind="world", world="tools", split="helout", count=8, seed=0)
    dataset = Dataset(
        name="own", content="conversations", sources=(source,), max_tokens=1024, too_long="drop", faulty_share=0.0
    )
    return Recipe(
        name="three_faults",
        flags={},
        seed=0,
        base=FolderBase(kind="folder", path="shipped:tiny"),
        chat=CHAT,
        phases=(
            PreparePhase(kind="prepare", name="data", datasets=(dataset,), gates=()),
            SftPhase(**(kept | {"optimizer": AdamW(**(optimizer | {"learning_rate": -1.0})), "stepps": 3})),
        ),
        suggested=NOTHING_SUGGESTED,
    )
