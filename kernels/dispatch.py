"""Which backend runs an op: the one asked for, else Triton for CUDA tensors, else torch (or an op's own CPU default)."""

from __future__ import annotations

import importlib.util

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


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
        raise ValueError(f"{op}: backend 'triton' needs the triton package, which is not installed; pass backend='torch'")
    return backend
