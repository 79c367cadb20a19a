"""The server on a port of loopback, in a thread of the test's own process."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from posttrain.data.registry import Registry
from posttrain.phases.chosen_model import of_folder
from posttrain.recipe.types import Execution
from posttrain.serve.app import make_app
from posttrain.serve.settings import ServedModels, Settings

TOKEN = "a-token-of-the-tests"


@dataclass
class Running:
    app: ASGIApp
    """The server's own, without what is wrapped around it."""
    settings: Settings

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.port}"


@contextmanager
def running(settings: Settings, wrapped: Callable[[ASGIApp], ASGIApp] = lambda app: app) -> Iterator[Running]:
    """`settings.port` is replaced by one that is free."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    settings = Settings(**vars(settings) | {"port": listening.getsockname()[1]})
    app = make_app(settings)
    server = uvicorn.Server(uvicorn.Config(wrapped(app), log_level="critical", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Running(app, settings)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def settings_with(folder: Path, runs_dir: Path, name: str = "base") -> Settings:
    """A server whose first model is this folder's."""
    models = ServedModels(first=name, folders={name: of_folder(name, folder, None)}, execution=Execution(threads=1))
    return Settings(
        runs_dir=runs_dir,
        data_dir=runs_dir / "_server",
        registry=Registry(runs_dir / "_datasets"),
        token=TOKEN,
        models=models,
    )


def settings_at(folder: Path) -> Settings:
    """A server whose every folder is in this one, and whose runs are sessions of their own."""
    return Settings(
        runs_dir=folder / "runs",
        data_dir=folder / "data",
        registry=Registry(folder / "datasets"),
        token=TOKEN,
        host_names=("testserver",),
        session="own",
    )
