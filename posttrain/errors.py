"""The tree of errors: one class per boundary that can be crossed, each with the exit code the command ends with.

A message names the thing, its value, the limit, and what to type next.
"""

from typing import Literal

CompletionReason = Literal[
    "empty",  # nothing was written
    "cut off",  # the stop token of the last message is missing
    "header",  # a message's header has something in it that does not belong there
    "channel",  # an unknown channel, or the wrong one for what the message does
    "special token",  # a special token inside a message's text, or an id outside the vocabulary
    "wrong end",  # a message ends in another token than its kind demands
    "after the end",  # something follows the message that ended the generation
    "no answer",  # only reasoning: neither an answer nor a call
    "reasoning",  # reasoning that is not closed, or not in its form
    "call",  # a tool call that cannot be read
]
"""Why a completion does not parse."""


class PosttrainError(Exception):
    """Base of every error a user can meet; anything else that escapes is a bug of ours."""

    exit_code = 1


class PhaseFault(PosttrainError):
    """A phase could not do its work (non-finite loss, failed verification, full disk)."""


class InputError(PosttrainError):
    """What the user gave is wrong: a flag, a recipe, a name, a run folder, a data row."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe with one or more faults; all of them are in the message."""


class RunFolderError(InputError):
    """A run folder that cannot be used as asked: another recipe's, held by another process, unreadable."""


class DataError(InputError):
    """A data row that cannot be read: file, row and reason are in the message."""


class ChatFormatError(PosttrainError):
    """A conversation that cannot be rendered, or tokens that do not parse back to messages."""


class CompletionError(ChatFormatError):
    """A completion that does not parse back to messages; the message has the particulars."""

    def __init__(self, reason: CompletionReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["CompletionError"], tuple[CompletionReason, str]]:
        # So that it survives the way from one process to another.
        return type(self), (self.reason, str(self))


class ModelError(InputError):
    """A model or adapter folder that is not what its files promise, or an adapter made for another model."""


class CheckpointError(PosttrainError):
    """A checkpoint that does not verify against its manifest."""


class ScoringError(PosttrainError):
    """A scorer was asked about something it cannot judge; the episode becomes unscorable."""


class GateFailed(PosttrainError):
    """A hard gate did not pass."""

    exit_code = 3


class Stopped(PosttrainError):
    """The run was stopped on request and can be resumed."""

    exit_code = 4


class MachineError(PosttrainError):
    """The machine lacks something: disk, a device, an extra package."""

    exit_code = 5
