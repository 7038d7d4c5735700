"""What layernorm.py and rmsnorm.py share: the check of their arguments, launch configurations, and the inputs, bytes
and tuning of their specifications.
"""

from __future__ import annotations

from typing import Any

import torch

from .dispatch import bad_argument, triton
from .spec import Case


def check_norm(
    op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> None:
    """Raises ValueError unless weight and bias are [C] for x [..., C] and the residual is as x."""
    if x.dim() < 2 or weight.dim() != 1 or x.shape[-1] != weight.shape[0]:
        given = f"of shape {tuple(weight.shape)}"
        raise bad_argument(op, "weight", given, f"[C] for x [..., C]; x is {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape:
        raise bad_argument(op, "bias", f"of shape {tuple(bias.shape)}", f"{tuple(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        given = f"{residual.dtype} of shape {tuple(residual.shape)}"
        raise bad_argument(op, "residual", given, f"as x: {x.dtype} {tuple(x.shape)}")


def forward_config(block: int) -> dict[str, int]:
    """Rows a program and warps for rows padded to ``block`` channels."""
    return {"rows": max(1, min(8, 2048 // block)), "num_warps": 4 if block <= 4096 else 8}


def backward_config(block: int, sums: bool) -> dict[str, int]:
    """``sums``: the weights' gradients are wanted, too, and their partial sums take registers."""
    if sums:
        return {"rows": 1, "num_warps": max(4, min(16, block // 512))}
    return {"rows": 1, "num_warps": 1} if block <= 1024 else {"rows": 2, "num_warps": min(16, block // 512)}


def make_norm_inputs(
    case: Case, device: str, dtype: torch.dtype, seed: int, *, takes_bias: bool = False
) -> dict[str, Any]:
    """x [T,C], or [T,N,C] where the case has heads, with a residual unless the case says otherwise."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case["T"], *((case["N"],) if "N" in case else ()), case["C"])

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    inputs: dict[str, Any] = {"x": normal(*shape).to(dtype), "weight": (1 + 0.1 * normal(case["C"])).to(dtype)}
    if takes_bias:
        inputs["bias"] = (0.1 * normal(case["C"])).to(dtype) if case.get("bias") else None
    inputs["eps"] = 1e-5
    if case.get("residual", True):
        inputs["residual"] = normal(*shape).to(dtype)
    if case.get("pass", "forward") != "forward":
        for name in ("x", "residual", *(("weight", "bias") if case.get("train_weight") else ())):
            if inputs.get(name) is not None:
                inputs[name].requires_grad_()
    return inputs


def norm_bytes(case: Case) -> int:
    """x and y, with a residual also it and the sum; backward dy, h, dx and the sum's gradient."""
    tensors = {"forward": 2 + 2 * case.get("residual", True), "backward": 3 + case.get("residual", True)}
    return tensors[case.get("pass", "forward")] * case["T"] * case.get("N", 1) * case["C"] * 2


def norm_tuning(case: Case) -> tuple[str, list[dict[str, int]]]:
    """Rows and warps that leave each thread 8 to 64 elements."""
    block = triton.next_power_of_2(case["C"])
    rows = [r for r in (1, 2, 4, 8, 16, 32) if r * block <= 16384]
    return f"{case.get('pass', 'forward')} {block}", [
        {"rows": r, "num_warps": w} for r in rows for w in (1, 2, 4, 8, 16) if 8 <= r * block // (32 * w) <= 64
    ]
