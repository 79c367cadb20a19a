"""Put an exported folder on the hub: planned and said first, private unless told, and only where the caller says so."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posttrain.errors import InputError, MachineError
from posttrain.run.folder import files_below, write_atomic

CARD = "README.md"


class Hub(Protocol):
    """The part of `huggingface_hub.HfApi` that is used."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...
    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any: ...


@dataclass(frozen=True)
class Push:
    folder: Path
    repo: str
    public: bool
    card: str

    def lines(self) -> list[str]:
        files = [file for file in files_below(self.folder) if file.name != CARD]
        size = sum(file.stat().st_size for file in files)
        kind = "public: anyone can read it" if self.public else "private"
        return [
            f"push {self.folder} to {self.repo} ({kind}): {len(files)} files, {size / 1e6:,.1f} MB, and a model card",
            *(f"  {file.relative_to(self.folder)}" for file in files),
        ]


def plan_push(folder: Path, repo: str, public: bool, card: str) -> Push:
    """Raises InputError for a folder that holds no export, or a name that is no repository's."""
    if not folder.is_dir() or not any(files_below(folder)):
        raise InputError(f"{folder} holds nothing to push: posttrain export it first")
    owner, slash, name = repo.partition("/")
    if not (owner and slash and name) or "/" in name:
        raise InputError(f"--repo {repo!r}: write it as OWNER/NAME")
    return Push(folder, repo, public, card)


def push(plan: Push, hub: Hub, say: Callable[[str], None]) -> None:
    """Create the repository where there is none, and upload folder and card in one commit.

    Raises MachineError with what the hub answered; nothing is retried.
    """
    write_atomic(plan.folder / CARD, plan.card.encode("utf-8", "replace"))
    try:
        hub.create_repo(plan.repo, private=not plan.public, exist_ok=True)
        hub.upload_folder(repo_id=plan.repo, folder_path=plan.folder, commit_message="Export with its model card")
    except (OSError, ValueError) as error:
        raise MachineError(
            f"the hub refused {plan.repo}: {error}. Log in with `hf auth login`, or set HF_TOKEN "
            f"to a token that may write"
        ) from error
    say(f"pushed to {plan.repo}")
