"""Hopper's backward kernels of packed causal attention, in Gluon; formulas as in attention_backward.py.

Same frame as attention_hopper.py: a producer warp copies tiles by TMA, two warpgroups hold 64 keys (dK, dV) or
64 queries (dQ) each, the grid is persistent. Weights and score gradients stay in registers as the left operand
of the next product.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Mapping

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attention_backward import launch_delta
from .attention_forward import heads_per_group
from .attention_hopper import (
    clear_rows,
    copy_tile,
    find_tile,
    make_barriers,
    make_descriptor,
    plan,
    produce,
    store_tile,
)
from .attention_tiles import LOG2_E


@gluon.jit
def produce_queries(
    q_desc, dout_desc, k_desc, v_desc, q_tiles, dout_tiles, k_tiles, v_tiles, statistics,
    full, empty, kv_full, kv_empty, lse, delta, starts, slopes, stat_head,
    num_slots, num_programs, num_tiles, num_kv_heads, num_sequences, group_heads,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, HAS_ALIBI: gl.constexpr,
):  # fmt: skip
    """For key_gradient_kernel: a tile's keys and values once, then the query and dout blocks of each head of
    its group, from the last to the first.

    The queries' log-sum-exp and δ are loaded here too, so that no consumer waits for global memory.
    """
    flat_layout: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    tiles_done = 0
    blocks_done = 0
    for slot in range(num_slots):
        start, length, row, kv_head = find_tile(
            starts, slot, num_programs, num_tiles, num_kv_heads, num_sequences, group_heads, 128, False
        )
        if row < length:
            for half in gl.static_range(2):
                mbarrier.wait(kv_empty.index(half), (tiles_done & 1) ^ 1)
                mbarrier.expect(kv_full.index(half), 2 * k_desc.block_type.nbytes)
                coordinates = [start + row + half * 64, kv_head, 0]
                copy_tile(k_desc, coordinates, kv_full.index(half), k_tiles.index(half))
                copy_tile(v_desc, coordinates, kv_full.index(half), v_tiles.index(half))
            num_blocks = (length - row + BLOCK_M - 1) // BLOCK_M
            for g in range(GROUP):
                head = kv_head * GROUP + g
                for step in range(num_blocks):
                    block_begin = row + (num_blocks - 1 - step) * BLOCK_M
                    stage = blocks_done % STAGES
                    queries = block_begin + gl.arange(0, BLOCK_M, flat_layout)
                    address = head.to(gl.int64) * stat_head + start + queries
                    # A query past the end gets weight exp2(x − ∞) = 0.
                    log_sums = gl.load(lse + address, mask=queries < length, other=float("inf"))
                    deltas = gl.load(delta + address, mask=queries < length, other=0.0)
                    if HAS_ALIBI:
                        log_sums += gl.load(slopes + head) * 1.4426950408889634 * (queries - row).to(gl.float32)
                    mbarrier.wait(empty.index(stage), ((blocks_done // STAGES) & 1) ^ 1)
                    mbarrier.expect(full.index(stage), 2 * q_desc.block_type.nbytes)
                    coordinates = [start + block_begin, head, 0]
                    copy_tile(q_desc, coordinates, full.index(stage), q_tiles.index(stage))
                    copy_tile(dout_desc, coordinates, full.index(stage), dout_tiles.index(stage))
                    statistics.index(2 * stage).store(log_sums)
                    statistics.index(2 * stage + 1).store(deltas)
                    mbarrier.arrive(full.index(stage), count=1)
                    blocks_done += 1
            tiles_done += 1


@gluon.jit
def consume_queries(
    half: gl.constexpr, q_tiles, dout_tiles, k_tiles, v_tiles, statistics, column_ids, full, empty, kv_full, kv_empty,
    dk, dv, starts, slopes, dk_stride, dk_head, scale, softmax_scale,
    num_slots, num_programs, num_tiles, num_kv_heads, num_sequences, group_heads,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, HAS_ALIBI: gl.constexpr,
):  # fmt: skip
    """dK and dV of one half tile of 64 keys; scores are transposed, keys are rows."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    column_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    element: gl.constexpr = q_tiles.dtype

    tiles_done = 0
    blocks_done = 0
    for slot in range(num_slots):
        start, length, row, kv_head = find_tile(
            starts, slot, num_programs, num_tiles, num_kv_heads, num_sequences, group_heads, 128, False
        )
        if row < length:
            keys = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, score_layout))
            empty_scores = gl.zeros([64, BLOCK_M], gl.float32, score_layout)
            dk_acc = gl.zeros([64, WIDTH], gl.float32, out_layout)
            dv_acc = gl.zeros([64, WIDTH], gl.float32, out_layout)
            key_tile = k_tiles.index(half).reshape([64, WIDTH])
            value_tile = v_tiles.index(half).reshape([64, WIDTH])
            mbarrier.wait(kv_full.index(half), tiles_done & 1)
            num_blocks = (length - row + BLOCK_M - 1) // BLOCK_M
            for g in range(GROUP):
                key_bias = 0.0
                if HAS_ALIBI:
                    slope = gl.load(slopes + kv_head * GROUP + g) * 1.4426950408889634
                    key_bias = slope * keys.to(gl.float32)
                num_present = length - row - (num_blocks - 1) * BLOCK_M
                if num_present < BLOCK_M:
                    stage = blocks_done % STAGES
                    mbarrier.wait(full.index(stage), (blocks_done // STAGES) & 1)
                    clear_rows(q_tiles.index(stage), num_present, WIDTH)
                    clear_rows(dout_tiles.index(stage), num_present, WIDTH)
                for step in range(num_blocks):
                    stage = blocks_done % STAGES
                    mbarrier.wait(full.index(stage), (blocks_done // STAGES) & 1)
                    scores_token = warpgroup_mma(
                        key_tile,
                        q_tiles.index(stage).reshape([BLOCK_M, WIDTH]).permute((1, 0)),
                        empty_scores,
                        use_acc=False,
                        is_async=True,
                    )
                    dweights_token = warpgroup_mma(
                        value_tile,
                        dout_tiles.index(stage).reshape([BLOCK_M, WIDTH]).permute((1, 0)),
                        empty_scores,
                        use_acc=False,
                        is_async=True,
                    )
                    log_sums = statistics.index(2 * stage).load(column_layout)
                    scores = warpgroup_mma_wait(1, deps=[scores_token])
                    scores = scores * scale - log_sums[None, :]
                    if HAS_ALIBI:
                        scores += key_bias[:, None]
                    block_begin = (num_blocks - 1 - step) * BLOCK_M
                    if block_begin < half * 64 + 63:
                        limits = (keys - block_begin).to(gl.float32)
                        scores = gl.where(
                            column_ids.load(column_layout)[None, :] >= limits[:, None], scores, float("-inf")
                        )
                    weights = gl.exp2(scores)
                    narrow = gl.convert_layout(weights.to(element), weight_layout)
                    dv_token = warpgroup_mma(
                        narrow, dout_tiles.index(stage).reshape([BLOCK_M, WIDTH]), dv_acc, is_async=True
                    )
                    dweights = warpgroup_mma_wait(1, deps=[dweights_token])
                    dscores = weights * (dweights - statistics.index(2 * stage + 1).load(column_layout)[None, :])
                    narrow_gradient = gl.convert_layout(dscores.to(element), weight_layout)
                    dk_token = warpgroup_mma(
                        narrow_gradient, q_tiles.index(stage).reshape([BLOCK_M, WIDTH]), dk_acc, is_async=True
                    )
                    dv_acc, dk_acc = warpgroup_mma_wait(0, deps=[dv_token, dk_token])
                    mbarrier.arrive(empty.index(stage), count=1)
                    blocks_done += 1
            mbarrier.arrive(kv_empty.index(half), count=1)
            tiles_done += 1
            # Asked again rather than kept: the loop has no register to spare.
            start, length, row, kv_head = find_tile(
                starts, slot, num_programs, num_tiles, num_kv_heads, num_sequences, group_heads, 128, False
            )
            first_key = row + half * 64
            base = start.to(gl.int64) * dk_stride + kv_head.to(gl.int64) * dk_head
            store_tile(dk + base, dk_acc * softmax_scale, dk_stride, first_key, length, HEAD_DIM, WIDTH)
            store_tile(dv + base, dv_acc, dk_stride, first_key, length, HEAD_DIM, WIDTH)


UNSPECIALISED = ["stat_head", "num_slots", "num_tiles", "num_sequences", "num_heads", "group_heads"]


@gluon.jit(do_not_specialize=UNSPECIALISED)
def hopper_key_gradient_kernel(
    q_desc, dout_desc, k_desc, v_desc, dk, dv, lse, delta, starts, slopes, dk_stride, dk_head, stat_head,
    scale, softmax_scale, num_slots, num_tiles, num_heads, num_sequences, group_heads,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, HAS_ALIBI: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK and dV of tiles of 128 keys; ``num_heads`` counts key/value heads."""
    WIDTH: gl.constexpr = q_desc.block_type.shape[2]  # the head dim padded to a power of two; the copies fill in zeros
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_M, 1, WIDTH], q_desc.layout)
    dout_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_M, 1, WIDTH], dout_desc.layout)
    k_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, 64, 1, WIDTH], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, 64, 1, WIDTH], v_desc.layout)
    # Per stage: the queries' log-sum-exp (in log2, ALiBi's row part added) and their δ.
    statistics = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    flat_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    column_ids = gl.allocate_shared_memory(gl.float32, [BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    column_ids.store(gl.arange(0, BLOCK_M, flat_layout).to(gl.float32))
    full = make_barriers(STAGES, 2)  # the copies, and the statistics
    empty = make_barriers(STAGES, 2)  # both consumers
    kv_full = make_barriers(2, 1)
    kv_empty = make_barriers(2, 1)
    num_programs = gl.num_programs(0)
    gl.warp_specialize(
        [
            (consume_queries, (
                0, q_tiles, dout_tiles, k_tiles, v_tiles, statistics, column_ids, full, empty, kv_full, kv_empty,
                dk, dv, starts, slopes, dk_stride, dk_head, scale, softmax_scale,
                num_slots, num_programs, num_tiles, num_heads, num_sequences, group_heads,
                GROUP, HEAD_DIM, WIDTH, BLOCK_M, STAGES, HAS_ALIBI,
            )),
            (consume_queries, (
                1, q_tiles, dout_tiles, k_tiles, v_tiles, statistics, column_ids, full, empty, kv_full, kv_empty,
                dk, dv, starts, slopes, dk_stride, dk_head, scale, softmax_scale,
                num_slots, num_programs, num_tiles, num_heads, num_sequences, group_heads,
                GROUP, HEAD_DIM, WIDTH, BLOCK_M, STAGES, HAS_ALIBI,
            )),
            (produce_queries, (
                q_desc, dout_desc, k_desc, v_desc, q_tiles, dout_tiles, k_tiles, v_tiles, statistics,
                full, empty, kv_full, kv_empty, lse, delta, starts, slopes, stat_head,
                num_slots, num_programs, num_tiles, num_heads, num_sequences, group_heads,
                GROUP, BLOCK_M, STAGES, HAS_ALIBI,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def consume_keys(
    half: gl.constexpr, q_tiles, dout_tiles, k_tiles, v_tiles,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, biases, column_ids,
    dq, lse, delta, starts, slopes, dq_stride, dq_head, stat_head, scale, softmax_scale,
    num_slots, num_programs, num_tiles, num_heads, num_sequences, group_heads,
    HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_ALIBI: gl.constexpr,
):  # fmt: skip
    """dQ of one half tile of 64 queries."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    column_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    element: gl.constexpr = q_tiles.dtype

    tiles_done = 0
    blocks_done = 0
    for slot in range(num_slots):
        start, length, row, head = find_tile(
            starts, slot, num_programs, num_tiles, num_heads, num_sequences, group_heads, 128, True
        )
        if row < length:
            first_row = row + half * 64
            last_block = (gl.minimum(row + 128, length) - 1) // BLOCK_N
            positions = first_row + gl.arange(0, 64, gl.SliceLayout(1, score_layout))
            statistics = head.to(gl.int64) * stat_head + start + positions
            log_sums = gl.load(lse + statistics, mask=positions < length, other=float("inf"))
            deltas = gl.load(delta + statistics, mask=positions < length, other=0.0)
            slope = 0.0
            if HAS_ALIBI:
                slope = gl.load(slopes + head) * 1.4426950408889634
            if HAS_ALIBI:
                biases.index(half).store(slope * column_ids.load(column_layout))
            empty_scores = gl.zeros([64, BLOCK_N], gl.float32, score_layout)
            dq_acc = gl.zeros([64, WIDTH], gl.float32, out_layout)
            queries = q_tiles.index(half).reshape([64, WIDTH])
            douts = dout_tiles.index(half).reshape([64, WIDTH])
            mbarrier.wait(q_full.index(half), tiles_done & 1)
            num_present = length - last_block * BLOCK_N
            if num_present < BLOCK_N:
                stage = blocks_done % STAGES
                phase = (blocks_done // STAGES) & 1
                mbarrier.wait(k_full.index(stage), phase)
                clear_rows(k_tiles.index(stage), num_present, WIDTH)
                mbarrier.wait(v_full.index(stage), phase)
                clear_rows(v_tiles.index(stage), num_present, WIDTH)
            for step in range(last_block + 1):
                block_begin = (last_block - step) * BLOCK_N
                stage = blocks_done % STAGES
                phase = (blocks_done // STAGES) & 1
                mbarrier.wait(k_full.index(stage), phase)
                scores_token = warpgroup_mma(
                    queries,
                    k_tiles.index(stage).reshape([BLOCK_N, WIDTH]).permute((1, 0)),
                    empty_scores,
                    use_acc=False,
                    is_async=True,
                )
                mbarrier.wait(v_full.index(stage), phase)
                dweights_token = warpgroup_mma(
                    douts,
                    v_tiles.index(stage).reshape([BLOCK_N, WIDTH]).permute((1, 0)),
                    empty_scores,
                    use_acc=False,
                    is_async=True,
                )
                scores = warpgroup_mma_wait(1, deps=[scores_token])
                row_bias = log_sums
                if HAS_ALIBI:
                    row_bias = log_sums + slope * (positions - block_begin).to(gl.float32)
                    scores = scores * scale + biases.index(half).load(column_layout)[None, :]
                    scores = scores - row_bias[:, None]
                else:
                    scores = scores * scale - row_bias[:, None]
                if block_begin + BLOCK_N - 1 > first_row:
                    limits = (positions - block_begin).to(gl.float32)
                    scores = gl.where(column_ids.load(column_layout)[None, :] <= limits[:, None], scores, float("-inf"))
                weights = gl.exp2(scores)
                dweights = warpgroup_mma_wait(0, deps=[dweights_token])
                mbarrier.arrive(v_empty.index(stage), count=1)
                dscores = weights * (dweights - deltas[:, None])
                narrow = gl.convert_layout(dscores.to(element), weight_layout)
                dq_token = warpgroup_mma(narrow, k_tiles.index(stage).reshape([BLOCK_N, WIDTH]), dq_acc, is_async=True)
                dq_acc = warpgroup_mma_wait(0, deps=[dq_token])
                mbarrier.arrive(k_empty.index(stage), count=1)
                blocks_done += 1
            mbarrier.arrive(q_empty.index(half), count=1)
            tiles_done += 1
            base = start.to(gl.int64) * dq_stride + head.to(gl.int64) * dq_head
            store_tile(dq + base, dq_acc * softmax_scale, dq_stride, first_row, length, HEAD_DIM, WIDTH)


@gluon.jit(do_not_specialize=UNSPECIALISED)
def hopper_query_gradient_kernel(
    q_desc, dout_desc, k_desc, v_desc, dq, lse, delta, starts, slopes, dq_stride, dq_head, stat_head,
    scale, softmax_scale, num_slots, num_tiles, num_heads, num_sequences, group_heads,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_ALIBI: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dQ of tiles of 128 queries."""
    WIDTH: gl.constexpr = q_desc.block_type.shape[2]  # the head dim padded to a power of two; the copies fill in zeros
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, 64, 1, WIDTH], q_desc.layout)
    dout_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, 64, 1, WIDTH], dout_desc.layout)
    k_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_N, 1, WIDTH], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_N, 1, WIDTH], v_desc.layout)
    flat_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    column_ids = gl.allocate_shared_memory(gl.float32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    column_ids.store(gl.arange(0, BLOCK_N, flat_layout).to(gl.float32))
    biases = gl.allocate_shared_memory(gl.float32, [2, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = make_barriers(2, 1)
    q_empty = make_barriers(2, 1)
    k_full = make_barriers(STAGES, 1)
    k_empty = make_barriers(STAGES, 2)
    v_full = make_barriers(STAGES, 1)
    v_empty = make_barriers(STAGES, 2)
    num_programs = gl.num_programs(0)
    gl.warp_specialize(
        [
            (consume_keys, (
                0, q_tiles, dout_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, biases,
                column_ids,
                dq, lse, delta, starts, slopes, dq_stride, dq_head, stat_head, scale, softmax_scale,
                num_slots, num_programs, num_tiles, num_heads, num_sequences, group_heads,
                HEAD_DIM, WIDTH, BLOCK_N, STAGES, HAS_ALIBI,
            )),
            (consume_keys, (
                1, q_tiles, dout_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, biases,
                column_ids,
                dq, lse, delta, starts, slopes, dq_stride, dq_head, stat_head, scale, softmax_scale,
                num_slots, num_programs, num_tiles, num_heads, num_sequences, group_heads,
                HEAD_DIM, WIDTH, BLOCK_N, STAGES, HAS_ALIBI,
            )),
            (produce, (
                q_desc, dout_desc, k_desc, v_desc, q_tiles, dout_tiles, k_tiles, v_tiles,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                starts, num_slots, num_programs, num_tiles, num_heads, num_sequences, group_heads,
                GROUP, BLOCK_N, STAGES, True,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, 24],
    )  # fmt: skip


def default_key_config(head_dim: int) -> dict[str, int]:
    """Tiles of the dK/dV kernel where tuned/ has nothing."""
    return {"BLOCK_M": 64 if head_dim > 64 else 128, "STAGES": 2, "CONSUMER_REGISTERS": 240}


def default_query_config(head_dim: int) -> dict[str, int]:
    """Tiles of the dQ kernel where tuned/ has nothing."""
    if head_dim > 64:
        return {"BLOCK_N": 64, "STAGES": 2, "CONSUMER_REGISTERS": 240}
    return {"BLOCK_N": 128, "STAGES": 3, "CONSUMER_REGISTERS": 240}


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
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    num_tiles = num_tokens // 128 + num_sequences
    shared = heads_per_group(num_heads, group, max_query_len, head_dim, q.element_size())
    slopes_or_any = slopes if slopes is not None else lse
    scales = (softmax_scale * LOG2_E, softmax_scale)
    constants = {"GROUP": group, "HEAD_DIM": head_dim, "HAS_ALIBI": slopes is not None, "num_warps": 4}

    rows = key_config["BLOCK_M"]
    programs = min(num_tiles * num_kv_heads, processors)
    group_heads, num_slots = plan(num_tokens, num_sequences, num_kv_heads, max(1, shared // group), programs, False)
    hopper_key_gradient_kernel[(programs,)](
        make_descriptor(q, rows), make_descriptor(dout, rows), make_descriptor(k, 64), make_descriptor(v, 64),
        dk, dv, lse, delta, query_starts, slopes_or_any, dk.stride(0), dk.stride(1), lse.stride(0), *scales,
        num_slots, num_tiles, num_kv_heads, num_sequences, group_heads,
        **constants, **key_config,
    )  # fmt: skip
    rows = query_config["BLOCK_N"]
    programs = min(num_tiles * num_heads, processors)
    group_heads, num_slots = plan(num_tokens, num_sequences, num_heads, shared, programs, True)
    hopper_query_gradient_kernel[(programs,)](
        make_descriptor(q, 64), make_descriptor(dout, 64), make_descriptor(k, rows), make_descriptor(v, rows),
        dq, lse, delta, query_starts, slopes_or_any, dq.stride(0), dq.stride(1), lse.stride(0), *scales,
        num_slots, num_tiles, num_heads, num_sequences, group_heads, **constants,
        **query_config,
    )  # fmt: skip
    return dq, dk, dv
