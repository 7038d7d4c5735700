"""One adapter over a frozen weight: y = x Wᵀ + bias + s·(x Aᵀ) Bᵀ, forward and backward.

Backward (W and bias are frozen, so nothing for them), with h = x Aᵀ and g = dy B:

    dx = dy W + s·g A        dA = s·gᵀ x        dB = s·dyᵀ h

Shapes: x [T, in], W [out, in] dense or quantised, bias [out], a [R, in], b [out, R], y [T, out]. The sums run in x's
dtype with fp32 accumulation; a and b may be kept in fp32, and their gradients come back in their own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from .checks import bad_argument
from .dispatch import choose_backend
from .lora_grouped import lora_grouped_add_ as lora_grouped_add_
from .quantized_linear import QuantizedWeight, dequantize

OP = "lora_linear"


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The definition in x's dtype, differentiable by autograd."""
    dense = dequantize(weight, x.dtype, backend="torch").detach()
    return linear(x, dense, bias) + linear(linear(x, a.to(x.dtype)), b.to(x.dtype)) * scaling


class _LoraLinearTorch(torch.autograd.Function):
    """Plain GEMMs: the frozen one and the small ones beside it."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, scaling: float) -> torch.Tensor:  # type: ignore[override]
        a_, b_ = a.to(x.dtype), b.to(x.dtype)
        y = linear(x, dequantize(weight, x.dtype, backend="torch"), bias)
        hidden = linear(x, a_)
        y.addmm_(hidden, b_.t(), alpha=scaling)
        ctx.save_for_backward(x, hidden, a_, b_, weight if isinstance(weight, torch.Tensor) else None)
        ctx.weight = None if isinstance(weight, torch.Tensor) else weight
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):  # type: ignore[override]
        x, hidden, a_, b_, weight = ctx.saved_tensors
        need_x, _, _, need_a, need_b, _ = ctx.needs_input_grad
        dx = da = db = None
        g = torch.mm(dy, b_).mul_(ctx.scaling)
        if need_x:
            dense = weight if weight is not None else dequantize(ctx.weight, x.dtype, backend="torch")
            dx = torch.mm(dy, dense).addmm_(g, a_)
        if need_a:
            da = torch.mm(g.t(), x).to(ctx.dtypes[0])
        if need_b:
            # scaled in the parameter's dtype: [out, R] is small, and fp32 loses nothing
            db = torch.mm(dy.t(), hidden).to(ctx.dtypes[1]).mul_(ctx.scaling)
        return dx, None, None, da, db, None


def _validate(x, weight, bias, a, b, scaling) -> None:
    if x.ndim != 2 or x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise bad_argument(OP, "x", f"{x.dtype} {tuple(x.shape)}", "[T, in] in fp32, bf16 or fp16")
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[1]:
        raise bad_argument(OP, "weight", tuple(weight.shape), f"[out, {x.shape[1]}]")
    if isinstance(weight, torch.Tensor) and weight.dtype != x.dtype:
        raise bad_argument(OP, "weight", weight.dtype, f"x's {x.dtype}")
    if bias is not None and (bias.shape != (weight.shape[0],) or bias.dtype != x.dtype):
        raise bad_argument(OP, "bias", f"{bias.dtype} {tuple(bias.shape)}", f"{x.dtype} [{weight.shape[0]}]")
    if a.ndim != 2 or a.shape[1] != x.shape[1]:
        raise bad_argument(OP, "a", tuple(a.shape), f"[R, {x.shape[1]}]")
    if b.shape != (weight.shape[0], a.shape[0]):
        raise bad_argument(OP, "b", tuple(b.shape), f"[{weight.shape[0]}, {a.shape[0]}]")
    for name, tensor in (("a", a), ("b", b)):
        if not tensor.is_floating_point():
            raise bad_argument(OP, name, tensor.dtype, "a floating dtype")
    for name, device in (("weight", weight.device), ("a", a.device), ("b", b.device)):
        if device != x.device:
            raise bad_argument(OP, name, f"on {device}", f"x's device {x.device}")
    if not isinstance(scaling, (int, float)):
        raise bad_argument(OP, "scaling", type(scaling).__name__, "a number")


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """x [T, in] → [T, out]; differentiable in x, a and b. Any stride of x is taken."""
    _validate(x, weight, bias, a, b, scaling)
    choose_backend(OP, x, backend, ("torch", "triton"))
    return _LoraLinearTorch.apply(x, weight, bias, a, b, float(scaling))
