"""RMS normalisation, optionally of a sum: ``h = x (+ residual);  y = h / sqrt(mean(h²) + eps) · weight``.

x [T, C] or [T, N, C] (each head on its own), weight [C]. Statistics in fp32; the sum is rounded to x's dtype before it is
normalised, because that rounded sum is what the residual stream carries on.
Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dispatch import bad_argument, choose_backend


def rmsnorm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Same arguments and results as ``rmsnorm``; accumulates in fp32, or in fp64 for fp64 inputs."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    h = x if residual is None else x + residual
    wide = h.to(accumulate)
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.to(accumulate)
    y = y.to(x.dtype)
    return y if residual is None else (y, h)


def _rmsnorm_torch(x, weight, eps, residual):
    h = x if residual is None else x + residual
    y = F.rms_norm(h, weight.shape, weight, eps) if weight.dtype == h.dtype else rmsnorm_reference(h, weight, eps)
    return y if residual is None else (y, h)


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
):
    """Normalises the last dimension of ``x`` [..., C] by its root mean square and scales by ``weight`` [C].

    With ``residual`` (same shape as x) returns ``(y, x + residual)``, else ``y``. Differentiable.
    Raises ValueError where shapes do not fit.
    """
    if weight.dim() != 1 or x.shape[-1] != weight.shape[0]:
        raise bad_argument(
            "rmsnorm", "weight", f"of shape {tuple(weight.shape)}", f"[{x.shape[-1]}], x's last dimension"
        )
    if residual is not None and residual.shape != x.shape:
        raise bad_argument("rmsnorm", "residual", f"of shape {tuple(residual.shape)}", f"x's shape {tuple(x.shape)}")
    choose_backend("rmsnorm", x, backend, ("torch",))
    return _rmsnorm_torch(x, weight, eps, residual)
