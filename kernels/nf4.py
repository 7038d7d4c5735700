"""NF4: 4-bit weights in blocks of 64 on the normal-float codebook, with double-quantised block scales.

Definition (Dettmers et al., "QLoRA", arXiv 2305.14314, §3 and appendix E): a block's 64 values are divided by their
largest magnitude (absmax) and rounded to the nearest of 16 codebook values, ties to the lower one. The absmax of all
blocks, less their mean, are quantised again: in blocks of 256, divided by that block's largest magnitude, to the
nearest of the 256 values of the signed 8-bit dynamic-exponent map (Dettmers et al., arXiv 2110.02861, §2.1).

    w ≈ codebook[code] · absmax         absmax = map[index] · scale + offset

Shapes: w [out, in] with in a multiple of 64; codes u8 [in/64, out, 32]; absmax_index u8 [in/64, out]; absmax_scale
f32 [⌈out·in/64/256⌉] over the blocks in the weight's own order (row by row), absmax_offset f32 [1].
A weight costs 4 + 8/64 + 32/16384 = 4.127 bits.

Storage is ours: block after block, so that a kernel reads a block of many channels in one piece, and within a block
byte 4 w + b holds elements 16 b + 2 w (low four bits) and 16 b + 2 w + 1. A 32-bit word is then what one thread of a
matrix instruction needs: neighbouring elements of each of four 16-element steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .dispatch import bad_argument, choose_backend, tl, triton
from .spec import Case, CompileCase, KernelSpec

BLOCK = 64
SCALE_BLOCK = 256

# Appendix E of the paper.
CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NF4Weight:
    """A weight [out, in] in NF4; the fields are those of the module's docstring."""

    codes: torch.Tensor
    absmax_index: torch.Tensor
    absmax_scale: torch.Tensor
    absmax_offset: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes.shape[1], BLOCK * self.codes.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        return self.codes.numel() + self.absmax_index.numel() + 4 * self.absmax_scale.numel() + 4

    def to(self, device: torch.device | str) -> NF4Weight:
        return NF4Weight(
            *(t.to(device) for t in (self.codes, self.absmax_index, self.absmax_scale, self.absmax_offset))
        )


