"""In front of every request: who may ask, under which name, from which page, and how much."""

import hmac
import ipaddress
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from posttrain.serve.dashboard.login import login_page
from posttrain.serve.problems import error_response
from posttrain.serve.settings import MOST_BODY_BYTES, Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Security:
    """ASGI middleware over HTTP and WebSockets.

    The token comes as `Authorization: Bearer`, or as the cookie that a login link `/?token=...` sets.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.cookie = f"posttrain_{settings.port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._foreign(scope["path"], headers) or self._login(scope) or self._unknown(scope, headers)
        if refusal is None and scope["type"] == "http":
            body = await _read_body(scope["path"], headers, receive)
            if isinstance(body, Response):
                refusal = body
            else:
                receive = _replayed(body, receive)
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await refusal(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _foreign(self, path: str, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if not self._is_ours(_name(host)):
            return error_response(path, 421, f"host {host!r} is not served here; name it with --host-name")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return error_response(path, 403, f"origin {origin!r} is another site than {host!r}")
        return None

    def _is_ours(self, name: str) -> bool:
        """By name, so that a foreign name that resolves to this machine is refused; an address cannot be one."""
        if name in (*LOOPBACK, self.settings.host, *self.settings.host_names):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.settings.host not in LOOPBACK

    def _login(self, scope: Scope) -> Response | None:
        """The answer to a login link: the cookie, and the same address without the token."""
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(query).get("token")
        if scope["type"] != "http" or scope["method"] != "GET" or given is None or not self._is_token(given):
            return None
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        # A path that begins with two slashes would lead to another host.
        path = "/" + scope["path"].lstrip("/\\")
        response = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
        response.set_cookie(self.cookie, self.settings.token, httponly=True, samesite="lax")
        return response

    def _unknown(self, scope: Scope, headers: Headers) -> Response | None:
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._is_token(token.strip()):
            return None
        cookie = HTTPConnection(scope).cookies.get(self.cookie)
        if cookie is not None and self._is_token(cookie):
            return None
        if "text/html" in headers.get("accept", ""):
            return login_page()
        detail = "the token is absent or wrong: send `Authorization: Bearer TOKEN`, or open the link that was printed"
        return error_response(scope["path"], 401, detail, {"WWW-Authenticate": "Bearer"})

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.settings.token.encode())


def _name(host: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def _read_body(path: str, headers: Headers, receive: Receive) -> bytes | Response:
    """All of it, or the refusal of one that is too long."""
    too_long = error_response(path, 413, f"the body is longer than {MOST_BODY_BYTES:,} bytes")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MOST_BODY_BYTES:
        return too_long
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MOST_BODY_BYTES:
            return too_long
        if not message.get("more_body", False):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once, then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
