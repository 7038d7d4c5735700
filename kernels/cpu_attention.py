"""Python side of ``cpp/attention.cpp``: paged attention and cache writes on a CPU, without gathering the pages."""

from __future__ import annotations

import ctypes
import functools

import torch

from . import cpu

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.load("attention")
    library.attention_paged.argtypes = [*[_POINTER] * 12, *[_LONG] * 17, _FLOAT, *[_INT] * 3]
    library.kv_write.argtypes = [*[_POINTER] * 10, *[_LONG] * 11, _FLOAT, *[_INT] * 3]
    library.attention_paged.restype, library.kv_write.restype = _LONG, None
    return library


def default_backend(x: torch.Tensor, k_cache: torch.Tensor, *scales: torch.Tensor | None) -> str:
    """What a CPU tensor gets when no backend is asked for: "cpp" where the twin can take it, else "torch"."""
    return "torch" if _refusal(x, k_cache, *scales) else cpu.default_backend("attention")


def _refusal(x: torch.Tensor, k_cache: torch.Tensor, *scales: torch.Tensor | None) -> str | None:
    if x.device.type != "cpu":
        return f"the tensors lie on {x.device}"
    if x.dtype not in cpu.DTYPE_CODES or k_cache.dtype not in (x.dtype, torch.int8):
        return (
            f"dtypes are {x.dtype} and {k_cache.dtype} (cache); allowed: fp32, bf16 or fp16, and the same or int8 pages"
        )
    if k_cache.dtype != torch.int8 and any(scale is not None for scale in scales):
        return f"scales are given for {k_cache.dtype} pages; allowed: int8 pages"
    return None


def _contiguous(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def attention_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    max_context_len: int,
    num_decodes: int,
    softmax_scale: float,
    alibi_slopes: torch.Tensor | None,
    window: int | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    prefix_groups: torch.Tensor | None,
    prefix_lens: torch.Tensor | None,
) -> torch.Tensor | None:
    """As `attention_decode.attention_paged`; raises ValueError for what the twin cannot take. None: the lengths, or the
    groups of prefixes, make no sense, and nothing was computed."""
    refusal = _refusal(q, k_cache, k_scale, v_scale)
    if refusal or v_cache.dtype != k_cache.dtype or v_cache.stride() != k_cache.stride() or k_cache.stride(-1) != 1:
        raise ValueError(f"attention_paged: backend 'cpp' cannot run: {refusal or 'the two caches differ in layout'}")
    if q.stride(-1) != 1:
        q = q.contiguous()
    num_tokens, num_heads, dim = q.shape
    out = torch.empty(num_tokens, num_heads, dim, dtype=q.dtype)
    if not num_tokens:
        return out
    if page_table.stride(-1) != 1 or page_table.dtype != torch.int32:
        page_table = page_table.to(torch.int32).contiguous()
    context_lens = context_lens.to(torch.int32).contiguous()
    query_starts = query_starts.to(torch.int32).contiguous()
    slopes = _contiguous(alibi_slopes, torch.float32)
    k_scale, v_scale = _contiguous(k_scale, torch.float32), _contiguous(v_scale, torch.float32)
    wrong = _library().attention_paged(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), page_table.data_ptr(),
        context_lens.data_ptr(), query_starts.data_ptr(), _pointer(slopes), _pointer(k_scale), _pointer(v_scale),
        _pointer(prefix_groups), _pointer(prefix_lens), q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1),
        k_cache.stride(2), page_table.stride(0), page_table.shape[1], num_tokens, context_lens.shape[0], num_decodes,
        0 if prefix_groups is None else prefix_groups.shape[0] - 1, num_heads, k_cache.shape[2], dim, k_cache.shape[1],
        window or 0, max_context_len, softmax_scale, cpu.DTYPE_CODES[q.dtype], k_cache.dtype == torch.int8,
        cpu.num_threads(),
    )  # fmt: skip
    return out if wrong == -1 else None


def kv_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    clip: float | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """As `kv_write.kv_write`; raises ValueError for what the twin cannot take."""
    refusal = _refusal(k, k_cache, k_scale, v_scale)
    if refusal or v.dtype != k.dtype or v_cache.stride() != k_cache.stride() or k_cache.stride(-1) != 1:
        raise ValueError(f"kv_write: backend 'cpp' cannot run: {refusal or 'keys and values differ in layout'}")
    k = k if k.stride(-1) == 1 else k.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    slots = slots.contiguous()
    cos, sin = _contiguous(cos, torch.float32), _contiguous(sin, torch.float32)
    positions = _contiguous(positions, torch.int64)
    k_scale, v_scale = _contiguous(k_scale, torch.float32), _contiguous(v_scale, torch.float32)
    _library().kv_write(
        k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), _pointer(k_scale), _pointer(v_scale),
        slots.data_ptr(), _pointer(cos), _pointer(sin), _pointer(positions), k.shape[0], k.shape[1], k.shape[2],
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), k_cache.shape[1], k_cache.stride(0), k_cache.stride(1),
        k_cache.stride(2), clip or 0.0, cpu.DTYPE_CODES[k.dtype], k_cache.dtype == torch.int8, cpu.num_threads(),
    )  # fmt: skip
