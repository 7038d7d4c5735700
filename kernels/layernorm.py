"""Layer normalisation, optionally of a sum: ``h = x (+ residual);  y = (h - mean) / sqrt(var + eps) · weight (+
bias)``.

x [T, C], weight and bias [C]. Statistics in fp32, the variance about the mean (no cancellation); the sum is rounded
to x's dtype before it is normalised, because that rounded sum is what the residual stream carries on. Design and
floor are those of rmsnorm.py: whole rows in registers, each tensor moved once, statistics recomputed in the backward
pass. Source: Ba, Kiros & Hinton, "Layer Normalization" (2016).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from . import cpu_rows
from .dispatch import choose_backend, tl, triton
from .norms import backward_config, check_norm, forward_config, make_norm_inputs, norm_bytes, norm_tuning
from .rows import as_rows, check_triton_operands, needs_grad, num_reduction_programs
from .spec import CompileCase, KernelSpec
from .tuning import tuned_config


def layernorm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Same arguments and results as ``layernorm``; accumulates in fp32, or in fp64 for fp64 inputs."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    h = x if residual is None else x + residual
    wide = h.to(accumulate)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight.to(accumulate)
    if bias is not None:
        y = y + bias.to(accumulate)
    y = y.to(x.dtype)
    return y if residual is None else (y, h)


def _layernorm_torch(x, weight, bias, eps, residual):
    h = x if residual is None else x + residual
    if weight.dtype == h.dtype:
        y = F.layer_norm(h, weight.shape, weight, bias, eps)
    else:
        y = layernorm_reference(h, weight, bias, eps)
    return y if residual is None else (y, h)


@triton.jit
def layernorm_forward_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    h,
    num_rows,
    num_channels,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    residual_inner,
    residual_outer_stride,
    residual_inner_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows)[:, None] & (columns < num_channels)
    x_offsets = (rows // x_inner) * x_outer_stride + (rows % x_inner) * x_inner_stride
    values = tl.load(x + x_offsets[:, None] + columns, mask=mask, other=0.0)
    out_offsets = rows[:, None] * num_channels + columns
    if HAS_RESIDUAL:
        offsets = (rows // residual_inner) * residual_outer_stride + (rows % residual_inner) * residual_inner_stride
        added = tl.load(residual + offsets[:, None] + columns, mask=mask, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
        tl.store(h + out_offsets, values, mask=mask)
    wide = values.to(tl.float32)
    mean = tl.sum(wide, axis=1) / num_channels
    centred = tl.where(mask, wide - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / num_channels + eps)
    w = tl.load(weight + columns, mask=columns < num_channels, other=0.0).to(tl.float32)
    result = centred * scale[:, None] * w
    if HAS_BIAS:
        result += tl.load(bias + columns, mask=columns < num_channels, other=0.0).to(tl.float32)
    tl.store(y + out_offsets, result.to(values.dtype), mask=mask)


@triton.jit
def layernorm_backward_kernel(
    dy,
    dh,
    h,
    weight,
    dx,
    dweight_parts,
    dbias_parts,
    num_rows,
    num_channels,
    h_inner,
    h_outer_stride,
    h_inner_stride,
    eps,
    HAS_DH: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + columns, mask=columns < num_channels, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < num_rows)[:, None] & (columns < num_channels)
        offsets = rows[:, None] * num_channels + columns
        h_offsets = (rows // h_inner) * h_outer_stride + (rows % h_inner) * h_inner_stride
        values = tl.load(h + h_offsets[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, values - (tl.sum(values, axis=1) / num_channels)[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / num_channels + eps)[:, None]
        normed = centred * scale
        if HAS_DWEIGHT:
            dw += gradient * normed
        if HAS_DBIAS:
            db += gradient
        gradient *= w
        mean = tl.sum(gradient, axis=1) / num_channels
        projection = tl.sum(gradient * normed, axis=1) / num_channels
        result = (gradient - mean[:, None] - normed * projection[:, None]) * scale
        if HAS_DH:
            result += tl.load(dh + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
    part = program.to(tl.int64) * num_channels + tl.arange(0, BLOCK)
    if HAS_DWEIGHT:
        tl.store(dweight_parts + part, tl.sum(dw, axis=0), mask=tl.arange(0, BLOCK) < num_channels)
    if HAS_DBIAS:
        tl.store(dbias_parts + part, tl.sum(db, axis=0), mask=tl.arange(0, BLOCK) < num_channels)


def _launch_forward(x, weight, bias, eps, residual):
    shape = x.shape
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    h = torch.empty(shape, dtype=x.dtype, device=x.device) if residual is not None else y
    x, num_rows, inner, outer_stride, inner_stride = as_rows(x)
    added, _, added_inner, added_outer_stride, added_inner_stride = as_rows(x if residual is None else residual)
    if num_rows:
        block = triton.next_power_of_2(shape[-1])
        config = tuned_config("layernorm", f"forward {block}", forward_config(block))
        weight = weight.contiguous()
        layernorm_forward_kernel[(triton.cdiv(num_rows, config["rows"]),)](
            x, added, weight, weight if bias is None else bias.contiguous(), y, h, num_rows, shape[-1],
            inner, outer_stride, inner_stride, added_inner, added_outer_stride, added_inner_stride, eps,
            HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None,
            ROWS=config["rows"], BLOCK=block, num_warps=config["num_warps"],
        )  # fmt: skip
    return y, h


def _launch_backward(dy, dh, h, weight, eps, want_dweight, want_dbias):
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    num_channels = h.shape[-1]
    block = triton.next_power_of_2(num_channels)
    sums = want_dweight or want_dbias
    name = "backward sums" if sums else "backward"
    config = tuned_config("layernorm", f"{name} {block}", backward_config(block, sums))
    h, num_rows, inner, outer_stride, inner_stride = as_rows(h)
    num_blocks = triton.cdiv(num_rows, config["rows"])
    num_programs = num_reduction_programs(h, num_blocks) if want_dweight or want_dbias else num_blocks
    parts = torch.zeros if num_rows == 0 else torch.empty
    dweight = parts((num_programs, num_channels), dtype=torch.float32, device=h.device) if want_dweight else None
    dbias = parts((num_programs, num_channels), dtype=torch.float32, device=h.device) if want_dbias else None
    if num_rows:
        dy = dy.contiguous()
        layernorm_backward_kernel[(num_programs,)](
            dy, dy if dh is None else dh.contiguous(), h, weight.contiguous(), dx,
            dx if dweight is None else dweight, dx if dbias is None else dbias,
            num_rows, num_channels, inner, outer_stride, inner_stride, eps,
            HAS_DH=dh is not None, HAS_DWEIGHT=want_dweight, HAS_DBIAS=want_dbias,
            ROWS=config["rows"], BLOCK=block, num_warps=config["num_warps"],
            enable_fp_fusion=False,  # dy·w − mean fused is not 0 where it cancels, and the scale is large just there
        )  # fmt: skip
    return (
        dx,
        None if dweight is None else dweight.sum(0).to(weight.dtype),
        None if dbias is None else dbias.sum(0).to(weight.dtype),
    )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, eps, residual):
        y, h = _launch_forward(x, weight, bias, eps, residual)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        ctx.save_for_backward(x if residual is None else h, weight)
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy, dh=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        h, weight = ctx.saved_tensors
        _, want_dweight, want_dbias, _, want_dresidual = ctx.needs_input_grad
        if dy is None:
            return dh, None, None, None, dh
        dx, dweight, dbias = _launch_backward(dy, dh, h, weight, ctx.eps, want_dweight, want_dbias)
        return dx, dweight, dbias, None, dx if want_dresidual else None


def layernorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Normalises the last dimension of ``x`` [..., C]; ``weight`` [C], ``bias`` [C] or None.

    With ``residual`` (same shape as x) returns ``(y, x + residual)``, else ``y``. Differentiable.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    check_norm("layernorm", x, weight, bias, residual)
    chosen = choose_backend(
        "layernorm", x, backend, ("torch", "triton", "cpp"), cpu_rows.default_backend(x, weight, bias)
    )
    if chosen == "torch":
        return _layernorm_torch(x, weight, bias, eps, residual)
    if chosen == "cpp":
        return cpu_rows.norm(x, weight, bias, eps, residual, centre=True)
    check_triton_operands("layernorm", x, weight=weight, bias=bias, residual=residual)
    if needs_grad(x, weight, bias, residual):
        return _LayerNorm.apply(x, weight, bias, eps, residual)
    y, h = _launch_forward(x, weight, bias, eps, residual)
    return y if residual is None else (y, h)


def _compile_cases(target: int) -> list[CompileCase]:
    cases = []
    for channels in (576, 4096, 7168, 8192):
        block = triton.next_power_of_2(channels)
        integers = dict.fromkeys(("num_rows", "num_channels", "x_inner", "x_outer_stride", "x_inner_stride"), "i32")
        integers |= dict.fromkeys(("residual_inner", "residual_outer_stride", "residual_inner_stride"), "i32")
        config = tuned_config("layernorm", f"forward {block}", forward_config(block))
        cases.append(
            CompileCase(
                f"forward C={channels}",
                layernorm_forward_kernel,
                {**dict.fromkeys(("x", "residual", "weight", "bias", "y", "h"), "*bf16"), **integers, "eps": "fp32"},
                {"HAS_RESIDUAL": True, "HAS_BIAS": False, "ROWS": config["rows"], "BLOCK": block},
                num_warps=config["num_warps"],
                attrs=dict.fromkeys(("num_channels", "x_outer_stride", "residual_outer_stride"), 16),
            )
        )
        for sums in (False, True):
            name = "backward sums" if sums else "backward"
            config = tuned_config("layernorm", f"{name} {block}", backward_config(block, sums))
            cases.append(
                CompileCase(
                    f"{name} C={channels}",
                    layernorm_backward_kernel,
                    {
                        **dict.fromkeys(("dy", "dh", "h", "weight", "dx"), "*bf16"),
                        **dict.fromkeys(("dweight_parts", "dbias_parts"), "*fp32"),
                        **dict.fromkeys(
                            ("num_rows", "num_channels", "h_inner", "h_outer_stride", "h_inner_stride"), "i32"
                        ),
                        "eps": "fp32",
                    },
                    {
                        "HAS_DH": True,
                        "HAS_DWEIGHT": sums,
                        "HAS_DBIAS": False,
                        "ROWS": config["rows"],
                        "BLOCK": block,
                    },
                    num_warps=config["num_warps"],
                    attrs=dict.fromkeys(("num_channels", "h_outer_stride"), 16),
                    options={"enable_fp_fusion": False},
                )
            )
    return cases


SPEC = KernelSpec(
    op="layernorm",
    run=layernorm,
    reference=layernorm_reference,
    make_inputs=functools.partial(make_norm_inputs, takes_bias=True),
    test_cases=tuple(
        {"T": t, "C": c, "residual": r, "bias": b}
        for t, c, r, b in (
            (1, 1, True, True),
            (7, 64, True, False),
            (5, 65, False, True),
            (0, 32, True, True),
            (33, 127, True, True),
        )
    ),
    bench_cases=(
        {"model": "MPT-7B", "T": 8192, "C": 4096, "priority": 2, "check_at": {"T": 1111}},
        {"model": "MPT-7B", "T": 8192, "C": 4096, "pass": "backward", "priority": 2, "check_at": {"T": 1111}},
        {"model": "MPT-30B", "T": 8192, "C": 7168, "check_at": {"T": 1111}},
        {"model": "MPT-30B", "T": 8192, "C": 7168, "pass": "backward", "check_at": {"T": 1111}},
        {"model": "MPT-7B decode", "T": 64, "C": 4096},
    ),
    bytes=norm_bytes,
    flops=lambda case: 10 * case["T"] * case["C"],
    compile_cases=_compile_cases,
    peers={"torch": lambda **inputs: layernorm(**inputs, backend="torch")},
    tuning=norm_tuning,
)
