"""Activations of the feed-forward block: ``gelu(x) = x·Φ(x)`` (exact, by erf) and ``swiglu([g, u]) = g·sigmoid(g)·u``.

gelu keeps x's shape; swiglu takes gate and up side by side, [T, 2I] -> [T, I]. Computed in fp32 and rounded once.
Sources: Hendrycks & Gimpel, "Gaussian Error Linear Units" (2016); Shazeer, "GLU Variants Improve Transformer" (2020).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dispatch import bad_argument, choose_backend


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """Same as ``gelu``; computes in fp32, or in fp64 for fp64 inputs."""
    return F.gelu(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Same as ``swiglu``; computes in fp32, or in fp64 for fp64 inputs."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gelu(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """``x·Φ(x)`` for any shape. Differentiable."""
    choose_backend("gelu", x, backend, ("torch",))
    return F.gelu(x)


def swiglu(gate_up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """``silu(gate)·up`` for ``gate_up`` [T, 2I], gate first; returns [T, I]. Differentiable. Raises ValueError on an odd width."""
    if gate_up.dim() != 2 or gate_up.shape[-1] % 2:
        raise bad_argument("swiglu", "gate_up", f"of shape {tuple(gate_up.shape)}", "[T, 2I]")
    choose_backend("swiglu", gate_up, backend, ("torch",))
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
