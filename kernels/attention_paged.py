"""Triton kernels of attention against the paged KV cache.

Decodes: one program per (sequence, span of SPLIT keys, key/value head) takes the head's whole query group in
one tile and leaves a partial output with its weights' maximum and sum; a second kernel merges the spans. Spans
are cut at fixed positions, so a row's arithmetic depends on its own context alone. A prefix common to a group of
adjacent decodes is read once for the group: there the rows of a tile are the queries of many sequences, and its spans
are merged like any others. Chunks (more than one query): tiles of queries times group heads against all keys, no
split.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from .attention_forward import schedule, tiles
from .attention_tiles import LOG2_E, attend, finish_rows, key_limits, locate_tile, split_head_dim, start_rows


@triton.jit(do_not_specialize=["table_stride", "num_kv_heads", "num_slots", "first_slot", "window"])
def decode_kernel(
    q, k, v, page_table, context_lens, prefix_lens, slopes, k_scales, v_scales, out, partial, statistics,
    q_stride, q_head, k_page, k_stride, k_head, v_page, v_stride, v_head, out_stride, out_head, table_stride,
    num_kv_heads, num_slots, first_slot, window, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_PREFIX: tl.constexpr,
    DIRECT: tl.constexpr,
):  # fmt: skip
    """One span of one decode's context after its shared prefix. DIRECT: there is only one span, the output is
    final.
    """
    program = tl.program_id(0)
    kv_head = program % num_kv_heads
    span = (program // num_kv_heads) % (num_slots - first_slot)
    sequence = program // num_kv_heads // (num_slots - first_slot)
    context = tl.load(context_lens + sequence)
    span_begin = span * SPLIT
    if HAS_PREFIX:
        span_begin += tl.load(prefix_lens + sequence)
    span_end = tl.minimum(span_begin + SPLIT, context)
    if span_begin >= context:
        return
    sequence_id = sequence.to(tl.int64)
    kv_head_id = kv_head.to(tl.int64)
    rows = tl.arange(0, ROWS)
    rows_in = rows < GROUP
    heads = kv_head * GROUP + rows
    q_rows = q + sequence_id * q_stride + (heads * q_head)[:, None]
    q0, q1, q2, acc0, acc1, acc2, row_sum, row_max = start_rows(q_rows, rows_in, HEAD_DIM, D0, D1, D2)
    slope = 0.0
    if HAS_ALIBI:
        slope = (tl.load(slopes + heads, mask=rows_in, other=0.0) * 1.4426950408889634)[:, None]
    if HAS_SCALE:
        scale = scale * tl.load(k_scales + kv_head)
    positions = tl.zeros([ROWS], dtype=tl.int32) + (context - 1)
    pages = page_table + sequence_id * table_stride
    k_base = k + kv_head_id * k_head
    v_base = v + kv_head_id * v_head
    full_begin = span_begin
    if HAS_WINDOW:
        window_begin = tl.maximum(context - window, span_begin)
        full_begin = tl.minimum(span_begin + (window_begin - span_begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N, span_end)
        masked_begin = tl.minimum(span_begin + (window_begin - span_begin) // BLOCK_N * BLOCK_N, full_begin)
        acc0, acc1, acc2, row_sum, row_max = attend(
            acc0, acc1, acc2, row_sum, row_max, q0, q1, q2, positions, context - 1, slope, k_base, v_base, k_stride,
            v_stride, pages, k_page, v_page, masked_begin, full_begin, span_end, window, scale,
            HEAD_DIM, D0, D1, D2, BLOCK_N, PAGE_SIZE, True, HAS_ALIBI, True, True,
        )  # fmt: skip
    full_end = full_begin + (span_end - full_begin) // BLOCK_N * BLOCK_N
    acc0, acc1, acc2, row_sum, row_max = attend(
        acc0, acc1, acc2, row_sum, row_max, q0, q1, q2, positions, context - 1, slope, k_base, v_base, k_stride,
        v_stride,
        pages, k_page, v_page, full_begin, full_end, span_end, window, scale,
        HEAD_DIM, D0, D1, D2, BLOCK_N, PAGE_SIZE, True, HAS_ALIBI, HAS_WINDOW, False,
    )  # fmt: skip
    acc0, acc1, acc2, row_sum, row_max = attend(
        acc0, acc1, acc2, row_sum, row_max, q0, q1, q2, positions, context - 1, slope, k_base, v_base, k_stride,
        v_stride,
        pages, k_page, v_page, full_end, span_end, span_end, window, scale,
        HEAD_DIM, D0, D1, D2, BLOCK_N, PAGE_SIZE, True, HAS_ALIBI, HAS_WINDOW, True,
    )  # fmt: skip
    if HAS_SCALE:
        row_sum = tl.div_rn(row_sum, tl.load(v_scales + kv_head))
    if DIRECT:
        out_rows = out + sequence_id * out_stride + (heads * out_head)[:, None]
        finish_rows(out_rows, acc0, acc1, acc2, tl.div_rn(1.0, row_sum), rows_in, HEAD_DIM, D0, D1, D2)
    else:
        # A span wholly before the window has no weight: maximum −∞, sum 0.
        num_heads = num_kv_heads * GROUP
        slots = (sequence_id * num_heads + heads) * num_slots + first_slot + span
        ones = tl.full([ROWS], 1.0, dtype=tl.float32)
        finish_rows(partial + slots[:, None] * HEAD_DIM, acc0, acc1, acc2, ones, rows_in, HEAD_DIM, D0, D1, D2)
        tl.store(statistics + 2 * slots, row_max, mask=rows_in)
        tl.store(statistics + 2 * slots + 1, row_sum, mask=rows_in)


@triton.jit(do_not_specialize=["table_stride", "num_kv_heads", "num_slots", "first_slot", "window"])
def vector_decode_kernel(
    q, k, v, page_table, context_lens, prefix_lens, slopes, k_scales, v_scales, out, partial, statistics,
    q_stride, q_head, k_page, k_stride, k_head, v_page, v_stride, v_head, out_stride, out_head, table_stride,
    num_kv_heads, num_slots, first_slot, window, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_PREFIX: tl.constexpr,
    DIRECT: tl.constexpr,
):  # fmt: skip
    """decode_kernel for one query head per key head and 8-bit pages: products on the vector units, straight from the
    registers the pages are loaded into. A matrix tile would be fifteen sixteenths empty, and its operands,
    widened to 16 bits, would go through shared memory."""
    program = tl.program_id(0)
    head = program % num_kv_heads
    span = (program // num_kv_heads) % (num_slots - first_slot)
    sequence = program // num_kv_heads // (num_slots - first_slot)
    context = tl.load(context_lens + sequence)
    span_begin = span * SPLIT
    if HAS_PREFIX:
        span_begin += tl.load(prefix_lens + sequence)
    span_end = tl.minimum(span_begin + SPLIT, context)
    if span_begin >= context:
        return
    sequence_id = sequence.to(tl.int64)
    head_id = head.to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    dims_in = dims < HEAD_DIM
    query = tl.load(q + sequence_id * q_stride + head_id * q_head + dims, mask=dims_in, other=0.0).to(tl.float32)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes + head) * 1.4426950408889634
    if HAS_SCALE:
        scale = scale * tl.load(k_scales + head)
    query = query * scale
    pages = page_table + sequence_id * table_stride
    k_base = k + head_id * k_head + dims[None, :]
    v_base = v + head_id * v_head + dims[None, :]
    begin = span_begin
    if HAS_WINDOW:
        begin = tl.maximum(begin, begin + (context - window - begin) // BLOCK_N * BLOCK_N)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    row_max = float("-inf")
    row_sum = 0.0
    for start in tl.range(begin, span_end, BLOCK_N, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_N)
        keys_in = keys < span_end
        page = tl.load(pages + keys // PAGE_SIZE, mask=keys_in, other=0).to(tl.int64)
        in_page = keys % PAGE_SIZE
        tile_in = keys_in[:, None] & dims_in[None, :]
        k_tile = tl.load(k_base + (page * k_page + in_page * k_stride)[:, None], mask=tile_in, other=0.0)
        v_tile = tl.load(v_base + (page * v_page + in_page * v_stride)[:, None], mask=tile_in, other=0.0)
        scores = tl.sum(k_tile.to(tl.float32) * query[None, :], 1)
        if HAS_ALIBI:
            scores += slope * (keys - (context - 1)).to(tl.float32)
        if HAS_WINDOW:
            keys_in = keys_in & (keys > context - 1 - window)
        scores = tl.where(keys_in, scores, -1.0e30)
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        weights = tl.where(keys_in, tl.math.exp2(scores - new_max), 0.0)
        rescale = tl.math.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 0)
        acc = acc * rescale + tl.sum(weights[:, None] * v_tile.to(tl.float32), 0)
        row_max = new_max
    if HAS_SCALE:
        row_sum = tl.div_rn(row_sum, tl.load(v_scales + head))
    if DIRECT:
        out_row = out + sequence_id * out_stride + head_id * out_head
        tl.store(out_row + dims, (acc * tl.div_rn(1.0, row_sum)).to(out.dtype.element_ty), mask=dims_in)
    else:
        slot = (sequence_id * num_kv_heads + head) * num_slots + first_slot + span
        tl.store(partial + slot * HEAD_DIM + dims, acc, mask=dims_in)
        tl.store(statistics + 2 * slot, row_max)
        tl.store(statistics + 2 * slot + 1, row_sum)


@triton.jit(do_not_specialize=["table_stride", "num_groups", "num_kv_heads", "num_slots", "num_spans", "window"])
def prefix_kernel(
    q, k, v, page_table, context_lens, prefix_groups, prefix_lens, slopes, k_scales, v_scales, partial, statistics,
    q_stride, q_head, k_page, k_stride, k_head, v_page, v_stride, v_head, table_stride,
    num_groups, num_kv_heads, num_slots, num_spans, window, scale,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """One span of a group's shared prefix for a tile of (member, group head) rows; the first member's page-table row
    serves all.
    """
    MEMBERS: tl.constexpr = BLOCK_M // GROUP
    program = tl.program_id(0)
    kv_head = program % num_kv_heads
    span = (program // num_kv_heads) % num_spans
    tile = program // num_kv_heads // num_spans
    _, group_start, num_members, first_member = locate_tile(prefix_groups, tile, num_groups, MEMBERS)
    if (first_member >= num_members) | (first_member < 0):
        return
    prefix_len = tl.load(prefix_lens + group_start)
    span_begin = span * SPLIT
    if span_begin >= prefix_len:
        return
    row = tl.arange(0, BLOCK_M)
    members = first_member + row // GROUP
    rows_in = (members < num_members) & (row < MEMBERS * GROUP)
    sequences = (group_start + members).to(tl.int64)
    heads = kv_head * GROUP + row % GROUP
    q_rows = q + (sequences * q_stride + heads * q_head)[:, None]
    q0, q1, q2, acc0, acc1, acc2, row_sum, row_max = start_rows(q_rows, rows_in, HEAD_DIM, D0, D1, D2)
    positions = tl.load(context_lens + sequences, mask=rows_in, other=1) - 1
    row_slope = 0.0
    slope = 0.0
    if HAS_ALIBI:
        row_slope = tl.load(slopes + heads, mask=rows_in, other=0.0) * 1.4426950408889634
        slope = row_slope[:, None]
    if HAS_SCALE:
        scale = scale * tl.load(k_scales + kv_head)
    pages = page_table + group_start.to(tl.int64) * table_stride
    span_end = tl.minimum(span_begin + SPLIT, prefix_len)
    full_end = span_begin + (span_end - span_begin) // BLOCK_N * BLOCK_N
    if HAS_WINDOW:
        full_end = span_begin
    k_base = k + kv_head.to(tl.int64) * k_head
    v_base = v + kv_head.to(tl.int64) * v_head
    acc0, acc1, acc2, row_sum, row_max = attend(
        acc0, acc1, acc2, row_sum, row_max, q0, q1, q2, positions, prefix_len, slope, k_base, v_base, k_stride,
        v_stride, pages, k_page, v_page, span_begin, full_end, span_end, window, scale,
        HEAD_DIM, D0, D1, D2, BLOCK_N, PAGE_SIZE, True, HAS_ALIBI, HAS_WINDOW, False,
    )  # fmt: skip
    acc0, acc1, acc2, row_sum, row_max = attend(
        acc0, acc1, acc2, row_sum, row_max, q0, q1, q2, positions, prefix_len, slope, k_base, v_base, k_stride,
        v_stride, pages, k_page, v_page, full_end, span_end, span_end, window, scale,
        HEAD_DIM, D0, D1, D2, BLOCK_N, PAGE_SIZE, True, HAS_ALIBI, HAS_WINDOW, True,
    )  # fmt: skip
    if HAS_SCALE:
        row_sum = tl.div_rn(row_sum, tl.load(v_scales + kv_head))
    if HAS_ALIBI:  # keys were measured from the prefix's end, decode_kernel measures from each query
        row_max += row_slope * (prefix_len - positions).to(tl.float32)
    slots = (sequences * (num_kv_heads * GROUP) + heads) * num_slots + span
    ones = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    finish_rows(partial + slots[:, None] * HEAD_DIM, acc0, acc1, acc2, ones, rows_in, HEAD_DIM, D0, D1, D2)
    tl.store(statistics + 2 * slots, row_max, mask=rows_in)
    tl.store(statistics + 2 * slots + 1, row_sum, mask=rows_in)


@triton.jit(do_not_specialize=["num_heads", "num_slots", "first_slot"])
def merge_kernel(
    partial, statistics, context_lens, prefix_lens, out, out_stride, out_head, num_heads, num_slots, first_slot,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, HAS_PREFIX: tl.constexpr,
):  # fmt: skip
    """Merges a row's spans, in order. Maximum and sum come apart: a log-sum-exp would be rounded, and with it the
    weight of a whole span.
    """
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    context = tl.load(context_lens + sequence)
    prefix_len = 0
    if HAS_PREFIX:
        prefix_len = tl.load(prefix_lens + sequence)
    prefix_used = (prefix_len + SPLIT - 1) // SPLIT
    used = prefix_used + (context - prefix_len + SPLIT - 1) // SPLIT
    dims = tl.arange(0, BLOCK_D)
    base = (sequence * num_heads + head) * num_slots
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    largest = float("-inf")
    weight_sum = 0.0
    for number in tl.range(0, used):
        slot = tl.where(number < prefix_used, number, first_slot + number - prefix_used)
        slot_max = tl.load(statistics + 2 * (base + slot))
        slot_sum = tl.load(statistics + 2 * (base + slot) + 1)
        part = tl.load(partial + (base + slot) * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        new_largest = tl.maximum(largest, slot_max)
        pivot = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        rescale = tl.math.exp2(largest - pivot)
        weight = tl.math.exp2(slot_max - pivot)
        total = total * rescale + part * weight
        weight_sum = weight_sum * rescale + slot_sum * weight
        largest = new_largest
    out_row = out + sequence * out_stride + head * out_head
    tl.store(out_row + dims, (total * tl.div_rn(1.0, weight_sum)).to(out.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit(do_not_specialize=["table_stride", "num_sequences", "num_tiles", "num_kv_heads", "window"])
def chunk_kernel(
    q, k, v, page_table, context_lens, starts, slopes, k_scales, v_scales, out,
    q_stride, q_head, k_page, k_stride, k_head, v_page, v_stride, v_head, out_stride, out_head, table_stride,
    num_sequences, num_tiles, num_kv_heads, window, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M // GROUP queries, all heads of one group, against the sequence's pages."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head = schedule(tl.program_id(0), num_tiles, num_kv_heads, num_kv_heads)
    sequence, sequence_start, num_queries, first_query = locate_tile(starts, tile, num_sequences, QUERIES)
    if (first_query >= num_queries) | (first_query < 0):
        return
    sequence_id = sequence.to(tl.int64)
    kv_head_id = kv_head.to(tl.int64)
    context = tl.load(context_lens + sequence)
    rows = tl.arange(0, BLOCK_M)
    queries = first_query + rows // GROUP
    rows_in = (queries < num_queries) & (rows < QUERIES * GROUP)
    heads = kv_head * GROUP + rows % GROUP
    tokens = sequence_start.to(tl.int64) + queries
    q_rows = q + (tokens * q_stride + heads * q_head)[:, None]
    q0, q1, q2, acc0, acc1, acc2, row_sum, row_max = start_rows(q_rows, rows_in, HEAD_DIM, D0, D1, D2)
    slope = 0.0
    if HAS_ALIBI:
        slope = (tl.load(slopes + heads) * 1.4426950408889634)[:, None]
    if HAS_SCALE:
        scale = scale * tl.load(k_scales + kv_head)
    positions = context - num_queries + queries
    first_position = context - num_queries + first_query
    last_position = tl.minimum(first_position + QUERIES, context) - 1
    pages = page_table + sequence_id * table_stride
    k_base = k + kv_head_id * k_head
    v_base = v + kv_head_id * v_head
    begin, full_begin, full_end, edge, end = key_limits(
        first_position, last_position, context, window, True, HAS_WINDOW, BLOCK_N
    )
    if HAS_WINDOW:
        acc0, acc1, acc2, row_sum, row_max = attend(
            acc0, acc1, acc2, row_sum, row_max, q0, q1, q2, positions, last_position, slope, k_base, v_base, k_stride,
            v_stride, pages, k_page, v_page, begin, tl.minimum(full_begin, end), context, window, scale,
            HEAD_DIM, D0, D1, D2, BLOCK_N, PAGE_SIZE, True, HAS_ALIBI, HAS_WINDOW, True,
        )  # fmt: skip
    acc0, acc1, acc2, row_sum, row_max = attend(
        acc0, acc1, acc2, row_sum, row_max, q0, q1, q2, positions, last_position, slope, k_base, v_base, k_stride,
        v_stride,
        pages, k_page, v_page, full_begin, full_end, context, window, scale,
        HEAD_DIM, D0, D1, D2, BLOCK_N, PAGE_SIZE, True, HAS_ALIBI, HAS_WINDOW, False,
    )  # fmt: skip
    acc0, acc1, acc2, row_sum, row_max = attend(
        acc0, acc1, acc2, row_sum, row_max, q0, q1, q2, positions, last_position, slope, k_base, v_base, k_stride,
        v_stride,
        pages, k_page, v_page, edge, end, context, window, scale,
        HEAD_DIM, D0, D1, D2, BLOCK_N, PAGE_SIZE, True, HAS_ALIBI, HAS_WINDOW, True,
    )  # fmt: skip
    if HAS_SCALE:
        row_sum = tl.div_rn(row_sum, tl.load(v_scales + kv_head))
    out_rows = out + (tokens * out_stride + heads * out_head)[:, None]
    finish_rows(out_rows, acc0, acc1, acc2, tl.div_rn(1.0, row_sum), rows_in, HEAD_DIM, D0, D1, D2)


def default_decode_config(head_dim: int, element_bytes: int, target: int = 80, cache_bytes: int = 2) -> dict[str, int]:
    """Decode tiles; SPLIT_KEYS, the keys of one span, is part of the result's rounding and the same on every device."""
    if element_bytes == 4:
        return {"BLOCK_N": 32, "num_warps": 4 if head_dim <= 64 else 8, "num_stages": 2}
    if head_dim % 16 or (cache_bytes == 1 and head_dim & (head_dim - 1)):
        return {"BLOCK_N": 64, "num_warps": 4, "num_stages": 1}  # as in default_chunk_config
    if head_dim > 128:
        return {"BLOCK_N": 32, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}


