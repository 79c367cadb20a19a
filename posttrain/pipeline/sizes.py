"""How many parameters a model has and an adapter would have, from file headers and configurations alone."""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from posttrain.pipeline.base import FRESH, on_this_machine
from posttrain.recipe.types import FolderBase, FreshBase, HubBase, Lora, Recipe
from posttrain.run.folder import RunFolder

LAYER = re.compile(r"\.layers\.(\d+)\.")
EXPERT_PROJECTIONS = ("gate_up_proj", "down_proj")

KNOWN = {
    "openai/gpt-oss-20b": FreshBase(
        kind="fresh",
        hidden_size=2880,
        num_layers=24,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        num_experts=32,
        experts_per_token=4,
        expert_size=2880,
        vocab_size=201088,
        sliding_window=128,
        initializer_range=0.02,
    )
}
"""Bases, stored with packed experts, that can be planned for before they are downloaded."""


@dataclass(frozen=True)
class ModelSize:
    shapes: dict[str, tuple[int, ...]]
    """Shape of every tensor by its name in the checkpoint; packed experts as what they stand for."""
    active_experts: int = 0
    """Experts of one token; 0 for a dense model."""
    is_packed: bool = False
    """Whether experts are stored as MXFP4 blocks."""

    @property
    def parameters(self) -> int:
        return sum(_volume(shape) for shape in self.shapes.values())

    @property
    def expert_parameters(self) -> int:
        return sum(_volume(shape) for name, shape in self.shapes.items() if _is_expert(name, shape))

    @property
    def layer_parameters(self) -> int:
        """Of all layers together."""
        return sum(_volume(shape) for name, shape in self.shapes.items() if LAYER.search(name))

    @property
    def has_experts(self) -> bool:
        return self.active_experts > 0

    @property
    def layers(self) -> int:
        return len({found[1] for name in self.shapes if (found := LAYER.search(name))})

    @property
    def hidden(self) -> int:
        return self._side("embed_tokens", -1)

    @property
    def vocabulary(self) -> int:
        return self._side("embed_tokens", 0)

    @property
    def queries(self) -> int:
        """Width of all of a layer's queries together; `keys` is that of its keys."""
        return self._side("q_proj", 0)

    @property
    def keys(self) -> int:
        return self._side("k_proj", 0)

    @property
    def feed_forward(self) -> int:
        """Width of a feed-forward block, or of one expert."""
        # Joined experts are stored (in, out), unless they are packed.
        joined = any(_is_expert(name, shape) for name, shape in self.shapes.items())
        return self._side("down_proj", -2 if joined and not self.is_packed else -1)

    def _side(self, module: str, side: int) -> int:
        """One side of the first matrix of this module."""
        for name, shape in self.shapes.items():
            if name.removesuffix(".weight").endswith(module) and len(shape) >= 2:
                return shape[side]
        return 0

    def adapter_parameters(self, adapter: Lora) -> int:
        """Parameters of a LoRA: rank times the sum of both sides of every target, for each expert."""
        total = 0
        for name, shape in self.shapes.items():
            module = name.removesuffix(".weight").rpartition(".")[2]
            expert = _is_expert(name, shape) and "experts" in adapter.targets
            if expert or (module in adapter.targets and len(shape) == 2 and not name.endswith("bias")):
                experts = shape[0] if len(shape) == 3 else 1
                total += adapter.rank * experts * (shape[-1] + shape[-2])
        return total


def _is_expert(name: str, shape: tuple[int, ...]) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in EXPERT_PROJECTIONS and len(shape) == 3


def _volume(shape: tuple[int, ...]) -> int:
    volume = 1
    for side in shape:
        volume *= side
    return volume


def model_size(recipe: Recipe, run: RunFolder) -> ModelSize:
    """The base's tensors; empty where the folder holds no safetensors."""
    if isinstance(recipe.base, FreshBase):
        return ModelSize(_fresh_shapes(recipe.base), recipe.base.experts_per_token)
    folder = base_folder(recipe, run)
    if folder is None and isinstance(recipe.base, HubBase) and recipe.base.repo in KNOWN:
        known = KNOWN[recipe.base.repo]
        return ModelSize(_fresh_shapes(known), known.experts_per_token, is_packed=True)
    return size_of(folder) if folder else ModelSize({})


def base_folder(recipe: Recipe, run: RunFolder) -> Path | None:
    """Where the base lies, if it is on this machine."""
    match recipe.base:
        case FreshBase():
            return run.path / FRESH if (run.path / FRESH).exists() else None
        case HubBase() as base:
            return on_this_machine(base)
        case FolderBase() as base:
            return _folder(base, run)
    raise AssertionError(recipe.base)


def size_of(folder: Path) -> ModelSize:
    stored = _folder_shapes(folder)
    packed = {name for name in stored if name.endswith("_blocks")}
    shapes = {name: shape for name, shape in stored.items() if not name.endswith(("_blocks", "_scales"))}
    # [experts, out, in / 32, 16] bytes of two values each.
    shapes |= {name.removesuffix("_blocks"): (*stored[name][:2], stored[name][2] * 32) for name in packed}
    return ModelSize(shapes, _active_experts(folder), bool(packed))


def _active_experts(folder: Path) -> int:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return 0
    return int(config.get("num_experts_per_tok") or config.get("experts_per_token") or 0)


def _folder(base: FolderBase, run: RunFolder) -> Path:
    return run.model_folder(base.path) if base.path.startswith("shipped:") else Path(base.path).expanduser()


def _folder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read from the headers of the safetensors files: 8 bytes of length, then JSON."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def _fresh_shapes(base: FreshBase) -> dict[str, tuple[int, ...]]:
    """The tensors of a GPT-OSS of these dimensions."""
    hidden, expert = base.hidden_size, base.expert_size
    queries, keys = base.num_heads * base.head_dim, base.num_kv_heads * base.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (base.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (base.vocab_size, hidden),
    }
    for layer in range(base.num_layers):
        at = f"model.layers.{layer}"
        for name, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            shapes |= {f"{at}.self_attn.{name}.weight": (width, hidden), f"{at}.self_attn.{name}.bias": (width,)}
        shapes |= {f"{at}.self_attn.o_proj.weight": (hidden, queries), f"{at}.self_attn.o_proj.bias": (hidden,)}
        shapes |= {f"{at}.self_attn.sinks": (base.num_heads,)}
        shapes |= {f"{at}.input_layernorm.weight": (hidden,), f"{at}.post_attention_layernorm.weight": (hidden,)}
        shapes |= {f"{at}.mlp.router.weight": (base.num_experts, hidden), f"{at}.mlp.router.bias": (base.num_experts,)}
        shapes |= {f"{at}.mlp.experts.gate_up_proj": (base.num_experts, hidden, 2 * expert)}
        shapes |= {f"{at}.mlp.experts.gate_up_proj_bias": (base.num_experts, 2 * expert)}
        shapes |= {f"{at}.mlp.experts.down_proj": (base.num_experts, expert, hidden)}
        shapes |= {f"{at}.mlp.experts.down_proj_bias": (base.num_experts, hidden)}
    return shapes
