"""Packed variable-length attention, forward and backward.

For every sequence of the packed batch, head h and query i, over the keys j of the same sequence:

    s_ij = softmax_scale · q_i·k_j − slope_h · |i − j|
    out_i = Σ_j softmax_j(s_ij) v_j        lse_i = log Σ_j exp(s_ij)

Causal attention sees j ≤ i; a sliding window sees |i − j| < window. Query heads share key/value heads in consecutive
groups of H/K. Sequences are packed along T with starts ``query_starts`` [B+1]; nothing is padded. ALiBi: Press
et al., "Train Short, Test Long", 2022. Online softmax and the recomputing backward: Dao, "FlashAttention-2",
2023.

The Triton kernels are in attention_forward.py and attention_backward.py, Hopper's forward in attention_hopper.py.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from . import cpu_prefill
from .dispatch import bad_argument, choose_backend
from .tuning import tuned_config

OP = "attention_prefill"
BACKENDS = ("triton", "torch", "sdpa", "flash", "cpp")
MAX_HEAD_DIM = 256
QUERY_BLOCK = 256  # rows of a bias tile in the torch backend: bounds its memory and skips the keys above the diagonal


def alibi_slopes(num_heads: int, bias_max: float = 8, device: torch.device | str | None = None) -> torch.Tensor:
    """Slopes f32[H], in MPT's order.

    For a power of two n the slopes are 2^(−bias_max·i/n), i = 1…n. Otherwise those of the next power of two are
    taken, first i = 2, 4, …, then i = 1, 3, …, and cut to ``num_heads``.
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads is {num_heads}; allowed: 1 or more")
    rounded = 1 << (num_heads - 1).bit_length()
    exponents = torch.arange(1, rounded + 1, dtype=torch.float32) * (bias_max / rounded)
    slopes = torch.pow(2.0, -exponents)
    if rounded != num_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:num_heads]
    return slopes.to(device) if device is not None else slopes


