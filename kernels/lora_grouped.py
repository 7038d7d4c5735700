"""Many adapters in one batch: y += s_n · (x A_nᵀ) B_nᵀ, each sequence with its own adapter n or with none.

Shapes: y [T, out], x [T, in], a [N, R, in], b [N, out, R], scalings f32 [N], adapter_index i32 [B] (−1 = base only),
query_starts i32 [B+1]. Adapters of lower rank are padded with zeros to R. In place on y, no gradient.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from .checks import bad_argument
from .dispatch import choose_backend

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
            y[start:stop].addmm_(linear(x[start:stop], a_n), b_n.t(), alpha=scale[adapter])
            continue
        rows = torch.cat([torch.arange(start, stop, device=x.device) for start, stop in pieces])
        update = torch.addmm(y[rows], linear(x[rows], a_n), b_n.t(), alpha=scale[adapter])
        y.index_copy_(0, rows, update)
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
    choose_backend(OP, x, backend, ("torch", "triton"))
    if x.shape[0] == 0 or a.shape[1] == 0:
        return y
    return _add_torch(y, x, a, b, scalings, adapter_index, query_starts)