SPLIT_KEYS = 512


def use_vector_kernel(group: int, cache_dtype: torch.dtype) -> bool:
    """Whether decodes run on the vector units."""
    return group == 1 and cache_dtype.itemsize == 1


def default_vector_config() -> dict[str, int]:
    """Decode tiles of vector_decode_kernel."""
    return {"BLOCK_N": 16, "STAGES": 3, "num_warps": 1}


def padded_head_dim(head_dim: int) -> dict[str, int]:
    """One chunk for the whole head: a decode waits for memory, not for products, and masked columns are not
    fetched.
    """
    return {"D0": max(16, triton.next_power_of_2(head_dim)), "D1": 0, "D2": 0}


def default_chunk_config(head_dim: int, element_bytes: int, target: int = 80, cache_bytes: int = 2) -> dict[str, int]:
    """Tiles for sequences with more than one query, and for a shared prefix.

    One stage for 8-bit pages and for head dims that 16 does not divide: there chunks of a head dim, in a pipelined
    loop, read outside the pages on an H100 with Triton 3.6.
    """
    if element_bytes == 4:
        return tiles(32, 32, 4 if head_dim <= 64 else 8, 1)
    if cache_bytes == 1 or head_dim % 16:
        return tiles(64, 32, 4, 1)
    if head_dim > 128:
        return tiles(64, 32, 8, 2)
    if target < 90 and head_dim > 64:
        return tiles(64, 32, 4, 2)
    if target >= 100 and head_dim & (head_dim - 1):
        return tiles(64, 64, 4, 2)  # a third stage spills
    return tiles(64, 64, 4, 3)