def bias_tile(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    slopes: torch.Tensor | None,
    window: int | None,
    causal: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Additive bias [1 or H, queries, keys]: ALiBi where allowed, −inf where masked."""
    distance = query_positions[:, None] - key_positions[None, :]
    span = distance.abs()
    masked = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        masked = masked | (span >= window)
    if slopes is None:
        bias = torch.zeros((1, *distance.shape), dtype=dtype, device=distance.device)
    else:
        bias = -slopes.to(dtype)[:, None, None] * span.to(dtype)
    return bias.masked_fill_(masked, float("-inf"))


def _sequences(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_starts: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each sequence's rows and its q, k, v as [H,L,D] in fp32 (fp64 stays fp64), key heads repeated for their
    group.
    """
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    for start, stop in pairwise(query_starts.tolist()):
        rows = slice(start, stop)
        heads = (q[rows], k[rows].repeat_interleave(group, dim=1), v[rows].repeat_interleave(group, dim=1))
        qs, ks, vs = (x.to(accumulate).transpose(0, 1) for x in heads)
        yield rows, qs, ks, vs


class _Reference(torch.autograd.Function):
    """Sequence by sequence with the whole score matrix, in fp32 or better. What the backward pass takes δ from is
    ``saved_out`` in q's type, or the reference's own result where none is given.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v, query_starts, softmax_scale, slopes, window, causal, saved_out):
        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.zeros_like(q)
        lse = torch.zeros(q.shape[:2], dtype=accumulate, device=q.device)
        for rows, qs, ks, vs in _sequences(q, k, v, query_starts):
            positions = torch.arange(qs.shape[1], device=q.device)
            scores = qs @ ks.mT * softmax_scale + bias_tile(positions, positions, slopes, window, causal, accumulate)
            lse[rows] = torch.logsumexp(scores, dim=-1).T
            out[rows] = (torch.softmax(scores, dim=-1) @ vs).transpose(0, 1).to(q.dtype)
        ctx.save_for_backward(q, k, v, out if saved_out is None else saved_out, lse, query_starts, slopes)
        ctx.settings = (softmax_scale, window, causal)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout, _dlse):  # type: ignore[override]
        q, k, v, out, lse, query_starts, slopes = ctx.saved_tensors
        softmax_scale, window, causal = ctx.settings
        group = q.shape[1] // k.shape[1]
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, qs, ks, vs in _sequences(q, k, v, query_starts):
            positions = torch.arange(qs.shape[1], device=q.device)
            scores = qs @ ks.mT * softmax_scale + bias_tile(positions, positions, slopes, window, causal, qs.dtype)
            weights = torch.exp(scores - lse[rows].T[..., None])
            douts = dout[rows].to(qs.dtype).transpose(0, 1)
            delta = (out[rows].to(qs.dtype).transpose(0, 1) * douts).sum(-1, keepdim=True)
            dscores = weights * (douts @ vs.mT - delta) * softmax_scale
            dq[rows] = (dscores @ ks).transpose(0, 1).to(q.dtype)
            dk[rows] = (dscores.mT @ qs).unflatten(0, (-1, group)).sum(1).transpose(0, 1).to(k.dtype)
            dv[rows] = (weights.mT @ douts).unflatten(0, (-1, group)).sum(1).transpose(0, 1).to(v.dtype)
        return dq, dk, dv, None, None, None, None, None, None


def attention_prefill_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    max_query_len: int,
    softmax_scale: float,
    alibi_slopes: torch.Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    return_lse: bool = False,
    saved_out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The readable truth, forward and backward; arguments as attention_prefill.

    ``saved_out`` [T,H,D] is the output that a backward pass finds saved: gradients are functions of q, k, v, dout and
    of it. Given another implementation's, the reference's gradients start where that implementation's start.
    """
    out, lse = _Reference.apply(  # type: ignore[misc]
        q, k, v, query_starts, softmax_scale, alibi_slopes, window, causal, saved_out
    )
    return (out, lse) if return_lse else out


def sdpa_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first_position: int,
    softmax_scale: float,
    slopes: torch.Tensor | None,
    window: int | None,
    causal: bool,
) -> torch.Tensor:
    """Queries [N,L,H,D] at positions first_position… against keys [N,M,K,D] at positions 0…, by torch's own SDPA."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    plain = slopes is None and (window is None or window >= num_keys)
    square = first_position == 0 and num_queries == num_keys
    if plain and (not causal or square or num_queries == 1):
        is_causal = causal and num_queries > 1
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=softmax_scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    positions = torch.arange(first_position, first_position + num_queries, device=q.device)
    keys = torch.arange(num_keys, device=q.device)
    outs = []
    for start in range(0, num_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_queries)
        first = 0 if window is None else max(0, first_position + start - window + 1)
        last = num_keys if not causal else min(num_keys, first_position + stop)
        bias = bias_tile(positions[start:stop], keys[first:last], slopes, window, causal, dtype)
        if q.is_cuda:
            bias = bias.to(q.dtype)
        outs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop],
                k[:, :, first:last],
                v[:, :, first:last],
                attn_mask=bias[None].expand(q.shape[0], q.shape[1], -1, -1),
                scale=softmax_scale,
                enable_gqa=grouped,
            )
        )
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)).transpose(1, 2)


def _torch_prefill(q, k, v, query_starts, softmax_scale, slopes, window, causal) -> torch.Tensor:
    """One SDPA call per sequence, or one for all where every sequence has the same length."""
    starts = query_starts.tolist()
    lengths = [stop - start for start, stop in pairwise(starts)]
    if q.shape[0] == 0:
        return q + 0.0 * (k.sum() + v.sum())  # empty, and still a function of all three
    if len(set(lengths)) == 1:
        q_, k_, v_ = (x.unflatten(0, (len(lengths), lengths[0])) for x in (q, k, v))
        return sdpa_sequence(q_, k_, v_, 0, softmax_scale, slopes, window, causal).reshape(q.shape)
    outs = []
    for start, stop in pairwise(starts):
        if stop > start:
            q_, k_, v_ = (x[None, start:stop] for x in (q, k, v))
            outs.append(sdpa_sequence(q_, k_, v_, 0, softmax_scale, slopes, window, causal)[0])
    return torch.cat(outs)


def _flash_prefill(q, k, v, query_starts, max_query_len, softmax_scale, slopes, window, causal) -> torch.Tensor:
    """The flash-attn package's variable-length kernel."""
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(f"{OP}: backend 'flash' needs the flash-attn package, which is not installed")
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    left = window - 1 if window is not None else -1
    return flash_attn_varlen_func(
        q, k, v, query_starts, query_starts, max_query_len, max_query_len, softmax_scale=softmax_scale, causal=causal,
        window_size=(left, 0 if causal and window is not None else left), alibi_slopes=slopes,
    )  # fmt: skip


