"""Many adapters in one batch: y += s_n · (x A_nᵀ) B_nᵀ, each sequence with its own adapter n or with none.

Shapes: y [T, out], x [T, in], a [N, R, in], b [N, out, R], scalings f32 [N], adapter_index i32 [B] (−1 = base only),
query_starts i32 [B+1]. Adapters of lower rank are padded with zeros to R. In place on y, no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from . import cpu_blocks
from .dispatch import bad_argument, choose_backend, tl, triton
from .spec import Case, CompileCase, KernelSpec
from .tuning import tuned_config

OP = "lora_grouped_add_"


def lora_grouped_add_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scalings: torch.Tensor,
    adapter_index: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    max_query_len: int,
) -> torch.Tensor:
    """The definition, sequence by sequence, accumulated in fp32 (fp64 kept)."""
    compute = torch.float64 if y.dtype == torch.float64 else torch.float32
    starts = query_starts.tolist()
    for sequence_id, adapter in enumerate(adapter_index.tolist()):
        if adapter < 0:
            continue
        rows = slice(starts[sequence_id], starts[sequence_id + 1])
        hidden = linear(x[rows].to(compute), a[adapter].to(compute)) * scalings[adapter].to(compute)
        y[rows] = (y[rows].to(compute) + linear(hidden, b[adapter].to(compute))).to(y.dtype)
    return y


def _add_torch(y, x, a, b, scalings, adapter_index, query_starts) -> torch.Tensor:
    """One small pair of GEMMs per adapter in use, over all its rows at once."""
    starts = query_starts.tolist()
    runs: dict[int, list[tuple[int, int]]] = {}
    for sequence_id, adapter in enumerate(adapter_index.tolist()):
        start, stop = starts[sequence_id], starts[sequence_id + 1]
        if adapter < 0 or start == stop:
            continue
        mine = runs.setdefault(adapter, [])
        if mine and mine[-1][1] == start:
            mine[-1] = (mine[-1][0], stop)
        else:
            mine.append((start, stop))
    scale = scalings.tolist()
    for adapter, pieces in runs.items():
        a_n, b_n = a[adapter], b[adapter]
        if len(pieces) == 1:
            start, stop = pieces[0]
            cpu_blocks.add_product_(y[start:stop], cpu_blocks.linear(x[start:stop], a_n), b_n, scale[adapter])
            continue
        rows = torch.cat([torch.arange(start, stop, device=x.device) for start, stop in pieces])
        update = cpu_blocks.add_product_(y[rows], cpu_blocks.linear(x[rows], a_n), b_n, scale[adapter])
        y.index_copy_(0, rows, update)
    return y


@triton.jit
def _adapter_of(token, adapter_ptr, starts_ptr, T, B, BLOCK_B: tl.constexpr):
    """The adapter of each token: the sequence is the number of sequences that have ended before it."""
    sequence = tl.zeros_like(token)
    for first in range(0, B, BLOCK_B):
        other = first + tl.arange(0, BLOCK_B)
        end = tl.load(starts_ptr + 1 + other, mask=other < B, other=2147483647)
        sequence += tl.sum((end[None, :] <= token[:, None]).to(tl.int32), axis=1)
    return tl.load(adapter_ptr + sequence, mask=(token < T) & (sequence < B), other=-1)


@triton.jit
def _shrink_token_kernel(x_ptr, a_ptr, adapter_ptr, h_ptr, T, K, stride_x, R: tl.constexpr, BK: tl.constexpr):
    """h [split, T, R] = x[t, split's channels] · A_nᵀ, one token and one share of the channels a program."""
    token = tl.program_id(0).to(tl.int64)
    adapter = tl.load(adapter_ptr + token).to(tl.int64)
    if adapter >= 0:
        channel = tl.program_id(1) * BK + tl.arange(0, BK)
        rank = tl.arange(0, R)
        x = tl.load(x_ptr + token * stride_x + channel, mask=channel < K, other=0.0).to(tl.float32)
        at = (adapter * R + rank)[:, None] * K + channel[None, :]
        a = tl.load(a_ptr + at, mask=(channel < K)[None, :], other=0.0).to(tl.float32)
        h = tl.sum(a * x[None, :], axis=1)
        tl.store(h_ptr + (tl.program_id(1) * tl.cast(T, tl.int64) + token) * R + rank, h)


@triton.jit
def _expand_token_kernel(
    y_ptr,
    h_ptr,
    b_ptr,
    scale_ptr,
    adapter_ptr,
    T,
    N,
    stride_y,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    BN: tl.constexpr,
):
    """y[t, columns] += scale · (Σ_split h) · B_nᵀ."""
    token = tl.program_id(0).to(tl.int64)
    adapter = tl.load(adapter_ptr + token).to(tl.int64)
    if adapter >= 0:
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        rank = tl.arange(0, R)
        split = tl.arange(0, SPLIT_BLOCK)
        at = (split[:, None] * tl.cast(T, tl.int64) + token) * R + rank[None, :]
        b = tl.load(b_ptr + (adapter * N + column)[:, None] * R + rank[None, :], mask=(column < N)[:, None], other=0.0)
        h = tl.sum(tl.load(h_ptr + at, mask=(split < SPLITS)[:, None], other=0.0), axis=0)
        update = tl.sum(b.to(tl.float32) * (h * tl.load(scale_ptr + adapter))[None, :], axis=1)
        target = y_ptr + token * stride_y + column
        y = tl.load(target, mask=column < N, other=0.0).to(tl.float32)
        tl.store(target, (y + update).to(y_ptr.dtype.element_ty), mask=column < N)


@triton.jit
def _members(adapter_ptr, adapter, first, T, BLOCK_T: tl.constexpr, GROUP: tl.constexpr):
    """Of the tokens with this adapter those numbered ``first`` to ``first + GROUP``: their places, −1 where there are
    no more, and how many there are in all. One token a sequence."""
    token = tl.arange(0, BLOCK_T)
    mine = tl.load(adapter_ptr + token, mask=token < T, other=-1) == adapter
    rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1 - first
    slot = tl.arange(0, GROUP)
    hit = (rank[None, :] == slot[:, None]) & mine[None, :]
    place = tl.sum(tl.where(hit, token[None, :] + 1, 0), axis=1) - 1
    return place, tl.sum(mine.to(tl.int32), axis=0)


@triton.jit
def _shrink_adapter_kernel(
    x_ptr,
    a_ptr,
    adapter_ptr,
    h_ptr,
    T,
    K,
    stride_x,
    R: tl.constexpr,
    BK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h [split, T, R] = x · A_nᵀ over one share of the channels, for all tokens of one adapter: A is read once."""
    adapter = tl.program_id(0)
    channel = tl.program_id(1) * BK + tl.arange(0, BK)
    rank = tl.arange(0, R)
    ok = channel < K
    a_at = a_ptr + (adapter.to(tl.int64) * R + rank)[None, :] * K + channel[:, None]
    a = tl.load(a_at, mask=ok[:, None], other=0.0)
    place, count = _members(adapter_ptr, adapter, 0, T, BLOCK_T, GROUP)
    if count > 0:
        h_split = h_ptr + tl.program_id(1) * tl.cast(T, tl.int64) * R
        first = 0
        while first < count:
            row = place.to(tl.int64)[:, None]
            x = tl.load(x_ptr + row * stride_x + channel[None, :], mask=(row >= 0) & ok[None, :], other=0.0)
            h = tl.dot(x, a, input_precision=PRECISION)
            tl.store(h_split + row * R + rank[None, :], h, mask=row >= 0)
            first += GROUP
            if first < count:
                place, count = _members(adapter_ptr, adapter, first, T, BLOCK_T, GROUP)


@triton.jit
def _expand_adapter_kernel(
    y_ptr,
    h_ptr,
    b_ptr,
    scale_ptr,
    adapter_ptr,
    T,
    N,
    stride_y,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[tokens of one adapter, columns] += scale · (Σ_split h) · B_nᵀ: B is read once."""
    adapter = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    rank = tl.arange(0, R)
    inside = column < N
    b_at = b_ptr + (adapter.to(tl.int64) * N + column)[None, :] * R + rank[:, None]
    b = tl.load(b_at, mask=inside[None, :], other=0.0)
    place, count = _members(adapter_ptr, adapter, 0, T, BLOCK_T, GROUP)
    if count > 0:
        scale = tl.load(scale_ptr + adapter)
        first = 0
        while first < count:
            row = place.to(tl.int64)[:, None]
            target = y_ptr + row * stride_y + column[None, :]
            mask = (row >= 0) & inside[None, :]
            y = tl.load(target, mask=mask, other=0.0).to(tl.float32)
            h = tl.zeros((GROUP, R), dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                h += tl.load(h_ptr + (split * tl.cast(T, tl.int64) + row) * R + rank[None, :], mask=row >= 0, other=0.0)
            y = tl.dot((h * scale).to(b.dtype), b, y, input_precision=PRECISION)
            tl.store(target, y.to(y_ptr.dtype.element_ty), mask=mask)
            first += GROUP
            if first < count:
                place, count = _members(adapter_ptr, adapter, first, T, BLOCK_T, GROUP)


@triton.jit
def _shrink_tile_kernel(
    x_ptr,
    a_ptr,
    adapter_ptr,
    starts_ptr,
    h_ptr,
    T,
    K,
    B,
    stride_x,
    R: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h [T, R] = x · A_nᵀ for a tile of tokens, one pass for each adapter that occurs in the tile."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    adapter = _adapter_of(token, adapter_ptr, starts_ptr, T, B, BLOCK_B)
    rank = tl.arange(0, R)
    row = token.to(tl.int64)[:, None]
    acc = tl.zeros((BT, R), dtype=tl.float32)
    current = tl.min(tl.where(adapter >= 0, adapter, 2147483647), axis=0)
    while current < 2147483647:
        mine = adapter == current
        base = a_ptr + current.to(tl.int64) * R * K
        for k in tl.range(0, K, BK):
            channel = k + tl.arange(0, BK)
            ok = channel < K
            x = tl.load(x_ptr + row * stride_x + channel[None, :], mask=mine[:, None] & ok[None, :], other=0.0)
            a = tl.load(base + rank[None, :] * K + channel[:, None], mask=ok[:, None], other=0.0)
            acc = tl.dot(x, a, acc, input_precision=PRECISION)
        current = tl.min(tl.where(adapter > current, adapter, 2147483647), axis=0)
    tl.store(h_ptr + row * R + rank[None, :], acc, mask=(token < T)[:, None])


@triton.jit
def _expand_tile_kernel(
    y_ptr,
    h_ptr,
    b_ptr,
    scale_ptr,
    adapter_ptr,
    starts_ptr,
    T,
    N,
    B,
    stride_y,
    R: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y [T, columns] += scale · h · B_nᵀ for a tile of tokens; rows without an adapter are not written."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    adapter = _adapter_of(token, adapter_ptr, starts_ptr, T, B, BLOCK_B)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    rank = tl.arange(0, R)
    row = token.to(tl.int64)[:, None]
    scale = tl.load(scale_ptr + adapter, mask=adapter >= 0, other=0.0)
    h = tl.load(h_ptr + row * R + rank[None, :], mask=(adapter >= 0)[:, None], other=0.0) * scale[:, None]
    h = h.to(b_ptr.dtype.element_ty)
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    current = tl.min(tl.where(adapter >= 0, adapter, 2147483647), axis=0)
    while current < 2147483647:
        mine = tl.where((adapter == current)[:, None], h, 0.0).to(h.dtype)
        base = b_ptr + current.to(tl.int64) * N * R
        b = tl.load(base + column[None, :].to(tl.int64) * R + rank[:, None], mask=(column < N)[None, :], other=0.0)
        acc = tl.dot(mine, b, acc, input_precision=PRECISION)
        current = tl.min(tl.where(adapter > current, adapter, 2147483647), axis=0)
    target = y_ptr + row * stride_y + column[None, :]
    mask = (adapter >= 0)[:, None] & (column < N)[None, :]
    y = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (y + acc).to(y_ptr.dtype.element_ty), mask=mask)


MAX_DECODE_TOKENS = 512
DECODE_DEFAULT = {"BY_TOKEN": True, "BK": 1024, "BN": 512, "shrink_warps": 8, "expand_warps": 8}
TILE_DEFAULT = {"BT": 16, "BK": 128, "BN": 128, "warps": 4, "stages": 3}


def _pad_rank(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks the matrix units cannot take are padded with zeros; a pool that stores them padded pays nothing here."""
    rank = a.shape[1]
    padded = max(16, triton.next_power_of_2(rank))
    if padded != rank:
        a = torch.nn.functional.pad(a, (0, 0, 0, padded - rank))
        b = torch.nn.functional.pad(b, (0, padded - rank))
    return a.contiguous(), b.contiguous()


def _add_triton(y, x, a, b, scalings, adapter_index, query_starts, max_query_len) -> torch.Tensor:
    a, b = _pad_rank(a, b)
    num_tokens, num_in = x.shape
    num_out, rank = b.shape[1], b.shape[2]
    num_sequences = adapter_index.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    if max_query_len <= 1 and num_sequences == num_tokens and num_tokens <= MAX_DECODE_TOKENS:
        config = tuned_config(OP, f"decode {rank} {triton.next_power_of_2(num_in)}", DECODE_DEFAULT)
        bk = max(32, config["BK"] * 16 // rank)
        splits = triton.cdiv(num_in, bk)
        bn = max(32, config["BN"] * 16 // rank)
        h = torch.empty(splits, num_tokens, rank, dtype=torch.float32, device=x.device)
        if config["BY_TOKEN"]:
            _shrink_token_kernel[(num_tokens, splits)](
                x, a, adapter_index, h, num_tokens, num_in, x.stride(0), R=rank, BK=bk, num_warps=config["shrink_warps"]
            )
            _expand_token_kernel[(num_tokens, triton.cdiv(num_out, bn))](
                y,
                h,
                b,
                scalings,
                adapter_index,
                num_tokens,
                num_out,
                y.stride(0),
                R=rank,
                SPLITS=splits,
                SPLIT_BLOCK=triton.next_power_of_2(splits),
                BN=bn,
                num_warps=config["expand_warps"],
            )
            return y
        common = {
            "R": rank,
            "BLOCK_T": max(16, triton.next_power_of_2(num_tokens)),
            "GROUP": 16,
            "PRECISION": precision,
        }
        _shrink_adapter_kernel[(a.shape[0], splits)](
            x,
            a,
            adapter_index,
            h,
            num_tokens,
            num_in,
            x.stride(0),
            BK=bk,
            num_warps=config["shrink_warps"],
            **common,
        )
        _expand_adapter_kernel[(a.shape[0], triton.cdiv(num_out, bn))](
            y,
            h,
            b,
            scalings,
            adapter_index,
            num_tokens,
            num_out,
            y.stride(0),
            SPLITS=splits,
            BN=bn,
            num_warps=config["expand_warps"],
            **common,
        )
        return y
    config = tuned_config(OP, f"tile {rank}", TILE_DEFAULT)
    h = torch.empty(num_tokens, rank, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(num_tokens, config["BT"])
    common = {
        "R": rank,
        "BT": config["BT"],
        "BLOCK_B": min(256, max(16, triton.next_power_of_2(num_sequences))),
        "PRECISION": precision,
        "num_warps": config["warps"],
        "num_stages": config["stages"],
    }
    _shrink_tile_kernel[(tiles,)](
        x,
        a,
        adapter_index,
        query_starts,
        h,
        num_tokens,
        num_in,
        num_sequences,
        x.stride(0),
        BK=max(32, min(config["BK"], 8192 // rank)),
        **common,
    )
    _expand_tile_kernel[(tiles, triton.cdiv(num_out, config["BN"]))](
        y,
        h,
        b,
        scalings,
        adapter_index,
        query_starts,
        num_tokens,
        num_out,
        num_sequences,
        y.stride(0),
        BN=config["BN"],
        **common,
    )
    return y


def _validate(y, x, a, b, scalings, adapter_index, query_starts, max_query_len) -> None:
    if x.ndim != 2:
        raise bad_argument(OP, "x", tuple(x.shape), "[T, in]")
    if a.ndim != 3 or a.shape[2] != x.shape[1]:
        raise bad_argument(OP, "a", tuple(a.shape), f"[N, R, {x.shape[1]}]")
    if b.ndim != 3 or b.shape[0] != a.shape[0] or b.shape[2] != a.shape[1]:
        raise bad_argument(OP, "b", tuple(b.shape), f"[{a.shape[0]}, out, {a.shape[1]}]")
    if y.shape != (x.shape[0], b.shape[1]):
        raise bad_argument(OP, "y", tuple(y.shape), f"[{x.shape[0]}, {b.shape[1]}]")
    for name, tensor in (("y", y), ("a", a), ("b", b)):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise bad_argument(OP, name, f"{tensor.dtype} on {tensor.device}", f"x's {x.dtype} on {x.device}")
    if scalings.shape != (a.shape[0],) or scalings.dtype != torch.float32 or scalings.device != x.device:
        raise bad_argument(
            OP, "scalings", f"{scalings.dtype} {tuple(scalings.shape)}", f"float32 [{a.shape[0]}] on {x.device}"
        )
    if adapter_index.ndim != 1 or adapter_index.dtype != torch.int32:
        raise bad_argument(OP, "adapter_index", f"{adapter_index.dtype} {tuple(adapter_index.shape)}", "int32 [B]")
    if query_starts.shape != (adapter_index.shape[0] + 1,) or query_starts.dtype != torch.int32:
        given = f"{query_starts.dtype} {tuple(query_starts.shape)}"
        raise bad_argument(OP, "query_starts", given, f"int32 [{adapter_index.shape[0] + 1}]")
    if max_query_len < 0:
        raise bad_argument(OP, "max_query_len", max_query_len, "0 or more")
    if y.stride(-1) != 1 and y.shape[1] > 1:
        raise bad_argument(OP, "y", f"strides {y.stride()}", "contiguous rows")


def lora_grouped_add_(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scalings: torch.Tensor,
    adapter_index: torch.Tensor,
    query_starts: torch.Tensor,
    *,
    max_query_len: int,
    backend: str | None = None,
) -> torch.Tensor:
    """Adds each sequence's LoRA term to y in place and returns y; rows of index −1 stay untouched, bit for bit."""
    _validate(y, x, a, b, scalings, adapter_index, query_starts, max_query_len)
    name = choose_backend(OP, x, backend, ("torch", "triton"))
    if x.shape[0] == 0 or a.shape[1] == 0 or a.shape[0] == 0:
        return y
    if name == "torch":
        return _add_torch(y, x, a, b, scalings, adapter_index, query_starts)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise bad_argument(OP, "x", x.dtype, "float32, bfloat16 or float16 with backend 'triton'")
    if adapter_index.device != x.device or query_starts.device != x.device:
        raise bad_argument(OP, "adapter_index", f"on {adapter_index.device}", f"on {x.device}, as x and query_starts")
    return _add_triton(y, x, a, b, scalings, adapter_index, query_starts, max_query_len)


def _segments(case: Case, generator: torch.Generator) -> tuple[list[int], torch.Tensor]:
    """Query lengths, and each sequence's adapter: all the same, all different, uniform with holes, or skewed."""
    lens = list(case["lens"]) if "lens" in case else [1] * case["B"]
    num_sequences, num_adapters = len(lens), case["N"]
    kind = case.get("segments", "uniform")
    if kind == "same":
        index = torch.zeros(num_sequences, dtype=torch.int64)
    elif kind == "different":
        index = torch.arange(num_sequences) % num_adapters
    elif kind == "skewed":
        index = (torch.rand(num_sequences, generator=generator).pow(4) * num_adapters).long()
    elif kind == "none":
        index = torch.full((num_sequences,), -1)
    else:
        index = torch.randint(-1, num_adapters, (num_sequences,), generator=generator)
    return lens, index.int()


def _make_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    lens, index = _segments(case, generator)
    num_in, num_out, rank, num_adapters = case["in"], case["out"], case["R"], case["N"]
    starts = torch.tensor([0, *lens]).cumsum(0).int()

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(scale).to(device, dtype)

    return {
        "weight": normal(num_out, num_in, scale=num_in**-0.5),
        "x": normal(sum(lens), num_in),
        "a": normal(num_adapters, rank, num_in, scale=num_in**-0.5),
        "b": normal(num_adapters, num_out, rank, scale=rank**-0.5),
        "scalings": (torch.rand(num_adapters, generator=generator) + 0.5).to(device),
        "adapter_index": index.to(device),
        "query_starts": starts.to(device),
        "max_query_len": max(lens, default=0),
    }


def _linear_then_add(weight, x, backend=None, **inputs) -> torch.Tensor:
    return lora_grouped_add_(linear(x, weight), x, **inputs, backend=backend)


def _linear_then_add_reference(weight, x, **inputs) -> torch.Tensor:
    return lora_grouped_add_reference(linear(x, weight), x, **inputs)


def _num_tokens(case: Case) -> int:
    return sum(case["lens"]) if "lens" in case else case["B"]


def _compile_cases(target: int) -> list[CompileCase]:
    pointers = {"adapter_ptr": "*i32", "starts_ptr": "*i32"}
    cases = []
    for rank in (16, 64):
        decode, tile = DECODE_DEFAULT, TILE_DEFAULT
        group = {"R": rank, "BLOCK_T": 64, "GROUP": 16, "PRECISION": "tf32"}
        cases += [
            CompileCase(
                f"shrink, decode by token, R={rank}",
                _shrink_token_kernel,
                {
                    "x_ptr": "*bf16",
                    "a_ptr": "*bf16",
                    "adapter_ptr": "*i32",
                    "h_ptr": "*fp32",
                    **dict.fromkeys(("T", "K", "stride_x"), "i32"),
                },
                {"R": rank, "BK": decode["BK"] * 16 // rank},
                num_warps=decode["shrink_warps"],
                attrs={"K": 16, "stride_x": 16},
            ),
            CompileCase(
                f"expand, decode by token, R={rank}",
                _expand_token_kernel,
                {
                    "y_ptr": "*bf16",
                    "h_ptr": "*fp32",
                    "b_ptr": "*bf16",
                    "scale_ptr": "*fp32",
                    "adapter_ptr": "*i32",
                    **dict.fromkeys(("T", "N", "stride_y"), "i32"),
                },
                {"R": rank, "SPLITS": 8, "SPLIT_BLOCK": 8, "BN": decode["BN"] * 16 // rank},
                num_warps=decode["expand_warps"],
                attrs={"N": 16, "stride_y": 16},
            ),
            CompileCase(
                f"shrink, decode by adapter, R={rank}",
                _shrink_adapter_kernel,
                {
                    "x_ptr": "*bf16",
                    "a_ptr": "*bf16",
                    "adapter_ptr": "*i32",
                    "h_ptr": "*fp32",
                    **dict.fromkeys(("T", "K", "stride_x"), "i32"),
                },
                {**group, "BK": decode["BK"] * 16 // rank},
                num_warps=decode["shrink_warps"],
                attrs={"K": 16, "stride_x": 16},
            ),
            CompileCase(
                f"expand, decode by adapter, R={rank}",
                _expand_adapter_kernel,
                {
                    "y_ptr": "*bf16",
                    "h_ptr": "*fp32",
                    "b_ptr": "*bf16",
                    "scale_ptr": "*fp32",
                    "adapter_ptr": "*i32",
                    **dict.fromkeys(("T", "N", "stride_y"), "i32"),
                },
                {**group, "SPLITS": 8, "BN": decode["BN"] * 16 // rank},
                num_warps=decode["expand_warps"],
                attrs={"N": 16, "stride_y": 16},
            ),
            CompileCase(
                f"shrink, a tile of tokens, R={rank}",
                _shrink_tile_kernel,
                {
                    "x_ptr": "*bf16",
                    "a_ptr": "*bf16",
                    **pointers,
                    "h_ptr": "*fp32",
                    **dict.fromkeys(("T", "K", "B", "stride_x"), "i32"),
                },
                {"R": rank, "BT": tile["BT"], "BK": min(tile["BK"], 8192 // rank), "BLOCK_B": 64, "PRECISION": "tf32"},
                num_warps=tile["warps"],
                num_stages=tile["stages"],
                attrs={"K": 16, "stride_x": 16},
            ),
            CompileCase(
                f"expand, a tile of tokens, R={rank}",
                _expand_tile_kernel,
                {
                    "y_ptr": "*bf16",
                    "h_ptr": "*fp32",
                    "b_ptr": "*bf16",
                    "scale_ptr": "*fp32",
                    **pointers,
                    **dict.fromkeys(("T", "N", "B", "stride_y"), "i32"),
                },
                {"R": rank, "BT": tile["BT"], "BN": tile["BN"], "BLOCK_B": 64, "PRECISION": "tf32"},
                num_warps=tile["warps"],
                num_stages=tile["stages"],
                attrs={"N": 16, "stride_y": 16},
            ),
        ]
    return cases


SPEC = KernelSpec(
    op="lora_grouped_add_",
    run=_linear_then_add,
    reference=_linear_then_add_reference,
    make_inputs=_make_inputs,
    test_cases=(
        *(
            {"B": 9, "in": 70, "out": 130, "R": 7, "N": 3, "segments": s}
            for s in ("same", "different", "uniform", "skewed", "none")
        ),
        *(
            {"lens": (3, 0, 17, 1, 40), "in": 70, "out": 130, "R": 16, "N": 5, "segments": s}
            for s in ("same", "different", "uniform", "skewed", "none")
        ),
        {"lens": (), "in": 16, "out": 16, "R": 4, "N": 2},
        {"B": 1, "in": 1, "out": 1, "R": 1, "N": 1, "segments": "same"},
    ),
    bench_cases=(
        *(
            {"model": "MPT-7B", "B": 64, "in": i, "out": o, "R": 16, "N": 16, "segments": "different", "priority": p}
            for i, o, p in ((4096, 12288, 1), (4096, 4096, 5), (4096, 16384, 1), (16384, 4096, 5))
        ),
        {
            "model": "MPT-7B prefill",
            "lens": (512,) * 4,
            "in": 4096,
            "out": 4096,
            "R": 16,
            "N": 4,
            "segments": "different",
        },
        {"model": "SmolLM2-135M", "B": 64, "in": 576, "out": 1536, "R": 8, "N": 16, "segments": "different"},
    ),
    bytes=lambda case: (
        2
        * (
            case["in"] * case["out"]
            + case["N"] * case["R"] * (case["in"] + case["out"])
            + _num_tokens(case) * (case["in"] + case["out"])
        )
    ),
    flops=lambda case: 2 * _num_tokens(case) * (case["in"] * case["out"] + case["R"] * (case["in"] + case["out"])),
    compile_cases=_compile_cases,
    peers={
        "one by one": lambda **inputs: _linear_then_add(**inputs, backend="torch"),
        "floor: no adapter": lambda weight, x, **_: linear(x, weight),
    },
    row_invariant=False,
)
