"""A hub of our own: who may log in, and one set that is gated for everybody."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

GATED = "Salesforce/xlam-function-calling-60k"


@contextmanager
def gated_hub(accepted: set[str]) -> Iterator[str]:
    """Its address; `accepted` are the tokens that it knows at the moment."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = (self.headers.get("Authorization") or "").removeprefix("Bearer ") in accepted
            if self.path == "/api/whoami-v2":
                self.answer(200 if known else 401, {"name": "me"})
            elif GATED in self.path:
                self.answer(403, {"error": f"Access to dataset {GATED} is restricted"}, "GatedRepo")
            elif "missing" in self.path:
                self.answer(404, {"error": "no"}, "RepoNotFound")
            else:
                self.answer(200, {})

        do_HEAD = do_GET

        def answer(self, code: int, body: dict, error: str = "") -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            if error:
                self.send_header("X-Error-Code", error)
                self.send_header("X-Error-Message", body["error"])
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *words: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
