"""Short words for the bases and the data of the shipped recipes."""

from typing import Literal

from posttrain.recipe.types import (
    Base,
    Dataset,
    Effort,
    Filter,
    FolderBase,
    HubBase,
    HubSource,
    RowFormat,
    Selection,
    Source,
)


def base_at(name: str) -> Base:
    """A folder, `shipped:tiny`, or OWNER/NAME on the hub."""
    if name.startswith(("/", ".", "~", "shipped:")):
        return FolderBase(kind="folder", path=name)
    return HubBase(kind="hub", repo=name, revision=None)


def take(max_samples: int | None, seed: int | None) -> Selection:
    """So many rows, mixed in by their number."""
    return Selection(max_samples=max_samples, seed=seed, repeat=1, weight=None)


def hub(
    repo: str,
    row_format: RowFormat,
    selection: Selection,
    subset: str | None = None,
    split: str = "train",
    files: str | None = None,
    filters: tuple[Filter, ...] = (),
    effort: Effort | None = None,
    optional: bool = False,
) -> HubSource:
    """The newest revision; the manifest records which one that was."""
    return HubSource(
        kind="hub",
        repo=repo,
        subset=subset,
        split=split,
        revision=None,
        files=files,
        format=row_format,
        filters=filters,
        selection=selection,
        reasoning_effort=effort,
        optional=optional,
    )


def dataset(
    name: str, content: Literal["text", "conversations", "pairs", "tasks"], sources: tuple[Source, ...], max_tokens: int
) -> Dataset:
    return Dataset(
        name=name, content=content, sources=sources, max_tokens=max_tokens, too_long="drop", faulty_share=0.01
    )