def check_attention(
    op: str,
    q: torch.Tensor,
    keys: dict[str, torch.Tensor],
    query_starts: torch.Tensor,
    softmax_scale: float,
    slopes: torch.Tensor | None,
    window: int | None,
) -> None:
    """What prefill and paged attention ask alike of their arguments; ``keys`` are the tensors whose last two
    dims are [K,D].
    """
    if q.dim() != 3:
        raise bad_argument(op, "q", f"of shape {tuple(q.shape)}", "[T,H,D]")
    num_heads, head_dim = q.shape[1:]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise bad_argument(op, "q", f"of head dim {head_dim}", f"1 to {MAX_HEAD_DIM}")
    if not q.dtype.is_floating_point or q.dtype.itemsize == 1:
        raise bad_argument(op, "q", q.dtype, "float64 (torch backend), float32, float16 or bfloat16")
    for name, tensor in keys.items():
        if tensor.shape[-1] != head_dim:
            raise bad_argument(op, name, f"of head dim {tensor.shape[-1]}", f"{head_dim}, as q")
        if tensor.shape[-2] == 0 or num_heads % tensor.shape[-2]:
            raise bad_argument(op, name, f"of {tensor.shape[-2]} heads", f"a divisor of q's {num_heads}")
        if tensor.device != q.device:
            raise bad_argument(op, name, f"on {tensor.device}", f"{q.device}, as q")
    if query_starts.dim() != 1 or query_starts.shape[0] < 1:
        raise bad_argument(op, "query_starts", f"of shape {tuple(query_starts.shape)}", "[B+1]")
    if query_starts.dtype not in (torch.int32, torch.int64):
        raise bad_argument(op, "query_starts", query_starts.dtype, "int32")
    if query_starts.device != q.device:
        raise bad_argument(op, "query_starts", f"on {query_starts.device}", f"{q.device}, as q")
    if not query_starts.is_cuda:
        starts = query_starts.tolist()
        if starts[0] != 0 or starts[-1] != q.shape[0] or any(a > b for a, b in pairwise(starts)):
            raise bad_argument(op, "query_starts", starts, f"ascending from 0 to {q.shape[0]}, the rows of q")
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise bad_argument(op, "softmax_scale", softmax_scale, "a positive number")
    if slopes is not None and (slopes.shape != (num_heads,) or slopes.dtype != torch.float32):
        raise bad_argument(op, "alibi_slopes", f"{slopes.dtype} {tuple(slopes.shape)}", f"float32 ({num_heads},)")
    if slopes is not None and slopes.device != q.device:
        raise bad_argument(op, "alibi_slopes", f"on {slopes.device}", f"{q.device}, as q")
    if window is not None and window < 1:
        raise bad_argument(op, "window", window, "None, or 1 or more keys")


def shape_bucket(q: torch.Tensor) -> str:
    """Name of a row in kernels/tuned: element width and head dim decide the tiles."""
    return f"{q.dtype.itemsize * 8}bit-d{q.shape[-1]}"


class _TritonAttention(torch.autograd.Function):
    """Forward by the device's best kernel; out and lse are saved, scores are recomputed in the backward."""

    @staticmethod
    def forward(ctx: Any, q, k, v, query_starts, max_query_len, softmax_scale, slopes, window, causal):
        out, lse = _launch(q, k, v, query_starts, max_query_len, softmax_scale, slopes, window, causal)
        ctx.save_for_backward(q, k, v, out, lse, query_starts, slopes)
        ctx.settings = (max_query_len, softmax_scale, window, causal)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout, _dlse):  # type: ignore[override]
        q, k, v, out, lse, query_starts, slopes = ctx.saved_tensors
        max_query_len, softmax_scale, window, causal = ctx.settings
        bucket, sizes = shape_bucket(q), (q.shape[-1], q.dtype.itemsize)
        arguments = (q, k, v, out, lse, _unit_stride(dout), query_starts, max_query_len, softmax_scale, slopes)
        if use_hopper(q, k, v, window, causal) and use_hopper(arguments[5], k, v, window, causal):
            from . import attention_hopper_backward as hopper

            key_config = tuned_config("attention_dkdv_hopper", bucket, hopper.default_key_config(q.shape[-1]))
            query_config = tuned_config("attention_dq_hopper", bucket, hopper.default_query_config(q.shape[-1]))
            dq, dk, dv = hopper.launch_backward(*arguments, key_config, query_config)
        else:
            from . import attention_backward as backward

            target = capability(q)
            key_config = tuned_config("attention_dkdv", bucket, backward.default_key_config(*sizes, target))
            query_config = tuned_config("attention_dq", bucket, backward.default_query_config(*sizes, target))
            dq, dk, dv = backward.launch_backward(*arguments, window, causal, key_config, query_config)
        return dq, dk, dv, None, None, None, None, None, None


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def capability(x: torch.Tensor) -> int:
    """Compute capability of x's device as 80, 90, 100, …; the interpreter counts as 80."""
    if not x.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


