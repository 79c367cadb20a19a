"""A message when a run ends: to a webhook, or to a command."""

import json
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass

from posttrain.run.redaction import redact, without_secrets

TIMEOUT_S = 10.0
TRIES = 3


@dataclass(frozen=True)
class Message:
    run: str
    outcome: str
    """`completed`, `stopped`, `gate_failed` or `failed`."""
    exit_code: int
    text: str


def send(to: str, message: Message) -> str | None:
    """Post JSON to a URL, or give it to a shell command's standard input; what went wrong, or None.

    `text` and `content` are what Slack and Discord show.
    """
    said = redact(f"posttrain run {message.run}: {message.outcome}. {message.text}")
    body = json.dumps(asdict(message) | {"text": said, "content": said}).encode()
    if to.startswith(("http://", "https://")):
        return _post(to, body)
    try:
        done = subprocess.run(
            to, shell=True, input=body, capture_output=True, timeout=6 * TIMEOUT_S, check=False, env=without_secrets()
        )
    except subprocess.TimeoutExpired:
        return f"the command took longer than {6 * TIMEOUT_S:.0f} s"
    if done.returncode:
        return f"the command ended with {done.returncode}: {done.stderr.decode(errors='replace').strip()[-200:]}"
    return None


def _post(url: str, body: bytes) -> str | None:
    fault = None
    for attempt in range(TRIES):
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                return None
        except urllib.error.HTTPError as error:
            fault = f"the webhook answered {error.code}"
            if error.code < 500:
                break
        except OSError as error:
            fault = f"the webhook cannot be reached: {getattr(error, 'reason', error)}"
        if attempt + 1 < TRIES:
            time.sleep(2.0**attempt)
    return fault
