"""The three Triton kernels under ``lora_linear``: all that a rank-R update adds to a frozen GEMM.

    gemm_add    y [T, N] = x [T, K] · W + h [T, R] · B (+ bias)     the update is one more step of the GEMM's K loop
    shrink      h [T, R] = s · x [T, K] · A                          one pass over x
    gradient    d [K, R] = xᵀ [K, T] · h [T, R]                      one pass over x, tokens split and then summed

Tiles come through tensor descriptors: TMA on Hopper and later, plain loads on Ampere and in the interpreter. They ask
for rows that start on 16 bytes; ``fits`` says whether a tensor's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .dispatch import tl, triton
from .spec import CompileCase

GEMM_DEFAULT = {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "PARTS": 2, "FLATTEN": True, "warps": 8, "stages": 3}
# without TMA the addresses of a tile take registers: no larger tile fits without spills
GEMM_AMPERE = {"BM": 64, "BN": 64, "BK": 32, "GROUP": 8, "PARTS": 1, "FLATTEN": False, "warps": 8, "stages": 3}
SHRINK_DEFAULT = {"BM": 64, "BK": 128, "warps": 8, "stages": 3}
GRADIENT_DEFAULT = {"BT": 64, "BK": 128, "SPLITS": 8, "warps": 4, "stages": 4}


@triton.jit
def _gemm_add_kernel(
    x_desc,
    w_desc,
    h_desc,
    b_desc,
    y_desc,
    bias_ptr,
    T,
    N,
    K,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    W_ROWS_ARE_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_m = tl.cdiv(T, BM)
    num_n = tl.cdiv(N, BN)
    num_k = tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), num_m * num_n, NUM_PROGRAMS, flatten=FLATTEN):
        group = tile // (GROUP * num_n)
        first_m = group * GROUP
        size_m = min(num_m - first_m, GROUP)
        m = (first_m + (tile % (GROUP * num_n)) % size_m) * BM
        n = ((tile % (GROUP * num_n)) // size_m) * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in tl.range(num_k):
            x = x_desc.load([m, k * BK])
            if W_ROWS_ARE_K:
                acc = tl.dot(x, w_desc.load([k * BK, n]), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(x, w_desc.load([n, k * BK]).T, acc, input_precision=PRECISION)
        for r in tl.static_range(0, R, BR):
            h = h_desc.load([m, r])
            if W_ROWS_ARE_K:
                acc = tl.dot(h, b_desc.load([r, n]), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(h, b_desc.load([n, r]).T, acc, input_precision=PRECISION)
        if HAS_BIAS:
            columns = n + tl.arange(0, BN)
            acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        dtype: tl.constexpr = y_desc.dtype
        if PARTS == 2:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
            y_desc.store([m, n], left.to(dtype))
            y_desc.store([m, n + BN // 2], right.to(dtype))
        else:
            y_desc.store([m, n], acc.to(dtype))


@triton.jit
def _shrink_kernel(
    x_desc,
    a_ptr,
    h_ptr,
    T,
    K,
    stride_ar: tl.constexpr,
    stride_ak: tl.constexpr,
    scaling,
    R: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m = tl.program_id(0) * BM
    rank = tl.arange(0, R)
    acc = tl.zeros((BM, R), dtype=tl.float32)
    for k in tl.range(0, K, BK):
        x = x_desc.load([m, k])
        channel = k + tl.arange(0, BK)
        a = tl.load(
            a_ptr + channel[:, None] * stride_ak + rank[None, :] * stride_ar, mask=(channel < K)[:, None], other=0.0
        )
        acc = tl.dot(x, a, acc, input_precision=PRECISION)
    row = m.to(tl.int64) + tl.arange(0, BM)
    tl.store(
        h_ptr + row[:, None] * R + rank[None, :], (acc * scaling).to(h_ptr.dtype.element_ty), mask=(row < T)[:, None]
    )


@triton.jit
def _gradient_kernel(
    x_desc,
    h_desc,
    d_ptr,
    T,
    K,
    tokens_per_split,
    stride_dk,
    stride_dr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = tl.program_id(0) * BK
    split = tl.program_id(1)
    start = split * tokens_per_split
    acc = tl.zeros((BK, R), dtype=tl.float32)
    for t in tl.range(start, min(start + tokens_per_split, T), BT):
        x = x_desc.load([t, k])
        h = h_desc.load([t, 0])
        acc = tl.dot(x.T, h, acc, input_precision=PRECISION)
    channel = k + tl.arange(0, BK).to(tl.int64)
    rank = tl.arange(0, R)
    target = d_ptr + split.to(tl.int64) * K * R + channel[:, None] * stride_dk + rank[None, :] * stride_dr
    tl.store(target, acc, mask=(channel < K)[:, None])


def gemm_default(target: int) -> dict[str, Any]:
    """Tiles for a compute capability (80, 90, 100)."""
    if target < 90:
        return GEMM_AMPERE
    return GEMM_DEFAULT if target < 100 else GEMM_DEFAULT | {"FLATTEN": False}


def capability(tensor: torch.Tensor) -> int:
    """The device's compute capability as a number; what is no CUDA device runs as the newest."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def fits(*tensors: torch.Tensor) -> bool:
    """Whether each tensor's rows can be described for TMA: dense last dimension, rows and base on 16 bytes."""
    return all(
        t.shape[0] > 0
        and t.shape[1] > 0
        and t.stride(1) == 1
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def _precision(tensor: torch.Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def _describe(tensor: torch.Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def gemm_add(
    x: torch.Tensor,
    w: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    rows_are_k: bool,
    config: Mapping[str, Any],
) -> torch.Tensor:
    """x [T, K] · w + h [T, R] · b + bias; w is [N, K] and b [N, R], or with ``rows_are_k`` [K, N] and [R, N]."""
    num_tokens, num_k = x.shape
    num_out = w.shape[1] if rows_are_k else w.shape[0]
    rank = h.shape[1]
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    br = min(rank, 64)
    y = torch.empty(num_tokens, num_out, dtype=x.dtype, device=x.device)
    num_programs = min(triton.cdiv(num_tokens, bm) * triton.cdiv(num_out, bn), num_multiprocessors(x.device))
    _gemm_add_kernel[(num_programs,)](
        _describe(x, bm, bk),
        _describe(w, bk, bn) if rows_are_k else _describe(w, bn, bk),
        _describe(h, bm, br),
        _describe(b, br, bn) if rows_are_k else _describe(b, bn, br),
        _describe(y, bm, bn // config["PARTS"]),
        bias,
        num_tokens,
        num_out,
        num_k,
        R=rank,
        HAS_BIAS=bias is not None,
        W_ROWS_ARE_K=rows_are_k,
        BM=bm,
        BN=bn,
        BK=bk,
        BR=br,
        GROUP=config["GROUP"],
        PARTS=config["PARTS"],
        FLATTEN=config["FLATTEN"],
        NUM_PROGRAMS=num_programs,
        PRECISION=_precision(x),
        num_warps=config["warps"],
        num_stages=config["stages"],
    )
    return y


def shrink(
    x: torch.Tensor, a: torch.Tensor, scaling: float, *, config: Mapping[str, Any] = SHRINK_DEFAULT
) -> torch.Tensor:
    """scaling · x [T, K] · aᵀ for a [R, K] of any strides, R a power of two of at least 16 → [T, R] in x's dtype."""
    num_tokens, num_k = x.shape
    rank = a.shape[0]
    h = torch.empty(num_tokens, rank, dtype=x.dtype, device=x.device)
    bm, bk = config["BM"], config["BK"]
    _shrink_kernel[(triton.cdiv(num_tokens, bm),)](
        _describe(x, bm, bk),
        a,
        h,
        num_tokens,
        num_k,
        a.stride(0),
        a.stride(1),
        scaling,
        R=rank,
        BM=bm,
        BK=bk,
        PRECISION=_precision(x),
        num_warps=config["warps"],
        num_stages=config["stages"],
    )
    return h


def gradient(
    x: torch.Tensor, h: torch.Tensor, *, transposed: bool, config: Mapping[str, Any] = GRADIENT_DEFAULT
) -> torch.Tensor:
    """xᵀ h for x [T, K], h [T, R] → f32 [K, R], or with ``transposed`` [R, K]. Splits are summed in a fixed order."""
    num_tokens, num_k = x.shape
    rank = h.shape[1]
    bt, bk = config["BT"], config["BK"]
    splits = max(1, min(config["SPLITS"], num_tokens // bt))
    per_split = triton.cdiv(triton.cdiv(num_tokens, splits), bt) * bt
    splits = triton.cdiv(num_tokens, per_split)
    shape = (splits, rank, num_k) if transposed else (splits, num_k, rank)
    parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    _gradient_kernel[(triton.cdiv(num_k, bk), splits)](
        _describe(x, bt, bk),
        _describe(h, bt, rank),
        parts,
        num_tokens,
        num_k,
        per_split,
        1 if transposed else rank,
        num_k if transposed else 1,
        R=rank,
        BT=bt,
        BK=bk,
        PRECISION=_precision(x),
        num_warps=config["warps"],
        num_stages=config["stages"],
    )
    return parts[0] if splits == 1 else parts.sum(0)


def _descriptor(rows: int, columns: int) -> str:
    return f"tensordesc<bf16[{rows}, {columns}]>"


def compile_cases(target: int) -> list[CompileCase]:
    """The shipped tiles at rank 16 and 64, both orders of W."""
    cases = []
    sizes = dict.fromkeys(("T", "N", "K"), "i32")
    for rank in (16, 64):
        for rows_are_k in (False, True):
            config = gemm_default(target)
            bm, bn, bk, br = config["BM"], config["BN"], config["BK"], min(rank, 64)
            signature = {
                "x_desc": _descriptor(bm, bk),
                "w_desc": _descriptor(bk, bn) if rows_are_k else _descriptor(bn, bk),
                "h_desc": _descriptor(bm, br),
                "b_desc": _descriptor(br, bn) if rows_are_k else _descriptor(bn, br),
                "y_desc": _descriptor(bm, bn // config["PARTS"]),
                "bias_ptr": "*bf16",
                **sizes,
            }
            constants = {
                "R": rank,
                "HAS_BIAS": not rows_are_k,
                "W_ROWS_ARE_K": rows_are_k,
                "BR": br,
                "NUM_PROGRAMS": 132,
                "PRECISION": "tf32",
                **{k: config[k] for k in ("BM", "BN", "BK", "GROUP", "PARTS", "FLATTEN")},
            }
            cases.append(
                CompileCase(
                    f"gemm_add {'backward' if rows_are_k else 'forward'} R={rank}",
                    _gemm_add_kernel,
                    signature,
                    constants,
                    num_warps=config["warps"],
                    num_stages=config["stages"],
                    gemm=True,
                )
            )
        config = SHRINK_DEFAULT
        cases.append(
            CompileCase(
                f"shrink R={rank}",
                _shrink_kernel,
                {
                    "x_desc": _descriptor(config["BM"], config["BK"]),
                    "a_ptr": "*bf16",
                    "h_ptr": "*bf16",
                    "T": "i32",
                    "K": "i32",
                    "scaling": "fp32",
                },
                {
                    "stride_ar": 4096,
                    "stride_ak": 1,
                    "R": rank,
                    "PRECISION": "tf32",
                    **{k: config[k] for k in ("BM", "BK")},
                },
                num_warps=config["warps"],
                num_stages=config["stages"],
                gemm=True,
            )
        )
        config = GRADIENT_DEFAULT
        cases.append(
            CompileCase(
                f"gradient R={rank}",
                _gradient_kernel,
                {
                    "x_desc": _descriptor(config["BT"], config["BK"]),
                    "h_desc": _descriptor(config["BT"], rank),
                    "d_ptr": "*fp32",
                    **dict.fromkeys(("T", "K", "tokens_per_split", "stride_dk", "stride_dr"), "i32"),
                },
                {"R": rank, "PRECISION": "tf32", **{k: config[k] for k in ("BT", "BK")}},
                num_warps=config["warps"],
                num_stages=config["stages"],
                gemm=True,
            )
        )
    return cases