@functools.cache
def _has_gluon() -> bool:
    return importlib.util.find_spec("triton.experimental.gluon") is not None


def use_hopper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, causal: bool) -> bool:
    """Whether Hopper's own kernels run: the device has wgmma, this Triton has Gluon, and the shapes fit."""
    if not q.is_cuda or capability(q) != 90 or not _has_gluon():
        return False
    from . import attention_hopper

    return attention_hopper.supports(q, k, v, window, causal)


def _launch(q, k, v, query_starts, max_query_len, softmax_scale, slopes, window, causal):
    bucket = shape_bucket(q)
    if use_hopper(q, k, v, window, causal):
        from . import attention_hopper as hopper

        config = tuned_config("attention_prefill_hopper", bucket, hopper.default_config(q.shape[-1]))
        return hopper.launch_forward(q, k, v, query_starts, max_query_len, softmax_scale, slopes, config)
    from . import attention_forward as forward

    config = tuned_config(OP, bucket, forward.default_config(q.shape[-1], q.dtype.itemsize, capability(q)))
    return forward.launch_forward(q, k, v, query_starts, max_query_len, softmax_scale, slopes, window, causal, config)


def attention_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    max_query_len: int,
    softmax_scale: float,
    alibi_slopes: torch.Tensor | None = None,
    window: int | None = None,
    causal: bool = True,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention within each packed sequence. Differentiable in q, k and v.

    q [T,H,D], k and v [T,K,D] with K dividing H, query_starts int32 [B+1] from 0 to T, alibi_slopes f32 [H].
    Returns out [T,H,D] like q, and with ``return_lse`` also lse f32 [T,H] (no gradient flows through lse).
    Backends: "triton"; "torch" and "sdpa" (SDPA per sequence); "flash" (the flash-attn package, CUDA, no
    lse); "cpp" (bf16 on a CPU).
    Raises ValueError for arguments that do not fit, before any launch.
    """
    chosen = choose_backend(OP, q, backend, BACKENDS, cpu_prefill.default_backend(q))
    check_attention(OP, q, {"k": k, "v": v}, query_starts, softmax_scale, alibi_slopes, window)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != q.shape[0] or tensor.dim() != 3 or tensor.shape[1] != k.shape[1]:
            raise bad_argument(OP, name, f"of shape {tuple(tensor.shape)}", "[T,K,D] with the T of q")
        if tensor.dtype != q.dtype:
            raise bad_argument(OP, name, tensor.dtype, f"{q.dtype}, as q")
    softmax_scale = float(softmax_scale)
    if chosen == "triton":
        if q.dtype == torch.float64:
            raise bad_argument(OP, "q", q.dtype, "float32, float16 or bfloat16 with backend 'triton'")
        head_dim = q.shape[-1]
        if head_dim % 16:  # zeros change no score, and every row then starts where a wide load may
            q, k, v = (F.pad(x, (0, -head_dim % 16)) for x in (q, k, v))
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        out, lse = _TritonAttention.apply(
            q, k, v, query_starts, max_query_len, softmax_scale, alibi_slopes, window, causal
        )  # type: ignore[misc]
        out = out[..., :head_dim]
        return (out, lse.transpose(0, 1) * math.log(2)) if return_lse else out
    if chosen == "cpp":
        if q.dtype != torch.bfloat16:
            raise bad_argument(OP, "q", q.dtype, "bfloat16 with backend 'cpp'")
        return cpu_prefill.attention(  # type: ignore[return-value]
            q, k, v, query_starts, softmax_scale, alibi_slopes, window, causal, return_lse
        )
    if chosen == "flash":
        if return_lse:
            raise bad_argument(OP, "return_lse", True, "False with backend 'flash'")
        return _flash_prefill(q, k, v, query_starts, max_query_len, softmax_scale, alibi_slopes, window, causal)
    if return_lse:
        return attention_prefill_reference(
            q, k, v, query_starts, max_query_len=max_query_len, softmax_scale=softmax_scale,
            alibi_slopes=alibi_slopes,
            window=window, causal=causal, return_lse=True,
        )  # fmt: skip
    return _torch_prefill(q, k, v, query_starts, softmax_scale, alibi_slopes, window, causal)
