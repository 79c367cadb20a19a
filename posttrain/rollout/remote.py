"""Sampling on a server with OpenAI's completions endpoint that takes and returns token ids, as vLLM's does.

Prompts go as ids and `return_token_ids` asks for ids back. Log-probabilities must be those of the sampling temperature
(vLLM: `--logprobs-mode processed_logprobs`, or temperature 1). Adapters are loaded through `/v1/load_lora_adapter`,
which vLLM offers under VLLM_ALLOW_RUNTIME_LORA_UPDATING; the server has to see the folder under the same path.
"""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from posttrain.errors import InputError, MachineError
from posttrain.recipe.types import Sampling
from posttrain.rollout.sampler import Reply, Sampled, Sampler

TRIES = 4
"""Of one request, before its episode is lost."""
FIRST_WAIT_S = 0.5
"""Before the second try; doubled each time."""
TIMEOUT_S = 600.0
"""Without a byte of an answer; a long completion behind a queue takes minutes."""
CONNECTIONS = 64
KEY_VARIABLE = "POSTTRAIN_SAMPLER_KEY"
"""Environment variable with the server's bearer token, where it wants one."""


class _Lost(Exception):
    """No answer after every try."""


@dataclass
class RemoteSampler(Sampler):
    url: str
    """Up to `/v1`, as in `http://127.0.0.1:8000`."""
    stop_tokens: frozenset[int]
    timeout_s: float = TIMEOUT_S
    first_wait_s: float = FIRST_WAIT_S
    model: str = field(init=False)
    """What requests name: the base, or the adapter that was loaded last."""

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self._session = requests.Session()
        self._session.mount("http", requests.adapters.HTTPAdapter(pool_maxsize=CONNECTIONS))
        if key := os.environ.get(KEY_VARIABLE):
            self._session.headers["Authorization"] = f"Bearer {key}"
        try:
            models = self._ask("GET", "/v1/models")["data"]
        except _Lost as error:
            raise MachineError(f"sampler {error}; is the server up? Execution's sampler_url names it") from None
        if not models:
            raise MachineError(f"sampler {self.url} serves no model")
        self.base = self.model = str(models[0]["id"])

    def load_adapter(self, name: str, folder: Path) -> None:
        """Sample with this adapter from now on; the one before is unloaded."""
        before = self.model
        self._change("load", {"lora_name": name, "lora_path": str(folder.absolute())})
        self.model = name
        if before != self.base:
            self._change("unload", {"lora_name": before})

    def drop_adapter(self) -> None:
        """Leave the server as it was found."""
        if self.model != self.base:
            name, self.model = self.model, self.base
            self._change("unload", {"lora_name": name})

    def _change(self, verb: str, body: dict[str, str]) -> None:
        try:
            self._ask("POST", f"/v1/{verb}_lora_adapter", body)
        except _Lost as error:
            raise MachineError(f"sampler {error}") from None

    def play(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, reply: Reply) -> None:
        one_at_a_time = threading.Lock()
        lost: list[str] = []

        def episode(number: int) -> None:
            tokens, turn, more = list(prompts[number]), 0, None
            while turn == 0 or more is not None:
                tokens += more or ()
                try:
                    sampled = self._complete(tokens, seeds[number] + turn, sampling)
                except _Lost as error:
                    sampled = Sampled([], [], "lost", f"sampler {error}")
                    lost.append(sampled.reason)
                tokens += sampled.tokens
                with one_at_a_time:
                    more = reply(number, sampled)
                turn += 1

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(episode, range(len(prompts))))
        if prompts and len(lost) == len(prompts):
            raise MachineError(f"the sampler answered none of {len(prompts)} prompts: {lost[0]}")

    def _complete(self, prompt: list[int], seed: int, sampling: Sampling) -> Sampled:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            # Servers take signed 64-bit seeds.
            "seed": seed % 2**63,
            "stop_token_ids": sorted(self.stop_tokens),
            "ignore_eos": True,
            "logprobs": 1,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        choice = self._ask("POST", "/v1/completions", body)["choices"][0]
        tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if tokens is None or logprobs is None or len(tokens) != len(logprobs):
            raise InputError(
                f"sampler {self.url} returned no token ids with their log-probabilities: it must know "
                f"`return_token_ids` and `logprobs` of /v1/completions, as vLLM from 0.10.2 on does"
            )
        stopped = bool(tokens) and tokens[-1] in self.stop_tokens
        return Sampled(tokens, logprobs, "stop" if stopped else "length")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer, {} where it is no JSON. Raises _Lost when there is none, InputError when it is refused."""
        wait_s, reason = self.first_wait_s, ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(wait_s)
                wait_s *= 2
            try:
                answer = self._session.request(method, self.url + path, json=body, timeout=self.timeout_s)
            except requests.Timeout:
                reason = f"did not answer within {self.timeout_s:g} s"
                continue
            except requests.RequestException as error:
                reason = f"dropped the connection ({type(error).__name__})"
                continue
            if answer.status_code >= 500 or answer.status_code == 429:
                reason = f"answered {answer.status_code}"
                continue
            if not answer.ok:
                raise InputError(
                    f"sampler {self.url}{path} refused the request: {answer.status_code} {answer.text[:300]}"
                )
            return answer.json() if answer.headers.get("Content-Type", "").startswith("application/json") else {}
        raise _Lost(f"{self.url}{path} {reason}, {TRIES} times")
