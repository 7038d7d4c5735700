"""Products of 16-bit matrices on a CPU, in row counts of which there are few.

oneDNN, which does them for torch, makes a program for every shape that it meets: for one product of a small model
0.3 MiB in its cache of 1,024, and as much again beside it that is never freed. The rows of packed batches come in any
number, so a long run would hold programs for all of them. Here the largest multiple of ``BLOCK`` rows runs at once, and
the rest filled up with zeros to the next of 20 sizes. Other than in 16 bits on a CPU these are torch's own products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

BLOCK = 256  # rows; a multiple of it runs as it is
STEP = 16  # a rest of more rows is filled up to a multiple of it, a smaller one to a power of two


def is_shape_bound(x: torch.Tensor) -> bool:
    """Whether each number of rows of x costs memory for good."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def filled_rows(num_rows: int) -> int:
    """What a rest of ``num_rows`` < ``BLOCK`` is filled up to."""
    if num_rows > STEP:
        return num_rows + -num_rows % STEP
    return 1 << (num_rows - 1).bit_length() if num_rows else 0


def fill(x: torch.Tensor) -> torch.Tensor:
    """x [T, C] with rows of zeros behind it, `filled_rows` together."""
    missing = filled_rows(x.shape[0]) - x.shape[0]
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    rest: Callable[[torch.Tensor, torch.Tensor], object] | None = None,
) -> torch.Tensor:
    """``x Wᵀ + bias`` without a gradient: x [T, in], W [out, in] -> [T, out].

    ``rest(x, out)`` takes the rows beyond whole blocks in place of a filled product.
    """
    num_rows = x.shape[0]
    if not is_shape_bound(x):
        return F.linear(x, weight, bias)
    whole = num_rows - num_rows % BLOCK
    out = x.new_empty(num_rows, weight.shape[0])
    if whole:
        _multiply(x[:whole], weight, bias, out[:whole])
    if whole == num_rows:
        return out
    if rest is not None:
        rest(x[whole:], out[whole:])
    elif filled_rows(num_rows - whole) == num_rows - whole:
        _multiply(x[whole:], weight, bias, out[whole:])
    else:
        out[whole:] = F.linear(fill(x[whole:]), weight, bias)[: num_rows - whole]
    return out


def add_product_(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """``y += scaling · x Wᵀ`` in place without a gradient: y [T, out], x [T, in], W [out, in]."""
    num_rows, columns = x.shape[0], weight.t()
    if not is_shape_bound(x):
        return y.addmm_(x, columns, alpha=scaling)
    whole = num_rows - num_rows % BLOCK
    if whole:
        y[:whole].addmm_(x[:whole], columns, alpha=scaling)
    if whole < num_rows:
        y[whole:] = fill(y[whole:]).addmm_(fill(x[whole:]), columns, alpha=scaling)[: num_rows - whole]
    return y


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
