"""MXFP4: 32 values along the input dimension share one power of two, each is one of 16 four-bit numbers (OCP MX 1.0).

Axes: O output, G groups of 32 inputs, B the 16 bytes of a group, I = 32 G input. Hugging Face stores the codes of
inputs 2b and 2b+1 in the low and high half of byte b, output-major; ggml those of inputs b and b+16, after the scale.
"""

import torch
from torch import nn

from posttrain.engine.fusing import fused

GROUP = 32
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
VALUES = torch.cat([MAGNITUDES, -MAGNITUDES])
PAIRS = torch.stack([VALUES.repeat(16), VALUES.repeat_interleave(16)], dim=1).view(torch.int64).flatten()
"""The two float32 values of every byte, as one number to look up."""
PACKED_EXPANSION = GROUP / (GROUP // 2 + 1)
"""Values that a byte of blocks and scales stands for."""
BIAS = 127
LARGEST_EXPONENT = 2
"""floor(log2 6): the shared exponent is the largest value's less this."""
MANTISSA_BITS = 23
TINIEST = 1 << (MANTISSA_BITS - 1)
"""Bits of 2^-127, which float32 holds only below its normal numbers."""


def decode(blocks_OGB: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
    """Values [O, I] in float32."""
    values = PAIRS.index_select(0, blocks_OGB.reshape(-1).int()).view(torch.float32).view(*scales_OG.shape, GROUP)
    values.mul_(_power_of_two(scales_OG.int()).unsqueeze(-1))
    return values.flatten(-2)


def _power_of_two(biased: torch.Tensor) -> torch.Tensor:
    """2^(biased - 127) for whole numbers from 0 to 254."""
    return (biased << MANTISSA_BITS).clamp_(min=TINIEST).view(torch.float32)


def encode(values_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [O, G, 16] and scales [O, G] nearest to the values under ggml's choice of the shared exponent."""
    groups = values_OI.float().unflatten(-1, (-1, GROUP))
    largest = torch.maximum(groups.amax(-1), -groups.amin(-1))
    scales = ((largest.view(torch.int32) >> MANTISSA_BITS) - LARGEST_EXPONENT).clamp_(0, 2 * BIAS)
    scaled = groups * _power_of_two(2 * BIAS - scales).unsqueeze(-1)
    codes = _nearest(scaled.abs())
    # Zero has no sign here: what rounds to it is 0, never -0.
    codes |= ((scaled < 0) & (codes > 0)).to(torch.uint8) << 3
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scales.to(torch.uint8)


def _nearest(magnitudes: torch.Tensor) -> torch.Tensor:
    """Code 0 to 7 of the nearest magnitude; a tie goes to the smaller one, as in ggml."""
    # From 1 on the codes are float32's own numbers with one bit of mantissa, below it multiples of a half.
    half = (1 << (MANTISSA_BITS - 2)) - 1
    large = ((magnitudes.view(torch.int32) + half) >> (MANTISSA_BITS - 1)) - (2 * BIAS - 2)
    small = (magnitudes * 2 - 0.5).ceil_().int()
    return torch.maximum(large, small.clamp_(max=2)).clamp_(max=7).to(torch.uint8)


def encode_change(
    values_OI: torch.Tensor, before: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `encode`, but a group whose values are those it had before keeps its codes and scale."""
    blocks, scales = encode(values_OI)
    same = (decode(*before) == values_OI).unflatten(-1, (-1, GROUP)).all(-1)
    return torch.where(same.unsqueeze(-1), before[0], blocks), torch.where(same, before[1], scales)


def to_ggml(blocks_OGB: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
    """ggml's bytes [O, G * 17] of Hugging Face's blocks and scales, code for code."""
    codes = torch.stack([blocks_OGB & 0x0F, blocks_OGB >> 4], dim=-1).flatten(-2)
    packed = codes[..., :16] | (codes[..., 16:] << 4)
    return torch.cat([scales_OG.unsqueeze(-1), packed], dim=-1).flatten(-2)


@fused
def unpack(blocks_OGB: torch.Tensor, scales_OG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values [..., O, I] by arithmetic instead of a table, for a device that fuses it: exact in bfloat16 too."""
    codes = (blocks_OGB.int().unsqueeze(-1) >> (torch.arange(2, device=blocks_OGB.device).int() * 4)) & 0x0F
    # Two bits of exponent and one of mantissa, put where float32 has its lowest exponent bits and its highest mantissa
    # bit, are the number times 2^-126: the numbers below 1 are float32's own below its normal ones.
    bits = ((codes & 7) << (MANTISSA_BITS - 1)) | ((codes & 8) << 28)
    values = bits.view(torch.float32) * 2.0**126 * _power_of_two(scales_OG.int())[..., None, None]
    return values.to(dtype).flatten(-3)


class PackedExperts(nn.Module):
    """The frozen matrices of one expert projection, kept in four bits and unpacked when they are used.

    blocks [E, O, G, 16] and scales [E, O, G], as Hugging Face stores them.
    """

    blocks: torch.Tensor
    scales: torch.Tensor

    def __init__(self, num_experts: int, size_in: int, size_out: int) -> None:
        super().__init__()
        groups = num_experts, size_out, size_in // GROUP
        self.register_buffer("blocks", torch.empty(*groups, GROUP // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(groups, dtype=torch.uint8))

    @property
    def shape(self) -> torch.Size:
        """(expert, in, out), as the parameter it stands for."""
        experts, size_out, groups = self.scales.shape
        return torch.Size((experts, groups * GROUP, size_out))

    def matrices(self, dtype: torch.dtype) -> torch.Tensor:
        """[E, I, O]"""
        return unpack(self.blocks, self.scales, dtype).transpose(1, 2)

    def matrix(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """[I, O]"""
        return decode(self.blocks[expert], self.scales[expert]).to(dtype).T
