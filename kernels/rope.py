"""Rotary position embedding, half-rotation (NeoX) layout: with ``x = [a, b]`` split in the middle of the last
dimension, ``y = [a·cos - b·sin, b·cos + a·sin]``, cos and sin being row ``positions[t]`` of their tables.

x [T, H, D], cos and sin [M, D/2] in fp32, positions [T]. Computed in fp32 and rounded once. Rows of the kernel are
heads; floor 2·T·H·D elements (the tables' rows are shared by H heads and stay in L1). The backward pass is the
rotation by the opposite angle: the same kernel with sin negated. Source: Su et al., "RoFormer" (2021), in the layout
of GPT-NeoX.
"""

from __future__ import annotations

from typing import Any

import torch

from . import cpu_rows
from .dispatch import bad_argument, choose_backend, tl, triton
from .rows import check_triton_operands, needs_grad
from .spec import Case, CompileCase, KernelSpec
from .tuning import tuned_config


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Same arguments and result as ``rope``; computes in fp32, or in fp64 for fp64 inputs."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    c = cos[positions].to(accumulate).unsqueeze(1)
    s = sin[positions].to(accumulate).unsqueeze(1)
    a, b = x.to(accumulate).chunk(2, dim=-1)
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)


@triton.jit
def rope_kernel(
    x,
    cos,
    sin,
    positions,
    y,
    num_rows,
    num_heads,
    num_positions,
    x_token_stride,
    x_head_stride,
    cos_stride,
    sin_stride,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    tokens = rows // num_heads
    position = tl.load(positions + tokens, mask=rows < num_rows, other=0)
    mask = (rows < num_rows)[:, None] & (columns < HALF)
    # A position outside the tables yields zeros rather than a stray read.
    known = mask & ((position >= 0) & (position < num_positions))[:, None]
    c = tl.load(cos + position[:, None] * cos_stride + columns, mask=known, other=0.0)
    s = tl.load(sin + position[:, None] * sin_stride + columns, mask=known, other=0.0)
    if INVERSE:
        s = -s
    source = (tokens * x_token_stride + (rows % num_heads) * x_head_stride)[:, None] + columns
    a = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + source + HALF, mask=mask, other=0.0).to(tl.float32)
    target = y + rows[:, None] * (2 * HALF) + columns
    tl.store(target, (a * c - b * s).to(y.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (b * c + a * s).to(y.dtype.element_ty), mask=mask)


def _config(block: int) -> dict[str, int]:
    return {"rows": max(1, min(64, 1024 // block)), "num_warps": 4}


def _launch(x, cos, sin, positions, inverse):
    if x.stride(-1) != 1:
        x = x.contiguous()
    num_tokens, num_heads, head_dim = x.shape
    y = torch.empty((num_tokens, num_heads, head_dim), dtype=x.dtype, device=x.device)
    num_rows = num_tokens * num_heads
    if num_rows and head_dim:
        block = triton.next_power_of_2(head_dim // 2)
        config = tuned_config("rope", f"{2 * block}", _config(block))
        rope_kernel[(triton.cdiv(num_rows, config["rows"]),)](
            x, cos, sin, positions, y, num_rows, num_heads, cos.shape[0],
            x.stride(0), x.stride(1), cos.stride(0), sin.stride(0),
            HALF=head_dim // 2, BLOCK=block, ROWS=config["rows"], INVERSE=inverse, num_warps=config["num_warps"],
        )  # fmt: skip
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, cos, sin, positions):
        ctx.save_for_backward(cos, sin, positions)
        return _launch(x, cos, sin, positions, inverse=False)

    @staticmethod
    def backward(ctx: Any, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _launch(dy, *ctx.saved_tensors, inverse=True), None, None, None


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Rotates each head of ``x`` [T, H, D] by its position; cos, sin [M, D/2], positions i64 [T] in [0, M).

    Differentiable in x. Raises ValueError where shapes, dtypes or devices do not fit.
    """
    if x.dim() != 3 or x.shape[-1] % 2:
        raise bad_argument("rope", "x", f"of shape {tuple(x.shape)}", "[T, H, D] with D even")
    if cos.dim() != 2 or cos.shape[1] * 2 != x.shape[-1] or sin.shape != cos.shape:
        given = f"of shapes {tuple(cos.shape)} and {tuple(sin.shape)}"
        raise bad_argument("rope", "cos, sin", given, f"both [M, {x.shape[-1] // 2}]")
    if positions.shape != x.shape[:1]:
        raise bad_argument("rope", "positions", f"of shape {tuple(positions.shape)}", f"[{x.shape[0]}]")
    chosen = choose_backend("rope", x, backend, ("torch", "triton", "cpp"), cpu_rows.default_backend(x))
    if chosen == "torch":
        return rope_reference(x, cos, sin, positions)
    if chosen == "cpp":
        return cpu_rows.rope(x, cos, sin, positions)
    check_triton_operands("rope", x, cos=cos, sin=sin, positions=positions)
    if cos.stride(-1) != 1 or sin.stride(-1) != 1:
        raise bad_argument("rope", "cos, sin", f"with strides {cos.stride()} and {sin.stride()}", "rows of stride 1")
    if needs_grad(x):
        return _Rope.apply(x, cos, sin, positions)
    return _launch(x, cos, sin, positions, inverse=False)


def _make_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(seed)
    length = case.get("M", 8192)
    angles = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(case["D"] // 2) / (case["D"] // 2))
    x = torch.randn(case["T"], case["H"], case["D"], generator=generator, device=device).to(dtype)
    if case.get("pass") == "backward":
        x.requires_grad_()
    return {
        "x": x,
        "cos": angles.cos().to(device, torch.float32),
        "sin": angles.sin().to(device, torch.float32),
        "positions": torch.randint(0, length, (case["T"],), generator=generator, device=device),
    }


def _compile_cases(target: int) -> list[CompileCase]:
    cases = []
    for head_dim in (64, 112, 128):
        block = triton.next_power_of_2(head_dim // 2)
        config = tuned_config("rope", f"{2 * block}", _config(block))
        integers = (
            "num_rows",
            "num_heads",
            "num_positions",
            "x_token_stride",
            "x_head_stride",
            "cos_stride",
            "sin_stride",
        )
        cases.append(
            CompileCase(
                f"D={head_dim}",
                rope_kernel,
                {
                    "x": "*bf16",
                    "cos": "*fp32",
                    "sin": "*fp32",
                    "positions": "*i64",
                    "y": "*bf16",
                    **dict.fromkeys(integers, "i32"),
                },
                {"HALF": head_dim // 2, "BLOCK": block, "ROWS": config["rows"], "INVERSE": False},
                num_warps=config["num_warps"],
                attrs=dict.fromkeys(("x_token_stride", "x_head_stride"), 16),
            )
        )
    return cases


def _tuning(case: Case) -> tuple[str, list[dict[str, int]]]:
    block = triton.next_power_of_2(case["D"] // 2)
    return f"{2 * block}", [
        {"rows": size // block, "num_warps": w}
        for size in (512, 1024, 2048, 4096)
        for w in (2, 4, 8)
        if 4 <= size // (32 * w) <= 32
    ]


SPEC = KernelSpec(
    op="rope",
    run=rope,
    reference=rope_reference,
    make_inputs=_make_inputs,
    test_cases=(
        {"T": 1, "H": 1, "D": 2, "M": 1},
        {"T": 5, "H": 3, "D": 64, "M": 17},
        {"T": 0, "H": 3, "D": 64, "M": 17},
        {"T": 31, "H": 2, "D": 112, "M": 64},
    ),
    bench_cases=(
        {"model": "Llama-8B", "T": 8192, "H": 32, "D": 128, "priority": 2, "check_at": {"T": 1111}},
        {"model": "Llama-8B", "T": 8192, "H": 32, "D": 128, "pass": "backward", "check_at": {"T": 1111}},
        {"model": "SmolLM2", "T": 32768, "H": 9, "D": 64, "check_at": {"T": 1111}},
    ),
    bytes=lambda case: case["T"] * (case["H"] * case["D"] * 2 * 2 + case["D"] * 4 + 8),
    flops=lambda case: 3 * case["T"] * case["H"] * case["D"],
    compile_cases=_compile_cases,
    peers={"torch": lambda **inputs: rope(**inputs, backend="torch")},
    tuning=_tuning,
)
