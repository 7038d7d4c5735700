"""Views of tensors as rows for the row-wise kernels, and the limits those kernels share."""

from __future__ import annotations

import torch

from .dispatch import bad_argument

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_ROW = 65536  # elements; one program holds a whole row in registers


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int]:
    """``(x, num_rows, inner, outer_stride, inner_stride)``: row r lies at (r // inner)·outer_stride + (r %
    inner)·inner_stride.

    Copies only where the last dimension is strided or more than two leading dimensions do not collapse.
    """
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if x.dim() == 2:
        return x, x.shape[0], 1, x.stride(0), 0
    if x.dim() == 3 and not x.is_contiguous():
        return x, x.shape[0] * x.shape[1], x.shape[1], x.stride(0), x.stride(1)
    x = x.reshape(-1, x.shape[-1])
    return x, x.shape[0], 1, x.stride(0), 0


def check_triton_operands(op: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises ValueError unless x's dtype is one that the kernels take and the others lie on its device."""
    if x.dtype not in TRITON_DTYPES:
        raise bad_argument(op, "x", x.dtype, "float32, float16 or bfloat16 with backend 'triton'")
    if x.shape[-1] > MAX_ROW:
        raise bad_argument(op, "x", f"{x.shape[-1]} wide", f"up to {MAX_ROW}; no configuration fits a longer row")
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise bad_argument(op, name, f"on {tensor.device}", f"on {x.device}, as x is")


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass may come; without one the autograd wrapper's overhead is saved."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def num_reduction_programs(x: torch.Tensor, num_blocks: int) -> int:
    """How many programs share a sum over rows: fixed per device, so a gradient is repeatable."""
    limit = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8
    return max(1, min(num_blocks, limit))
