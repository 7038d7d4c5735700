"""Quantised linear layers on a CPU: a packed product for AMX tiles, and dequantising, in C++.

``y = x Wᵀ + b`` in bf16, x [T, in], W [out, in]. An int8 weight meets activations in integers, per row of x: in two
8-bit terms (``terms=2``, 16 bits below the row's largest magnitude, finer than bf16's own rounding of the result) or in
one, faster and coarser. NF4 and fp8 become bf16 on the way, with the values that dequantising gives.
`int8_linear_reference` is the integer arithmetic in torch.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace

import torch

from . import cpu
from .channelwise import ChannelWeight
from .nf4 import BLOCK, CODEBOOK, NF4Weight, absmax_of

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_PANEL = 32
LIMITS = {1: 127.0, 2: 32512.0}  # the largest integer of a row of activations: 127, or 127 · 256
_NOTHING = torch.empty(0, dtype=torch.uint8)
SMALLEST = 1e-30  # rows whose largest magnitude is below count as zeros


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.load("quantized_linear")
    library.quantized_linear_bytes.argtypes = [_INT, _LONG, _LONG, _INT]
    library.quantized_linear_bytes.restype = _LONG
    library.quantized_linear_allocate.argtypes, library.quantized_linear_allocate.restype = [_LONG], _POINTER
    library.quantized_linear_free.argtypes = [_POINTER]
    library.quantized_linear_pack.argtypes = [_INT, _POINTER, _LONG, _LONG, _LONG, _INT, _POINTER, _INT]
    library.quantized_linear.argtypes = [_INT, _POINTER, _LONG, *[_POINTER] * 6, *[_LONG] * 3, _INT, _INT, _INT]
    library.dequantize_nf4.argtypes = [*[_POINTER] * 4, _INT, _LONG, _LONG, _INT]
    library.dequantize_channelwise.argtypes = [_POINTER, _LONG, *[_POINTER] * 3, _INT, _LONG, _LONG, _INT]
    library.quantized_linear_unpack.argtypes = [_INT, _POINTER, _LONG, _LONG, _INT, _POINTER, _INT]
    for name in ("free", "pack", "unpack"):
        getattr(library, f"quantized_linear_{name}").restype = None
    library.quantized_linear.restype = library.dequantize_nf4.restype = library.dequantize_channelwise.restype = None
    return library


@functools.cache
def available() -> bool:
    """Whether this machine has AMX tiles and a compiler for the twin."""
    return cpu.default_backend("quantized_linear") == "cpp" and bool(_library().quantized_linear_available())


def default_backend(dtype: torch.dtype) -> str:
    """What dequantises on a CPU: "cpp" where the twin builds and knows ``dtype``, else "torch"."""
    return cpu.default_backend("quantized_linear") if dtype in cpu.DTYPE_CODES else "torch"


@functools.cache
def _table(kind: str) -> torch.Tensor:
    if kind == "nf4":
        return torch.tensor(CODEBOOK, dtype=torch.float32)
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def dequantize(weight: NF4Weight | ChannelWeight, dtype: torch.dtype) -> torch.Tensor:
    """The dense [out, in] in fp32, bf16 or fp16, to the bit what the torch references give."""
    num_out, num_in = weight.shape
    out = torch.empty(num_out, num_in, dtype=dtype)
    code, threads = cpu.DTYPE_CODES[dtype], cpu.num_threads()
    if isinstance(weight, NF4Weight):
        absmax = absmax_of(weight).contiguous()
        _library().dequantize_nf4(
            weight.codes.data_ptr(), absmax.data_ptr(), _table("nf4").data_ptr(), out.data_ptr(), code, num_out, num_in,
            threads,
        )  # fmt: skip
        return out
    values, scales = weight.values, weight.scales.contiguous()
    values = values if values.stride(1) == 1 else values.contiguous()
    table = None if values.dtype == torch.int8 else _table("fp8").data_ptr()
    _library().dequantize_channelwise(
        values.data_ptr(), values.stride(0), scales.data_ptr(), table, out.data_ptr(), code, num_out, num_in, threads
    )  # fmt: skip
    return out


def quantize_rows(x: torch.Tensor, terms: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in] → integers [T, in] (i32, |q| ≤ `LIMITS`) and f32 scales [T], x ≈ q · scale; round half to even."""
    largest = x.float().abs().amax(dim=1) if x.shape[1] else torch.zeros(x.shape[0])
    empty, limit = largest < SMALLEST, torch.full_like(largest, LIMITS[terms])  # number / tensor would round twice
    inverse = torch.where(empty, 0.0, limit / torch.where(empty, 1.0, largest))
    return (x.float() * inverse[:, None]).round().to(torch.int32), torch.where(empty, 0.0, largest / limit)


def int8_linear_reference(
    x: torch.Tensor, weight: ChannelWeight, bias: torch.Tensor | None = None, *, terms: int = 2
) -> torch.Tensor:
    """The packed int8 product's arithmetic: exact sums of integers, then one scale per row and one per column."""
    q, scales = quantize_rows(x, terms)
    sums = (q.double() @ weight.values.double().t()).float()  # fp64 holds these sums exactly
    y = sums * (weight.scales[None, :] * scales[:, None])
    return (y if bias is None else y + bias.float()).to(x.dtype)


