"""y = x Wᵀ + bias with W in NF4, int8 or fp8 (e4m3).

Few rows (up to a measured count): one kernel reads the packed weight and dequantises it in registers on the way to
the matrix unit, so that a weight crosses the memory bus as 0.5 or 1 byte. Many rows: the weight is dequantised once
and the dense GEMM of the library does the rest; the weight's traffic is then small beside the arithmetic.

The few-rows kernel computes yᵀ: channels fill the matrix unit's tall side, tokens its narrow one. NF4 scales apply to
the fp32 sums of each block of 64, channel scales to the whole sum. The blocks of a row are shared out over several
programs; the last one to finish adds their sums in a fixed order, so results are repeatable.
Shapes: x [T, in], W [out, in], bias [out], y [T, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch.nn.functional import linear

from . import cpu_blocks, cpu_quantized
from .channelwise import ChannelWeight, dequantize_channelwise, quantize_fp8, quantize_int8
from .dispatch import bad_argument, choose_backend, tl, triton
from .nf4 import BLOCK, CODEBOOK, NF4Weight, check_nf4, dequantize_nf4, quantize_nf4, tables
from .spec import Case, CompileCase, KernelSpec
from .tuning import tuned_config

OP = "quantized_linear"
QuantizedWeight: TypeAlias = NF4Weight | ChannelWeight
QUANTIZERS = {"nf4": quantize_nf4, "int8": quantize_int8, "fp8": quantize_fp8}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def dequantize(
    weight: torch.Tensor | QuantizedWeight, dtype: torch.dtype, *, backend: str | None = None
) -> torch.Tensor:
    """The dense [out, in] of any weight, bit-equal on all backends ("torch", "triton", and on a CPU "cpp"); a dense one
    comes back as it is."""
    if isinstance(weight, torch.Tensor):
        return weight
    if backend is None and weight.device.type == "cpu":
        backend = cpu_quantized.default_backend(dtype)
    if backend == "cpp":
        return cpu_quantized.dequantize(weight, dtype)
    if isinstance(weight, NF4Weight):
        return dequantize_nf4(weight, dtype, backend=backend)
    return dequantize_channelwise(weight, dtype)


def quantized_linear_reference(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition: dequantise, multiply."""
    return linear(x, dequantize(weight, x.dtype, backend="torch"), bias)


