"""The three Triton kernels under ``lora_linear``: all that a rank-R update adds to a frozen GEMM.

    gemm_add    y [T, N] = x [T, K] · W + h [T, R] · B (+ bias)     the update is one more step of the GEMM's K loop
    shrink      h [T, R] = s · x [T, K] · A                          one pass over x
    gradient    d [K, R] = xᵀ [K, T] · h [T, R]                      one pass over x, tokens split and then summed
    both        of them from one pass over x, where both are wanted

The GEMM's tiles come through tensor descriptors: TMA on Hopper and later, plain loads on Ampere and in the interpreter.
They ask for rows that start on 16 bytes; ``fits`` says whether a tensor's do. The others, memory-bound, load plainly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .dispatch import tl, triton
from .spec import CompileCase

# MERGED: the update's steps are iterations of the K loop that take their tiles through other descriptors, so they are
# loaded ahead as the others are. h and B end where the rank does, and the copies fill the rest of a step with zeros.
HOPPER_TILES = {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "PARTS": 2, "warps": 8, "stages": 3}
GEMM_DEFAULT = HOPPER_TILES | {"FLATTEN": True, "MERGED": True}
# without TMA the addresses of a tile take registers: no larger tile fits without spills
GEMM_AMPERE = GEMM_DEFAULT | {"BM": 64, "BN": 64, "BK": 32, "PARTS": 1, "FLATTEN": False, "MERGED": False}
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
    MERGED: tl.constexpr,
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
        for k in tl.range(num_k + tl.cdiv(R, BK) if MERGED else num_k):
            left = x_desc
            right = w_desc
            at = k * BK
            if MERGED:  # noqa: SIM102 - decided when compiled, the inner one when run
                if k >= num_k:
                    left = h_desc
                    right = b_desc
                    at = (k - num_k) * BK
            x = left.load([m, at])
            if W_ROWS_ARE_K:
                acc = tl.dot(x, right.load([at, n]), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(x, right.load([n, at]).T, acc, input_precision=PRECISION)
        if not MERGED:
            for r in tl.range(0, R, BR, num_stages=1):
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
    x_ptr,
    a_ptr,
    h_ptr,
    T,
    K,
    stride_x,
    stride_ar,
    stride_ak,
    scaling,
    R: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    rank = tl.arange(0, R)
    within = tl.arange(0, BK)
    inside = (row < T)[:, None]
    x_at = x_ptr + row[:, None] * stride_x + within[None, :]
    a_at = a_ptr + within[:, None] * stride_ak + rank[None, :] * stride_ar
    acc = tl.zeros((BM, R), dtype=tl.float32)
    for k in tl.range(0, K, BK):
        ok = k + within < K
        x = tl.load(x_at + k, mask=inside & ok[None, :], other=0.0)
        a = tl.load(a_at + k * stride_ak, mask=ok[:, None], other=0.0)
        acc = tl.dot(x, a, acc, input_precision=PRECISION)
    tl.store(h_ptr + row[:, None] * R + rank[None, :], (acc * scaling).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    x_ptr,
    h_ptr,
    d_ptr,
    a_ptr,
    g_ptr,
    T,
    K,
    stride_x,
    tokens_per_split,
    stride_dk,
    stride_dr,
    stride_ar,
    stride_ak,
    SHRINK: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d [split, K, R] = xᵀ h over the split's tokens; with SHRINK, from the same tiles, g [K's block, T, R] = x aᵀ."""
    channel = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    ok = channel < K
    rank = tl.arange(0, R)
    within = tl.arange(0, BT)
    if SHRINK:
        a_at = a_ptr + channel[:, None] * stride_ak + rank[None, :] * stride_ar
        a = tl.load(a_at, mask=ok[:, None], other=0.0)
        g_block = g_ptr + tl.program_id(0).to(tl.int64) * T * R
    acc = tl.zeros((BK, R), dtype=tl.float32)
    start = split * tokens_per_split
    for t in tl.range(start, min(start + tokens_per_split, T), BT):
        row = (t + within).to(tl.int64)
        there = (t + within < T)[:, None]
        x = tl.load(x_ptr + row[:, None] * stride_x + channel[None, :], mask=there & ok[None, :], other=0.0)
        h = tl.load(h_ptr + row[:, None] * R + rank[None, :], mask=there, other=0.0)
        acc = tl.dot(x.T, h, acc, input_precision=PRECISION)
        if SHRINK:
            g = tl.dot(x, a, input_precision=PRECISION)
            tl.store(g_block + row[:, None] * R + rank[None, :], g, mask=there)
    target = d_ptr + split.to(tl.int64) * K * R + channel[:, None] * stride_dk + rank[None, :] * stride_dr
    tl.store(target, acc, mask=ok[:, None])


