"""llama.cpp through node-llama-cpp: the program that will load a GGUF file is asked what it computes."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import MachineError, PhaseFault
from posttrain.run.redaction import without_secrets

SCRIPT = Path(__file__).with_name("llama_greedy.mjs")
ENTRY = Path("node_modules/node-llama-cpp/dist/index.js")
FOLDER_VARIABLES = ("POSTTRAIN_TEST_TOOLS", "POSTTRAIN_NODE_TOOLS")
TIMEOUT_S = 1800


@dataclass(frozen=True)
class LlamaAnswer:
    greedy: list[list[int]]
    """Greedy continuation of each prompt."""
    logprobs: list[list[float]]
    """Of each prompt's own tokens, as its last positions foretell them."""
    tokens: list[list[int]]
    """Token ids of each text."""


def tool_folders() -> list[Path]:
    """Where node's packages may be."""
    return [*(Path(os.environ[name]) for name in FOLDER_VARIABLES if os.environ.get(name)), Path(".tools/node")]


def find_entry() -> Path:
    """node-llama-cpp's entry file; raises MachineError saying where it was looked for."""
    folders = tool_folders()
    if shutil.which("node") is None:
        raise MachineError("llama.cpp was not asked: there is no `node` on the PATH")
    for folder in folders:
        if (folder / ENTRY).exists():
            return (folder / ENTRY).resolve()
    looked = ", ".join(str(folder) for folder in folders)
    raise MachineError(f"llama.cpp was not asked: node-llama-cpp is in none of {looked} (npm i node-llama-cpp there)")


def ask_llama(
    model: Path,
    prompts: list[list[int]],
    new_tokens: int,
    texts: list[str],
    threads: int = 1,
    adapter: Path | None = None,
    positions: int = 0,
) -> LlamaAnswer:
    """Greedy tokens, log-probabilities and token ids from llama.cpp in float32 arithmetic where the file allows it.

    `adapter` is a GGUF file that is put on the model.

    Raises MachineError where llama.cpp is not installed, PhaseFault where it cannot load or run the file.
    """
    request = {
        "module": str(find_entry()),
        "model": str(model.resolve()),
        "prompts": prompts,
        "new_tokens": new_tokens,
        "positions": positions,
        "texts": texts,
        "threads": threads,
        "adapter": str(adapter.resolve()) if adapter else None,
    }
    command = ["node", str(SCRIPT)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=without_secrets(),
        )
    except subprocess.TimeoutExpired as error:
        raise PhaseFault(f"llama.cpp did not answer about {model} within {TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise PhaseFault(f"llama.cpp failed on {model} (exit {done.returncode}): {done.stderr.strip()[-600:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return LlamaAnswer(answer["greedy"], answer["logprobs"], answer["tokens"])
