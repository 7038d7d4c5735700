"""8-bit weights with one fp32 scale per output channel: int8 (symmetric, ±127) and fp8 e4m3 (±448).

    scale[o] = max|w[o, :]| / limit        values[o, i] = round(w[o, i] / scale[o])        w ≈ values · scale

Shapes: w [out, in], values [out, in], scales [out]. A channel of zeros gets scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .dispatch import bad_argument

INT8_LIMIT = 127.0
FP8_LIMIT = 448.0


@dataclass(frozen=True)
class ChannelWeight:
    """A weight [out, in] in int8 or float8_e4m3fn with f32 scales [out]."""

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def num_bytes(self) -> int:
        return self.values.numel() + 4 * self.scales.numel()

    def to(self, device: torch.device | str) -> ChannelWeight:
        return ChannelWeight(self.values.to(device), self.scales.to(device))


def _scales(op: str, w: torch.Tensor, limit: float) -> torch.Tensor:
    if w.ndim != 2 or not w.is_floating_point():
        raise bad_argument(op, "w", f"{w.dtype} {tuple(w.shape)}", "a floating-point [out, in]")
    if w.shape[1] == 0:
        return torch.ones(w.shape[0], dtype=torch.float32, device=w.device)
    scales = w.abs().amax(dim=1).float() / limit
    if not bool(torch.isfinite(scales).all()):
        raise bad_argument(op, "w", "values that are infinite or NaN", "finite values")
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def quantize_int8(w: torch.Tensor) -> ChannelWeight:
    """w [out, in] → int8 with one scale per row; round half to even."""
    scales = _scales("quantize_int8", w, INT8_LIMIT)
    values = (w.float() / scales[:, None]).round_().clamp_(-INT8_LIMIT, INT8_LIMIT)
    return ChannelWeight(values.to(torch.int8), scales)


def quantize_fp8(w: torch.Tensor) -> ChannelWeight:
    """w [out, in] → float8_e4m3fn with one scale per row."""
    scales = _scales("quantize_fp8", w, FP8_LIMIT)
    values = (w.float() / scales[:, None]).clamp_(-FP8_LIMIT, FP8_LIMIT)
    return ChannelWeight(values.to(torch.float8_e4m3fn), scales)


def dequantize_channelwise(weight: ChannelWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """values · scale in fp32 (fp64 if asked), rounded once to ``dtype``: [out, in]."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (weight.values.to(compute) * weight.scales.to(compute)[:, None]).to(dtype)
