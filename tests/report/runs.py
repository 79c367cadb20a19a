"""Hand-made run folders, written file by file."""

import hashlib
import json
from pathlib import Path

from posttrain.run.folder import RunFolder

START = 1_760_000_000.0


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


class FakeRun:
    """A run folder written file by file; times advance with every phase."""

    def __init__(self, path, phases, flags=None, name="quickstart"):
        self.run = RunFolder(Path(path))
        self.phases = {phase["name"]: phase for phase in phases}
        self.clock = START
        recipe = {
            "name": name,
            "flags": flags if flags is not None else {"quick": False, "grpo_steps": 40},
            "seed": 42,
            "base": {"kind": "folder", "path": "shipped:tiny"},
            "chat": {"kind": "harmony", "date": "2025-06-28"},
            "phases": phases,
        }
        self.write(self.run.recipe, json.dumps({"digest": sha("recipe"), "recipe": recipe}))
        self.event("attempt_started", attempt=1)

    def write(self, path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")

    def append(self, path, rows, torn=""):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.write(torn)

    def event(self, name, **fields):
        self.append(self.run.events, [{"time": self.clock, "event": name, **fields}])

    def start(self, name):
        self.event("phase_started", phase=name)

    def complete(self, name, seconds=10.0, metrics=None, counts=None, gates=None, state=None, details=None, **more):
        """A phase's result; `gates` maps gate names to (value, passed)."""
        spec = self.phases[name]
        self.event(more.get("began", "phase_started"), phase=name, fingerprint=sha(name))
        started, self.clock = self.clock, self.clock + seconds
        known = {gate["name"]: gate for gate in spec["gates"]}
        result = {
            "phase": name,
            "kind": spec["kind"],
            "fingerprint": sha(name),
            "inputs": {},
            "outputs": more.get("outputs", []),
            "metrics": metrics or {},
            "counts": counts or {},
            "gates": [
                {"gate": known[gate], "value": value, "passed": passed, "reason": None}
                for gate, (value, passed) in (gates or {}).items()
            ],
            "state": state,
            "notes": more.get("notes", []),
            "details": details or {},
            "started": started,
            "finished": self.clock,
            "seconds": seconds,
        }
        self.write(self.run.phase(name).result, json.dumps(result))
        self.event("phase_completed", phase=name)

    def steps(self, name, rows, torn=""):
        self.append(self.run.phase(name).metrics, rows, torn)

    def answers(self, name, rows, torn=""):
        self.append(self.run.phase(name).answers, rows, torn)

    def manifest(self, **fields):
        self.write(self.run.manifest, json.dumps(fields))


def gate(name, metric, comparison, threshold, hard=True, reduction="value"):
    return {
        "name": name, "metric": metric, "reduction": reduction, "window": 10, "comparison": comparison,
        "threshold": threshold, "minimum_steps": 0, "hard": hard,
    }  # fmt: skip


def phase(kind, name, gates=(), **fields):
    return {"kind": kind, "name": name, "gates": list(gates), **fields}


def evaluate(name, model, datasets=("tools",), shots=0):
    return phase("evaluate", name, model=model, datasets=list(datasets), shots=shots)


def answer(
    identity, score, dataset="tools", completion="call", prompt="<|start|>user<|message|>Send it<|end|>", **parts
):
    return {
        "id": identity, "dataset": dataset, "prompt": prompt, "completion": completion, "score": score,
        "parts": parts, "reason": None if score is not None else "the test child did not start",
    }  # fmt: skip
