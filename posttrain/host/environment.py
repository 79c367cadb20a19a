"""The environment of a command: caches where there is room, the hub's token, and defaults that libraries read."""

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.errors import InputError

WORKSPACE = "POSTTRAIN_WORKSPACE"
"""Names the volume for caches and temporary files; else `/workspace`, where rented machines mount theirs."""
TOKEN_NAMES = ("HF_TOKEN", "RUNPOD_SECRET_HF_TOKEN")
DEFAULTS = {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "WANDB_MODE": "offline",
}
FOLDERS = {
    "HF_HOME": ".cache/huggingface",
    "TORCH_HOME": ".cache/torch",
    "XDG_CACHE_HOME": ".cache",
    "TMPDIR": "tmp",
    "TEMP": "tmp",
    "TMP": "tmp",
}
FIRST_PROCESS = Path("/proc/1/environ")

Environment = MutableMapping[str, str]
TokenPlace = Literal["HF_TOKEN", "RUNPOD_SECRET_HF_TOKEN", "process 1", "login", "none"]


@dataclass(frozen=True)
class Prepared:
    workspace: Path | None
    """Where caches and temporary files lie, if not where libraries put them by themselves."""
    problem: str | None
    """Why they do not lie there although there is such a folder."""
    token: TokenPlace
    """Where the hub's token comes from; the token itself is in HF_TOKEN or in the login's file, and nowhere else."""


def prepare(environment: Environment | None = None) -> Prepared:
    """Complete the environment, before any library reads it. What is set stays as it is.

    InputError where POSTTRAIN_WORKSPACE names no folder.
    """
    found = os.environ if environment is None else environment
    login = _login(found)
    workspace, problem = _use_workspace(found)
    for name, value in DEFAULTS.items():
        found.setdefault(name, value)
    return Prepared(workspace, problem, _use_token(found, login))


def _use_workspace(environment: Environment) -> tuple[Path | None, str | None]:
    named = environment.get(WORKSPACE)
    workspace = Path(named or "/workspace")
    if not workspace.is_dir():
        if named:
            raise InputError(f"{WORKSPACE}={named}: there is no such folder; create it, or unset the variable")
        return None, None
    try:
        for name, folder in FOLDERS.items():
            if name not in environment:
                (workspace / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return None, f"{workspace} cannot hold caches: {error.strerror or error}"
    for name, folder in FOLDERS.items():
        environment.setdefault(name, str(workspace / folder))
    return workspace, None


def _login(environment: Environment) -> Path | None:
    """The file that `hf auth login` wrote, looked for before caches move away from it."""
    if "HF_TOKEN_PATH" in environment:
        path = Path(environment["HF_TOKEN_PATH"])
    else:
        caches = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = Path(environment.get("HF_HOME") or caches / "huggingface") / "token"
    return path if path.is_file() else None


def _use_token(environment: Environment, login: Path | None) -> TokenPlace:
    """See to it that the hub's library finds a token, in this process alone."""
    for name in TOKEN_NAMES:
        if token := environment.get(name, "").strip():
            environment["HF_TOKEN"] = token
            return "HF_TOKEN" if name == "HF_TOKEN" else "RUNPOD_SECRET_HF_TOKEN"
    if inherited := _token_of_first_process():
        environment["HF_TOKEN"] = inherited
        return "process 1"
    moved = Path(environment.get("HF_HOME", "")) / "token"
    if login is not None and not moved.is_file():
        environment["HF_TOKEN_PATH"] = str(login)
    return "login" if login is not None or moved.is_file() else "none"


def _token_of_first_process() -> str | None:
    """A container's secrets are given to its first process; a shell that logs in does not inherit them."""
    try:
        pairs = FIRST_PROCESS.read_bytes().split(b"\0")
    except OSError:
        return None
    theirs = dict(pair.decode(errors="replace").partition("=")[::2] for pair in pairs)
    return next((token for name in TOKEN_NAMES if (token := theirs.get(name, "").strip())), None)