@triton.jit
def _finish(
    acc, token, channel, T, N, bias_ptr, y_ptr, parts_ptr, counter_ptr, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr
):
    """Adds up the programs that share these channels, the last one writing y. acc is [channels, tokens]."""
    mask = (channel < N)[:, None] & (token < T)[None, :]
    at = token.to(tl.int64)[None, :] * N + channel[:, None]
    last = True
    if SPLITS > 1:
        size = tl.cast(T, tl.int64) * N
        tl.store(parts_ptr + tl.program_id(1).to(tl.int64) * size + at, acc, mask=mask)
        tl.debug_barrier()
        counter = counter_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
        if last:
            acc = tl.zeros_like(acc)
            for split in range(SPLITS):
                acc += tl.load(parts_ptr + split * size + at, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
    if last:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + channel, mask=channel < N, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _nf4_values(base, mask, codebook_ptr, LOOKUP: tl.constexpr, dtype: tl.constexpr):
    """The four 16-element steps of a block of 64, each [channels, 16]; base points at the channels' 32 bytes."""
    step = tl.arange(0, 16)
    if LOOKUP == "":
        byte = base + (step // 2 * 4)[None, :]
        shift = (step % 2 * 4)[None, :]
        w0 = tl.load(codebook_ptr + ((tl.load(byte, mask=mask, other=0) >> shift) & 15)).to(dtype)
        w1 = tl.load(codebook_ptr + ((tl.load(byte + 1, mask=mask, other=0) >> shift) & 15)).to(dtype)
        w2 = tl.load(codebook_ptr + ((tl.load(byte + 2, mask=mask, other=0) >> shift) & 15)).to(dtype)
        w3 = tl.load(codebook_ptr + ((tl.load(byte + 3, mask=mask, other=0) >> shift) & 15)).to(dtype)
    else:
        half = tl.load(base.to(tl.pointer_type(tl.int16)) + step[None, :], mask=mask, other=0)
        if dtype == tl.bfloat16:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                LOOKUP,
                "=r,=r,=r,=r,r",
                [half],
                (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                LOOKUP,
                "=r,=r,=r,=r,r",
                [half],
                (tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    return w0, w1, w2, w3


@triton.jit
def _nf4_kernel(
    x_ptr,
    codes_ptr,
    index_ptr,
    scale_ptr,
    offset_ptr,
    map_ptr,
    codebook_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    counter_ptr,
    T,
    N,
    num_blocks,
    stride_x,
    blocks_per_split,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    UNROLL: tl.constexpr,
    LOOKUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    token = tl.program_id(2) * BT + tl.arange(0, BT)
    step = tl.arange(0, 16)
    zero = tl.zeros((BN,), dtype=tl.int32)
    inside = channel < N
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offset = tl.load(offset_ptr)
    x_column = x_ptr + token.to(tl.int64)[None, :] * stride_x + step[:, None]
    acc = tl.zeros((BN, BT), dtype=tl.float32)
    first = tl.program_id(1) * blocks_per_split
    stop = min(first + blocks_per_split, num_blocks)
    # a scale comes through dependent loads: the index is fetched an iteration ahead
    indices = (tl.load(index_ptr + first * N + channel, mask=inside & (zero + first < stop), other=0),)
    for u in tl.static_range(1, UNROLL):
        there = inside & (zero + first + u < stop)
        indices = indices + (tl.load(index_ptr + (first + u) * N + channel, mask=there, other=0),)  # noqa: RUF005
    for start in tl.range(first, stop, UNROLL):
        following = ()
        for u in tl.static_range(UNROLL):
            block = start + u
            there = inside & (zero + block < stop)
            scale = tl.load(scale_ptr + (channel * num_blocks + block) // 256, mask=there, other=0.0)
            absmax = tl.load(map_ptr + indices[u].to(tl.int32), mask=there, other=0.0) * scale + offset  # pyright: ignore
            absmax = tl.where(there, absmax, 0.0)
            ahead = inside & (zero + block + UNROLL < stop)
            fetched = tl.load(index_ptr + (block + UNROLL) * N + channel, mask=ahead, other=0)
            following = following + (fetched,)  # noqa: RUF005
            x_mask = (token < T)[None, :] & (step * 0 + block < stop)[:, None]
            base = codes_ptr + (tl.cast(block, tl.int64) * N + channel)[:, None] * 32
            w0, w1, w2, w3 = _nf4_values(base, there[:, None], codebook_ptr, LOOKUP, dtype)
            x_at = x_column + block * 64
            part = tl.dot(w0, tl.load(x_at, mask=x_mask, other=0.0), input_precision=PRECISION)
            part = tl.dot(w1, tl.load(x_at + 16, mask=x_mask, other=0.0), part, input_precision=PRECISION)
            part = tl.dot(w2, tl.load(x_at + 32, mask=x_mask, other=0.0), part, input_precision=PRECISION)
            part = tl.dot(w3, tl.load(x_at + 48, mask=x_mask, other=0.0), part, input_precision=PRECISION)
            acc += part * absmax[:, None]
        indices = following
    _finish(acc, token, channel, T, N, bias_ptr, y_ptr, parts_ptr, counter_ptr, HAS_BIAS, SPLITS)


@triton.jit
def _fp8_values(raw, dtype: tl.constexpr):
    """e4m3's bits moved to the place of the wider format's; a power of two then makes the exponent right, exactly."""
    if dtype == tl.float16:
        bits = ((raw & 0x80).to(tl.uint16) << 8) | ((raw & 0x7F).to(tl.uint16) << 7)
        return bits.to(tl.float16, bitcast=True) * 256.0
    bits = ((raw & 0x80).to(tl.uint32) << 24) | ((raw & 0x7F).to(tl.uint32) << 20)
    return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(dtype)


@triton.jit
def _channel_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    counter_ptr,
    T,
    N,
    K,
    stride_x,
    stride_w,
    k_per_split,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    FP8: tl.constexpr,
    DECODE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    token = tl.program_id(2) * BT + tl.arange(0, BT)
    within = tl.arange(0, BK)
    inside = channel < N
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_row = x_ptr + token.to(tl.int64)[:, None] * stride_x + within[None, :]
    w_row = w_ptr + channel[:, None] * stride_w + within[None, :]
    acc = tl.zeros((BN, BT), dtype=tl.float32)
    first = tl.program_id(1) * k_per_split
    for k in tl.range(first, min(first + k_per_split, K), BK):
        ok = k + within < K
        raw = tl.load(w_row + k, mask=inside[:, None] & ok[None, :], other=0)
        x = tl.load(x_row + k, mask=(token < T)[:, None] & ok[None, :], other=0.0)
        if FP8:
            if DECODE == "":
                w = _fp8_values(raw, dtype)
            elif dtype == tl.bfloat16:
                w = tl.inline_asm_elementwise(DECODE, "=r,=r,r", [raw], tl.bfloat16, is_pure=True, pack=4)
            else:
                w = tl.inline_asm_elementwise(DECODE, "=r,=r,r", [raw], tl.float16, is_pure=True, pack=4)
        else:
            w = raw.to(dtype)
        if PRECISION == "ieee":
            # One running sum over thousands of products would lose three bits of fp32. The compiler makes one of a
            # plain addition of dots; of scaled ones it cannot.
            scale = tl.load(scale_ptr + channel, mask=inside, other=0.0)[:, None]
            acc += tl.dot(w, x.T, input_precision=PRECISION) * scale
        else:
            acc = tl.dot(w, x.T, acc, input_precision=PRECISION)
    if PRECISION != "ieee":
        acc *= tl.load(scale_ptr + channel, mask=inside, other=0.0)[:, None]
    _finish(acc, token, channel, T, N, bias_ptr, y_ptr, parts_ptr, counter_ptr, HAS_BIAS, SPLITS)


def _table_words(dtype: torch.dtype) -> list[list[int]]:
    """The codebook in a 16-bit ``dtype`` as four words of low bytes and four of high bytes."""
    values = [v & 0xFFFF for v in torch.tensor(CODEBOOK).to(dtype).view(torch.int16).tolist()]
    return [
        [sum(((values[4 * word + byte] >> shift) & 255) << (8 * byte) for byte in range(4)) for word in range(4)]
        for shift in (0, 8)
    ]


@lru_cache(maxsize=16)
def lookup_assembly(dtype: torch.dtype, halves_shuffled: int = 0) -> str:
    """PTX that turns a word of storage, eight codes, into their codebook values: four registers, each with the two
    neighbouring elements of one 16-element step; "" where the dtype has no 16-bit table.

    Two ways, which load different units. ``prmt`` picks four bytes of eight by four-bit selectors, so a 16-entry table
    of bytes takes three: one on the lower eight entries, one on the upper, one that chooses by the codes' top bits.
    ``shfl`` lets each lane hold one entry and fetches by lane number, one code at a time. ``halves_shuffled`` of a
    word's two halves take the second way.

    An xor with a zero that the compiler cannot see through (no lane's lower-lanes mask has bit 31) keeps half of the
    table in ordinary registers: as uniform constants they would be moved there anew before each use.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return ""
    words = _table_words(dtype)
    lines = [
        ".reg .b32 s, q, t, u, low, high, zero, table<4>, entry, n<8>;",
        "mov.u32 zero, %lanemask_lt;",
        "shr.u32 zero, zero, 31;",
        *(f"xor.b32 table{2 * i + j}, zero, {words[i][2 * j]:#x};" for i in range(2) for j in range(2)),
    ]

    def permute(number: int) -> list[str]:
        lines = [
            "and.b32 s, t, 0x77777777;",
            "shr.u32 q, t, 1;",
            "lop3.b32 q, q, 0x44444444, 0x32103210, 0xEA;",
        ]
        for i, name in enumerate(("low", "high")):
            lines += [
                f"prmt.b32 t, table{2 * i}, {words[i][1]:#x}, s;",
                f"prmt.b32 u, table{2 * i + 1}, {words[i][3]:#x}, s;",
                f"prmt.b32 {name}, t, u, q;",
            ]
        return [*lines, f"prmt.b32 n{number}, low, high, 0x5140;", f"prmt.b32 n{number + 1}, low, high, 0x7362;"]

    if halves_shuffled:
        lines += ["mov.u32 t, %laneid;", *permute(0), "prmt.b32 entry, n0, n0, 0x1010;"]
    for half in range(2):
        if half < halves_shuffled:
            for i in range(4):
                lines.append(f"shr.u32 s, $4, {16 * half + 4 * i};")
                lines.append(f"shfl.sync.idx.b32 n{4 * half + i}, entry, s, 31, 0xffffffff;")
            for i in range(2):
                number = 4 * half + 2 * i
                lines.append(f"prmt.b32 ${2 * half + i}, n{number}, n{number + 1}, 0x5410;")
        else:
            lines.append(f"shr.u32 t, $4, {16 * half};")
            lines += permute(4 * half)
            lines += [f"mov.b32 ${2 * half + i}, n{4 * half + i};" for i in range(2)]
    return "{" + " ".join(lines) + "}"


@lru_cache(maxsize=4)
def fp8_assembly(dtype: torch.dtype) -> str:
    """PTX that turns four e4m3 bytes into two registers of two 16-bit values each, as ``_fp8_values`` does; "" for
    other dtypes."""
    if dtype == torch.bfloat16:
        shift, mask, scale = 4, 0x07F007F0, "fma.rn.bf16x2 $%d, b, scale, zero;"
    elif dtype == torch.float16:
        shift, mask, scale = 1, 0x3F803F80, "mul.f16x2 $%d, b, scale;"
    else:
        return ""
    power = "0x7B807B80" if dtype == torch.bfloat16 else "0x5C005C00"
    lines = [
        ".reg .b32 a, b, c, scale, zero;",
        "mov.b32 c, 0;",
        "mov.b32 zero, 0x80008000;",
        f"mov.b32 scale, {power};",
    ]
    for half, selector in enumerate(("0x1404", "0x3424")):
        lines += [
            f"prmt.b32 a, $2, c, {selector};",
            f"shr.u32 b, a, {shift};",
            f"and.b32 b, b, {mask:#x};",
            "lop3.b32 b, a, 0x80008000, b, 0xEA;",
            scale % half,
        ]
    return "{" + " ".join(lines) + "}"


FEW_ROWS = {
    "BN": 64,
    "BK": 128,
    "UNROLL": 2,
    "SHUFFLED": 1,
    "PER_SM": 4,
    "warps": 2,
    "stages": 3,
    "MAX_ROWS": 128,
}
MORE_ROWS = FEW_ROWS | {"BK": 64, "UNROLL": 1, "warps": 4}
_counters: dict[tuple[torch.device, int | str], torch.Tensor] = {}


def _counter(device: torch.device, count: int) -> torch.Tensor:
    """Zeros that the kernels leave as zeros: one buffer a stream, whose kernels follow one another, and one for graphs,
    which must not own what eager calls use. The kernels are compiled before a capture, so by then the latter exists."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32)
    capturing = torch.cuda.is_current_stream_capturing()
    key = (device, "graph" if capturing else torch.cuda.current_stream(device).cuda_stream)
    held = _counters.get(key)
    if held is not None and held.numel() >= count:
        return held
    made = torch.zeros(max(count, 8192), dtype=torch.int32, device=device)
    if not capturing:
        _counters[key] = made
        _counters.setdefault((device, "graph"), torch.zeros_like(made))
    return made


def config_for(weight: QuantizedWeight, num_rows: int) -> Mapping[str, Any]:
    """Tiles for this weight's format and shape at this many rows."""
    kind = "nf4" if isinstance(weight, NF4Weight) else "fp8" if weight.values.dtype == torch.float8_e4m3fn else "int8"
    size = "large" if weight.shape[0] * weight.shape[1] > 1 << 25 else "small"
    rows = max(16, min(128, triton.next_power_of_2(num_rows)))
    return tuned_config(OP, f"{kind} {size} {rows}", FEW_ROWS if rows == 16 else MORE_ROWS)


def _few_rows(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, config: Mapping[str, Any]
) -> torch.Tensor:
    num_rows, num_k = x.shape
    num_out = weight.shape[0]
    device = x.device
    bn, bt = config["BN"], max(16, min(64, triton.next_power_of_2(num_rows)))
    step = BLOCK if isinstance(weight, NF4Weight) else config["BK"]
    columns, rows = triton.cdiv(num_out, bn), triton.cdiv(num_rows, bt)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    steps = triton.cdiv(num_k, step)
    splits = max(1, min(config["PER_SM"] * processors // (columns * rows), steps // 4))
    per_split = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, per_split)
    y = torch.empty(num_rows, num_out, dtype=x.dtype, device=device)
    parts = torch.empty(splits if splits > 1 else 0, num_rows, num_out, dtype=torch.float32, device=device)
    counter = _counter(device, columns * rows)
    grid = (columns, splits, rows)
    common: dict[str, Any] = {
        "HAS_BIAS": bias is not None,
        "SPLITS": splits,
        "BN": bn,
        "BT": bt,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "num_warps": config["warps"],
        "num_stages": config["stages"],
    }
    if isinstance(weight, NF4Weight):
        codebook, absmax_map = tables(device)
        _nf4_kernel[grid](
            x,
            weight.codes,
            weight.absmax_index,
            weight.absmax_scale,
            weight.absmax_offset,
            absmax_map,
            codebook,
            bias,
            y,
            parts,
            counter,
            num_rows,
            num_out,
            steps,
            x.stride(0),
            per_split,
            UNROLL=config["UNROLL"],
            LOOKUP=lookup_assembly(x.dtype, config["SHUFFLED"]) if x.is_cuda else "",
            **common,
        )
    else:
        fp8 = weight.values.dtype == torch.float8_e4m3fn
        _channel_kernel[grid](
            x,
            weight.values.view(torch.uint8) if fp8 else weight.values,
            weight.scales,
            bias,
            y,
            parts,
            counter,
            num_rows,
            num_out,
            num_k,
            x.stride(0),
            weight.values.stride(0),
            per_split * step,
            BK=step,
            FP8=fp8,
            DECODE=fp8_assembly(x.dtype) if x.is_cuda else "",
            **common,
        )
    return y


def _validate(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> None:
    if x.ndim != 2 or x.shape[1] != weight.shape[1] or not x.is_floating_point():
        raise bad_argument(OP, "x", f"{x.dtype} {tuple(x.shape)}", f"floating-point [T, {weight.shape[1]}]")
    if weight.device != x.device:
        raise bad_argument(OP, "weight", f"on {weight.device}", f"on {x.device}, as x is")
    if isinstance(weight, NF4Weight):
        check_nf4(OP, weight)
    elif weight.values.dtype not in (torch.int8, torch.float8_e4m3fn) or weight.values.stride(1) != 1:
        raise bad_argument(OP, "weight", weight.values.dtype, "int8 or float8_e4m3fn with dense rows")
    elif weight.scales.shape != weight.shape[:1] or weight.scales.dtype != torch.float32:
        given = f"scales {weight.scales.dtype} {tuple(weight.scales.shape)}"
        raise bad_argument(OP, "weight", given, f"float32 [{weight.shape[0]}]")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype or bias.device != x.device):
        given = f"{bias.dtype} {tuple(bias.shape)} on {bias.device}"
        raise bad_argument(OP, "bias", given, f"{x.dtype} [{weight.shape[0]}] on {x.device}")


class _Frozen(torch.autograd.Function):
    """The gradient of x alone: dx = dy W, the weight dequantised anew rather than kept."""

    @staticmethod
    def forward(ctx: Any, x, weight: QuantizedWeight, bias, backend: str | None) -> torch.Tensor:  # type: ignore[override]
        ctx.weight, ctx.backend = weight, backend
        return _forward(x, weight, bias, backend)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):  # type: ignore[override]
        return torch.mm(dy, dequantize(ctx.weight, dy.dtype, backend=ctx.backend)), None, None, None


def quantized_linear(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """x [T, in] → [T, out] in x's dtype; differentiable in x, the weight and bias being frozen."""
    _validate(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Frozen.apply(x, weight, bias, backend)
    return _forward(x, weight, bias, backend)


def _forward(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, backend: str | None) -> torch.Tensor:
    name = choose_backend(OP, x, backend, ("torch", "triton", "cpp"), cpu_quantized.default_backend(x.dtype))
    if name == "torch":
        return quantized_linear_reference(x, weight, bias)
    if name == "cpp":
        return cpu_blocks.linear(x, dequantize(weight, x.dtype, backend="cpp"), bias)
    if x.dtype not in FLOATS:
        raise bad_argument(OP, "x", x.dtype, "float32, bfloat16 or float16 with backend 'triton'")
    config = config_for(weight, x.shape[0])
    if x.shape[0] == 0 or x.shape[0] > config["MAX_ROWS"]:
        return linear(x, dequantize(weight, x.dtype, backend="triton"), bias)
    if x.stride(1) != 1:
        x = x.contiguous()
    return _few_rows(x, weight, bias, config)


def _make_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    num_out = case["out"]
    w = torch.randn(num_out, case["in"], generator=generator).to(device)
    return {
        "x": torch.randn(case["T"], case["in"], generator=generator).to(device, dtype),
        "weight": QUANTIZERS[case["format"]](w),
        "bias": torch.randn(num_out, generator=generator).to(device, dtype) if case.get("bias") else None,
    }


def _bytes(case: Case) -> int:
    weight_bits = {"nf4": 4 + 8 / 64 + 32 / 16384, "int8": 8, "fp8": 8}[case["format"]]
    return int(case["in"] * case["out"] * weight_bits / 8) + 2 * case["T"] * (case["in"] + case["out"])


def _compile_cases(target: int) -> list[CompileCase]:
    cases = []
    pointers = {"bias_ptr": "*bf16", "y_ptr": "*bf16", "parts_ptr": "*fp32", "counter_ptr": "*i32"}
    for rows in (16, 64):
        for kind in ("nf4", "int8", "fp8"):
            config = tuned_config(OP, f"{kind} large {rows}", FEW_ROWS if rows == 16 else MORE_ROWS)
            constants = {"HAS_BIAS": True, "SPLITS": 4, "BN": config["BN"], "BT": rows, "PRECISION": "tf32"}
            if kind == "nf4":
                kernel = _nf4_kernel
                signature = {
                    "x_ptr": "*bf16",
                    "codes_ptr": "*u8",
                    "index_ptr": "*u8",
                    **dict.fromkeys(("scale_ptr", "offset_ptr", "map_ptr", "codebook_ptr"), "*fp32"),
                    **pointers,
                    **dict.fromkeys(("T", "N", "num_blocks", "stride_x", "blocks_per_split"), "i32"),
                }
                constants |= {"LOOKUP": lookup_assembly(torch.bfloat16, config["SHUFFLED"]), "UNROLL": config["UNROLL"]}
                attrs: dict[str, int] = dict.fromkeys(("N", "stride_x"), 16)
            else:
                kernel = _channel_kernel
                signature = {
                    "x_ptr": "*bf16",
                    "w_ptr": "*u8" if kind == "fp8" else "*i8",
                    "scale_ptr": "*fp32",
                    **pointers,
                    **dict.fromkeys(("T", "N", "K", "stride_x", "stride_w", "k_per_split"), "i32"),
                }
                constants |= {"BK": config["BK"], "FP8": kind == "fp8", "DECODE": fp8_assembly(torch.bfloat16)}
                attrs = dict.fromkeys(("N", "K", "stride_x", "stride_w", "k_per_split"), 16)
            cases.append(
                CompileCase(
                    f"{kind} rows={rows}",
                    kernel,
                    signature,
                    constants,
                    num_warps=config["warps"],
                    num_stages=config["stages"],
                    gemm=rows > 16,  # below, the weight is streamed: bound by memory, and two warps do
                    attrs=attrs,
                )
            )
    return cases


def _tuning(case: Case) -> tuple[str, list[dict[str, Any]]]:
    size = "large" if case["out"] * case["in"] > 1 << 25 else "small"
    rows = max(16, min(128, triton.next_power_of_2(case["T"])))
    base = FEW_ROWS if rows == 16 else MORE_ROWS
    tiles = [(32, 64, 2), (64, 64, 2), (64, 64, 4), (128, 64, 4), (128, 64, 8)]
    if case["format"] != "nf4":
        tiles += [(64, 128, 2), (64, 128, 4), (128, 128, 8)]
    return f"{case['format']} {size} {rows}", [
        {**base, "BN": bn, "BK": bk, "warps": warps, "PER_SM": per_sm, "stages": stages}
        for bn, bk, warps in tiles
        for per_sm in (2, 4, 8)
        for stages in (3, 5)
    ]


def _priority(kind: str, rows: int, num_out: int) -> int:
    """NF4 of few rows has a target; of the 8-bit formats one shape of each is asked for early."""
    if kind == "nf4":
        return 1 if rows <= 16 else 5
    return 2 if rows == 16 and num_out == 16384 else 5


SPEC = KernelSpec(
    op="quantized_linear",
    run=quantized_linear,
    reference=quantized_linear_reference,
    make_inputs=_make_inputs,
    test_cases=tuple(
        {"T": t, "in": i, "out": o, "format": f, "bias": b}
        for t, i, o, b in (
            (1, 64, 7, False),
            (5, 576, 130, True),
            (17, 320, 65, True),
            (65, 128, 33, True),
            (0, 64, 8, True),
        )
        for f in ("nf4", "int8", "fp8")
    ),
    bench_cases=tuple(
        {"model": model, "T": t, "in": i, "out": o, "format": f, "priority": _priority(f, t, o)}
        for model, i, o in (("MPT-7B", 4096, 16384), ("MPT-7B", 4096, 4096), ("MPT-30B", 7168, 28672))
        for t in (1, 16, 64)
        for f in ("nf4", "int8", "fp8")
    ),
    bytes=_bytes,
    flops=lambda case: 2 * case["T"] * case["in"] * case["out"],
    compile_cases=_compile_cases,
    peers={"dequantise, GEMM": lambda x, weight, bias: linear(x, dequantize(weight, x.dtype), bias)},
    row_invariant=False,
    tuning=_tuning,
)