@lru_cache(maxsize=1)
def dynamic_map() -> tuple[float, ...]:
    """The 256 values of the signed dynamic-exponent map, ascending.

    Decade e (0 … 6) spans 10^(e-7) … 10^(e-6) and holds 2^e midpoints of evenly spaced boundaries, with both signs;
    0 and 1 complete the map.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        boundaries = torch.linspace(0.1, 1.0, 2**decade + 1)
        midpoints = ((boundaries[:-1] + boundaries[1:]) / 2.0) * 10.0 ** (decade - 6)
        values += midpoints.tolist() + (-midpoints).tolist()
    return tuple(sorted(values))


def _table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _nearest(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(x, (table[1:] + table[:-1]) / 2)


def quantize_nf4(w: torch.Tensor) -> NF4Weight:
    """w [out, in] (any floating dtype, finite) → NF4. Runs where w is; rows are taken in slices to bound memory."""
    if w.ndim != 2 or not w.is_floating_point():
        raise bad_argument("quantize_nf4", "w", f"{w.dtype} {tuple(w.shape)}", "a floating-point [out, in]")
    num_out, num_in = w.shape
    if num_out == 0 or num_in == 0 or num_in % BLOCK:
        raise bad_argument("quantize_nf4", "w", tuple(w.shape), f"[out, in], both above 0, in a multiple of {BLOCK}")
    table = _table(CODEBOOK, w.device)
    num_blocks = num_in // BLOCK
    codes = torch.empty(num_blocks, num_out, BLOCK // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(num_out, num_blocks, dtype=torch.float32, device=w.device)
    step = max(1, (1 << 24) // num_in)
    for start in range(0, num_out, step):
        blocks = w[start : start + step].float().view(-1, num_blocks, BLOCK)
        largest = blocks.abs().amax(dim=2)
        absmax[start : start + step] = largest
        unit = blocks / torch.where(largest > 0, largest, torch.ones_like(largest))[..., None]
        code = _nearest(unit, table).to(torch.uint8)
        codes[:, start : start + step] = _pack(code).transpose(0, 1)
    if not bool(torch.isfinite(absmax).all()):
        raise bad_argument("quantize_nf4", "w", "values that are infinite or NaN", "finite values")
    index, scale, offset = _quantize_absmax(absmax)
    return NF4Weight(codes, index.t().contiguous(), scale, offset)


def _pack(code: torch.Tensor) -> torch.Tensor:
    """Codes [..., 64], one a byte → [..., 32] in storage order."""
    pairs = code.unflatten(-1, (4, 8, 2)).transpose(-3, -2).flatten(-3, -2)  # [..., 8 words × 4 steps, 2]
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(codes: torch.Tensor) -> torch.Tensor:
    """Storage order [..., 32] → codes [..., 64], one a byte."""
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1)
    return pairs.unflatten(-2, (8, 4)).transpose(-3, -2).flatten(-3)


def _quantize_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    offset = absmax.mean()
    centred = (absmax - offset).flatten()
    count = centred.numel()
    padded = torch.nn.functional.pad(centred, (0, -count % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    scale = padded.abs().amax(dim=1)
    unit = padded / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]
    index = _nearest(unit, _table(dynamic_map(), absmax.device)).to(torch.uint8)
    return index.flatten()[:count].view(absmax.shape), scale, offset.reshape(1)


def absmax_of(weight: NF4Weight) -> torch.Tensor:
    """The block scales back in fp32: [out, in/64]."""
    index = weight.absmax_index.t()
    scale = weight.absmax_scale.repeat_interleave(SCALE_BLOCK)[: index.numel()].view(index.shape)
    return _table(dynamic_map(), weight.device)[index.long()] * scale + weight.absmax_offset


def dequantize_nf4_reference(weight: NF4Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """codebook · absmax in fp32, rounded once to ``dtype``: [out, in]."""
    values = _table(CODEBOOK, weight.device)[unpack(weight.codes).long()].transpose(0, 1)
    return (values * absmax_of(weight)[..., None]).reshape(weight.shape).to(dtype)


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    index_ptr,
    scale_ptr,
    offset_ptr,
    map_ptr,
    codebook_ptr,
    w_ptr,
    num_out,
    num_blocks,
    BN: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = channel < num_out
    pair = tl.arange(0, 32)  # elements 2 p and 2 p + 1
    byte = (pair % 8) * 4 + pair // 8
    offset = tl.load(offset_ptr)
    for step in tl.static_range(BLOCKS):
        block = tl.program_id(1).to(tl.int64) * BLOCKS + step
        mask = inside & (tl.zeros_like(channel) + block < num_blocks)
        at = block * num_out + channel
        code = tl.load(codes_ptr + at[:, None] * 32 + byte[None, :], mask=mask[:, None], other=0)
        index = tl.load(index_ptr + at, mask=mask, other=0).to(tl.int32)
        scale = tl.load(scale_ptr + (channel * num_blocks + block) // 256, mask=mask, other=0.0)
        absmax = (tl.load(map_ptr + index) * scale + offset)[:, None]
        even = tl.load(codebook_ptr + (code & 15).to(tl.int32)) * absmax
        odd = tl.load(codebook_ptr + (code >> 4).to(tl.int32)) * absmax
        values = tl.reshape(tl.join(even, odd), (BN, 64)).to(w_ptr.dtype.element_ty)
        column = tl.arange(0, 64)
        tl.store(w_ptr + (channel * num_blocks + block)[:, None] * 64 + column[None, :], values, mask=mask[:, None])


@lru_cache(maxsize=16)
def tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The codebook and the dynamic map as f32 tensors on ``device``."""
    return _table(CODEBOOK, device), _table(dynamic_map(), device)


DEQUANTIZE_DEFAULT = {"BN": 16, "BLOCKS": 2, "warps": 2}


