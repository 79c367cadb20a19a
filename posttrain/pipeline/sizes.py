"""How many parameters a model has and an adapter would have, from file headers and configurations alone."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from posttrain.pipeline.base import on_this_machine
from posttrain.recipe.types import FolderBase, FreshBase, HubBase, Lora, Recipe
from posttrain.run.folder import RunFolder

EXPERT_PROJECTIONS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class ModelSize:
    shapes: dict[str, tuple[int, ...]]
    """Shape of every tensor by its name in the checkpoint."""

    @property
    def parameters(self) -> int:
        return sum(_volume(shape) for shape in self.shapes.values())

    def adapter_parameters(self, adapter: Lora) -> int:
        """Parameters of a LoRA: rank times the sum of both sides of every target, for each expert."""
        total = 0
        for name, shape in self.shapes.items():
            module = name.removesuffix(".weight").rpartition(".")[2]
            expert = module in EXPERT_PROJECTIONS and len(shape) == 3 and "experts" in adapter.targets
            if expert or (module in adapter.targets and len(shape) == 2 and not name.endswith("bias")):
                experts = shape[0] if len(shape) == 3 else 1
                total += adapter.rank * experts * (shape[-1] + shape[-2])
        return total


def _volume(shape: tuple[int, ...]) -> int:
    volume = 1
    for side in shape:
        volume *= side
    return volume


def model_size(recipe: Recipe, run: RunFolder) -> ModelSize:
    """The base's tensors; empty where the folder holds no safetensors."""
    if isinstance(recipe.base, FreshBase):
        return ModelSize(_fresh_shapes(recipe.base))
    folder = on_this_machine(recipe.base) if isinstance(recipe.base, HubBase) else _folder(recipe.base, run)
    return ModelSize(_folder_shapes(folder) if folder else {})


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
