"""Layer normalisation, optionally of a sum: ``h = x (+ residual);  y = (h - mean) / sqrt(var + eps) · weight (+ bias)``.

x [T, C], weight and bias [C]. Statistics in fp32; the sum is rounded to x's dtype before it is normalised, because that
rounded sum is what the residual stream carries on. Source: Ba, Kiros & Hinton, "Layer Normalization" (2016).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dispatch import bad_argument, choose_backend


def layernorm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Same arguments and results as ``layernorm``; accumulates in fp32, or in fp64 for fp64 inputs."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    h = x if residual is None else x + residual
    wide = h.to(accumulate)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight.to(accumulate)
    if bias is not None:
        y = y + bias.to(accumulate)
    y = y.to(x.dtype)
    return y if residual is None else (y, h)


def _layernorm_torch(x, weight, bias, eps, residual):
    h = x if residual is None else x + residual
    if weight.dtype == h.dtype:
        y = F.layer_norm(h, weight.shape, weight, bias, eps)
    else:
        y = layernorm_reference(h, weight, bias, eps)
    return y if residual is None else (y, h)


def layernorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
):
    """Normalises the last dimension of ``x`` [..., C]; ``weight`` [C], ``bias`` [C] or None.

    With ``residual`` (same shape as x) returns ``(y, x + residual)``, else ``y``. Differentiable.
    Raises ValueError where shapes do not fit.
    """
    if weight.dim() != 1 or x.shape[-1] != weight.shape[0]:
        raise bad_argument(
            "layernorm", "weight", f"of shape {tuple(weight.shape)}", f"[{x.shape[-1]}], x's last dimension"
        )
    if bias is not None and bias.shape != weight.shape:
        raise bad_argument("layernorm", "bias", f"of shape {tuple(bias.shape)}", f"{tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise bad_argument("layernorm", "residual", f"of shape {tuple(residual.shape)}", f"x's shape {tuple(x.shape)}")
    choose_backend("layernorm", x, backend, ("torch",))
    return _layernorm_torch(x, weight, bias, eps, residual)
