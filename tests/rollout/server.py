"""A server on loopback with the endpoints of vLLM that the remote sampler uses; the in-process sampler writes."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from posttrain.engine.model import load_model
from posttrain.errors import ModelError
from posttrain.recipe.types import Sampling
from posttrain.rollout.in_process import InProcessSampler


class Server(ThreadingHTTPServer):
    """`drop`, `refused_length`, `delay_s` and `token_ids` make it fail."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.models: dict[str, PreTrainedModel] = {"base": load_model(folder)}
        self.one_at_a_time = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.drop, self.delay_s, self.token_ids = 0, 0.0, True
        self.refused_length: int | None = None
        self.loaded = 0

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling = Sampling(
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=None if body["top_k"] == -1 else body["top_k"],
            max_new_tokens=body["max_tokens"],
            max_turns=1,
        )
        stops = frozenset(body["stop_token_ids"])
        with self.one_at_a_time:
            sampler = InProcessSampler(self.models[body["model"]], stops, "float32", 4096)
            [sampled] = sampler.sample([body["prompt"]], [body["seed"]], sampling)
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": sampled.ended}
        choice["logprobs"] = {"token_logprobs": sampled.logprobs}
        if body["return_token_ids"] and self.token_ids:
            choice["token_ids"] = sampled.tokens
        return {"object": "text_completion", "model": body["model"], "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.answer(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(self.server.delay_s)
        if self.server.drop:
            self.server.drop -= 1
            self.close_connection = True
            self.connection.close()
        elif self.path == "/v1/load_lora_adapter":
            self.load(body)
        elif self.path == "/v1/unload_lora_adapter":
            del self.server.models[body["lora_name"]]
            self.answer(200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully.")
        elif len(body["prompt"]) == self.server.refused_length:
            self.answer(503, {"error": {"message": "overloaded"}})
        else:
            self.answer(200, self.server.complete(body))

    def load(self, body: dict[str, Any]) -> None:
        try:
            self.server.models[body["lora_name"]] = load_model(self.server.folder, Path(body["lora_path"]))
        except ModelError as error:
            self.answer(404, {"error": {"message": str(error)}})
        else:
            self.server.loaded += 1
            self.answer(200, f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

    def answer(self, status: int, content: dict[str, Any] | str) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