@triton.jit
def _sum_kernel(parts_ptr, out_ptr, size, scaling, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """out [size] = scaling · Σ parts [COUNT, size], in a fixed order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(COUNT):
        acc += tl.load(parts_ptr + part * tl.cast(size, tl.int64) + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, (acc * scaling).to(out_ptr.dtype.element_ty), mask=at < size)


def gemm_default(target: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Tiles for a compute capability (80, 90, 100)."""
    if target < 90 or dtype == torch.float32:
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


def rank_loop(rank: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """How the GEMM goes through the rank: as steps of the K loop, or after it in steps of at most 64.

    Several steps after it are not flattened into the outer loop: their tiles would all lie in shared memory at once.
    """
    if config["MERGED"]:
        return {"MERGED": True, "BR": config["BK"], "FLATTEN": config["FLATTEN"]}
    return {"MERGED": False, "BR": min(rank, 64), "FLATTEN": config["FLATTEN"] and rank <= 64}


def _channels(config: Mapping[str, Any], rank: int, dtype: torch.dtype) -> int:
    """Channels of a step in the small kernels: fewer where the rank is large."""
    return max(16, min(config["BK"], 16384 // (rank * dtype.itemsize)))


def gradient_tiles(config: Mapping[str, Any], rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Channels, warps and stages of the gradient's kernel, such that a large rank finds room in shared memory (Ampere:
    163 KiB) and registers."""
    channels = _channels(config, rank, dtype)
    stage_bytes = config["BT"] * (channels + rank) * dtype.itemsize
    return {
        "BK": channels,
        "num_warps": config["warps"] if rank * dtype.itemsize <= 256 else max(8, config["warps"]),
        "num_stages": min(config["stages"], max(2, 98304 // stage_bytes)),
    }


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
    loop = rank_loop(rank, config)
    br = loop["BR"]
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
        GROUP=config["GROUP"],
        PARTS=config["PARTS"],
        **loop,
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
    _shrink_kernel[(triton.cdiv(num_tokens, config["BM"]),)](
        x,
        a,
        h,
        num_tokens,
        num_k,
        x.stride(0),
        a.stride(0),
        a.stride(1),
        scaling,
        R=rank,
        BM=config["BM"],
        BK=_channels(config, rank, x.dtype),
        PRECISION=_precision(x),
        num_warps=config["warps"],
        num_stages=config["stages"],
    )
    return h


def _sum(parts: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    size = out.numel()
    _sum_kernel[(triton.cdiv(size, 1024),)](parts, out, size, scaling, COUNT=parts.shape[0], BLOCK=1024, num_warps=4)
    return out


def gradient(
    x: torch.Tensor,
    h: torch.Tensor,
    *,
    transposed: bool,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] = GRADIENT_DEFAULT,
) -> torch.Tensor:
    """xᵀ h for x [T, K], h [T, R] → [K, R], or with ``transposed`` [R, K]. Splits are summed in a fixed order."""
    return _gradient(x, h, None, 0.0, transposed, dtype, config)[0]


def gradient_and_shrink(
    x: torch.Tensor,
    h: torch.Tensor,
    a: torch.Tensor,
    scaling: float,
    *,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] = GRADIENT_DEFAULT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over x [T, K] for two results: xᵀ h [K, R] and scaling · x · aᵀ [T, R] in x's dtype."""
    d, g = _gradient(x, h, a, scaling, False, dtype, config)
    assert g is not None
    return d, g


def _gradient(
    x: torch.Tensor,
    h: torch.Tensor,
    a: torch.Tensor | None,
    scaling: float,
    transposed: bool,
    dtype: torch.dtype,
    config: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    num_tokens, num_k = x.shape
    rank = h.shape[1]
    bt = config["BT"]
    tiles = gradient_tiles(config, rank, x.dtype)
    blocks = triton.cdiv(num_k, tiles["BK"])
    splits = max(1, min(config["SPLITS"], num_tokens // bt))
    per_split = triton.cdiv(triton.cdiv(num_tokens, splits), bt) * bt
    splits = triton.cdiv(num_tokens, per_split)
    shape = (splits, rank, num_k) if transposed else (splits, num_k, rank)
    parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    g_parts = None if a is None else torch.empty(blocks, num_tokens, rank, dtype=torch.float32, device=x.device)
    _gradient_kernel[(blocks, splits)](
        x,
        h,
        parts,
        a,
        g_parts,
        num_tokens,
        num_k,
        x.stride(0),
        per_split,
        1 if transposed else rank,
        num_k if transposed else 1,
        0 if a is None else a.stride(0),
        0 if a is None else a.stride(1),
        SHRINK=a is not None,
        R=rank,
        BT=bt,
        PRECISION=_precision(x),
        **tiles,
    )
    return _sum(parts, 1.0, dtype), None if g_parts is None else _sum(g_parts, scaling, x.dtype)


TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
COMPILED = {
    16: (torch.bfloat16,),
    64: (torch.bfloat16, torch.float32),
    128: (torch.bfloat16, torch.float32),
    256: tuple(TYPES),
}


def compile_cases(target: int) -> list[CompileCase]:
    """The shipped tiles from the smallest rank to the largest, both orders of W."""
    return [case for rank, dtypes in COMPILED.items() for dtype in dtypes for case in _cases(target, rank, dtype)]


def _cases(target: int, rank: int, dtype: torch.dtype) -> list[CompileCase]:
    kind, wide = TYPES[dtype], dtype == torch.float32
    name = f"R={rank} {kind}"
    common: dict[str, Any] = {"R": rank, "PRECISION": "ieee" if wide else "tf32"}
    cases = []
    for rows_are_k in (False, True):
        config = gemm_default(target, dtype)
        bm, bn, bk = config["BM"], config["BN"], config["BK"]
        loop = rank_loop(rank, config)
        br = loop["BR"]

        def descriptor(rows: int, columns: int) -> str:
            return f"tensordesc<{kind}[{rows}, {columns}]>"

        cases.append(
            CompileCase(
                f"gemm_add {'backward' if rows_are_k else 'forward'} {name}",
                _gemm_add_kernel,
                {
                    "x_desc": descriptor(bm, bk),
                    "w_desc": descriptor(bk, bn) if rows_are_k else descriptor(bn, bk),
                    "h_desc": descriptor(bm, br),
                    "b_desc": descriptor(br, bn) if rows_are_k else descriptor(bn, br),
                    "y_desc": descriptor(bm, bn // config["PARTS"]),
                    "bias_ptr": f"*{kind}",
                    **dict.fromkeys(("T", "N", "K"), "i32"),
                },
                {
                    "HAS_BIAS": not rows_are_k,
                    "W_ROWS_ARE_K": rows_are_k,
                    "NUM_PROGRAMS": 132,
                    **{k: config[k] for k in ("BM", "BN", "BK", "GROUP", "PARTS")},
                    **common,
                    **loop,
                },
                num_warps=config["warps"],
                num_stages=config["stages"],
                hot=not wide,
                gemm=not wide,
            )
        )
    config = SHRINK_DEFAULT
    cases.append(
        CompileCase(
            f"shrink {name}",
            _shrink_kernel,
            {
                **dict.fromkeys(("x_ptr", "a_ptr", "h_ptr"), f"*{kind}"),
                **dict.fromkeys(("T", "K", "stride_x", "stride_ar"), "i32"),
                "scaling": "fp32",
            },
            {"stride_ak": 1, "BM": config["BM"], "BK": _channels(config, rank, dtype), **common},
            num_warps=config["warps"],
            num_stages=config["stages"],
            hot=not wide,
            gemm=not wide,
            attrs=dict.fromkeys(("T", "K", "stride_x", "stride_ar"), 16),
        )
    )
    config = GRADIENT_DEFAULT
    tiles = gradient_tiles(config, rank, dtype)
    for both in (False, True):
        integers = ("T", "K", "stride_x", "tokens_per_split", "stride_dk", "stride_ak")
        cases.append(
            CompileCase(
                f"gradient{' and shrink' if both else ''} {name}",
                _gradient_kernel,
                {
                    **dict.fromkeys(("x_ptr", "h_ptr", "a_ptr"), f"*{kind}"),
                    **dict.fromkeys(("d_ptr", "g_ptr"), "*fp32"),
                    **dict.fromkeys(integers, "i32"),
                },
                {
                    "stride_dr": 1,
                    "stride_ar": 1,
                    "SHRINK": both,
                    "BT": config["BT"],
                    "BK": tiles["BK"],
                    **common,
                },
                num_warps=tiles["num_warps"],
                num_stages=tiles["num_stages"],
                hot=not wide,
                gemm=not wide and tiles["BK"] >= 64,  # of wgmma's rows
                attrs=dict.fromkeys(integers, 16),
            )
        )
    return cases
