"""LoRA on our modules during training, stock PEFT on disk.

PEFT's layout for expert parameters (`target_parameters`): `lora_A` is (E·r, in) with the expert slowest, `lora_B` is
(out, r·E) with the expert fastest, and wrappers nest: `experts.base_layer` is gate_up_proj, `experts` is down_proj.
"""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from posttrain.engine.experts import ExpertAdapter
from posttrain.engine.mxfp4 import PackedExperts
from posttrain.errors import ModelError
from posttrain.recipe.types import Lora

EXPERT_PROJECTIONS = ("gate_up_proj", "down_proj")
PEFT_PREFIX = "base_model.model."
LORA: WeakKeyDictionary[nn.Module, Lora] = WeakKeyDictionary()
"""What `attach` put on a model."""


class LoraLinear(nn.Module):
    """A frozen linear layer plus scale · B·A·x; lora_A is [rank, in], lora_B is [out, rank]."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(x, self.lora_A) * self.scale
        # Added inside the product: one pass less over the output, and one rounding.
        base = self.base(x)
        return torch.addmm(base.flatten(0, -2), low.flatten(0, -2), self.lora_B.T).view_as(base)


def is_experts(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in (*EXPERT_PROJECTIONS, "is_transposed", "has_gate"))


def attach(model: nn.Module, lora: Lora) -> None:
    """Put zeroed adapters on every module that a target names; the base is frozen.

    Raises ModelError for a target that matches nothing.
    """
    model.requires_grad_(False)
    scale = lora.alpha / lora.rank
    unmatched = set(lora.targets)
    for path, module in list(model.named_modules()):
        name = path.rsplit(".", 1)[-1]
        if name not in lora.targets:
            continue
        if isinstance(module, nn.Linear):
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, name, LoraLinear(module, lora.rank, scale))
        elif is_experts(module):
            module.adapters = nn.ModuleDict({part: _expert_adapter(module, part, lora) for part in EXPERT_PROJECTIONS})
        else:
            continue
        unmatched.discard(name)
    if unmatched:
        known = sorted({path.rsplit(".", 1)[-1] for path, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            f"LoRA targets {sorted(unmatched)} match no module of this model; known are {known}"
            + (" and 'experts'" if any(is_experts(m) for m in model.modules()) else "")
        )
    LORA[model] = lora


def _expert_adapter(experts: nn.Module, part: str, lora: Lora) -> ExpertAdapter:
    weight = getattr(experts, part)
    count, *sizes = weight.shape
    packed = isinstance(weight, PackedExperts)
    size_in, size_out = sizes if experts.is_transposed or packed else reversed(sizes)
    device = weight.blocks.device if packed else weight.device
    return ExpertAdapter(count, size_in, size_out, lora.rank, lora.alpha / lora.rank, device)


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """PEFT's start: A uniform with bound 1/sqrt(in), B zero. Drawn from one generator in the order of the modules."""
    with torch.no_grad():
        for _, module in adapted(model):
            size_in = module.lora_A.shape[1]
            bound = 1 / math.sqrt(size_in)
            drawn = torch.empty(module.lora_A.shape).uniform_(-bound, bound, generator=generator)
            module.lora_A.copy_(drawn)
            module.lora_B.zero_()


def adapted(model: nn.Module) -> Iterator[tuple[str, LoraLinear | ExpertAdapter]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear | ExpertAdapter):
            yield path, module


def _peft_key(path: str, module: nn.Module) -> str:
    """PEFT's module path of an adapter that sits at `path` of our model."""
    if isinstance(module, ExpertAdapter):
        path = path.replace(".adapters.gate_up_proj", ".base_layer").replace(".adapters.down_proj", "")
    return PEFT_PREFIX + path


def to_peft(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's names and in PEFT's layout."""
    tensors = {}
    for path, module in adapted(model):
        key, a, b = _peft_key(path, module), module.lora_A.detach(), module.lora_B.detach()
        if isinstance(module, ExpertAdapter):
            experts, size_in, rank = a.shape
            a = a.transpose(1, 2).reshape(experts * rank, size_in)
            b = b.permute(2, 1, 0).reshape(b.shape[2], rank * experts)
        tensors[f"{key}.lora_A.weight"] = a.contiguous()
        tensors[f"{key}.lora_B.weight"] = b.contiguous()
    return tensors


def from_peft(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy PEFT tensors into the attached adapters; raises ModelError on any missing, extra or misshapen one."""
    left = dict(tensors)
    with torch.no_grad():
        for path, module in adapted(model):
            key = _peft_key(path, module)
            try:
                a, b = left.pop(f"{key}.lora_A.weight"), left.pop(f"{key}.lora_B.weight")
            except KeyError as error:
                raise ModelError(f"the adapter lacks tensor {error.args[0]}: it was made for another model") from None
            if isinstance(module, ExpertAdapter):
                experts, size_in, rank = module.lora_A.shape
                size_out = module.lora_B.shape[2]
                if a.shape == (experts * rank, size_in) and b.shape == (size_out, rank * experts):
                    a = a.reshape(experts, rank, size_in).transpose(1, 2)
                    b = b.reshape(size_out, rank, experts).permute(2, 1, 0)
            if a.shape != module.lora_A.shape or b.shape != module.lora_B.shape:
                shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
                raise ModelError(f"adapter tensors of {key} have the shapes {shapes}, not this model's")
            module.lora_A.copy_(a)
            module.lora_B.copy_(b)
    if left:
        raise ModelError(f"adapter tensors this model has no place for: {sorted(left)[:5]}")


def save(model: nn.Module, folder: Path, base_name: str) -> None:
    """Write the attached adapter as PEFT reads it."""
    write(to_peft(model), LORA[model], folder, base_name)


def write(tensors: dict[str, torch.Tensor], lora: Lora, folder: Path, base_name: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT reads them; the tensors are PEFT's."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    has_experts = "experts" in lora.targets
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [target for target in lora.targets if target != "experts"],
        "target_parameters": [f"experts.{part}" for part in EXPERT_PROJECTIONS] if has_experts else None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(model: nn.Module, folder: Path) -> None:
    """Attach the adapter in a PEFT folder to a bare model."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is no PEFT adapter: {error}") from error
    targets = tuple(config["target_modules"]) + (("experts",) if config.get("target_parameters") else ())
    attach(model, Lora(kind="lora", rank=config["r"], alpha=config["lora_alpha"], targets=targets))
    from_peft(model, tensors)


def beside(model: nn.Module, folder: Path) -> nn.Module:
    """The bare model with the adapter in a PEFT folder, sharing the weights of `model`, which stays as it is."""
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    load(shared, folder)
    return shared
