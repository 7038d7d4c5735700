"""Python side of the C++ twin of packed attention (``cpp/attention_prefill.cpp``): bf16 on a CPU, forward and backward.

torch's own CPU attention takes one sequence a call, reaches a tenth of the machine in its bf16 backward pass and has no
ALiBi; this one takes the whole packed batch.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from . import cpu
from .rows import needs_grad

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_VIEW = [_POINTER, _LONG, _LONG]
_SHAPE = [_POINTER, _LONG, _LONG, _LONG, _LONG, _FLOAT, _POINTER, _LONG, _INT]


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.load("attention_prefill")
    forward, backward = library.attention_prefill_forward, library.attention_prefill_backward
    forward.argtypes = [*_VIEW * 3, *_SHAPE, _POINTER, _POINTER, _INT]
    backward.argtypes = [
        *_VIEW,
        *_VIEW,
        *_VIEW,
        _POINTER,
        *_VIEW,
        _POINTER,
        *_SHAPE,
        _POINTER,
        _POINTER,
        _POINTER,
        _INT,
    ]
    forward.restype = backward.restype = None
    return library


def default_backend(q: torch.Tensor) -> str:
    """What a CPU tensor gets when no backend is asked for: "cpp" for bf16 where the twin builds, else "torch"."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return "torch"
    return cpu.default_backend("attention_prefill")


def _view(x: torch.Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _shape(q, k, query_starts, softmax_scale, slopes, window, causal):
    return (
        query_starts.data_ptr(), query_starts.shape[0] - 1, q.shape[1], k.shape[1], q.shape[2], softmax_scale,
        None if slopes is None else slopes.data_ptr(), window or 0, causal,
    )  # fmt: skip


def _forward(q, k, v, query_starts, softmax_scale, slopes, window, causal, want_lse):
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.float32) if want_lse else None
    _library().attention_prefill_forward(
        *_view(q), *_view(k), *_view(v), *_shape(q, k, query_starts, softmax_scale, slopes, window, causal),
        out.data_ptr(), None if lse is None else lse.data_ptr(), cpu.num_threads(),
    )  # fmt: skip
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, query_starts, softmax_scale, slopes, window, causal):  # type: ignore[override]
        out, lse = _forward(q, k, v, query_starts, softmax_scale, slopes, window, causal, True)
        ctx.save_for_backward(q, k, v, out, lse, query_starts, slopes)
        ctx.settings = (softmax_scale, window, causal)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad, _):  # type: ignore[override]
        q, k, v, out, lse, query_starts, slopes = ctx.saved_tensors
        softmax_scale, window, causal = ctx.settings
        grad = _unit_stride(grad)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        _library().attention_prefill_backward(
            *_view(q), *_view(k), *_view(v), out.data_ptr(), *_view(grad), lse.data_ptr(),
            *_shape(q, k, query_starts, softmax_scale, slopes, window, causal),
            dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), cpu.num_threads(),
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None, None


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def attention(q, k, v, query_starts, softmax_scale: float, slopes, window, causal: bool, return_lse: bool):
    """q [T,H,D], k and v [T,K,D] in bf16; returns out [T,H,D], with ``return_lse`` also lse f32 [T,H]."""
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    query_starts = query_starts.contiguous()
    slopes = None if slopes is None else slopes.to(torch.float32).contiguous()
    if needs_grad(q, k, v):
        out, lse = _Attention.apply(q, k, v, query_starts, softmax_scale, slopes, window, causal)  # type: ignore[misc]
    else:
        out, lse = _forward(q, k, v, query_starts, softmax_scale, slopes, window, causal, return_lse)
    return (out, lse) if return_lse else out
