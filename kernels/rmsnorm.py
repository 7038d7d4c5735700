"""RMS normalisation, optionally of a sum: ``h = x (+ residual);  y = h / sqrt(mean(h²) + eps) · weight``.

x [T, C] or [T, N, C] (each head on its own), weight [C]. Statistics in fp32; the sum is rounded to x's dtype before it
is normalised, because that rounded sum is what the residual stream carries on. A program holds a few whole rows in
registers, so each tensor moves once: floor 2·T·C elements, 4·T·C with the residual. The backward pass recomputes the
statistics from h instead of saving them, and sums the weight gradient in a fixed number of partial rows.
Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import cpu_rows
from .dispatch import choose_backend, tl, triton
from .norms import backward_config, check_norm, forward_config, make_norm_inputs, norm_bytes, norm_tuning
from .rows import as_rows, check_triton_operands, needs_grad, num_reduction_programs
from .spec import CompileCase, KernelSpec
from .tuning import tuned_config


def rmsnorm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Same arguments and results as ``rmsnorm``; accumulates in fp32, or in fp64 for fp64 inputs."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    h = x if residual is None else x + residual
    wide = h.to(accumulate)
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.to(accumulate)
    y = y.to(x.dtype)
    return y if residual is None else (y, h)


def _rmsnorm_torch(x, weight, eps, residual):
    h = x if residual is None else x + residual
    y = F.rms_norm(h, weight.shape, weight, eps) if weight.dtype == h.dtype else rmsnorm_reference(h, weight, eps)
    return y if residual is None else (y, h)


@triton.jit
def rmsnorm_forward_kernel(
    x,
    residual,
    weight,
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
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / num_channels + eps)
    w = tl.load(weight + columns, mask=columns < num_channels, other=0.0).to(tl.float32)
    tl.store(y + out_offsets, (wide * scale[:, None] * w).to(values.dtype), mask=mask)


@triton.jit
def rmsnorm_backward_kernel(
    dy,
    dh,
    h,
    weight,
    dx,
    dweight_parts,
    num_rows,
    num_channels,
    h_inner,
    h_outer_stride,
    h_inner_stride,
    eps,
    HAS_DH: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + columns, mask=columns < num_channels, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < num_rows)[:, None] & (columns < num_channels)
        offsets = rows[:, None] * num_channels + columns
        h_offsets = (rows // h_inner) * h_outer_stride + (rows % h_inner) * h_inner_stride
        values = tl.load(h + h_offsets[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, axis=1) / num_channels + eps)[:, None]
        normed = values * scale
        if HAS_DWEIGHT:
            dw += gradient * normed
        gradient *= w
        mean = tl.sum(gradient * normed, axis=1) / num_channels
        result = (gradient - normed * mean[:, None]) * scale
        if HAS_DH:
            result += tl.load(dh + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
    if HAS_DWEIGHT:
        part = program.to(tl.int64) * num_channels + tl.arange(0, BLOCK)
        tl.store(dweight_parts + part, tl.sum(dw, axis=0), mask=tl.arange(0, BLOCK) < num_channels)


def _launch_forward(x, weight, eps, residual):
    shape = x.shape
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    h = torch.empty(shape, dtype=x.dtype, device=x.device) if residual is not None else y
    x, num_rows, inner, outer_stride, inner_stride = as_rows(x)
    added, _, added_inner, added_outer_stride, added_inner_stride = as_rows(x if residual is None else residual)
    if num_rows:
        block = triton.next_power_of_2(shape[-1])
        config = tuned_config("rmsnorm", f"forward {block}", forward_config(block))
        rmsnorm_forward_kernel[(triton.cdiv(num_rows, config["rows"]),)](
            x, added, weight.contiguous(), y, h, num_rows, shape[-1], inner, outer_stride, inner_stride,
            added_inner, added_outer_stride, added_inner_stride, eps,
            HAS_RESIDUAL=residual is not None, ROWS=config["rows"], BLOCK=block, num_warps=config["num_warps"],
        )  # fmt: skip
    return y, h


def _launch_backward(dy, dh, h, weight, eps, want_dweight):
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    num_channels = h.shape[-1]
    block = triton.next_power_of_2(num_channels)
    name = "backward sums" if want_dweight else "backward"
    config = tuned_config("rmsnorm", f"{name} {block}", backward_config(block, want_dweight))
    h, num_rows, inner, outer_stride, inner_stride = as_rows(h)
    num_blocks = triton.cdiv(num_rows, config["rows"])
    num_programs = num_reduction_programs(h, num_blocks) if want_dweight else num_blocks
    parts = torch.empty((num_programs, num_channels), dtype=torch.float32, device=h.device) if want_dweight else dx
    if num_rows == 0:
        return dx, torch.zeros_like(weight) if want_dweight else None
    rmsnorm_backward_kernel[(num_programs,)](
        dy.contiguous(), dh.contiguous() if dh is not None else dy, h, weight.contiguous(), dx, parts,
        num_rows, num_channels, inner, outer_stride, inner_stride, eps,
        HAS_DH=dh is not None, HAS_DWEIGHT=want_dweight,
        ROWS=config["rows"], BLOCK=block, num_warps=config["num_warps"],
    )  # fmt: skip
    return dx, parts.sum(0).to(weight.dtype) if want_dweight else None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, eps, residual):
        y, h = _launch_forward(x, weight, eps, residual)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        ctx.save_for_backward(x if residual is None else h, weight)
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy, dh=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        h, weight = ctx.saved_tensors
        if dy is None:
            return dh, None, None, dh
        dx, dweight = _launch_backward(dy, dh, h, weight, ctx.eps, ctx.needs_input_grad[1])
        return dx, dweight, None, dx if ctx.needs_input_grad[3] else None


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Normalises the last dimension of ``x`` [..., C] by its root mean square and scales by ``weight`` [C].

    With ``residual`` (same shape as x) returns ``(y, x + residual)``, else ``y``. Differentiable.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    check_norm("rmsnorm", x, weight, None, residual)
    chosen = choose_backend("rmsnorm", x, backend, ("torch", "triton", "cpp"), cpu_rows.default_backend(x, weight))
    if chosen == "torch":
        return _rmsnorm_torch(x, weight, eps, residual)
    if chosen == "cpp":
        return cpu_rows.norm(x, weight, None, eps, residual, centre=False)
    check_triton_operands("rmsnorm", x, weight=weight, residual=residual)
    if needs_grad(x, weight, residual):
        return _RMSNorm.apply(x, weight, eps, residual)
    y, h = _launch_forward(x, weight, eps, residual)
    return y if residual is None else (y, h)


def _compile_cases(target: int) -> list[CompileCase]:
    cases = []
    for channels in (64, 576, 4096, 8192):
        block = triton.next_power_of_2(channels)
        integers = dict.fromkeys(("num_rows", "num_channels", "x_inner", "x_outer_stride", "x_inner_stride"), "i32")
        integers |= dict.fromkeys(("residual_inner", "residual_outer_stride", "residual_inner_stride"), "i32")
        config = tuned_config("rmsnorm", f"forward {block}", forward_config(block))
        cases.append(
            CompileCase(
                f"forward C={channels}",
                rmsnorm_forward_kernel,
                {**dict.fromkeys(("x", "residual", "weight", "y", "h"), "*bf16"), **integers, "eps": "fp32"},
                {"HAS_RESIDUAL": channels != 64, "ROWS": config["rows"], "BLOCK": block},
                num_warps=config["num_warps"],
                attrs=dict.fromkeys(("num_channels", "x_outer_stride", "x_inner_stride", "residual_outer_stride"), 16),
            )
        )
        for sums in (False, True):
            name = "backward sums" if sums else "backward"
            config = tuned_config("rmsnorm", f"{name} {block}", backward_config(block, sums))
            integers = dict.fromkeys(("num_rows", "num_channels", "h_inner", "h_outer_stride", "h_inner_stride"), "i32")
            cases.append(
                CompileCase(
                    f"{name} C={channels}",
                    rmsnorm_backward_kernel,
                    {
                        **dict.fromkeys(("dy", "dh", "h", "weight", "dx"), "*bf16"),
                        "dweight_parts": "*fp32",
                        **integers,
                        "eps": "fp32",
                    },
                    {"HAS_DH": channels != 64, "HAS_DWEIGHT": sums, "ROWS": config["rows"], "BLOCK": block},
                    num_warps=config["num_warps"],
                    attrs=dict.fromkeys(("num_channels", "h_outer_stride", "h_inner_stride"), 16),
                )
            )
    return cases


SPEC = KernelSpec(
    op="rmsnorm",
    run=rmsnorm,
    reference=rmsnorm_reference,
    make_inputs=make_norm_inputs,
    test_cases=(
        {"T": 1, "C": 1, "residual": True},
        {"T": 7, "C": 64, "residual": True},
        {"T": 5, "C": 65, "residual": False},
        {"T": 0, "C": 32, "residual": True},
        {"T": 33, "C": 127, "residual": True},
        {"T": 6, "N": 3, "C": 16, "residual": False},
    ),
    bench_cases=(
        {"model": "Llama-8B", "T": 8192, "C": 4096, "priority": 2, "check_at": {"T": 1111}},
        {"model": "Llama-8B", "T": 8192, "C": 4096, "pass": "backward", "check_at": {"T": 1111}},
        {"model": "SmolLM2", "T": 32768, "C": 576, "check_at": {"T": 1111}},
        {"model": "SmolLM2", "T": 32768, "C": 576, "pass": "backward", "check_at": {"T": 1111}},
        {"model": "Qwen3-8B heads", "T": 8192, "N": 32, "C": 128, "residual": False, "check_at": {"T": 1111}},
        {"model": "Llama-8B decode", "T": 64, "C": 4096},
    ),
    bytes=norm_bytes,
    flops=lambda case: 8 * case["T"] * case.get("N", 1) * case["C"],
    compile_cases=_compile_cases,
    peers={"torch": lambda **inputs: rmsnorm(**inputs, backend="torch")},
    tuning=norm_tuning,
)
