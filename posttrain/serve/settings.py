"""Where the server finds its things, and who may ask it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from posttrain.data.registry import Registry
from posttrain.host.sessions import Kind
from posttrain.recipe.types import Execution, Precision

if TYPE_CHECKING:
    from posttrain.phases.chosen_model import ChosenModel

TOKEN, DATABASE_URL = "POSTTRAIN_TOKEN", "POSTTRAIN_DATABASE_URL"
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
MOST_BODY_BYTES = 1_000_000


def default_data_dir() -> Path:
    """`posttrain` where the user's data are."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "posttrain"


@dataclass(frozen=True)
class ServedModels:
    """Models for `/v1` and the chat besides those of the runs folder, and how all of them run."""

    first: str | None = None
    """What is listed first, and whose base adapters are loaded on: RUN, RUN/STATE, or one of `folders`."""
    folders: "Mapping[str, ChosenModel]" = field(default_factory=dict)
    """Models that belong to no run, by their names."""
    execution: Execution = field(default_factory=Execution)
    precision: Precision = "float32"
    """Of matrix products."""


@dataclass(frozen=True)
class Settings:
    runs_dir: Path
    data_dir: Path
    """For what the server itself writes: its SQLite database, and what is waiting to be ingested."""
    registry: Registry
    token: str
    database_url: str | None = None
    """None: SQLite in the data folder."""
    ingest_dir: Path | None = None
    """The one folder that ingests read from; None: `ingest` in the data folder."""
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    host_names: tuple[str, ...] = ()
    """Further names under which browsers reach it."""
    models: ServedModels = field(default_factory=ServedModels)
    session: Kind | None = None
    """What started runs live in; None: the first that is there."""

    @property
    def ingest(self) -> Path:
        return self.ingest_dir or self.data_dir / "ingest"


def _settings_of(connection: HTTPConnection) -> Settings:
    settings: Settings = connection.app.state.settings
    return settings


Serving = Annotated[Settings, Depends(_settings_of)]
"""As a parameter of an endpoint: the settings of the server that was asked."""
