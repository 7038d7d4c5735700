"""Which backend runs an op: the one asked for, else Triton for CUDA tensors, else torch (or an op's own CPU default).

Also the one place that knows whether Triton is installed: kernel files take ``triton`` and ``tl`` from here, so that
they import on a machine without it (macOS, aarch64).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:

    class _Untyped(type):
        def __getattr__(cls, name: str) -> Any: ...

    class tl(metaclass=_Untyped):
        """Kernels are written in Triton's language, not Python's: no checker's types fit them."""

        constexpr = Any

    triton: Any


try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")  # pyright: ignore
    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _AbsentTriton:
        """Lets ``@triton.jit`` definitions load; ``choose_backend`` refuses before one could be launched."""

        @staticmethod
        def jit(function: Any = None, **_: Any) -> Any:
            return function if function is not None else lambda f: f

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << max(n - 1, 0).bit_length()

    triton = _AbsentTriton()
    tl = None  # pyright: ignore


def choose_backend(
    op: str, tensor: torch.Tensor, backend: str | None, available: tuple[str, ...], cpu_default: str = "torch"
) -> str:
    """Returns the backend's name for ``op`` on ``tensor``.

    ``available`` lists what the op implements. ``cpu_default`` is what CPU tensors get when nothing is asked for.
    Raises ValueError where the backend asked for is unknown to the op or cannot run here; there is no silent fallback.
    """
    if backend is None:
        backend = "triton" if tensor.is_cuda else cpu_default
    if backend not in available:
        raise ValueError(f"{op}: backend {backend!r} is not available; allowed: {', '.join(available)}")
    if backend == "triton" and not HAS_TRITON:
        raise ValueError(
            f"{op}: backend 'triton' needs the triton package, which is not installed; pass backend='torch'"
        )
    return backend


def bad_argument(op: str, argument: str, given: object, allowed: object) -> ValueError:
    """The one wording for an argument that does not fit; raise what this returns, before any launch."""
    return ValueError(f"{op}: argument {argument} is {given}; allowed: {allowed}")