def _dequantize_triton(weight: NF4Weight, dtype: torch.dtype, config: Any) -> torch.Tensor:
    num_out, num_in = weight.shape
    num_blocks = num_in // BLOCK
    codebook, absmax_map = tables(weight.device)
    w = torch.empty(num_out, num_in, dtype=dtype, device=weight.device)
    grid = (triton.cdiv(num_out, config["BN"]), triton.cdiv(num_blocks, config["BLOCKS"]))
    _dequantize_kernel[grid](
        weight.codes,
        weight.absmax_index,
        weight.absmax_scale,
        weight.absmax_offset,
        absmax_map,
        codebook,
        w,
        num_out,
        num_blocks,
        BN=config["BN"],
        BLOCKS=config["BLOCKS"],
        num_warps=config["warps"],
        enable_fp_fusion=False,  # a fused multiply-add would round the scales unlike torch
    )
    return w


def check_nf4(op: str, weight: NF4Weight) -> None:
    """Raises ValueError unless the parts of ``weight`` fit each other; every kernel that reads one asks first."""
    codes, index = weight.codes, weight.absmax_index
    if codes.ndim != 3 or codes.shape[2] != BLOCK // 2 or codes.dtype != torch.uint8 or not codes.is_contiguous():
        raise bad_argument(op, "codes", f"{codes.dtype} {tuple(codes.shape)}", "contiguous uint8 [in/64, out, 32]")
    if index.shape != codes.shape[:2] or index.dtype != torch.uint8 or not index.is_contiguous():
        allowed = f"contiguous uint8 {tuple(codes.shape[:2])}"
        raise bad_argument(op, "absmax_index", f"{index.dtype} {tuple(index.shape)}", allowed)
    num_scales = -(-index.numel() // SCALE_BLOCK)
    for name, part, length in (
        ("absmax_scale", weight.absmax_scale, num_scales),
        ("absmax_offset", weight.absmax_offset, 1),
    ):
        if part.shape != (length,) or part.dtype != torch.float32:
            raise bad_argument(op, name, f"{part.dtype} {tuple(part.shape)}", f"float32 [{length}]")
    for name, part in (("absmax_index", index), ("absmax_scale", weight.absmax_scale)):
        if part.device != codes.device:
            raise bad_argument(op, name, f"on {part.device}", f"on {codes.device}, as codes are")


def dequantize_nf4(
    weight: NF4Weight, dtype: torch.dtype = torch.float32, *, backend: str | None = None
) -> torch.Tensor:
    """NF4 → dense [out, in] in ``dtype``; bit-equal on all backends."""
    check_nf4("dequantize_nf4", weight)
    if choose_backend("dequantize_nf4", weight.codes, backend, ("torch", "triton")) == "torch":
        return dequantize_nf4_reference(weight, dtype)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise bad_argument("dequantize_nf4", "dtype", dtype, "float32, bfloat16 or float16 with backend 'triton'")
    return _dequantize_triton(weight, dtype, DEQUANTIZE_DEFAULT)


def _make_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(case["out"], case["in"], generator=generator).to(device)
    return {"weight": quantize_nf4(w), "dtype": dtype}


def _compile_cases(target: int) -> list[CompileCase]:
    config = DEQUANTIZE_DEFAULT
    return [
        CompileCase(
            "dequantize",
            _dequantize_kernel,
            {
                "codes_ptr": "*u8",
                "index_ptr": "*u8",
                **dict.fromkeys(("scale_ptr", "offset_ptr", "map_ptr", "codebook_ptr"), "*fp32"),
                "w_ptr": "*bf16",
                "num_out": "i32",
                "num_blocks": "i32",
            },
            {"BN": config["BN"], "BLOCKS": config["BLOCKS"]},
            num_warps=config["warps"],
            attrs={"num_out": 16},
            options={"enable_fp_fusion": False},
        )
    ]


SPEC = KernelSpec(
    op="dequantize_nf4",
    run=dequantize_nf4,
    reference=dequantize_nf4_reference,
    make_inputs=_make_inputs,
    test_cases=({"out": 1, "in": 64}, {"out": 33, "in": 192}, {"out": 129, "in": 576}),
    bench_cases=({"model": "MPT-7B", "out": 16384, "in": 4096}, {"model": "MPT-30B", "out": 7168, "in": 7168}),
    bytes=lambda case: int(case["out"] * case["in"] * (2 + 4.127 / 8)),
    flops=lambda case: case["out"] * case["in"],
    compile_cases=_compile_cases,
)
