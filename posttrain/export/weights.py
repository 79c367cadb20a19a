"""The weights of a model folder under the names a loaded model gives them, whichever way the folder stores experts."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.engine.mxfp4 import GROUP
from posttrain.errors import ModelError
from posttrain.export.tensors import TensorFolder, TensorSpec

Layout = Literal["plain", "transposed", "pieces", "mxfp4"]
"""How the experts lie: one tensor (expert, out, in); one (expert, in, out); two-dimensional tensors for every expert,
gate before up; or MXFP4 blocks and scales. A weight without experts is plain."""
TRANSPOSED = ("gpt_oss",)
"""Model types whose experts are stored (expert, in, out)."""
EXPERTS = re.compile(r".+\.experts\.(gate_up_proj|down_proj)")
PACKED = re.compile(r"(?P<name>.+\.experts\.(gate_up_proj|down_proj))_(?P<part>blocks|scales)")
PIECE = re.compile(r"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Weight:
    name: str
    specs: tuple[TensorSpec, ...]
    """Where it lies on disk; pieces stand expert by expert."""
    layout: Layout
    experts: int
    """0 for a weight that is no stack of experts."""
    rows: int
    """Of one expert's matrix [rows, columns], output by input; without experts the sizes of the tensor itself."""
    columns: int

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """As a loaded model holds it."""
        if not self.experts:
            return self.specs[0].shape
        inner = (self.columns, self.rows) if self.layout in ("transposed", "mxfp4") else (self.rows, self.columns)
        return (self.experts, *inner)

    @property
    def pieces(self) -> int:
        """Tensors on disk per expert."""
        return len(self.specs) // self.experts if self.layout == "pieces" else 1


def read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is no model folder: its config.json cannot be read: {error}") from error
    return dict(config)


def find_weights(folder: TensorFolder, config: dict[str, Any]) -> dict[str, Weight]:
    """Every weight of the folder by name, in sorted order. Raises ModelError for experts that are incomplete."""
    found: dict[str, Weight] = {}
    packed: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    pieces: dict[str, dict[tuple[int, str], TensorSpec]] = defaultdict(dict)
    for name, spec in folder.specs.items():
        if match := PACKED.fullmatch(name):
            packed[match["name"]][match["part"]] = spec
        elif match := PIECE.fullmatch(name):
            projection = "down_proj" if match["part"] == "down" else "gate_up_proj"
            pieces[f"{match['experts']}.{projection}"][int(match["expert"]), match["part"]] = spec
        elif EXPERTS.fullmatch(name) and len(spec.shape) == 3:
            transposed = config.get("model_type") in TRANSPOSED
            experts, rows, columns = spec.shape
            rows, columns = (columns, rows) if transposed else (rows, columns)
            layout: Layout = "transposed" if transposed else "plain"
            found[name] = Weight(name, (spec,), layout, experts, rows, columns)
        else:
            sizes = (*spec.shape, 1, 1)
            found[name] = Weight(name, (spec,), "plain", 0, sizes[0], sizes[1])
    found |= {name: _packed(folder.path, name, parts) for name, parts in packed.items()}
    found |= {name: _pieces(folder.path, name, parts) for name, parts in pieces.items()}
    return dict(sorted(found.items()))


def _packed(path: Path, name: str, parts: dict[str, TensorSpec]) -> Weight:
    if len(parts) != 2:
        raise ModelError(f"{path}: {name} has MXFP4 {', '.join(parts)} only; blocks and scales belong together")
    blocks, scales = parts["blocks"], parts["scales"]
    if blocks.shape != (*scales.shape, GROUP // 2) or len(scales.shape) != 3:
        raise ModelError(f"{path}: {name} has blocks {list(blocks.shape)} and scales {list(scales.shape)}: no MXFP4")
    experts, rows, groups = scales.shape
    return Weight(name, (blocks, scales), "mxfp4", experts, rows, groups * GROUP)


def _pieces(path: Path, name: str, parts: dict[tuple[int, str], TensorSpec]) -> Weight:
    experts = 1 + max(expert for expert, _ in parts)
    kinds = ("down",) if name.endswith("down_proj") else ("gate", "up")
    wanted = [(expert, kind) for expert in range(experts) for kind in kinds]
    missing = [key for key in wanted if key not in parts]
    if missing:
        raise ModelError(f"{path}: expert {missing[0][0]} of {name} lacks its {missing[0][1]}_proj: a shard is missing")
    specs = tuple(parts[key] for key in wanted)
    shapes = {spec.shape for spec in specs}
    if len(shapes) > 1:
        raise ModelError(f"{path}: the experts of {name} have several shapes: {sorted(shapes)}")
    rows, columns = specs[0].shape
    return Weight(name, specs, "pieces", experts, rows * len(kinds), columns)


def weights_by_module(weights: dict[str, Weight]) -> Iterator[str]:
    """The modules that hold weights, sorted, each once."""
    yield from sorted({name.rpartition(".")[0] for name in weights})
