"""One adapter over a frozen weight: y = x Wᵀ + bias + s·(x Aᵀ) Bᵀ, forward and backward.

Backward (W and bias are frozen, so nothing for them), with h = x Aᵀ and g = dy B:

    dx = dy W + s·g A        dA = s·gᵀ x        dB = s·dyᵀ h

Shapes: x [T, in], W [out, in] dense or quantised, bias [out], a [R, in], b [out, R], y [T, out]. The sums run in x's
dtype with fp32 accumulation; a and b may be kept in fp32, and their gradients come back in their own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import linear

from .dispatch import bad_argument, choose_backend, triton
from .lora_gemm import (
    GRADIENT_DEFAULT,
    SHRINK_DEFAULT,
    capability,
    compile_cases,
    fits,
    gemm_add,
    gemm_default,
    gradient,
    gradient_and_shrink,
    shrink,
)
from .lora_grouped import lora_grouped_add_ as lora_grouped_add_
from .quantized_linear import QUANTIZERS, QuantizedWeight, dequantize
from .spec import Case, KernelSpec
from .tuning import tuned_config

OP = "lora_linear"
MAX_RANK = 256
# Multiplications of the frozen GEMM from which the fused kernels pay for their launches; below, the library's do.
CROSSOVER = {"products": 1 << 36}


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The definition in x's dtype, differentiable by autograd."""
    dense = dequantize(weight, x.dtype, backend="torch").detach()
    return linear(x, dense, bias) + linear(linear(x, a.to(x.dtype)), b.to(x.dtype)) * scaling


class _LoraLinearTorch(torch.autograd.Function):
    """Plain GEMMs: the frozen one and the small ones beside it."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, scaling: float) -> torch.Tensor:  # type: ignore[override]
        a_, b_ = a.to(x.dtype), b.to(x.dtype)
        y = linear(x, dequantize(weight, x.dtype), bias)
        hidden = linear(x, a_)
        y.addmm_(hidden, b_.t(), alpha=scaling)
        ctx.save_for_backward(x, hidden, a_, b_, weight if isinstance(weight, torch.Tensor) else None)
        ctx.weight = None if isinstance(weight, torch.Tensor) else weight
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):  # type: ignore[override]
        x, hidden, a_, b_, weight = ctx.saved_tensors
        need_x, _, _, need_a, need_b, _ = ctx.needs_input_grad
        dx = da = db = None
        g = torch.mm(dy, b_).mul_(ctx.scaling)
        if need_x:
            dense = weight if weight is not None else dequantize(ctx.weight, x.dtype)
            dx = torch.mm(dy, dense).addmm_(g, a_)
        if need_a:
            da = torch.mm(g.t(), x).to(ctx.dtypes[0])
        if need_b:
            # scaled in the parameter's dtype: [out, R] is small, and fp32 loses nothing
            # as (hᵀ dy)ᵀ: the CPU's library takes a third less where dy, the wide one, is not the transposed operand
            db = torch.mm(hidden.t().contiguous(), dy).t().to(ctx.dtypes[1]).mul_(ctx.scaling)
        return dx, None, None, da, db, None


def _padded(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """a [R, in] and b [out, R] in ``dtype`` with R padded to what the matrix unit takes."""
    rank = max(16, triton.next_power_of_2(a.shape[0]))
    if rank == a.shape[0]:
        return a.to(dtype).contiguous(), b.to(dtype).contiguous()
    padding = rank - a.shape[0]
    return torch.nn.functional.pad(a.to(dtype), (0, 0, 0, padding)), torch.nn.functional.pad(b.to(dtype), (0, padding))


def _tiles(which: str, x: torch.Tensor) -> Mapping[str, Any]:
    """The GEMM's tiles; fp32 takes twice the shared memory and has its own."""
    bucket = f"{which} fp32" if x.dtype == torch.float32 else which
    return tuned_config(OP, bucket, gemm_default(capability(x), x.dtype))


