"""Triton building blocks shared by the attention kernels: which tile is mine, which keys it sees, and the
online softmax.

A head dim over 64 that is no power of two is cut into up to three chunks (112 = 64 + 32 + 16), so that at most 15
columns are padding. Scores live in the exp2 domain: the softmax scale carries log2(e). For causal ALiBi the row
part slope·i cancels in the softmax, so only slope·(j − reference) is added, one value per key column, and the
row part enters the log-sum-exp alone.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
MASKED_SCORE = tl.constexpr(-1.0e30)  # finite, so that a row whose first block is all masked stays free of NaN


def split_head_dim(head_dim: int, element_bytes: int = 2) -> tuple[int, int, int]:
    """Chunk widths (powers of two ≥ 16, or 0) that cover ``head_dim`` with at most three products; up to 64 one.

    In fp32 a single chunk of 64 or more is cut as well, for its sums' sake (see dot_into).
    """
    whole = max(16, 1 << (head_dim - 1).bit_length())
    if element_bytes == 4 and whole >= 64 and whole - head_dim < 16:
        return whole // 2, whole // 4, whole // 4
    if head_dim <= 64:
        return whole, 0, 0
    left = -(-head_dim // 16) * 16
    chunks: list[int] = []
    while left:
        width = 1 << (left.bit_length() - 1)
        if len(chunks) == 2 and width != left:
            width *= 2  # the last chunk takes the rest, padded
        chunks.append(width)
        left = max(0, left - width)
    return (*chunks, 0, 0)[:3]  # type: ignore[return-value]


@triton.jit
def locate_tile(starts, tile, num_sequences, ROWS: tl.constexpr):
    """Sequence and first row of a tile. Sequence b owns the tile numbers from starts[b] // ROWS + b on: no
    table, no host sync.
    """
    low = 0
    high = num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        first_tile = tl.load(starts + middle) // ROWS + middle
        low = tl.where(first_tile <= tile, middle, low)
        high = tl.where(first_tile <= tile, high, middle - 1)
    start = tl.load(starts + low)
    length = tl.load(starts + low + 1) - start
    row = (tile - start // ROWS - low) * ROWS
    return low, start, length, row


@triton.jit
def key_limits(
    first_position,
    last_position,
    num_keys,
    window,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Key ranges of a query tile: masked [begin, full_begin), unmasked [full_begin, full_end), masked [edge, end)."""
    begin = 0
    full_begin = 0
    end = num_keys
    full_end = num_keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(last_position + 1, num_keys)
        full_end = tl.minimum(full_end, (first_position + 1) // BLOCK_N * BLOCK_N)
    if HAS_WINDOW:
        begin = tl.maximum(0, first_position - window + 1) // BLOCK_N * BLOCK_N
        full_begin = (tl.maximum(0, last_position - window + 1) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        if not CAUSAL:
            end = tl.minimum(end, last_position + window)
            full_end = tl.minimum(full_end, (first_position + window) // BLOCK_N * BLOCK_N)
    edge = tl.maximum(full_begin, full_end)
    return begin, full_begin, full_end, edge, end


@triton.jit
def allowed_pairs(positions, keys, num_keys, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Which (query position, key) pairs attend. Both arguments broadcast."""
    allowed = keys < num_keys
    if CAUSAL:
        allowed = allowed & (keys <= positions)
    if HAS_WINDOW:
        allowed = allowed & (positions - keys < window)
        if not CAUSAL:
            allowed = allowed & (keys - positions < window)
    return allowed


@triton.jit
def load_rows(base, rows_in, dims, offset: tl.constexpr, HEAD_DIM: tl.constexpr, ALL_ROWS: tl.constexpr):
    """A tile of pointers ``base`` [rows, width] whose columns are head dims offset + dims; absent rows and dims
    read as zero.
    """
    width: tl.constexpr = dims.shape[0]
    if offset + width <= HEAD_DIM:
        if ALL_ROWS:
            return tl.load(base)
        return tl.load(base, mask=rows_in[:, None], other=0.0)
    columns_in = (offset + dims < HEAD_DIM)[None, :]
    if ALL_ROWS:
        return tl.load(base, mask=columns_in, other=0.0)
    return tl.load(base, mask=rows_in[:, None] & columns_in, other=0.0)


@triton.jit
def store_rows(base, values, rows_in, dims, offset: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Stores ``values`` [rows, width] at head dims offset + dims of the present rows."""
    mask = rows_in[:, None] & (offset + dims < HEAD_DIM)[None, :]
    tl.store(base + (offset + dims)[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def start_rows(q_rows, rows_in, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """A tile of queries in chunks, and its empty accumulators."""
    rows: tl.constexpr = rows_in.shape[0]
    dims0 = tl.arange(0, D0)
    q0 = load_rows(q_rows + dims0[None, :], rows_in, dims0, 0, HEAD_DIM, False)
    acc0 = tl.zeros([rows, D0], dtype=tl.float32)
    q1 = q0
    q2 = q0
    acc1 = 0.0
    acc2 = 0.0
    if D1 > 0:
        dims1 = tl.arange(0, D1)
        q1 = load_rows(q_rows + (D0 + dims1)[None, :], rows_in, dims1, D0, HEAD_DIM, False)
        acc1 = tl.zeros([rows, D1], dtype=tl.float32)
    if D2 > 0:
        dims2 = tl.arange(0, D2)
        q2 = load_rows(q_rows + (D0 + D1 + dims2)[None, :], rows_in, dims2, D0 + D1, HEAD_DIM, False)
        acc2 = tl.zeros([rows, D2], dtype=tl.float32)
    row_sum = tl.zeros([rows], dtype=tl.float32)
    row_max = tl.full([rows], float("-inf"), dtype=tl.float32)
    return q0, q1, q2, acc0, acc1, acc2, row_sum, row_max


@triton.jit
def finish_rows(
    out_rows, acc0, acc1, acc2, factor, rows_in,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Stores the accumulators times ``factor`` [rows]."""
    store_rows(out_rows, acc0 * factor[:, None], rows_in, tl.arange(0, D0), 0, HEAD_DIM)
    if D1 > 0:
        store_rows(out_rows, acc1 * factor[:, None], rows_in, tl.arange(0, D1), D0, HEAD_DIM)
    if D2 > 0:
        store_rows(out_rows, acc2 * factor[:, None], rows_in, tl.arange(0, D2), D0 + D1, HEAD_DIM)


@triton.jit
def dot_into(a, b, acc):
    """acc + a·b (a·b where ``acc`` is None), in place on the matrix units.

    In fp32 a thread adds one product after the other, and the rounding of such a chain grows with its length: there
    the halves are summed on their own, and the fused multiply-add keeps the compiler from starting the chain at
    ``acc``.
    """
    if a.dtype != tl.float32:
        if acc is None:
            result = tl.dot(a, b)
        else:
            result = tl.dot(a, b, acc)
    else:
        rows: tl.constexpr = a.shape[0]
        columns: tl.constexpr = b.shape[1]
        half: tl.constexpr = a.shape[1] // 2
        if half >= 16:
            halves = tl.permute(tl.reshape(a, [rows, 2, half]), 1, 0, 2)
            result = tl.sum(tl.dot(halves, tl.reshape(b, [2, half, columns]), input_precision="ieee"), 0)
        else:
            result = tl.dot(a, b, input_precision="ieee")
        if acc is not None:
            result = tl.fma(result, 1.0, acc)
    return result


@triton.jit
def attend(
    acc0, acc1, acc2, row_sum, row_max,
    q0, q1, q2,
    positions, reference, slope,
    k, v, k_stride, v_stride,
    pages, k_page_stride, v_page_stride,
    begin, end, num_keys, window, scale,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys of [begin, end), in blocks. ``slope`` is a scalar, or [rows, 1] where rows
    are several heads.

    k and v point at the head's first key (PAGE_SIZE 0) or at the head in page 0 (then ``pages`` is the
    page-table row).
    """
    dims0 = tl.arange(0, D0)
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        keys_in = keys < num_keys
        if PAGE_SIZE > 0:
            if MASKED:
                page = tl.load(pages + keys // PAGE_SIZE, mask=keys_in, other=0).to(tl.int64)
            else:
                page = tl.load(pages + keys // PAGE_SIZE).to(tl.int64)
            in_page = keys % PAGE_SIZE
            k_rows = k + (page * k_page_stride + in_page * k_stride)[:, None]
            v_rows = v + (page * v_page_stride + in_page * v_stride)[:, None]
        else:
            k_rows = k + start * k_stride.to(tl.int64) + (tl.arange(0, BLOCK_N) * k_stride)[:, None]
            v_rows = v + start * v_stride.to(tl.int64) + (tl.arange(0, BLOCK_N) * v_stride)[:, None]
        tile = load_rows(k_rows + dims0[None, :], keys_in, dims0, 0, HEAD_DIM, not MASKED)
        scores = dot_into(q0, tl.trans(tile.to(q0.dtype)), None)
        if D1 > 0:
            dims1 = tl.arange(0, D1)
            tile = load_rows(k_rows + (D0 + dims1)[None, :], keys_in, dims1, D0, HEAD_DIM, not MASKED)
            scores = dot_into(q1, tl.trans(tile.to(q0.dtype)), scores)
        if D2 > 0:
            dims2 = tl.arange(0, D2)
            tile = load_rows(k_rows + (D0 + D1 + dims2)[None, :], keys_in, dims2, D0 + D1, HEAD_DIM, not MASKED)
            scores = dot_into(q2, tl.trans(tile.to(q0.dtype)), scores)

        # Masked scores must be scaled before they are masked: fused into the subtraction of their own maximum, the
        # scale's rounding would leave a huge remainder.
        if HAS_ALIBI:
            if CAUSAL:
                scores = scores * scale + slope * (keys - reference).to(tl.float32)[None, :]
            else:
                scores = scores * scale - slope * tl.abs(positions[:, None] - keys[None, :]).to(tl.float32)
        elif MASKED:
            scores = scores * scale
        if MASKED:
            allowed = allowed_pairs(positions[:, None], keys[None, :], num_keys, window, CAUSAL, HAS_WINDOW)
            scores = tl.where(allowed, scores, MASKED_SCORE)
        if HAS_ALIBI or MASKED:
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            weights = tl.math.exp2(scores - new_max[:, None])
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
            weights = tl.math.exp2(scores * scale - new_max[:, None])
        rescale = tl.math.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
        weights = weights.to(q0.dtype)

        tile = load_rows(v_rows + dims0[None, :], keys_in, dims0, 0, HEAD_DIM, not MASKED)
        acc0 = dot_into(weights, tile.to(q0.dtype), acc0 * rescale[:, None])
        if D1 > 0:
            dims1 = tl.arange(0, D1)
            tile = load_rows(v_rows + (D0 + dims1)[None, :], keys_in, dims1, D0, HEAD_DIM, not MASKED)
            acc1 = dot_into(weights, tile.to(q0.dtype), acc1 * rescale[:, None])
        if D2 > 0:
            dims2 = tl.arange(0, D2)
            tile = load_rows(v_rows + (D0 + D1 + dims2)[None, :], keys_in, dims2, D0 + D1, HEAD_DIM, not MASKED)
            acc2 = dot_into(weights, tile.to(q0.dtype), acc2 * rescale[:, None])
    return acc0, acc1, acc2, row_sum, row_max
