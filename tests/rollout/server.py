"""The project's own server, for samplers that ask one: it can be made to fail."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from posttrain.rollout.remote import KEY_VARIABLE
from posttrain.serve.asking import generation_of
from tests.serve.serving import TOKEN, running, settings_with


@dataclass
class Server:
    """`drop`, `refused_length`, `delay_s` and `token_ids` make it fail."""

    app: ASGIApp
    url: str = ""
    drop: int = 0
    refused_length: int | None = None
    delay_s: float = 0.0
    token_ids: bool = True
    loaded: int = 0

    @property
    def models(self) -> list[str]:
        return generation_of(self.app).models()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = await _body(receive)
        await asyncio.sleep(self.delay_s)
        if self.drop:
            self.drop -= 1
            # Fewer bytes than were promised: the connection is closed in the middle of the answer.
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
            await send({"type": "http.response.body", "body": b"{", "more_body": True})
            return
        if len(body.get("prompt", ())) == self.refused_length:
            await JSONResponse({"error": {"message": "overloaded"}}, 503)(scope, receive, send)
            return
        if not self.token_ids:
            body.pop("return_token_ids", None)
        self.loaded += scope["path"] == "/v1/load_lora_adapter"
        content = json.dumps(body).encode()
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
        scope["headers"].append((b"content-length", str(len(content)).encode()))
        await self.app(scope, _replayed(content, receive), send)


async def _body(receive: Receive) -> dict:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return json.loads(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


@contextmanager
def serve(folder: Path, runs_dir: Path) -> Iterator[Server]:
    """Adapters are read below `runs_dir`."""
    made: list[Server] = []
    with (
        pytest.MonkeyPatch.context() as patch,
        running(settings_with(folder, runs_dir), lambda app: made.append(Server(app)) or made[0]) as at,
    ):
        patch.setenv(KEY_VARIABLE, TOKEN)
        made[0].url = at.url
        yield made[0]
