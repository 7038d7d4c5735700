"""Frozen bf16 linear layers on a CPU with AMX, for few rows: weights packed once in the order in which tiles take them.

With the 32 rows of a decode step reading W is what costs; oneDNN's packed product reaches two thirds of what memory
gives, this one nine tenths. A gated layer writes silu(gate)·up of its fused [gate; up] matrix and spares the
intermediate of twice the width.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from . import cpu

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.load("packed_linear")
    library.packed_linear_bytes.argtypes, library.packed_linear_bytes.restype = [_LONG, _LONG], _LONG
    library.packed_linear_allocate.argtypes, library.packed_linear_allocate.restype = [_LONG], _POINTER
    library.packed_linear_free.argtypes, library.packed_linear_free.restype = [_POINTER], None
    library.packed_linear_pack.argtypes = [_POINTER, _LONG, _LONG, _LONG, _INT, _POINTER]
    library.packed_linear.argtypes = [_POINTER, _LONG, *[_POINTER] * 3, *[_LONG] * 3, _INT, _INT]
    library.packed_linear_pack.restype = library.packed_linear.restype = None
    return library


@functools.cache
def available() -> bool:
    """Whether this machine has AMX tiles and a compiler for the twin."""
    return cpu.default_backend("packed_linear") == "cpp" and bool(_library().packed_linear_available())


class PackedLinear:
    """A copy of ``weight`` [out, in] bf16 in tile order; with ``gated`` its two halves are gates and ups."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, gated: bool = False) -> None:
        if weight.dtype != torch.bfloat16 or weight.dim() != 2 or weight.device.type != "cpu":
            raise ValueError(
                f"packed_linear: weight is {weight.dtype} on {weight.device}; allowed: bf16 [out, in] on a CPU"
            )
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self._num_out, self._num_in = weight.shape
        self._gated = gated
        self._bias = None if bias is None else bias.to(torch.bfloat16).contiguous()
        library = _library()
        size = library.packed_linear_bytes(self._num_out, self._num_in)
        self._packed = library.packed_linear_allocate(size)
        if not self._packed:
            raise MemoryError(f"packed_linear: {size} bytes for packed weights")
        self._free = library.packed_linear_free
        library.packed_linear_pack(
            weight.data_ptr(), weight.stride(0), self._num_out, self._num_in, gated, self._packed
        )  # fmt: skip

    def __del__(self) -> None:
        if getattr(self, "_packed", None):
            self._free(self._packed)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] bf16 -> [T, out], or [T, out/2] where gated; into ``out`` where given. No gradient."""
        if x.dtype != torch.bfloat16 or x.shape[1] != self._num_in:
            raise ValueError(f"packed_linear: x is {x.dtype} {tuple(x.shape)}; allowed: bf16 [T, {self._num_in}]")
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = x.shape[0]
        width = self._num_out // 2 if self._gated else self._num_out
        if out is None:
            out = torch.empty(rows, width, dtype=torch.bfloat16)
        elif out.dtype != torch.bfloat16 or out.shape != (rows, width) or not out.is_contiguous():
            raise ValueError(
                f"packed_linear: out is {out.dtype} {tuple(out.shape)}; allowed: contiguous bf16 {(rows, width)}"
            )
        bias = None if self._bias is None else self._bias.data_ptr()
        _library().packed_linear(
            x.data_ptr(), x.stride(0), self._packed, bias, out.data_ptr(), rows, self._num_out, self._num_in,
            self._gated, cpu.num_threads(),
        )  # fmt: skip
        return out
