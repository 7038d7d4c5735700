"""Hopper's forward kernel of packed causal attention, in Gluon: TMA copies, two consumer warpgroups, a
persistent grid.

A producer warp runs ahead through all tiles of its program and copies query, key and value tiles; two
warpgroups hold 64 queries each. Inside a warpgroup the score product of the next key block is issued before the
value product of this one, so the tensor cores work while the softmax runs (the pipelining of Shah et al.,
"FlashAttention-3", 2024). Keys run from the diagonal backwards: only the first blocks are masked, and every row
meets a valid key in its first block.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .attention_forward import heads_per_group
from .attention_tiles import LOG2_E

copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed after Triton 3.6
meet = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed after Triton 3.6


@gluon.jit
def find_tile(
    starts,
    slot,
    num_programs,
    num_tiles,
    num_heads,
    num_sequences,
    group_heads,
    ROWS: gl.constexpr,
    LATE_FIRST: gl.constexpr,
):
    """The slot-th tile of this program: sequence start, length, first row and head. An empty slot's row is the
    length.

    The longest tiles of a group of heads come first (the last queries, or the first keys), and slots run there and
    back over the programs, so that each gets long and short ones alike. A group begins with a slot of its own: one
    that began inside a slot would hand its longest tiles to the same programs, group after group.
    """
    program = gl.program_id(0)
    lane = gl.where(slot % 2 == 0, program, num_programs - 1 - program)
    slots_each = (num_tiles * group_heads + num_programs - 1) // num_programs
    group = slot // slots_each
    heads_here = gl.minimum(group_heads, num_heads - group * group_heads)
    inside = (slot - group * slots_each) * num_programs + lane
    present = inside < num_tiles * heads_here
    inside = gl.where(present, inside, 0)
    tile = inside // heads_here
    if LATE_FIRST:
        tile = num_tiles - 1 - tile
    head = group * group_heads + inside % heads_here
    low = 0
    high = num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        first_tile = gl.load(starts + middle) // ROWS + middle
        low = gl.where(first_tile <= tile, middle, low)
        high = gl.where(first_tile <= tile, high, middle - 1)
    start = gl.load(starts + low)
    length = gl.load(starts + low + 1) - start
    row = (tile - start // ROWS - low) * ROWS
    row = gl.where(present, row, length)
    return start, length, row, head


@gluon.jit
def clear_rows(tile, num_present, WIDTH: gl.constexpr):
    """Zeroes the rows of a copied tile [ROWS,1,WIDTH] from ``num_present`` on: the copy took them from the next
    sequence, whose infinities a weight of 0 would turn into NaN.

    Each warpgroup does so before its own products. Both write the same bytes, so neither waits for the other.
    """
    ROWS: gl.constexpr = tile.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    flat = tile.reshape([ROWS, WIDTH])
    for part in gl.static_range(ROWS // 32):
        if num_present < 32 * (part + 1):
            rows = 32 * part + gl.arange(0, 32, gl.SliceLayout(1, layout))
            piece = flat.slice(32 * part, 32)
            values = piece.load(layout)
            piece.store(gl.where((rows < num_present)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    meet()


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers in shared memory; a phase of each ends with ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def store_tile(base, values, stride, first_row, length, HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr):
    """Stores a [64, WIDTH] tile, rows past the sequence's length and padded dims left out, by 16-byte accesses."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    tile = gl.convert_layout(values.to(base.dtype.element_ty), layout)
    rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, layout))
    dims = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    gl.store(
        base + rows.to(gl.int64)[:, None] * stride + dims[None, :],
        tile,
        mask=(rows < length)[:, None] & (dims < HEAD_DIM)[None, :],
    )


