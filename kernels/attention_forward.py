"""Triton forward kernel of packed attention for any GPU (and the interpreter); Hopper's own is
attention_hopper.py.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from .attention_tiles import LOG2_E, attend, finish_rows, key_limits, locate_tile, split_head_dim, start_rows


@triton.jit
def schedule(program, num_tiles, num_heads, heads_per_group):
    """Tile and head of a program. Long causal tiles come first, and a group of heads, small enough for its keys
    and values to stay in the L2 cache, is finished before the next."""
    group_size = num_tiles * heads_per_group
    group = program // group_size
    heads_here = tl.minimum(heads_per_group, num_heads - group * heads_per_group)
    inside = program % group_size
    tile = num_tiles - 1 - inside // heads_here
    head = group * heads_per_group + inside % heads_here
    return tile, head


# Counts and limits change from batch to batch: without specialising on them one compiled kernel serves all.
@triton.jit(do_not_specialize=["lse_head", "num_sequences", "num_tiles", "num_heads", "heads_per_group", "window"])
def forward_kernel(
    q, k, v, out, lse, starts, slopes,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head, lse_head,
    num_sequences, num_tiles, num_heads, heads_per_group, window, scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M queries of one head against all its keys. ``scale`` carries log2(e); lse is written
    as [H,T] in log2.
    """
    tile, head = schedule(tl.program_id(0), num_tiles, num_heads, heads_per_group)
    _, sequence_start, length, row = locate_tile(starts, tile, num_sequences, BLOCK_M)
    if row >= length:
        return
    head_id = head.to(tl.int64)
    first = sequence_start.to(tl.int64)
    positions = row + tl.arange(0, BLOCK_M)
    rows_in = positions < length
    q_rows = q + head_id * q_head + (first + positions.to(tl.int64))[:, None] * q_stride
    q0, q1, q2, acc0, acc1, acc2, row_sum, row_max = start_rows(q_rows, rows_in, HEAD_DIM, D0, D1, D2)

    k_base = k + (head_id // GROUP) * k_head + first * k_stride
    v_base = v + (head_id // GROUP) * v_head + first * v_stride
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes + head) * 1.4426950408889634
    last_position = tl.minimum(row + BLOCK_M, length) - 1
    begin, full_begin, full_end, edge, end = key_limits(row, last_position, length, window, CAUSAL, HAS_WINDOW, BLOCK_N)
    if HAS_WINDOW:
        acc0, acc1, acc2, row_sum, row_max = attend(
            acc0, acc1, acc2, row_sum, row_max, q0, q1, q2, positions, last_position, slope, k_base, v_base,
            k_stride, v_stride,
            starts, 0, 0, begin, tl.minimum(full_begin, end), length, window, scale, HEAD_DIM, D0, D1, D2, BLOCK_N, 0,
            CAUSAL, HAS_ALIBI, HAS_WINDOW, True,
        )  # fmt: skip
    acc0, acc1, acc2, row_sum, row_max = attend(
        acc0, acc1, acc2, row_sum, row_max, q0, q1, q2, positions, last_position, slope, k_base, v_base, k_stride,
        v_stride,
        starts, 0, 0, full_begin, full_end, length, window, scale, HEAD_DIM, D0, D1, D2, BLOCK_N, 0,
        CAUSAL, HAS_ALIBI, HAS_WINDOW, False,
    )  # fmt: skip
    acc0, acc1, acc2, row_sum, row_max = attend(
        acc0, acc1, acc2, row_sum, row_max, q0, q1, q2, positions, last_position, slope, k_base, v_base, k_stride,
        v_stride,
        starts, 0, 0, edge, end, length, window, scale, HEAD_DIM, D0, D1, D2, BLOCK_N, 0,
        CAUSAL, HAS_ALIBI, HAS_WINDOW, True,
    )  # fmt: skip

    out_rows = out + head_id * out_head + (first + positions.to(tl.int64))[:, None] * out_stride
    finish_rows(out_rows, acc0, acc1, acc2, tl.div_rn(1.0, row_sum), rows_in, HEAD_DIM, D0, D1, D2)
    log_sum = row_max + tl.math.log2(row_sum)
    if HAS_ALIBI and CAUSAL:
        log_sum -= slope * (positions - last_position).to(tl.float32)
    tl.store(lse + head_id * lse_head + first + positions, log_sum, mask=rows_in)


def heads_per_group(num_heads: int, group: int, max_len: int, head_dim: int, element_bytes: int) -> int:
    """How many heads run side by side so that their keys and values stay within about 16 MB of L2: on an H100
    MPT-30B's forward pass reached 532 TFLOP/s so, 482 with 24 MB."""
    per_kv_head = max(1, max_len * head_dim * 2 * element_bytes)
    kv_heads = max(1, (16 << 20) // per_kv_head)
    return min(num_heads, kv_heads * group)


def tiles(block_m: int, block_n: int, num_warps: int, num_stages: int) -> dict[str, int]:
    """A launch configuration."""
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


def default_config(head_dim: int, element_bytes: int, target: int = 80) -> dict[str, int]:
    """Tiles where tuned/ has nothing: the largest that do not spill on compute capability ``target``."""
    if element_bytes == 4:
        return tiles(32, 32, 4 if head_dim <= 64 else 8, 1)
    if head_dim > 128:
        return tiles(64, 32, 8, 2)
    if target < 90 and head_dim > 64:
        return tiles(128, 32, 8, 3)
    return tiles(128, 64, 8, 3)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    max_query_len: int,
    softmax_scale: float,
    slopes: torch.Tensor | None,
    window: int | None,
    causal: bool,
    config: Mapping[str, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel; returns out [T,H,D] and lse [H,T] in log2."""
    num_tokens, num_heads, head_dim = q.shape
    num_sequences = query_starts.shape[0] - 1
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=q.device)
    if num_tokens == 0:
        return out, lse
    block_m = config["BLOCK_M"]
    group = num_heads // k.shape[1]
    num_tiles = num_tokens // block_m + num_sequences
    d0, d1, d2 = split_head_dim(head_dim, q.element_size())
    forward_kernel[(num_tiles * num_heads,)](
        q, k, v, out, lse, query_starts, slopes if slopes is not None else query_starts,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1),
        lse.stride(0),
        num_sequences, num_tiles, num_heads, heads_per_group(num_heads, group, max_query_len, head_dim,
        q.element_size()),
        window if window is not None else 0, softmax_scale * LOG2_E,
        GROUP=group, HEAD_DIM=head_dim, D0=d0, D1=d1, D2=d2,
        CAUSAL=causal, HAS_ALIBI=slopes is not None, HAS_WINDOW=window is not None, **config,
    )  # fmt: skip
    return out, lse