class _LoraLinearTriton(torch.autograd.Function):
    """The update is one more step of the frozen GEMM's own loop; only h and g, [T, R], pass through memory."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, scaling: float) -> torch.Tensor:  # type: ignore[override]
        a_, b_ = _padded(a, b, x.dtype)
        dense = dequantize(weight, x.dtype, backend="triton")
        h = shrink(x, a_, scaling, config=tuned_config(OP, "shrink", SHRINK_DEFAULT))
        y = gemm_add(x, dense, h, b_, bias, rows_are_k=False, config=_tiles("forward", x))
        ctx.save_for_backward(x, h, a_, b_, weight if isinstance(weight, torch.Tensor) else None)
        ctx.weight = None if isinstance(weight, torch.Tensor) else weight
        ctx.scaling, ctx.rank, ctx.dtypes = scaling, a.shape[0], (a.dtype, b.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor):  # type: ignore[override]
        x, h, a_, b_, weight = ctx.saved_tensors
        need_x, _, _, need_a, need_b, _ = ctx.needs_input_grad
        dx = da = db = None
        if not fits(dy):
            dy = dy.contiguous()
        config = tuned_config(OP, "gradient", GRADIENT_DEFAULT)
        if need_b:
            db, g = gradient_and_shrink(dy, h, b_.t(), ctx.scaling, dtype=ctx.dtypes[1], config=config)
            db = db[:, : ctx.rank]
        else:
            g = shrink(dy, b_.t(), ctx.scaling, config=tuned_config(OP, "shrink", SHRINK_DEFAULT))
        if need_a:
            da = gradient(x, g, transposed=True, dtype=ctx.dtypes[0], config=config)[: ctx.rank]
        if need_x:
            dense = weight if weight is not None else dequantize(ctx.weight, x.dtype, backend="triton")
            config = _tiles("backward", x)
            dx = gemm_add(dy, dense, g, a_, None, rows_are_k=True, config=config)
        return dx, None, None, da, db, None


def _validate(x, weight, bias, a, b, scaling) -> None:
    if x.ndim != 2 or x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise bad_argument(OP, "x", f"{x.dtype} {tuple(x.shape)}", "[T, in] in fp32, bf16 or fp16")
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[1]:
        raise bad_argument(OP, "weight", tuple(weight.shape), f"[out, {x.shape[1]}]")
    if isinstance(weight, torch.Tensor) and weight.dtype != x.dtype:
        raise bad_argument(OP, "weight", weight.dtype, f"x's {x.dtype}")
    if bias is not None and (bias.shape != (weight.shape[0],) or bias.dtype != x.dtype):
        raise bad_argument(OP, "bias", f"{bias.dtype} {tuple(bias.shape)}", f"{x.dtype} [{weight.shape[0]}]")
    if a.ndim != 2 or a.shape[1] != x.shape[1]:
        raise bad_argument(OP, "a", tuple(a.shape), f"[R, {x.shape[1]}]")
    if b.shape != (weight.shape[0], a.shape[0]):
        raise bad_argument(OP, "b", tuple(b.shape), f"[{weight.shape[0]}, {a.shape[0]}]")
    for name, tensor in (("a", a), ("b", b)):
        if not tensor.is_floating_point():
            raise bad_argument(OP, name, tensor.dtype, "a floating dtype")
    for name, device in (("weight", weight.device), ("a", a.device), ("b", b.device)):
        if device != x.device:
            raise bad_argument(OP, name, f"on {device}", f"x's device {x.device}")
    if not isinstance(scaling, (int, float)):
        raise bad_argument(OP, "scaling", type(scaling).__name__, "a number")


def _fused(x: torch.Tensor, weight: torch.Tensor | QuantizedWeight, a: torch.Tensor) -> bool:
    """Whether the fused kernels take these shapes; else the library's GEMMs do the same sums one by one."""
    num_products = x.shape[0] * x.shape[1] * weight.shape[0]
    if x.shape[0] == 0 or a.shape[0] == 0 or a.shape[0] > MAX_RANK:
        return False
    if x.is_cuda and num_products < tuned_config(OP, "crossover", CROSSOVER)["products"]:
        return False
    aligned = weight.shape[0] * x.element_size() % 16 == 0 and x.shape[1] * x.element_size() % 16 == 0
    return aligned and fits(x) and (not isinstance(weight, torch.Tensor) or fits(weight))


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """x [T, in] → [T, out]; differentiable in x, a and b. Any stride of x is taken."""
    _validate(x, weight, bias, a, b, scaling)
    name = choose_backend(OP, x, backend, ("torch", "triton"))
    if name == "triton" and _fused(x, weight, a):
        return _LoraLinearTriton.apply(x, weight, bias, a, b, float(scaling))
    return _LoraLinearTorch.apply(x, weight, bias, a, b, float(scaling))