class PackedQuantized:
    """A copy of ``weight`` [out, in] in tile order; with ``gated`` its two halves are gates and ups, and the result is
    silu(gate) · up [T, out / 2]. ``terms`` (1 or 2) matters to int8 alone."""

    def __init__(
        self, weight: NF4Weight | ChannelWeight, bias: torch.Tensor | None, *, gated: bool = False, terms: int = 2
    ) -> None:
        if weight.device.type != "cpu" or terms not in LIMITS:
            raise ValueError(f"packed_quantized: weight on {weight.device}, terms {terms}; allowed: cpu; 1 or 2")
        self._num_out, self._num_in = weight.shape
        self._gated, self._terms = gated, terms
        nf4 = isinstance(weight, NF4Weight)
        self._kind = 2 if nf4 else 0 if weight.values.dtype == torch.int8 else 1
        order = _output_order(self._num_out, gated)
        ones = torch.ones(self._num_out)
        self._scales = _take(ones if nf4 else weight.scales, order)
        self._bias = _take(torch.zeros(self._num_out) if bias is None else bias.float(), order)
        self._absmax: torch.Tensor | None = None
        if isinstance(weight, NF4Weight):
            # [panels, 32, blocks] → [panels, blocks, 32], so that a block's scales lie side by side
            blocks = self._num_in // BLOCK
            self._absmax = _take(absmax_of(weight), order).view(-1, _PANEL, blocks).transpose(1, 2).contiguous()
            values, stride = weight.codes, 0
        else:
            values = weight.values if weight.values.stride(1) == 1 else weight.values.contiguous()
            stride = values.stride(0)
        library = _library()
        size = library.quantized_linear_bytes(self._kind, self._num_out, self._num_in, gated)
        self._packed = library.quantized_linear_allocate(size)
        if not self._packed:
            raise MemoryError(f"packed_quantized: {size} bytes for packed weights")
        self._free = library.quantized_linear_free
        library.quantized_linear_pack(
            self._kind, values.data_ptr(), stride, self._num_out, self._num_in, gated, self._packed, cpu.num_threads()
        )
        self._small = (
            replace(weight, codes=_NOTHING) if isinstance(weight, NF4Weight) else replace(weight, values=_NOTHING)
        )
        # A decode step makes hundreds of small calls: what they have in common is looked up once.
        held = (_table("nf4"), self._absmax, self._scales, self._bias)
        self._operands = (self._packed, *(None if tensor is None else tensor.data_ptr() for tensor in held))
        self._run = library.quantized_linear

    def unpack(self) -> NF4Weight | ChannelWeight:
        """The weight that was packed, whose plain form need not be kept beside this one."""
        kinds = {0: torch.int8, 1: torch.float8_e4m3fn, 2: torch.uint8}
        shape = (self._num_in // BLOCK, self._num_out, BLOCK // 2) if self._kind == 2 else (self._num_out, self._num_in)
        values = torch.empty(shape, dtype=kinds[self._kind])
        _library().quantized_linear_unpack(
            self._kind, self._packed, self._num_out, self._num_in, self._gated, values.data_ptr(), cpu.num_threads()
        )
        if isinstance(self._small, NF4Weight):
            return replace(self._small, codes=values)
        return replace(self._small, values=values)

    def __del__(self) -> None:
        if getattr(self, "_packed", None):
            self._free(self._packed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] bf16 -> [T, out], or [T, out/2] where gated. No gradient."""
        if x.dtype != torch.bfloat16 or x.shape[1] != self._num_in:
            raise ValueError(f"packed_quantized: x is {x.dtype} {tuple(x.shape)}; allowed: bf16 [T, {self._num_in}]")
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = x.shape[0]
        out = torch.empty(rows, self._num_out // 2 if self._gated else self._num_out, dtype=torch.bfloat16)
        if rows:
            self._run(
                self._kind, x.data_ptr(), x.stride(0), *self._operands, out.data_ptr(), rows, self._num_out,
                self._num_in, self._gated, self._terms, cpu.num_threads(),
            )  # fmt: skip
        return out


def _output_order(num_out: int, gated: bool) -> torch.Tensor:
    """The output that each column of each panel belongs to, -1 beyond the end: the order of the packed columns."""
    if not gated:
        columns = torch.arange(-(-num_out // _PANEL) * _PANEL)
        return torch.where(columns < num_out, columns, -1)
    half = num_out // 2
    units = torch.arange(-(-half // 16) * 16).view(-1, 1, 16)
    both = torch.cat((units, units + half), dim=1)
    return torch.where(units < half, both, -1).flatten()


def _take(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """values [out, …] in the panels' order, zeros beyond the end."""
    padded = torch.cat((values.float(), torch.zeros(1, *values.shape[1:])))
    return padded[order].contiguous()
