"""How a GGUF file stores numbers: blocks of 32 along a row, as ggml's documentation lays them out."""

from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize

from posttrain.engine import mxfp4
from posttrain.errors import PhaseFault
from posttrain.export.tensors import TensorSpec

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m", "mxfp4", "auto"]
"""`q4_k_m` is made of bf16 by llama.cpp's own quantizer. `mxfp4` is experts in MXFP4 and q8_0 elsewhere; `auto` is that
for GPT-OSS and q8_0 for others."""
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
Stored: TypeAlias = GGMLQuantizationType
STORED: dict[str, Stored] = {
    "f32": Stored.F32,
    "f16": Stored.F16,
    "bf16": Stored.BF16,
    "q8_0": Stored.Q8_0,
    "q4_0": Stored.Q4_0,
    "mxfp4": Stored.Q8_0,
}
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "mxfp4": LlamaFileType.MOSTLY_MXFP4_MOE,
}
FLOATS = {Stored.F32: torch.float32, Stored.F16: torch.float16, Stored.BF16: torch.bfloat16}


def stored_bytes(shape: tuple[int, ...], stored: Stored) -> int:
    block, size = GGML_QUANT_SIZES[stored]
    return TensorSpec("", shape, torch.int8).bytes // block * size


def encode(values: torch.Tensor, stored: Stored, name: str) -> torch.Tensor:
    """The values [..., columns] as the file stores them. PhaseFault with the name where float16 cannot hold one."""
    if stored in FLOATS:
        rounded = values.to(FLOATS[stored])
        if stored == Stored.F16 and rounded.numel() and not torch.isfinite(torch.stack(torch.aminmax(rounded))).all():
            raise PhaseFault(f"{name} has values beyond float16's 65504: choose the GGUF type bf16 or q8_0")
        return rounded.contiguous()
    if stored == Stored.Q8_0:
        return _q8_0(values.float().contiguous())
    if stored == Stored.MXFP4:
        return mxfp4.to_ggml(*mxfp4.encode(values.contiguous()))
    packed: np.ndarray = quantize(values.float().contiguous().numpy(), stored)
    return torch.from_numpy(packed)


def _q8_0(values: torch.Tensor) -> torch.Tensor:
    """32 signed bytes after their step, the largest magnitude / 127 in float16; halves are rounded away from zero."""
    groups = values.unflatten(-1, (-1, 32))
    step = torch.maximum(groups.amax(-1), -groups.amin(-1)).div_(127).unsqueeze(-1)
    inverse = torch.where(step == 0, 0.0, 1 / step)
    scaled = groups * inverse
    scaled += torch.copysign(torch.full((), 0.5), scaled)
    packed = torch.empty((*groups.shape[:-1], 34), dtype=torch.uint8)
    packed[..., :2] = step.half().view(torch.uint8)
    # Conversion to whole numbers cuts towards zero.
    packed[..., 2:] = scaled.to(torch.int8).view(torch.uint8)
    return packed.flatten(-2)