def _make_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    num_in, num_out, rank = case["in"], case["out"], case["R"]
    wants_grad = case.get("pass", "forward") != "forward"

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(scale).to(device)

    weight: Any = normal(num_out, num_in, scale=num_in**-0.5)
    form = case.get("format", "dense")
    weight = weight.to(dtype) if form == "dense" else QUANTIZERS[form](weight)
    return {
        "x": normal(case["T"], num_in).to(dtype).requires_grad_(wants_grad),
        "weight": weight,
        "bias": normal(num_out).to(dtype) if case.get("bias") else None,
        "a": normal(rank, num_in, scale=num_in**-0.5).requires_grad_(wants_grad),
        "b": normal(num_out, rank, scale=rank**-0.5).requires_grad_(wants_grad),
        "scaling": 0.5,
    }


def _flops(case: Case) -> int:
    frozen = 2 * case["T"] * case["in"] * case["out"]
    update = 2 * case["T"] * case["R"] * (case["in"] + case["out"])
    return {"forward": frozen + update, "backward": frozen + 2 * update, "both": 2 * frozen + 3 * update}[
        case.get("pass", "forward")
    ]


def _bytes(case: Case) -> int:
    size = 4 if case.get("dtype") == "fp32" else 2
    x, y, w = case["T"] * case["in"], case["T"] * case["out"], case["in"] * case["out"]
    forward, backward = x + y + w, 2 * x + y + w
    return size * {"forward": forward, "backward": backward, "both": forward + backward}[case.get("pass", "forward")]


def _frozen_gemms(x, weight, bias, a, b, scaling) -> torch.Tensor:
    return linear(x, dequantize(weight, x.dtype), bias)


SPEC = KernelSpec(
    op="lora_linear",
    run=lora_linear,
    reference=lora_linear_reference,
    make_inputs=_make_inputs,
    test_cases=(
        {"T": 1, "in": 16, "out": 16, "R": 1, "pass": "both"},
        {"T": 37, "in": 80, "out": 136, "R": 5, "bias": True, "pass": "both"},
        {"T": 129, "in": 72, "out": 264, "R": 16, "pass": "both"},
        {"T": 31, "in": 17, "out": 29, "R": 3, "bias": True, "pass": "both"},
        {"T": 65, "in": 64, "out": 40, "R": 65, "pass": "both"},
        {"T": 0, "in": 32, "out": 32, "R": 8, "pass": "both"},
        {"T": 40, "in": 128, "out": 72, "R": 8, "format": "nf4", "pass": "both"},
        {"T": 40, "in": 128, "out": 72, "R": 8, "format": "int8", "pass": "both"},
        {"T": 40, "in": 128, "out": 72, "R": 8, "format": "fp8", "pass": "both"},
    ),
    bench_cases=(
        {"model": "MPT-7B", "T": 8192, "in": 4096, "out": 4096, "R": 16, "pass": "both", "priority": 1},
        {"model": "MPT-7B", "T": 8192, "in": 4096, "out": 4096, "R": 16},
        {"model": "MPT-7B", "T": 8192, "in": 4096, "out": 16384, "R": 16, "pass": "both"},
        {"model": "MPT-7B", "T": 8192, "in": 16384, "out": 4096, "R": 16, "pass": "both"},
        {"model": "MPT-30B", "T": 8192, "in": 7168, "out": 7168, "R": 16, "pass": "both"},
        {"model": "MPT-30B NF4", "T": 8192, "in": 7168, "out": 7168, "R": 16, "pass": "both", "format": "nf4"},
        {"model": "Llama-8B", "T": 8192, "in": 4096, "out": 14336, "R": 16, "pass": "both"},
        {"model": "SmolLM2-135M", "T": 8192, "in": 576, "out": 1536, "R": 8, "pass": "both"},
    ),
    bytes=_bytes,
    flops=_flops,
    compile_cases=compile_cases,
    peers={
        "unfused": lora_linear_reference,
        "library": lambda **inputs: lora_linear(**inputs, backend="torch"),
        "floor: frozen GEMMs": _frozen_gemms,
    },
    row_invariant=False,
)
