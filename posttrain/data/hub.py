"""Records of datasets on the Hugging Face hub, through the `datasets` library, or of a copy of them on this machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.recipe.types import HubSource

MIRROR = "POSTTRAIN_HUB_DIR"
"""Names a folder that holds copies of hub datasets as `owner/name`; what is not in it comes from the hub."""
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class Unavailable(Exception):
    """The dataset is gated, missing or out of reach; the message says why and how to get access."""


def mirrored(source: HubSource) -> Path | None:
    """The copy of the source's repository on this machine, if there is one."""
    if not os.environ.get(MIRROR):
        return None
    copy = Path(os.environ[MIRROR], *source.repo.split("/"))
    return copy if copy.is_dir() else None


def hub_records(source: HubSource) -> Iterator[dict[str, Any]]:
    """Every record in order, a few at a time in memory. Raises Unavailable, or DataError for a wrong name."""
    copy = mirrored(source)
    first_ones = source.selection.max_samples is not None and source.selection.seed is None
    with _without_torch():
        # What is read whole, or twice, is worth a copy in the cache.
        rows = iter(_load(source, copy, streaming=copy is not None or first_ones))
        first = next(rows, None)
    if first is None:
        raise DataError(f"{source.repo}: there is no row in it")
    yield first
    yield from rows


@contextmanager
def _without_torch() -> Iterator[None]:
    """`datasets` imports torch when it begins to read, only to ask whether a data loader's worker does so."""
    from datasets import config

    kept, config.TORCH_AVAILABLE = config.TORCH_AVAILABLE, False
    try:
        yield
    finally:
        config.TORCH_AVAILABLE = kept


def resolved_revision(source: HubSource) -> str | None:
    """The commit that the source's revision stands for; None where a copy is used or the hub does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if mirrored(source) is not None:
        return None
    try:
        return HfApi().dataset_info(source.repo, revision=source.revision).sha
    except (HfHubHTTPError, OSError):
        return source.revision


def _load(source: HubSource, copy: Path | None, streaming: bool) -> Any:
    from datasets import load_dataset
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if source.files is None:
            place = str(copy) if copy else source.repo
            revision = None if copy else source.revision
            return load_dataset(place, name=source.subset, split=source.split, revision=revision, streaming=streaming)
        at = f"@{source.revision}" if source.revision else ""
        place = f"{copy}/{source.files}" if copy else f"hf://datasets/{source.repo}{at}/{source.files}"
        return load_dataset(
            _builder(source.files), data_files={source.split: place}, split=source.split, streaming=streaming
        )
    except (FileNotFoundError, ConnectionError, HfHubHTTPError) as error:
        raise Unavailable(f"{source.repo}: {_first_line(error)}; {_advice(source, str(error))}") from error
    except ValueError as error:
        raise DataError(f"{source.repo}: {_first_line(error)}") from error


def _builder(files: str) -> str:
    suffix = Path(files).suffix
    if suffix not in BUILDERS:
        raise DataError(f"{files}: files {suffix!r} cannot be read; {', '.join(BUILDERS)} can")
    return BUILDERS[suffix]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _advice(source: HubSource, reason: str) -> str:
    if any(word in reason for word in ("gated", "authenticated", "403", "401")):
        return (
            f"to get access, accept the terms on https://huggingface.co/datasets/{source.repo} and give a token that "
            "may read it: set HF_TOKEN, or type `hf auth login`"
        )
    return f"check the name and the network, or put a copy at ${MIRROR}/{source.repo}"
