"""Triton backward of packed attention: δ first, then dK and dV by key tile, dQ by query tile. No atomics, so
gradients repeat bitwise.

With P from the saved log-sum-exp (kept in log2, so that it is rounded once) and δ_i = Σ_d out_id·dout_id:

    dV = Pᵀ dout        dS = P ∘ (dout Vᵀ − δ)        dQ = softmax_scale · dS K        dK = softmax_scale · dSᵀ Q

Key tiles sum over the query heads of their group inside one program. Scores are recomputed twice (7 matrix
products where 5 are counted); that is the price of two kernels without atomics.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from .attention_forward import heads_per_group, schedule, tiles
from .attention_tiles import (
    LOG2_E,
    allowed_pairs,
    dot_into,
    key_limits,
    load_rows,
    locate_tile,
    split_head_dim,
    store_rows,
)

UNSPECIALISED = ["stat_head", "num_sequences", "num_tiles", "num_heads", "heads_per_group", "window"]


@triton.jit(do_not_specialize=["stat_head", "num_tokens"])
def delta_kernel(
    out, dout, delta, out_stride, out_head, dout_stride, dout_head, stat_head, num_tokens,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """δ [H,T] = Σ_d out·dout, summed in fp64 where the tensors are fp32.

    dout·v − δ cancels where few keys share a query, and an error of δ is the same for all of them.
    """
    wide = tl.float64 if out.dtype.element_ty == tl.float32 else tl.float32
    head = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    tokens_in = tokens < num_tokens
    mask = tokens_in[:, None] & (dims < HEAD_DIM)[None, :]
    o = tl.load(out + head * out_head + tokens[:, None] * out_stride + dims[None, :], mask=mask, other=0.0)
    do = tl.load(dout + head * dout_head + tokens[:, None] * dout_stride + dims[None, :], mask=mask, other=0.0)
    tl.store(delta + head * stat_head + tokens, tl.sum(o.to(wide) * do.to(wide), 1), mask=tokens_in)


@triton.jit
def query_limits(
    first_key, last_key, num_queries, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Query ranges of a key tile: masked [begin, full_begin), unmasked [full_begin, full_end), masked [edge, end)."""
    begin = 0
    full_begin = 0
    end = num_queries
    full_end = (num_queries + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if CAUSAL:
        begin = first_key // BLOCK_M * BLOCK_M
        full_begin = (last_key + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if HAS_WINDOW:
        end = tl.minimum(end, last_key + window)
        full_end = tl.minimum(full_end, (first_key + window) // BLOCK_M * BLOCK_M)
        if not CAUSAL:
            begin = tl.maximum(0, first_key - window + 1) // BLOCK_M * BLOCK_M
            full_begin = (tl.maximum(0, last_key - window + 1) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    full_end = tl.maximum(full_begin, full_end)
    return begin, full_begin, full_end, end


@triton.jit
def accumulate_key_gradients(
    dk0, dk1, dk2, dv0, dv1, dv2, k0, k1, k2, v0, v1, v2,
    q, dout, lse, delta, q_stride, dout_stride,
    keys, reference, slope, begin, end, num_queries, window, scale,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the queries of [begin, end) of one head to a key tile's gradients. Tiles are transposed: keys are rows."""
    dims0 = tl.arange(0, D0)
    rows = tl.arange(0, BLOCK_M)
    for start in tl.range(begin, end, BLOCK_M):
        positions = start + rows
        rows_in = positions < num_queries
        q_rows = q + start * q_stride.to(tl.int64) + (rows * q_stride)[:, None]
        dout_rows = dout + start * dout_stride.to(tl.int64) + (rows * dout_stride)[:, None]
        q0 = load_rows(q_rows + dims0[None, :], rows_in, dims0, 0, HEAD_DIM, False)
        # An absent query gets weight exp2(x − ∞) = 0.
        log_sums = tl.load(lse + positions, mask=rows_in, other=float("inf"))
        scores = dot_into(k0, tl.trans(q0), None)
        do0 = load_rows(dout_rows + dims0[None, :], rows_in, dims0, 0, HEAD_DIM, False)
        dweights = dot_into(v0, tl.trans(do0), None)
        if D1 > 0:
            dims1 = tl.arange(0, D1)
            q1 = load_rows(q_rows + (D0 + dims1)[None, :], rows_in, dims1, D0, HEAD_DIM, False)
            scores = dot_into(k1, tl.trans(q1), scores)
            do1 = load_rows(dout_rows + (D0 + dims1)[None, :], rows_in, dims1, D0, HEAD_DIM, False)
            dweights = dot_into(v1, tl.trans(do1), dweights)
        if D2 > 0:
            dims2 = tl.arange(0, D2)
            q2 = load_rows(q_rows + (D0 + D1 + dims2)[None, :], rows_in, dims2, D0 + D1, HEAD_DIM, False)
            scores = dot_into(k2, tl.trans(q2), scores)
            do2 = load_rows(dout_rows + (D0 + D1 + dims2)[None, :], rows_in, dims2, D0 + D1, HEAD_DIM, False)
            dweights = dot_into(v2, tl.trans(do2), dweights)
        if HAS_ALIBI:
            if CAUSAL:
                log_sums += slope * (positions - reference).to(tl.float32)
                scores = scores * scale + (slope * (keys - reference).to(tl.float32))[:, None]
            else:
                scores = scores * scale - slope * tl.abs(positions[None, :] - keys[:, None]).to(tl.float32)
            weights = tl.math.exp2(scores - log_sums[None, :])
        else:
            weights = tl.math.exp2(scores * scale - log_sums[None, :])
        if MASKED:
            allowed = allowed_pairs(positions[None, :], keys[:, None], num_queries, window, CAUSAL, HAS_WINDOW)
            weights = tl.where(allowed, weights, 0.0)
        deltas = tl.load(delta + positions, mask=rows_in, other=0.0)
        narrow = weights.to(q0.dtype)
        dv0 = dot_into(narrow, do0, dv0)
        dscores = (weights * (dweights - deltas[None, :])).to(q0.dtype)
        dk0 = dot_into(dscores, q0, dk0)
        if D1 > 0:
            dv1 = dot_into(narrow, do1, dv1)
            dk1 = dot_into(dscores, q1, dk1)
        if D2 > 0:
            dv2 = dot_into(narrow, do2, dv2)
            dk2 = dot_into(dscores, q2, dk2)
    return dk0, dk1, dk2, dv0, dv1, dv2


@triton.jit(do_not_specialize=UNSPECIALISED)
def key_gradient_kernel(
    q, k, v, dout, dk, dv, lse, delta, starts, slopes,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, dout_stride, dout_head, dk_stride, dk_head, stat_head,
    num_sequences, num_tiles, num_heads, heads_per_group, window, scale, softmax_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of BLOCK_N keys of one key/value head (``num_heads`` counts those)."""
    tile, kv_head = schedule(tl.program_id(0), num_tiles, num_heads, heads_per_group)
    # Early keys are seen by the most queries: tiles run from the first, and schedule counts from the last.
    _, sequence_start, length, row = locate_tile(starts, num_tiles - 1 - tile, num_sequences, BLOCK_N)
    if row >= length:
        return
    kv_head_id = kv_head.to(tl.int64)
    first = sequence_start.to(tl.int64)
    keys = row + tl.arange(0, BLOCK_N)
    keys_in = keys < length
    dims0 = tl.arange(0, D0)
    token_ids = (first + keys.to(tl.int64))[:, None]
    k_rows = k + kv_head_id * k_head + token_ids * k_stride
    v_rows = v + kv_head_id * v_head + token_ids * v_stride
    k0 = load_rows(k_rows + dims0[None, :], keys_in, dims0, 0, HEAD_DIM, False)
    v0 = load_rows(v_rows + dims0[None, :], keys_in, dims0, 0, HEAD_DIM, False)
    dk0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    k1 = k0
    k2 = k0
    v1 = v0
    v2 = v0
    dk1 = 0.0
    dk2 = 0.0
    dv1 = 0.0
    dv2 = 0.0
    if D1 > 0:
        dims1 = tl.arange(0, D1)
        k1 = load_rows(k_rows + (D0 + dims1)[None, :], keys_in, dims1, D0, HEAD_DIM, False)
        v1 = load_rows(v_rows + (D0 + dims1)[None, :], keys_in, dims1, D0, HEAD_DIM, False)
        dk1 = tl.zeros([BLOCK_N, D1], dtype=tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1], dtype=tl.float32)
    if D2 > 0:
        dims2 = tl.arange(0, D2)
        k2 = load_rows(k_rows + (D0 + D1 + dims2)[None, :], keys_in, dims2, D0 + D1, HEAD_DIM, False)
        v2 = load_rows(v_rows + (D0 + D1 + dims2)[None, :], keys_in, dims2, D0 + D1, HEAD_DIM, False)
        dk2 = tl.zeros([BLOCK_N, D2], dtype=tl.float32)
        dv2 = tl.zeros([BLOCK_N, D2], dtype=tl.float32)

    last_key = tl.minimum(row + BLOCK_N, length) - 1
    begin, full_begin, full_end, end = query_limits(row, last_key, length, window, CAUSAL, HAS_WINDOW, BLOCK_M)
    for g in range(GROUP):
        head = kv_head * GROUP + g
        head_id = kv_head_id * GROUP + g
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(slopes + head) * 1.4426950408889634
        q_head_base = q + head_id * q_head + first * q_stride
        dout_head_base = dout + head_id * dout_head + first * dout_stride
        lse_head_base = lse + head_id * stat_head + first
        delta_head_base = delta + head_id * stat_head + first
        if CAUSAL or HAS_WINDOW:
            dk0, dk1, dk2, dv0, dv1, dv2 = accumulate_key_gradients(
                dk0, dk1, dk2, dv0, dv1, dv2, k0, k1, k2, v0, v1, v2, q_head_base, dout_head_base, lse_head_base,
                delta_head_base, q_stride, dout_stride, keys, row, slope, begin, tl.minimum(full_begin, end), length,
                window,
                scale, HEAD_DIM, D0, D1, D2, BLOCK_M, CAUSAL, HAS_ALIBI, HAS_WINDOW, True,
            )  # fmt: skip
        dk0, dk1, dk2, dv0, dv1, dv2 = accumulate_key_gradients(
            dk0, dk1, dk2, dv0, dv1, dv2, k0, k1, k2, v0, v1, v2, q_head_base, dout_head_base, lse_head_base,
            delta_head_base, q_stride, dout_stride, keys, row, slope, full_begin, full_end, length, window,
            scale, HEAD_DIM, D0, D1, D2, BLOCK_M, CAUSAL, HAS_ALIBI, HAS_WINDOW, False,
        )  # fmt: skip
        if HAS_WINDOW:
            dk0, dk1, dk2, dv0, dv1, dv2 = accumulate_key_gradients(
                dk0, dk1, dk2, dv0, dv1, dv2, k0, k1, k2, v0, v1, v2, q_head_base, dout_head_base, lse_head_base,
                delta_head_base, q_stride, dout_stride, keys, row, slope, full_end, end, length, window,
                scale, HEAD_DIM, D0, D1, D2, BLOCK_M, CAUSAL, HAS_ALIBI, HAS_WINDOW, True,
            )  # fmt: skip

    dk_rows = dk + kv_head_id * dk_head + token_ids * dk_stride
    dv_rows = dv + kv_head_id * dk_head + token_ids * dk_stride
    store_rows(dk_rows, dk0 * softmax_scale, keys_in, dims0, 0, HEAD_DIM)
    store_rows(dv_rows, dv0, keys_in, dims0, 0, HEAD_DIM)
    if D1 > 0:
        store_rows(dk_rows, dk1 * softmax_scale, keys_in, tl.arange(0, D1), D0, HEAD_DIM)
        store_rows(dv_rows, dv1, keys_in, tl.arange(0, D1), D0, HEAD_DIM)
    if D2 > 0:
        store_rows(dk_rows, dk2 * softmax_scale, keys_in, tl.arange(0, D2), D0 + D1, HEAD_DIM)
        store_rows(dv_rows, dv2, keys_in, tl.arange(0, D2), D0 + D1, HEAD_DIM)


@triton.jit
def accumulate_query_gradients(
    dq0, dq1, dq2, q0, q1, q2, do0, do1, do2, log_sums, deltas,
    k, v, k_stride, v_stride, positions, reference, slope, begin, end, num_keys, window, scale,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys of [begin, end) to a query tile's gradient."""
    dims0 = tl.arange(0, D0)
    columns = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + columns
        keys_in = keys < num_keys
        k_rows = k + start * k_stride.to(tl.int64) + (columns * k_stride)[:, None]
        v_rows = v + start * v_stride.to(tl.int64) + (columns * v_stride)[:, None]
        k0 = load_rows(k_rows + dims0[None, :], keys_in, dims0, 0, HEAD_DIM, not MASKED)
        scores = dot_into(q0, tl.trans(k0), None)
        v0 = load_rows(v_rows + dims0[None, :], keys_in, dims0, 0, HEAD_DIM, not MASKED)
        dweights = dot_into(do0, tl.trans(v0), None)
        if D1 > 0:
            dims1 = tl.arange(0, D1)
            k1 = load_rows(k_rows + (D0 + dims1)[None, :], keys_in, dims1, D0, HEAD_DIM, not MASKED)
            scores = dot_into(q1, tl.trans(k1), scores)
            v1 = load_rows(v_rows + (D0 + dims1)[None, :], keys_in, dims1, D0, HEAD_DIM, not MASKED)
            dweights = dot_into(do1, tl.trans(v1), dweights)
        if D2 > 0:
            dims2 = tl.arange(0, D2)
            k2 = load_rows(k_rows + (D0 + D1 + dims2)[None, :], keys_in, dims2, D0 + D1, HEAD_DIM, not MASKED)
            scores = dot_into(q2, tl.trans(k2), scores)
            v2 = load_rows(v_rows + (D0 + D1 + dims2)[None, :], keys_in, dims2, D0 + D1, HEAD_DIM, not MASKED)
            dweights = dot_into(do2, tl.trans(v2), dweights)
        if HAS_ALIBI:
            if CAUSAL:
                scores = scores * scale + (slope * (keys - reference).to(tl.float32))[None, :]
            else:
                scores = scores * scale - slope * tl.abs(positions[:, None] - keys[None, :]).to(tl.float32)
            weights = tl.math.exp2(scores - log_sums[:, None])
        else:
            weights = tl.math.exp2(scores * scale - log_sums[:, None])
        if MASKED:
            allowed = allowed_pairs(positions[:, None], keys[None, :], num_keys, window, CAUSAL, HAS_WINDOW)
            weights = tl.where(allowed, weights, 0.0)
        dscores = (weights * (dweights - deltas[:, None])).to(q0.dtype)
        dq0 = dot_into(dscores, k0, dq0)
        if D1 > 0:
            dq1 = dot_into(dscores, k1, dq1)
        if D2 > 0:
            dq2 = dot_into(dscores, k2, dq2)
    return dq0, dq1, dq2


@triton.jit(do_not_specialize=UNSPECIALISED)
def query_gradient_kernel(
    q, k, v, dout, dq, lse, delta, starts, slopes,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, dout_stride, dout_head, dq_stride, dq_head, stat_head,
    num_sequences, num_tiles, num_heads, heads_per_group, window, scale, softmax_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of BLOCK_M queries of one head."""
    tile, head = schedule(tl.program_id(0), num_tiles, num_heads, heads_per_group)
    _, sequence_start, length, row = locate_tile(starts, tile, num_sequences, BLOCK_M)
    if row >= length:
        return
    head_id = head.to(tl.int64)
    first = sequence_start.to(tl.int64)
    positions = row + tl.arange(0, BLOCK_M)
    rows_in = positions < length
    token_ids = (first + positions.to(tl.int64))[:, None]
    dims0 = tl.arange(0, D0)
    q_rows = q + head_id * q_head + token_ids * q_stride
    dout_rows = dout + head_id * dout_head + token_ids * dout_stride
    q0 = load_rows(q_rows + dims0[None, :], rows_in, dims0, 0, HEAD_DIM, False)
    do0 = load_rows(dout_rows + dims0[None, :], rows_in, dims0, 0, HEAD_DIM, False)
    dq0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    q1 = q0
    q2 = q0
    do1 = do0
    do2 = do0
    dq1 = 0.0
    dq2 = 0.0
    if D1 > 0:
        dims1 = tl.arange(0, D1)
        q1 = load_rows(q_rows + (D0 + dims1)[None, :], rows_in, dims1, D0, HEAD_DIM, False)
        do1 = load_rows(dout_rows + (D0 + dims1)[None, :], rows_in, dims1, D0, HEAD_DIM, False)
        dq1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)
    if D2 > 0:
        dims2 = tl.arange(0, D2)
        q2 = load_rows(q_rows + (D0 + D1 + dims2)[None, :], rows_in, dims2, D0 + D1, HEAD_DIM, False)
        do2 = load_rows(dout_rows + (D0 + D1 + dims2)[None, :], rows_in, dims2, D0 + D1, HEAD_DIM, False)
        dq2 = tl.zeros([BLOCK_M, D2], dtype=tl.float32)
    last_position = tl.minimum(row + BLOCK_M, length) - 1
    log_sums = tl.load(lse + head_id * stat_head + first + positions, mask=rows_in, other=float("inf"))
    deltas = tl.load(delta + head_id * stat_head + first + positions, mask=rows_in, other=0.0)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes + head) * 1.4426950408889634
        if CAUSAL:
            log_sums += slope * (positions - last_position).to(tl.float32)
    k_base = k + (head_id // GROUP) * k_head + first * k_stride
    v_base = v + (head_id // GROUP) * v_head + first * v_stride
    begin, full_begin, full_end, edge, end = key_limits(row, last_position, length, window, CAUSAL, HAS_WINDOW, BLOCK_N)
    if HAS_WINDOW:
        dq0, dq1, dq2 = accumulate_query_gradients(
            dq0, dq1, dq2, q0, q1, q2, do0, do1, do2, log_sums, deltas, k_base, v_base, k_stride, v_stride, positions,
            last_position, slope, begin, tl.minimum(full_begin, end), length, window, scale,
            HEAD_DIM, D0, D1, D2, BLOCK_N, CAUSAL, HAS_ALIBI, HAS_WINDOW, True,
        )  # fmt: skip
    dq0, dq1, dq2 = accumulate_query_gradients(
        dq0, dq1, dq2, q0, q1, q2, do0, do1, do2, log_sums, deltas, k_base, v_base, k_stride, v_stride, positions,
        last_position, slope, full_begin, full_end, length, window, scale,
        HEAD_DIM, D0, D1, D2, BLOCK_N, CAUSAL, HAS_ALIBI, HAS_WINDOW, False,
    )  # fmt: skip
    dq0, dq1, dq2 = accumulate_query_gradients(
        dq0, dq1, dq2, q0, q1, q2, do0, do1, do2, log_sums, deltas, k_base, v_base, k_stride, v_stride, positions,
        last_position, slope, edge, end, length, window, scale,
        HEAD_DIM, D0, D1, D2, BLOCK_N, CAUSAL, HAS_ALIBI, HAS_WINDOW, True,
    )  # fmt: skip
    dq_rows = dq + head_id * dq_head + token_ids * dq_stride
    store_rows(dq_rows, dq0 * softmax_scale, rows_in, dims0, 0, HEAD_DIM)
    if D1 > 0:
        store_rows(dq_rows, dq1 * softmax_scale, rows_in, tl.arange(0, D1), D0, HEAD_DIM)
    if D2 > 0:
        store_rows(dq_rows, dq2 * softmax_scale, rows_in, tl.arange(0, D2), D0 + D1, HEAD_DIM)


def default_key_config(head_dim: int, element_bytes: int, target: int = 80) -> dict[str, int]:
    """Tiles of the dK/dV kernel where tuned/ has nothing: the largest that do not spill."""
    if element_bytes == 4:
        return tiles(16, 32, 4 if head_dim <= 64 else 8, 1)
    if head_dim > 128:
        return tiles(16, 32, 8, 1)
    if head_dim <= 64:
        return tiles(64, 128, 8, 2) if target >= 90 else tiles(32, 128, 8, 2)
    if target >= 100:
        return tiles(64, 128, 8, 2)
    if target < 90 and head_dim & (head_dim - 1):
        return tiles(16, 64, 4, 2)
    return tiles(32, 64, 8, 2)


def default_query_config(head_dim: int, element_bytes: int, target: int = 80) -> dict[str, int]:
    """Tiles of the dQ kernel where tuned/ has nothing: the largest that do not spill."""
    if element_bytes == 4:
        return tiles(32, 16, 4 if head_dim <= 64 else 8, 1)
    if head_dim > 128:
        return tiles(32, 32, 8, 1)
    if target >= 100:
        return tiles(128, 64, 8, 2) if head_dim > 64 else tiles(64, 64, 8, 2)
    if target >= 90:
        return tiles(128, 64, 8, 3)
    return tiles(128, 32, 8, 2) if head_dim > 64 else tiles(128, 64, 8, 2)


def launch_delta(out: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """δ f32 [H,T]."""
    num_tokens, num_heads, head_dim = out.shape
    delta = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=out.device)
    if num_tokens:
        delta_kernel[(triton.cdiv(num_tokens, 64), num_heads)](
            out, dout, delta, out.stride(0), out.stride(1), dout.stride(0), dout.stride(1), delta.stride(0),
            num_tokens,
            HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_M=64, num_warps=4,
        )  # fmt: skip
    return delta


def launch_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    query_starts: torch.Tensor,
    max_query_len: int,
    softmax_scale: float,
    slopes: torch.Tensor | None,
    window: int | None,
    causal: bool,
    key_config: Mapping[str, int],
    query_config: Mapping[str, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ [T,H,D], dK and dV [T,K,D] from the forward's out and lse f32 [H,T] (in log2)."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    num_sequences = query_starts.shape[0] - 1
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if num_tokens == 0:
        return dq, dk, dv
    delta = launch_delta(out, dout)
    d0, d1, d2 = split_head_dim(head_dim, q.element_size())
    shared = heads_per_group(num_heads, group, max_query_len, head_dim, q.element_size())
    slopes_or_any = slopes if slopes is not None else query_starts
    limits = (window if window is not None else 0, softmax_scale * LOG2_E, softmax_scale)
    constants = {
        "GROUP": group, "HEAD_DIM": head_dim, "D0": d0, "D1": d1, "D2": d2,
        "CAUSAL": causal, "HAS_ALIBI": slopes is not None, "HAS_WINDOW": window is not None,
    }  # fmt: skip
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    num_tiles = num_tokens // key_config["BLOCK_N"] + num_sequences
    key_gradient_kernel[(num_tiles * num_kv_heads,)](
        q, k, v, dout, dk, dv, lse, delta, query_starts, slopes_or_any, *strides, *dk.stride()[:2], lse.stride(0),
        num_sequences, num_tiles, num_kv_heads, max(1, shared // group), *limits, **constants, **key_config,
    )  # fmt: skip
    num_tiles = num_tokens // query_config["BLOCK_M"] + num_sequences
    query_gradient_kernel[(num_tiles * num_heads,)](
        q, k, v, dout, dq, lse, delta, query_starts, slopes_or_any, *strides, *dq.stride()[:2], lse.stride(0),
        num_sequences, num_tiles, num_heads, shared, *limits, **constants, **query_config,
    )  # fmt: skip
    return dq, dk, dv