def launch_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    max_query_len: int,
    max_context_len: int,
    num_decodes: int,
    softmax_scale: float,
    slopes: torch.Tensor | None,
    window: int | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    prefix_groups: torch.Tensor | None,
    prefix_lens: torch.Tensor | None,
    max_prefix_len: int,
    decode_config: Mapping[str, int],
    chunk_config: Mapping[str, int],
    vector_config: Mapping[str, int],
    split: int = SPLIT_KEYS,
) -> torch.Tensor:
    """Runs the decode kernels on the first ``num_decodes`` sequences and the chunk kernel on the rest."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    group = num_heads // num_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d0, d1, d2 = split_head_dim(head_dim, q.element_size())
    has_scale = k_scale is not None or v_scale is not None
    if has_scale:
        ones = torch.ones(num_kv_heads, dtype=torch.float32, device=q.device)
        k_scale, v_scale = (ones if s is None else s for s in (k_scale, v_scale))
    any_tensor = context_lens
    slopes_ = slopes if slopes is not None else any_tensor
    k_scale_ = k_scale if k_scale is not None else any_tensor
    v_scale_ = v_scale if v_scale is not None else any_tensor
    cache_strides = (*k_cache.stride()[:3], *v_cache.stride()[:3])
    window_, scale = window if window is not None else 0, softmax_scale * LOG2_E
    constants = {
        "GROUP": group, "HEAD_DIM": head_dim, "D0": d0, "D1": d1, "D2": d2, "PAGE_SIZE": k_cache.shape[1],
        "HAS_ALIBI": slopes is not None, "HAS_WINDOW": window is not None, "HAS_SCALE": has_scale,
    }  # fmt: skip
    if k_cache.dtype.itemsize == 1:
        constants |= padded_head_dim(head_dim)
    if num_decodes:
        prefix_spans = triton.cdiv(max_prefix_len, split)
        has_prefix = prefix_spans > 0
        prefix_lens_ = prefix_lens if prefix_lens is not None else any_tensor
        spans = triton.cdiv(max_context_len, split)
        num_slots = prefix_spans + spans
        direct = num_slots == 1
        if direct:
            partial = statistics = out
        else:
            partial = torch.empty((num_decodes, num_heads, num_slots, head_dim), dtype=torch.float32, device=q.device)
            statistics = torch.empty((num_decodes, num_heads, num_slots, 2), dtype=torch.float32, device=q.device)
        if has_prefix:
            assert prefix_groups is not None
            num_groups = prefix_groups.shape[0] - 1
            config = dict(chunk_config)
            config["BLOCK_M"] = max(config["BLOCK_M"], triton.next_power_of_2(group))
            num_tiles = num_decodes // (config["BLOCK_M"] // group) + num_groups
            prefix_kernel[(num_tiles * prefix_spans * num_kv_heads,)](
                q, k_cache, v_cache, page_table, context_lens, prefix_groups, prefix_lens_, slopes_, k_scale_,
                v_scale_, partial, statistics, q.stride(0), q.stride(1), *cache_strides, page_table.stride(0),
                num_groups, num_kv_heads, num_slots, prefix_spans, window_, scale, SPLIT=split, **constants, **config,
            )  # fmt: skip
        arguments = (
            q, k_cache, v_cache, page_table, context_lens, prefix_lens_, slopes_, k_scale_, v_scale_, out, partial,
            statistics, q.stride(0), q.stride(1), *cache_strides, out.stride(0), out.stride(1), page_table.stride(0),
            num_kv_heads, num_slots, prefix_spans, window_, scale,
        )  # fmt: skip
        flags = {"HAS_PREFIX": has_prefix, "DIRECT": direct}
        grid = (num_decodes * spans * num_kv_heads,)
        if use_vector_kernel(group, k_cache.dtype):
            config = {
                name: constants[name] for name in ("HEAD_DIM", "PAGE_SIZE", "HAS_ALIBI", "HAS_WINDOW", "HAS_SCALE")
            }
            config |= {"BLOCK_D": triton.next_power_of_2(head_dim), "SPLIT": split} | flags
            vector_decode_kernel[grid](*arguments, **config, **vector_config)
        else:
            rows = max(16, triton.next_power_of_2(group))
            config = constants | padded_head_dim(head_dim) | {"ROWS": rows, "SPLIT": split} | flags
            decode_kernel[grid](*arguments, **config, **decode_config)
        if not direct:
            merge_kernel[(num_decodes, num_heads)](
                partial, statistics, context_lens, prefix_lens_, out, out.stride(0), out.stride(1), num_heads,
                num_slots, prefix_spans, HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), SPLIT=split,
                HAS_PREFIX=has_prefix, num_warps=2,
            )  # fmt: skip
    num_chunks = context_lens.shape[0] - num_decodes
    if num_chunks and num_tokens > num_decodes:
        config = dict(chunk_config)
        config["BLOCK_M"] = max(config["BLOCK_M"], triton.next_power_of_2(group))
        num_tiles = num_tokens // (config["BLOCK_M"] // group) + num_chunks
        chunk_kernel[(num_tiles * num_kv_heads,)](
            q, k_cache, v_cache, page_table[num_decodes:], context_lens[num_decodes:], query_starts[num_decodes:],
            slopes_, k_scale_, v_scale_, out, q.stride(0), q.stride(1), *cache_strides, out.stride(0), out.stride(1),
            page_table.stride(0), num_chunks, num_tiles, num_kv_heads, window_, scale, **constants, **config,
        )  # fmt: skip
    return out
