"""Activations of the feed-forward block: ``gelu(x) = x·Φ(x)`` (exact, by erf) and ``swiglu([g, u]) = g·sigmoid(g)·u``.

gelu keeps x's shape; swiglu takes gate and up side by side, [T, 2I] -> [T, I]. Computed in fp32 and rounded once.
Floors: gelu 2 elements moved per element (backward 3), swiglu 3 per output (backward 5). The backward passes
recompute from the inputs; nothing else is saved.
Sources: Hendrycks & Gimpel, "Gaussian Error Linear Units" (2016); Shazeer, "GLU Variants Improve Transformer" (2020).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import cpu_rows
from .dispatch import bad_argument, choose_backend, tl, triton
from .rows import TRITON_DTYPES, needs_grad
from .spec import Case, CompileCase, KernelSpec
from .tuning import tuned_config


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """Same as ``gelu``; computes in fp32, or in fp64 for fp64 inputs."""
    return F.gelu(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Same as ``swiglu``; computes in fp32, or in fp64 for fp64 inputs."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


@triton.jit
def gelu_kernel(x, dy, out, num_elements, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    v = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    cdf = 0.5 + 0.5 * tl.erf(v * 0.7071067811865476)
    if BACKWARD:
        density = 0.3989422804014327 * tl.exp(-0.5 * v * v)
        result = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32) * (cdf + v * density)
    else:
        result = v * cdf
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_kernel(
    gate_up, dy, out, num_rows, num_columns, row_stride, BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    column_blocks = tl.cdiv(num_columns, BLOCK)
    rows = (program // column_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = ((program % column_blocks) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (columns < num_columns)
    source = gate_up + rows * row_stride + columns
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + num_columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    if BACKWARD:
        gradient = tl.load(dy + rows * num_columns + columns, mask=mask, other=0.0).to(tl.float32)
        target = out + rows * (2 * num_columns) + columns
        dgate = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(target, dgate.to(out.dtype.element_ty), mask=mask)
        tl.store(target + num_columns, (gradient * gate * sigmoid).to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + rows * num_columns + columns, (gate * sigmoid * up).to(out.dtype.element_ty), mask=mask)


_GELU_CONFIG = {"block": 2048, "num_warps": 4}


def _swiglu_config(num_columns: int) -> dict[str, int]:
    """Columns a block: the widest power of two that wastes little of the last one; rows fill the tile."""
    block = min(triton.next_power_of_2(num_columns), 1024)
    while block > 128 and (-num_columns % block) * 8 > num_columns:
        block //= 2
    return {"rows": max(1, min(8, 1024 // block)), "block": block, "num_warps": 4}


def _launch_gelu(x, dy):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        config = tuned_config("gelu", "default", _GELU_CONFIG)
        gelu_kernel[(triton.cdiv(x.numel(), config["block"]),)](
            x, x if dy is None else dy, out, x.numel(),
            BACKWARD=dy is not None, BLOCK=config["block"], num_warps=config["num_warps"],
        )  # fmt: skip
    return out


def _launch_swiglu(gate_up, dy):
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    num_rows, width = gate_up.shape
    num_columns = width // 2
    shape = (num_rows, num_columns) if dy is None else (num_rows, width)
    out = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        bucket = f"{'forward' if dy is None else 'backward'} {num_columns}"
        config = tuned_config("swiglu", bucket, _swiglu_config(num_columns))
        grid = (triton.cdiv(num_rows, config["rows"]) * triton.cdiv(num_columns, config["block"]),)
        swiglu_kernel[grid](
            gate_up, gate_up if dy is None else dy, out, num_rows, num_columns, gate_up.stride(0),
            BACKWARD=dy is not None, ROWS=config["rows"], BLOCK=config["block"], num_warps=config["num_warps"],
        )  # fmt: skip
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x):
        ctx.save_for_backward(x)
        return _launch_gelu(x, None)

    @staticmethod
    def backward(ctx: Any, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _launch_gelu(ctx.saved_tensors[0], dy.contiguous())


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up):
        ctx.save_for_backward(gate_up)
        return _launch_swiglu(gate_up, None)

    @staticmethod
    def backward(ctx: Any, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _launch_swiglu(ctx.saved_tensors[0], dy.contiguous())


def _check_dtype(op: str, argument: str, x: torch.Tensor) -> None:
    if x.dtype not in TRITON_DTYPES:
        raise bad_argument(op, argument, x.dtype, "float32, float16 or bfloat16 with backend 'triton'")


def gelu(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """``x·Φ(x)`` for any shape. Differentiable."""
    if choose_backend("gelu", x, backend, ("torch", "triton")) == "torch":
        return F.gelu(x)
    _check_dtype("gelu", "x", x)
    x = x.contiguous()
    return _Gelu.apply(x) if needs_grad(x) else _launch_gelu(x, None)


def swiglu(gate_up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """``silu(gate)·up`` for ``gate_up`` [T, 2I], gate first; returns [T, I]. Differentiable.

    Raises ValueError on an odd width.
    """
    if gate_up.dim() != 2 or gate_up.shape[-1] % 2:
        raise bad_argument("swiglu", "gate_up", f"of shape {tuple(gate_up.shape)}", "[T, 2I]")
    chosen = choose_backend("swiglu", gate_up, backend, ("torch", "triton", "cpp"), cpu_rows.default_backend(gate_up))
    if chosen == "torch":
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    if chosen == "cpp":
        return cpu_rows.swiglu(gate_up)
    _check_dtype("swiglu", "gate_up", gate_up)
    return _Swiglu.apply(gate_up) if needs_grad(gate_up) else _launch_swiglu(gate_up, None)


def _make_gelu_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    x = (2 * torch.randn(case["T"], case["I"], generator=torch.Generator(device).manual_seed(seed), device=device)).to(
        dtype
    )
    return {"x": x.requires_grad_(case.get("pass") == "backward")}


def _make_swiglu_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    x = (
        2 * torch.randn(case["T"], 2 * case["I"], generator=torch.Generator(device).manual_seed(seed), device=device)
    ).to(dtype)
    return {"gate_up": x.requires_grad_(case.get("pass") == "backward")}


def _gelu_compile_cases(target: int) -> list[CompileCase]:
    config = tuned_config("gelu", "default", _GELU_CONFIG)
    return [
        CompileCase(
            "backward" if backward else "forward",
            gelu_kernel,
            {"x": "*bf16", "dy": "*bf16", "out": "*bf16", "num_elements": "i32"},
            {"BACKWARD": backward, "BLOCK": config["block"]},
            num_warps=config["num_warps"],
            attrs={"num_elements": 16},
        )
        for backward in (False, True)
    ]


def _swiglu_compile_cases(target: int) -> list[CompileCase]:
    cases = []
    for columns in (1536, 14336):
        for name in ("forward", "backward"):
            config = tuned_config("swiglu", f"{name} {columns}", _swiglu_config(columns))
            cases.append(
                CompileCase(
                    f"{name} I={columns}",
                    swiglu_kernel,
                    {
                        **dict.fromkeys(("gate_up", "dy", "out"), "*bf16"),
                        **dict.fromkeys(("num_rows", "num_columns", "row_stride"), "i32"),
                    },
                    {"BACKWARD": name == "backward", "ROWS": config["rows"], "BLOCK": config["block"]},
                    num_warps=config["num_warps"],
                    attrs={"num_columns": 16, "row_stride": 16},
                )
            )
    return cases


def _gelu_tuning(case: Case) -> tuple[str, list[dict[str, int]]]:
    return "default", [{"block": b, "num_warps": w} for b in (1024, 2048, 4096) for w in (4, 8) if b // w >= 256]


def _swiglu_tuning(case: Case) -> tuple[str, list[dict[str, int]]]:
    return f"{case.get('pass', 'forward')} {case['I']}", [
        {"rows": r, "block": b, "num_warps": w}
        for b in (512, 1024, 2048)
        for r in (1, 2, 4)
        for w in (2, 4, 8)
        if 8 <= r * b // (32 * w) <= 32
    ]


GELU_SPEC = KernelSpec(
    op="gelu",
    run=gelu,
    reference=gelu_reference,
    make_inputs=_make_gelu_inputs,
    test_cases=({"T": 1, "I": 1}, {"T": 3, "I": 127}, {"T": 0, "I": 5}, {"T": 5, "I": 2049}),
    bench_cases=(
        {"model": "MPT-7B", "T": 8192, "I": 16384, "priority": 2, "check_at": {"T": 1111}},
        {"model": "MPT-7B", "T": 8192, "I": 16384, "pass": "backward", "check_at": {"T": 1111}},
    ),
    bytes=lambda case: (3 if case.get("pass") == "backward" else 2) * case["T"] * case["I"] * 2,
    flops=lambda case: 10 * case["T"] * case["I"],
    compile_cases=_gelu_compile_cases,
    peers={"torch": lambda **inputs: gelu(**inputs, backend="torch")},
    tuning=_gelu_tuning,
)

SPEC = KernelSpec(
    op="swiglu",
    run=swiglu,
    reference=swiglu_reference,
    make_inputs=_make_swiglu_inputs,
    test_cases=({"T": 1, "I": 1}, {"T": 3, "I": 127}, {"T": 0, "I": 5}, {"T": 5, "I": 1025}),
    bench_cases=(
        {"model": "Llama-8B", "T": 8192, "I": 14336, "priority": 2, "check_at": {"T": 1111}},
        {"model": "Llama-8B", "T": 8192, "I": 14336, "pass": "backward", "check_at": {"T": 1111}},
        {"model": "SmolLM2", "T": 32768, "I": 1536, "check_at": {"T": 1111}},
        {"model": "SmolLM2", "T": 32768, "I": 1536, "pass": "backward", "check_at": {"T": 1111}},
    ),
    bytes=lambda case: (5 if case.get("pass") == "backward" else 3) * case["T"] * case["I"] * 2,
    flops=lambda case: 8 * case["T"] * case["I"],
    compile_cases=_swiglu_compile_cases,
    peers={"torch": lambda **inputs: swiglu(**inputs, backend="torch")},
    tuning=_swiglu_tuning,
)
