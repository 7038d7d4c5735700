"""Rotary position embedding, half-rotation (NeoX) layout: with ``x = [a, b]`` split in the middle of the last dimension,
``y = [a·cos - b·sin, b·cos + a·sin]``, cos and sin being row ``positions[t]`` of their tables.

x [T, H, D], cos and sin [M, D/2] in fp32, positions [T]. Computed in fp32 and rounded once.
Source: Su et al., "RoFormer" (2021), in the layout of GPT-NeoX.
"""

from __future__ import annotations

import torch

from .dispatch import bad_argument, choose_backend


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Same arguments and result as ``rope``; computes in fp32, or in fp64 for fp64 inputs."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    c = cos[positions].to(accumulate).unsqueeze(1)
    s = sin[positions].to(accumulate).unsqueeze(1)
    a, b = x.to(accumulate).chunk(2, dim=-1)
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Rotates each head of ``x`` [T, H, D] by its position; cos, sin [M, D/2], positions i64 [T] in [0, M).

    Differentiable in x. Raises ValueError where shapes do not fit.
    """
    if x.dim() != 3 or x.shape[-1] % 2:
        raise bad_argument("rope", "x", f"of shape {tuple(x.shape)}", "[T, H, D] with D even")
    if cos.dim() != 2 or cos.shape[1] * 2 != x.shape[-1] or sin.shape != cos.shape:
        raise bad_argument(
            "rope", "cos/sin", f"of shapes {tuple(cos.shape)}/{tuple(sin.shape)}", f"both [M, {x.shape[-1] // 2}]"
        )
    if positions.shape != x.shape[:1]:
        raise bad_argument("rope", "positions", f"of shape {tuple(positions.shape)}", f"[{x.shape[0]}]")
    choose_backend("rope", x, backend, ("torch",))
    return rope_reference(x, cos, sin, positions)
