"""Angles of rotary positions: cos and sin tables f32[M, D/2] for a config's theta and scaling."""

from __future__ import annotations

import math

import torch

from .config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """f32[D/2] radians per position (arXiv 2104.09864, with the config's scaling), and the factor on cos and sin."""
    dim, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "factors":
        return frequencies / torch.tensor(scaling.frequency_factors, dtype=torch.float32), scaling.attention_factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(frequencies, scaling, dim, theta), scaling.attention_factor
    raise ValueError(f"rope scaling kind {scaling.kind!r} is unknown")


def _llama3(frequencies: torch.Tensor, s: RopeScaling) -> torch.Tensor:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a linear blend between."""
    turns = s.original_max_context * frequencies / (2 * math.pi)  # full turns within the original context
    blend = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * frequencies / s.factor + blend * frequencies


def _yarn(frequencies: torch.Tensor, s: RopeScaling, dim: int, theta: float) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): dimensions that turn often are kept, those that turn rarely divided, a ramp between."""

    def dimension(turns: float) -> float:
        return dim * math.log(s.original_max_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return ramp * frequencies / s.factor + (1 - ramp) * frequencies


def rope_tables(config: ModelConfig, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each f32[max_context, D/2]."""
    frequencies, factor = inverse_frequencies(config)
    angles = torch.outer(torch.arange(config.max_context, dtype=torch.float32), frequencies)
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)
