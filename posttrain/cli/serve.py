"""`posttrain serve`: traces, datasets and runs over HTTP, a dashboard, and an OpenAI-compatible endpoint."""

import contextlib
import getpass
import importlib.util
import os
import platform
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from posttrain.cli.data import open_registry, registry_option
from posttrain.cli.models import chosen_model, execution_given, model_options, precision_option, where_options
from posttrain.cli.options import runs_dir_option
from posttrain.errors import InputError, MachineError
from posttrain.run.folder import NAME

if TYPE_CHECKING:
    from posttrain.serve.settings import ServedModels, Settings

NEEDED = ("fastapi", "uvicorn", "nicegui", "sqlalchemy", "alembic")
"""Of the extra."""
SHORTEST_TOKEN = 16
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.command(help="Serve traces, datasets and runs over HTTP, with a dashboard and an OpenAI-compatible endpoint.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; others than this machine's "
              "own only with a token of yours in POSTTRAIN_TOKEN.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--host-name", multiple=True, help="A further name under which browsers may reach it.")
@click.option("--data-dir", type=click.Path(path_type=Path, file_okay=False), help="For its database.  "
              "[default: posttrain in the user's data folder]")  # fmt: skip
@click.option("--ingest-dir", type=click.Path(path_type=Path, file_okay=False), help="The one folder that traces are "
              "read from.  [default: ingest in the data folder]")  # fmt: skip
@click.option("--model", metavar="RUN|MODEL", help="A run, a model or adapter folder, a hub id: listed first in "
              "/v1/models, and what adapters are loaded on.  [default: none; runs go by their names]")  # fmt: skip
@registry_option()
def serve(
    host: str,
    port: int,
    host_name: tuple[str, ...],
    data_dir: Path | None,
    ingest_dir: Path | None,
    model: str | None,
    registry_dir: Path | None,
    **given: Any,
) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MachineError(
            f"posttrain serve needs {', '.join(missing)}, of the extra `serve`: pip install 'posttrain[serve]'"
        )
    from posttrain.serve import settings as names

    # They are for this process alone: what it starts inherits the rest of the environment.
    token, database_url = os.environ.pop(names.TOKEN, None), os.environ.pop(names.DATABASE_URL, None)
    if host not in LOOPBACK and not token:
        raise InputError(f"--host {host} can be reached by others: set a token of your own in {names.TOKEN}")
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise InputError(f"{names.TOKEN} has {len(token)} characters: give it at least {SHORTEST_TOKEN}")
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    settings = names.Settings(
        runs_dir=given["runs_dir"].absolute(),
        data_dir=(data_dir or names.default_data_dir()).absolute(),
        registry=open_registry(registry_dir),
        token=token or secrets.token_urlsafe(24),
        database_url=database_url,
        ingest_dir=ingest_dir.absolute() if ingest_dir else None,
        host=host,
        port=port,
        host_names=host_name,
        models=_served(model, given),
    )
    _run(settings, listening)


serve.params += [*model_options(), runs_dir_option(), precision_option(), *where_options()]


def _served(model: str | None, given: dict[str, Any]) -> "ServedModels":
    from posttrain.serve.settings import ServedModels

    how: dict[str, Any] = {"execution": execution_given(given), "precision": given["precision"]}
    if model is None:
        alone = [name for name in ("state", "adapter", "effort") if given[name] is not None]
        if alone:
            raise InputError(f"--{alone[0]} goes with --model, which says of what")
        return ServedModels(**how)
    chosen, _ = chosen_model(model, given)
    if NAME.fullmatch(model) and (given["runs_dir"] / model / "recipe.json").is_file() and given["effort"] is None:
        return ServedModels(first=model if given["state"] is None else f"{model}/{given['state']}", **how)
    return ServedModels(first=chosen.name, folders={chosen.name: chosen}, **how)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise MachineError(
            f"cannot listen at {host} port {port}: {error.strerror or error}; choose another with --port"
        ) from error


def _run(settings: "Settings", listening: socket.socket) -> None:
    import uvicorn

    from posttrain.serve.app import make_app

    app = make_app(settings)
    shown = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    shown = f"[{shown}]" if ":" in shown else shown
    click.echo(f"posttrain serves {settings.runs_dir}\n  http://{shown}:{settings.port}/?token={settings.token}")
    click.echo("from another machine, type there and then open the same address:")
    click.echo(f"  ssh -N -L {settings.port}:{shown}:{settings.port} {getpass.getuser()}@{platform.node()}")
    # Addresses in an access log would hold the token of the login link.
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
    # Having shut down, uvicorn raises the interrupt that made it.
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
