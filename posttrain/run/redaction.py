"""Takes secrets out of text before it is written to a log, a manifest or an error message."""

import os
import re
from collections.abc import Mapping
from typing import Any

SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\bsk-[A-Za-z0-9_-]{8,}|\bgh[pousr]_[A-Za-z0-9]{16,}|(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}"
)
SHORTEST = 8
"""Values of secret variables shorter than this are left alone: they would match ordinary words."""


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """Values of the variables whose names say that they are secret, longest first."""
    values = {value for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST}
    return sorted(values, key=len, reverse=True)


def without_secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a child process that needs none of the secrets in it."""
    given = os.environ if environment is None else environment
    return {name: value for name, value in given.items() if not SECRET_NAME.search(name)}


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with every secret value of the environment and everything that looks like a token replaced."""
    for value in secret_values(os.environ if environment is None else environment):
        text = text.replace(value, "[redacted]")
    return SECRET_TEXT.sub("[redacted]", text)


def redact_json(value: Any) -> Any:
    """The same for every string inside a JSON value."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {name: redact_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [redact_json(part) for part in value]
    return value