@gluon.jit
def produce(
    q_desc, dout_desc, k_desc, v_desc, q_tiles, dout_tiles, k_tiles, v_tiles,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    starts, num_slots, num_programs, num_tiles, num_heads, num_sequences, group_heads,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_DOUT: gl.constexpr,
):  # fmt: skip
    """Copies each tile's queries (HAS_DOUT: and their output gradients) once and its key and value blocks from the
    last to the first.
    """
    tiles_done = 0
    blocks_done = 0
    for slot in range(num_slots):
        start, length, row, head = find_tile(
            starts, slot, num_programs, num_tiles, num_heads, num_sequences, group_heads, 128, True
        )
        if row < length:
            kv_head = head // GROUP
            last_block = (gl.minimum(row + 128, length) - 1) // BLOCK_N
            for half in gl.static_range(2):
                mbarrier.wait(q_empty.index(half), (tiles_done & 1) ^ 1)
                coordinates = [start + row + half * 64, head, 0]
                mbarrier.expect(q_full.index(half), (1 + HAS_DOUT) * q_desc.block_type.nbytes)
                copy_tile(q_desc, coordinates, q_full.index(half), q_tiles.index(half))
                if HAS_DOUT:
                    copy_tile(dout_desc, coordinates, q_full.index(half), dout_tiles.index(half))
            for step in range(last_block + 1):
                block_row = start + (last_block - step) * BLOCK_N
                stage = blocks_done % STAGES
                phase = ((blocks_done // STAGES) & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                copy_tile(k_desc, [block_row, kv_head, 0], k_full.index(stage), k_tiles.index(stage))
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                copy_tile(v_desc, [block_row, kv_head, 0], v_full.index(stage), v_tiles.index(stage))
                blocks_done += 1
            tiles_done += 1


@gluon.jit
def mask_scores(scores, limits, column_ids, layout: gl.constexpr):
    """Keeps columns up to each row's limit; the finite floor never meets a row without a valid key."""
    return gl.where(column_ids.load(layout)[None, :] <= limits[:, None], scores, -1.0e30)


@gluon.jit
def consume(
    half: gl.constexpr, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, biases,
    column_ids,
    out, lse, starts, slopes, out_stride, out_head, lse_head, scale,
    num_slots, num_programs, num_tiles, num_heads, num_sequences, group_heads,
    HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_ALIBI: gl.constexpr,
):  # fmt: skip
    """Softmax and products of one half tile of 64 queries."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    element: gl.constexpr = q_tiles.dtype

    tiles_done = 0
    blocks_done = 0
    for slot in range(num_slots):
        start, length, row, head = find_tile(
            starts, slot, num_programs, num_tiles, num_heads, num_sequences, group_heads, 128, True
        )
        if row < length:
            last_block = (gl.minimum(row + 128, length) - 1) // BLOCK_N
            first_row = row + half * 64
            # Blocks whose keys all lie at or before this half's first row need no mask.
            masked_blocks = last_block + 1 - (first_row + 1) // BLOCK_N
            rows = first_row + gl.arange(0, 64, row_layout)
            slope = 0.0
            if HAS_ALIBI:
                slope = gl.load(slopes + head) * 1.4426950408889634
            # Column numbers and biases wait in shared memory: the loop needs the registers.
            if HAS_ALIBI:
                biases.index(half).store(slope * column_ids.load(column_layout))
            reference = row + 127

            mbarrier.wait(q_full.index(half), tiles_done & 1)
            queries = q_tiles.index(half).reshape([64, WIDTH])
            stage = blocks_done % STAGES
            phase = (blocks_done // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            empty_scores = gl.zeros([64, BLOCK_N], gl.float32, score_layout)
            scores = warpgroup_mma(
                queries,
                k_tiles.index(stage).reshape([BLOCK_N, WIDTH]).permute((1, 0)),
                empty_scores,
                use_acc=False,
                is_async=True,
            )
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(stage), count=1)
            block_begin = last_block * BLOCK_N
            if HAS_ALIBI:
                scores = scores * scale + biases.index(half).load(column_layout)[None, :]
            scores = mask_scores(scores, (rows - block_begin).to(gl.float32), column_ids, column_layout)
            # row_max is kept relative to the block's own bias, which is one number for all its keys.
            if HAS_ALIBI:
                block_bias = slope * (block_begin - reference).to(gl.float32)
                top = gl.max(scores, 1)
                weights = gl.exp2(scores - top[:, None])
                row_max = top + block_bias
            else:
                row_max = gl.max(scores, 1) * scale
                weights = gl.exp2(scores * scale - row_max[:, None])
            row_sum = gl.sum(weights, 1)
            narrow = gl.convert_layout(weights.to(element), weight_layout)
            acc = gl.zeros([64, WIDTH], gl.float32, out_layout)
            if length - block_begin < BLOCK_N:
                mbarrier.wait(v_full.index(stage), phase)
                clear_rows(v_tiles.index(stage), length - block_begin, WIDTH)

            for step in range(1, last_block + 1):
                value_stage = stage
                value_phase = phase
                blocks_done += 1
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
                mbarrier.wait(v_full.index(value_stage), value_phase)
                acc_token = warpgroup_mma(
                    narrow, v_tiles.index(value_stage).reshape([BLOCK_N, WIDTH]), acc, is_async=True
                )
                scores = warpgroup_mma_wait(1, deps=[scores_token])
                mbarrier.arrive(k_empty.index(stage), count=1)
                block_begin -= BLOCK_N
                if HAS_ALIBI:
                    scores = scores * scale + biases.index(half).load(column_layout)[None, :]
                if step < masked_blocks:
                    scores = mask_scores(scores, (rows - block_begin).to(gl.float32), column_ids, column_layout)
                if HAS_ALIBI:
                    block_bias = slope * (block_begin - reference).to(gl.float32)
                    new_max = gl.maximum(row_max, gl.max(scores, 1) + block_bias)
                    weights = gl.exp2(scores - (new_max - block_bias)[:, None])
                else:
                    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale)
                    weights = gl.exp2(scores * scale - new_max[:, None])
                rescale = gl.exp2(row_max - new_max)
                row_sum = row_sum * rescale + gl.sum(weights, 1)
                row_max = new_max
                acc = warpgroup_mma_wait(0, deps=[acc_token])
                mbarrier.arrive(v_empty.index(value_stage), count=1)
                acc = acc * gl.convert_layout(rescale, out_row_layout)[:, None]
                narrow = gl.convert_layout(weights.to(element), weight_layout)

            mbarrier.arrive(q_empty.index(half), count=1)
            blocks_done += 1
            mbarrier.wait(v_full.index(stage), phase)
            acc_token = warpgroup_mma(narrow, v_tiles.index(stage).reshape([BLOCK_N, WIDTH]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc_token])
            mbarrier.arrive(v_empty.index(stage), count=1)
            tiles_done += 1

            # Asked again rather than kept: the loop has no register to spare.
            start, length, row, head = find_tile(
                starts, slot, num_programs, num_tiles, num_heads, num_sequences, group_heads, 128, True
            )
            first_row = row + half * 64
            acc = acc * gl.convert_layout(1.0 / row_sum, out_row_layout)[:, None]
            token = start.to(gl.int64)
            base = out + token * out_stride + head.to(gl.int64) * out_head
            store_tile(base, acc, out_stride, first_row, length, HEAD_DIM, WIDTH)
            log_sum = row_max + gl.log2(row_sum)
            if HAS_ALIBI:
                log_sum -= slope * (rows - reference).to(gl.float32)
            gl.store(lse + head.to(gl.int64) * lse_head + token + rows, log_sum, mask=rows < length)


@gluon.jit(do_not_specialize=["lse_head", "num_slots", "num_tiles", "num_sequences", "num_heads", "group_heads"])
def hopper_forward_kernel(
    q_desc, k_desc, v_desc, out, lse, starts, slopes, out_stride, out_head, lse_head, scale,
    num_slots, num_tiles, num_heads, num_sequences, group_heads,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_ALIBI: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Persistent: program p works through slots 0 … num_slots − 1, one tile of 128 queries each."""
    WIDTH: gl.constexpr = q_desc.block_type.shape[2]  # the head dim padded to a power of two; the copies fill in zeros
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, 64, 1, WIDTH], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, 1, WIDTH], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, 1, WIDTH], v_desc.layout)
    biases = gl.allocate_shared_memory(gl.float32, [2, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    column_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    column_ids = gl.allocate_shared_memory(gl.float32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    column_ids.store(gl.arange(0, BLOCK_N, column_layout).to(gl.float32))
    q_full = make_barriers(2, 1)
    q_empty = make_barriers(2, 1)
    k_full = make_barriers(STAGES, 1)
    k_empty = make_barriers(STAGES, 2)
    v_full = make_barriers(STAGES, 1)
    v_empty = make_barriers(STAGES, 2)
    num_programs = gl.num_programs(0)
    gl.warp_specialize(
        [
            (consume, (
                0, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, biases, column_ids,
                out, lse, starts, slopes, out_stride, out_head, lse_head, scale,
                num_slots, num_programs, num_tiles, num_heads, num_sequences, group_heads,
                HEAD_DIM, WIDTH, BLOCK_N, STAGES, HAS_ALIBI,
            )),
            (consume, (
                1, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, biases, column_ids,
                out, lse, starts, slopes, out_stride, out_head, lse_head, scale,
                num_slots, num_programs, num_tiles, num_heads, num_sequences, group_heads,
                HEAD_DIM, WIDTH, BLOCK_N, STAGES, HAS_ALIBI,
            )),
            (produce, (
                q_desc, q_desc, k_desc, v_desc, q_tiles, q_tiles, k_tiles, v_tiles,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                starts, num_slots, num_programs, num_tiles, num_heads, num_sequences, group_heads,
                GROUP, BLOCK_N, STAGES, False,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, 24],
    )  # fmt: skip


def default_config(head_dim: int) -> dict[str, int]:
    """Tiles where tuned/ has nothing."""
    return {"BLOCK_N": 128, "STAGES": 2 if head_dim > 64 else 3, "CONSUMER_REGISTERS": 240}


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, causal: bool) -> bool:
    """Whether the kernel takes these: 16-bit, head dim 33 to 128, causal without window, rows aligned to 16 bytes."""
    if q.dtype.itemsize != 2 or not 32 < q.shape[-1] <= 128 or not causal or window is not None:
        return False
    return all(x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0 for x in (q, k, v))


@lru_cache(maxsize=1024)
def plan(
    num_tokens: int, num_sequences: int, num_heads: int, most_heads: int, num_programs: int, late_first: bool
) -> tuple[int, int]:
    """How many heads (at most ``most_heads``) make a group in ``find_tile``, and the slots of a program.

    Of the possible groups the one whose busiest program has least to do, if all sequences were of one length.
    """
    num_tiles = num_tokens // 128 + num_sequences
    tiles_each = num_tiles / num_sequences
    filled = -(-num_tokens // (128 * num_sequences))
    best = (float("inf"), 0, 0)
    for group_heads in range(most_heads, 0, -1):
        slots_each = -(-num_tiles * group_heads // num_programs)
        groups, rest = divmod(num_heads, group_heads)
        slots = np.arange(groups * slots_each - (-num_tiles * rest // num_programs))[:, None]
        lanes = np.arange(num_programs)
        lanes = np.where(slots % 2 == 0, lanes, num_programs - 1 - lanes)
        group = slots // slots_each
        tiles = ((slots - group * slots_each) * num_programs + lanes) // np.minimum(
            group_heads, num_heads - group * group_heads
        )
        present = tiles < num_tiles
        tiles = (num_tiles - 1 - tiles if late_first else tiles) % tiles_each
        work = np.where(present & (tiles < filled), tiles + 1 if late_first else filled - tiles, 0)
        best = min(best, (float(work.sum(0).max()), -group_heads, len(slots)))
    return -best[1], best[2]


_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def make_descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """TMA descriptor of x [T,N,D] for tiles of ``rows`` tokens of one head, the head dim padded with zeros to a
    power of two.
    """
    block = [rows, 1, max(16, 1 << (x.shape[2] - 1).bit_length())]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    max_query_len: int,
    softmax_scale: float,
    slopes: torch.Tensor | None,
    config: Mapping[str, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel; returns out [T,H,D] and lse [H,T] in log2."""
    num_tokens, num_heads, head_dim = q.shape
    num_sequences = query_starts.shape[0] - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=q.device)
    if num_tokens == 0:
        return out, lse
    block_n = config["BLOCK_N"]

    num_tiles = num_tokens // 128 + num_sequences
    num_programs = min(num_tiles * num_heads, torch.cuda.get_device_properties(q.device).multi_processor_count)
    group = num_heads // k.shape[1]
    most_heads = heads_per_group(num_heads, group, max_query_len, head_dim, q.element_size())
    group_heads, num_slots = plan(num_tokens, num_sequences, num_heads, most_heads, num_programs, True)
    hopper_forward_kernel[(num_programs,)](
        make_descriptor(q, 64), make_descriptor(k, block_n), make_descriptor(v, block_n), out, lse, query_starts,
        slopes if slopes is not None else lse, out.stride(0), out.stride(1), lse.stride(0), softmax_scale * LOG2_E,
        num_slots, num_tiles, num_heads, num_sequences, group_heads,
        GROUP=group, HEAD_DIM=head_dim, HAS_ALIBI=slopes is not None, num_warps=4, **config,
    )  # fmt: skip
    return out, lse
