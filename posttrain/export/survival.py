"""How much of an adapter's change is still there after quantization.

With D the adapter's change of a weight, Q the quantization and W the base's weight, the share is
<Q(W + D) - Q(W), D> / <D, D>: 1 where all of it arrives, 0 where the grid swallowed it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain.run.folder import write_json_atomic

FILE = "quantization.json"


@dataclass(frozen=True)
class Survival:
    kept: float
    """<Q(W + D) - Q(W), D>."""
    asked: float
    """<D, D>."""

    @classmethod
    def measured(cls, change: torch.Tensor, arrived: torch.Tensor) -> "Survival":
        # float64 only for the sums of rows: the products of a row fit float32.
        kept = torch.linalg.vecdot(arrived, change).sum(dtype=torch.float64)
        asked = torch.linalg.vecdot(change, change).sum(dtype=torch.float64)
        return cls(float(kept), float(asked))

    def __add__(self, other: "Survival") -> "Survival":
        return Survival(self.kept + other.kept, self.asked + other.asked)

    @property
    def share(self) -> float:
        return self.kept / self.asked if self.asked else 1.0


class Survivals:
    """By weight, in a file beside the shards, so that a resumed merge knows what it did before."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self.by_weight: dict[str, Survival] = {}
        if self.file.exists():
            rows = json.loads(self.file.read_text())["weights"]
            self.by_weight = {name: Survival(row["kept"], row["asked"]) for name, row in rows.items()}

    def add(self, name: str, survival: Survival) -> None:
        self.by_weight[name] = survival

    @property
    def overall(self) -> Survival:
        return sum(self.by_weight.values(), Survival(0.0, 0.0))

    def save(self) -> None:
        if self.by_weight:
            rows = {
                name: {"share": one.share, "kept": one.kept, "asked": one.asked}
                for name, one in sorted(self.by_weight.items())
            }
            write_json_atomic(self.file, {"share": self.overall.share, "weights": rows})
