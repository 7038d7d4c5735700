"""Python side of the C++ twins in ``cpp/rows.cpp``: norms, rotary embedding and SwiGLU on a CPU, both directions.

Eager torch makes four to ten passes over memory for each of these and keeps fp32 copies for the backward pass; one
fused pass per direction that keeps only its input is several times faster. Weights are frozen: a norm whose weight asks
for a gradient runs in torch.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from . import cpu
from .rows import as_rows, needs_grad

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.load("rows")
    rows = [_LONG, _LONG, _LONG, _LONG]
    signatures = {
        "norm_forward_rows": [*[_POINTER] * 6, *rows, _LONG, _FLOAT, _INT, _INT, _INT],
        "norm_backward_rows": [*[_POINTER] * 5, *rows, _LONG, _FLOAT, _INT, _INT, _INT],
        "rope_rows": [*[_POINTER] * 5, *rows, _LONG, _FLOAT, _INT, _INT],
        "swiglu_forward_rows": [_POINTER, _LONG, _POINTER, _LONG, _LONG, _INT, _INT],
        "swiglu_backward_rows": [_POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _INT, _INT],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def default_backend(x: torch.Tensor, *weights: torch.Tensor | None) -> str:
    """What a CPU tensor gets when no backend is asked for: "cpp" where the twin can take it, else "torch"."""
    if x.device.type != "cpu" or x.dtype not in cpu.DTYPE_CODES:
        return "torch"
    for weight in weights:
        if weight is not None and (weight.dtype != x.dtype or (weight.requires_grad and torch.is_grad_enabled())):
            return "torch"
    return cpu.default_backend("rows")


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _norm_forward(x, weight, bias, eps, residual, centre):
    rows, count, inner, outer_stride, inner_stride = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype)
    h = None
    if residual is not None:
        residual = residual.contiguous()
        h = torch.empty(x.shape, dtype=x.dtype)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    _library().norm_forward_rows(
        rows.data_ptr(), _pointer(residual), weight.data_ptr(), _pointer(bias), y.data_ptr(), _pointer(h), count, inner,
        outer_stride, inner_stride, x.shape[-1], eps, centre, cpu.DTYPE_CODES[x.dtype], cpu.num_threads(),
    )  # fmt: skip
    return y, h


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, eps, residual, centre):  # type: ignore[override]
        y, h = _norm_forward(x, weight, bias, eps, residual, centre)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.centre = eps, centre
        ctx.save_for_backward(x if h is None else h, weight)
        return y if h is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy, dh=None):  # type: ignore[override]
        h, weight = ctx.saved_tensors
        if dy is None:
            return dh, None, None, None, dh, None
        rows, count, inner, outer_stride, inner_stride = as_rows(h)
        dx = torch.empty(h.shape, dtype=h.dtype)
        dy, weight = dy.contiguous(), weight.contiguous()
        dh = None if dh is None else dh.contiguous()
        _library().norm_backward_rows(
            rows.data_ptr(), weight.data_ptr(), dy.data_ptr(), _pointer(dh), dx.data_ptr(), count, inner, outer_stride,
            inner_stride, h.shape[-1], ctx.eps, ctx.centre, cpu.DTYPE_CODES[h.dtype], cpu.num_threads(),
        )  # fmt: skip
        return dx, None, None, None, dx if ctx.needs_input_grad[4] else None, None


def norm(x, weight, bias, eps: float, residual, *, centre: bool):
    """RMS norm, or with ``centre`` layer norm; returns y, or (y, x + residual) where a residual is given."""
    if needs_grad(x, residual):
        return _Norm.apply(x, weight, bias, eps, residual, centre)
    y, h = _norm_forward(x, weight, bias, eps, residual, centre)
    return y if h is None else (y, h)


def _rotate(x, cos, sin, positions, sign: float) -> torch.Tensor:
    rows, count, inner, outer_stride, inner_stride = as_rows(x)
    if inner != x.shape[1]:  # a contiguous [T, N, D]: positions belong to the outer dimension
        inner, outer_stride, inner_stride = x.shape[1], x.shape[1] * x.shape[2], x.shape[2]
    y = torch.empty(x.shape, dtype=x.dtype)
    _library().rope_rows(
        rows.data_ptr(), cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), y.data_ptr(), count, inner, outer_stride,
        inner_stride, x.shape[2] // 2, sign, cpu.DTYPE_CODES[x.dtype], cpu.num_threads(),
    )  # fmt: skip
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, cos, sin, positions):  # type: ignore[override]
        ctx.save_for_backward(cos, sin, positions)
        return _rotate(x, cos, sin, positions, 1.0)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[override]
        cos, sin, positions = ctx.saved_tensors
        return _rotate(dy, cos, sin, positions, -1.0), None, None, None


def rope(x, cos, sin, positions) -> torch.Tensor:
    """Half-rotation of x [T, N, D]; cos and sin fp32 [M, D/2]."""
    cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    return _Rope.apply(x, cos, sin, positions) if needs_grad(x) else _rotate(x, cos, sin, positions, 1.0)  # type: ignore[return-value]


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _swiglu_forward(gate_up: torch.Tensor) -> torch.Tensor:
    x = _unit_stride(gate_up)
    y = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)
    _library().swiglu_forward_rows(
        x.data_ptr(), x.stride(0), y.data_ptr(), x.shape[0], y.shape[1], cpu.DTYPE_CODES[x.dtype], cpu.num_threads()
    )
    return y


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up):  # type: ignore[override]
        ctx.save_for_backward(gate_up)
        return _swiglu_forward(gate_up)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[override]
        x, dy = _unit_stride(ctx.saved_tensors[0]), dy.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype)
        _library().swiglu_backward_rows(
            x.data_ptr(), x.stride(0), dy.data_ptr(), dx.data_ptr(), x.shape[0], dy.shape[1],
            cpu.DTYPE_CODES[x.dtype], cpu.num_threads(),
        )  # fmt: skip
        return dx


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate)·up of [T, 2I], gate first."""
    return _Swiglu.apply(gate_up) if needs_grad(gate_up) else _swiglu_forward(gate_up)  # type: ignore[return-value]
