"""Output projection and cross-entropy in one op, in chunks of rows, so that no [N, V] logits of all rows exist.

With logits z = logit_scale · h Wᵀ and lse = log Σ exp z, summed over the counted rows:

    loss = Σ_n w_n · (lse_n − z_n[t_n] + z_loss · lse_n²)
    dh_n = w_n · logit_scale · (softmax(z_n) · (1 + 2 z_loss lse_n) − onehot(t_n)) W

The gradient is made in the forward pass, chunk by chunk, from the logits that lie there anyway: a backward pass of its
own would have to multiply by W once more. Ignored rows are left out before the first GEMM.
Shapes: hidden [N, C], weight [V, C], targets i64 [N], weights f32 [N]. Deviation from torch's cross_entropy: the sum,
never the mean, and always fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from .dispatch import bad_argument, choose_backend, tl, triton
from .spec import Case, CompileCase, KernelSpec
from .tuning import tuned_config

OP = "linear_cross_entropy"
CPU_CHUNK_ROWS = 256  # the GEMMs reach their rate
CPU_BLOCK_ROWS = 64  # the fp32 copy of the logits stays in the cache


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition over whole logits; differentiable by autograd. fp64 in, fp64 out; else fp32."""
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counted = targets != ignore_index
    logits = (hidden @ weight.t()).to(compute) * logit_scale
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, torch.where(counted, targets, 0)[:, None]).squeeze(1)
    loss = lse - picked + z_loss * lse.square()
    if weights is not None:
        loss = loss * weights.to(compute)
    return torch.where(counted, loss, torch.zeros_like(loss)).sum()


def _chunk_torch(logits, targets, logit_scale, z_loss, buffer, want_grad):
    """Logits [n, V] of one chunk → losses f32 [n]; in place, the logits' gradient in units of w·logit_scale."""
    rows = torch.arange(CPU_BLOCK_ROWS, device=logits.device)
    losses = torch.empty(logits.shape[0], dtype=buffer.dtype, device=logits.device)
    for start in range(0, logits.shape[0], CPU_BLOCK_ROWS):
        block = logits[start : start + CPU_BLOCK_ROWS]
        target = targets[start : start + CPU_BLOCK_ROWS]
        row, p = rows[: block.shape[0]], buffer[: block.shape[0]]
        if logit_scale == 1.0:
            largest, picked = block.amax(dim=-1).to(p.dtype), block[row, target].to(p.dtype)
            torch.softmax(block, dim=-1, dtype=p.dtype, out=p)
        else:
            p.copy_(block).mul_(logit_scale)
            largest, picked = p.amax(dim=-1), p[row, target]
            torch.softmax(p, dim=-1, out=p)
        # the largest probability is 1 / Σ exp(z − max), so it gives lse exactly and never underflows
        lse = largest - p.amax(dim=-1).log()
        losses[start : start + block.shape[0]] = lse - picked + z_loss * lse.square()
        if want_grad:
            if z_loss:
                p.mul_((1.0 + 2.0 * z_loss * lse)[:, None])
            p[row, target] -= 1.0
            block.copy_(p)
    return losses


@triton.jit
def _loss_kernel(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    losses_ptr,
    V,
    stride,
    logit_scale,
    z_loss,
    HAS_WEIGHTS: tl.constexpr,
    WANT_GRADIENT: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: its loss, and in place of its logits their gradient."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * stride
    target = tl.load(targets_ptr + row)
    valid = (target >= 0) & (target < V)
    picked = tl.load(base + target, mask=valid, other=float("nan")).to(tl.float32) * logit_scale
    column = tl.arange(0, BLOCK)
    if WHOLE_ROW:
        kept = tl.load(base + column, mask=column < V, other=-float("inf"))
        z = kept.to(tl.float32) * logit_scale
        largest = tl.max(z, axis=0)
        total = tl.sum(tl.exp(z - largest), axis=0)
    else:
        largest = -float("inf")
        total = 0.0
        # from the end: what the GEMM wrote last is still in the cache, and what is read last serves the second pass
        num_blocks = tl.cdiv(V, BLOCK)
        for block in tl.range(0, num_blocks):
            at = (num_blocks - 1 - block) * BLOCK + column
            z = tl.load(base + at, mask=at < V, other=-float("inf")).to(tl.float32) * logit_scale
            larger = tl.maximum(largest, tl.max(z, axis=0))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger), axis=0)
            largest = larger
    lse = largest + tl.log(total)
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row).to(tl.float32)
    tl.store(losses_ptr + row, weight * (lse - picked + z_loss * lse * lse))
    if WANT_GRADIENT:
        factor = weight * logit_scale
        slope = factor * (1.0 + 2.0 * z_loss * lse)
        if WHOLE_ROW:
            gradient = tl.exp(kept.to(tl.float32) * logit_scale - lse) * slope
            gradient -= tl.where(column == target, factor, 0.0)
            tl.store(base + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < V)
        else:
            for first in tl.range(0, V, BLOCK):
                at = first + column
                z = tl.load(base + at, mask=at < V, other=0.0).to(tl.float32) * logit_scale
                gradient = tl.exp(z - lse) * slope - tl.where(at == target, factor, 0.0)
                tl.store(base + at, gradient.to(logits_ptr.dtype.element_ty), mask=at < V)


TRITON_DEFAULT = {"ROWS": 1024, "BLOCK": 8192, "warps": 16}


def _chunk_triton(logits, targets, weights, logit_scale, z_loss, losses, want_gradient, config) -> None:
    """As ``_chunk_torch``, but the gradient comes multiplied by w·logit_scale, and so do the losses by w."""
    _loss_kernel[(logits.shape[0],)](
        logits,
        targets,
        weights,
        losses,
        logits.shape[1],
        logits.stride(0),
        logit_scale,
        z_loss,
        HAS_WEIGHTS=weights is not None,
        WANT_GRADIENT=want_gradient,
        WHOLE_ROW=config["BLOCK"] >= logits.shape[1],
        BLOCK=config["BLOCK"],
        num_warps=config["warps"],
    )


def _run_torch(hidden, weight, targets, weights, logit_scale, z_loss, grad_hidden, grad_weight) -> torch.Tensor:
    """Losses summed over all rows given; gradients written where a buffer is given."""
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=compute, device=hidden.device)
    num_rows = hidden.shape[0]
    chunk = min(CPU_CHUNK_ROWS, max(num_rows, 1))
    logits_buffer = torch.empty(chunk, weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    wide_buffer = torch.empty(min(chunk, CPU_BLOCK_ROWS), weight.shape[0], dtype=compute, device=hidden.device)
    want_gradient = grad_hidden is not None or grad_weight is not None
    for start in range(0, num_rows, chunk):
        rows = slice(start, min(start + chunk, num_rows))
        part = hidden[rows]
        logits = torch.mm(part, weight.t(), out=logits_buffer[: part.shape[0]])
        losses = _chunk_torch(logits, targets[rows], logit_scale, z_loss, wide_buffer, want_gradient)
        factor: torch.Tensor | float = logit_scale
        if weights is not None:
            losses = losses * weights[rows]
            factor = (weights[rows] * logit_scale)[:, None]
        total += losses.sum()
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden[rows])
            if weights is not None or logit_scale != 1.0:
                grad_hidden[rows] *= factor
        if grad_weight is not None:
            grad_weight += torch.mm(logits.t(), (part * factor).to(part.dtype))
    return total


def _run_triton(hidden, weight, targets, weights, logit_scale, z_loss, grad_hidden, grad_weight) -> torch.Tensor:
    num_rows = hidden.shape[0]
    config = tuned_config(OP, f"vocabulary {triton.next_power_of_2(weight.shape[0])}", TRITON_DEFAULT)
    # equal chunks: a short last one would leave the GEMMs half empty
    num_chunks = max(1, triton.cdiv(num_rows, config["ROWS"]))
    chunk = triton.cdiv(triton.cdiv(max(num_rows, 1), num_chunks), 128) * 128
    losses = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    buffer = torch.empty(min(chunk, num_rows), weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    want_gradient = grad_hidden is not None or grad_weight is not None
    for start in range(0, num_rows, chunk):
        rows = slice(start, min(start + chunk, num_rows))
        part = hidden[rows]
        logits = torch.mm(part, weight.t(), out=buffer[: part.shape[0]])
        row_weights = None if weights is None else weights[rows]
        _chunk_triton(logits, targets[rows], row_weights, logit_scale, z_loss, losses[rows], want_gradient, config)
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            grad_weight += torch.mm(logits.t(), part)
    return losses.sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, targets, weights, logit_scale, z_loss, ignore_index, backend):  # type: ignore[override]
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        rows = (targets != ignore_index).nonzero().squeeze(1)
        all_counted = rows.shape[0] == hidden.shape[0]
        compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        if weights is not None:
            weights = weights.to(compute)
        inputs, labels, row_weights = hidden.contiguous(), targets, weights
        if not all_counted:
            inputs, labels = hidden.index_select(0, rows), targets.index_select(0, rows)
            row_weights = None if weights is None else weights.index_select(0, rows)
        grad_rows = torch.empty_like(inputs) if want_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=compute, device=weight.device) if want_weight else None
        run = _run_triton if backend == "triton" else _run_torch
        total = run(inputs, weight, labels, row_weights, logit_scale, z_loss, grad_rows, grad_weight)
        grad_hidden = grad_rows
        if grad_rows is not None and not all_counted:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, rows, grad_rows)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _validate(hidden, weight, targets, weights, logit_scale, z_loss) -> None:
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise bad_argument(OP, "hidden", f"{hidden.dtype} {tuple(hidden.shape)}", "a floating-point [N, C]")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise bad_argument(OP, "weight", tuple(weight.shape), f"[V, {hidden.shape[1]}], V above 0")
    if weight.dtype != hidden.dtype:
        raise bad_argument(OP, "weight", weight.dtype, f"hidden's {hidden.dtype}")
    if targets.shape != (hidden.shape[0],) or targets.dtype != torch.int64:
        raise bad_argument(OP, "targets", f"{targets.dtype} {tuple(targets.shape)}", f"int64 [{hidden.shape[0]}]")
    if weights is not None and (weights.shape != (hidden.shape[0],) or not weights.is_floating_point()):
        raise bad_argument(OP, "weights", f"{weights.dtype} {tuple(weights.shape)}", f"float32 [{hidden.shape[0]}]")
    for name, tensor in (("weight", weight), ("targets", targets), ("weights", weights)):
        if tensor is not None and tensor.device != hidden.device:
            raise bad_argument(OP, name, f"on {tensor.device}", f"hidden's device {hidden.device}")
    if not logit_scale > 0:
        raise bad_argument(OP, "logit_scale", logit_scale, "a number above 0")
    if not z_loss >= 0:
        raise bad_argument(OP, "z_loss", z_loss, "0 or more")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The summed loss, a scalar in fp32; differentiable in hidden, and in weight where it asks for a gradient.

    ``weights`` multiply each row's loss and carry no gradient. A target outside [0, V) that is not ``ignore_index``
    is an error on the CPU; on a GPU such a row gives NaN.
    """
    _validate(hidden, weight, targets, weights, logit_scale, z_loss)
    name = choose_backend(OP, hidden, backend, ("torch", "triton"))
    if name == "triton" and hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise bad_argument(OP, "hidden", hidden.dtype, "float32, bfloat16 or float16 with backend 'triton'")
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, logit_scale, z_loss, ignore_index, name)


def _make_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    num_rows, channels, vocabulary = case["N"], case["C"], case["V"]
    wants_grad = case.get("pass", "forward") != "forward"
    targets = torch.randint(0, vocabulary, (num_rows,), generator=generator)
    if case.get("ignored"):
        targets[torch.rand(num_rows, generator=generator) < case["ignored"]] = -100
    inputs: dict[str, Any] = {
        "hidden": torch.randn(num_rows, channels, generator=generator).to(device, dtype).requires_grad_(wants_grad),
        "weight": torch.randn(vocabulary, channels, generator=generator).mul_(3 * channels**-0.5).to(device, dtype),
        "targets": targets.to(device),
        "logit_scale": case.get("logit_scale", 1.0),
        "z_loss": case.get("z_loss", 0.0),
    }
    if case.get("train_weight"):
        inputs["weight"].requires_grad_()
    if case.get("weights"):
        inputs["weights"] = torch.rand(num_rows, generator=generator).to(device)
    return inputs


class _GemmsAlone(torch.autograd.Function):
    """The two GEMMs in chunks and nothing else: what the loss cannot do without."""

    @staticmethod
    def forward(ctx: Any, hidden, weight):  # type: ignore[override]
        gradient = torch.empty_like(hidden)
        step = TRITON_DEFAULT["ROWS"]
        for start in range(0, hidden.shape[0], step):
            logits = torch.mm(hidden[start : start + step], weight.t())
            if ctx.needs_input_grad[0]:
                torch.mm(logits, weight, out=gradient[start : start + step])
        ctx.save_for_backward(gradient)
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        return ctx.saved_tensors[0], None


def _unfused(hidden, weight, targets, logit_scale=1.0, z_loss=0.0, weights=None) -> torch.Tensor:
    logits = (hidden @ weight.t()).float() * logit_scale
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def _bytes(case: Case) -> int:
    gemms = 1 if case.get("pass", "forward") == "forward" else 2
    chunks = -(-case["N"] // TRITON_DEFAULT["ROWS"])
    return 2 * gemms * (case["N"] * (case["C"] + case["V"]) + chunks * case["V"] * case["C"])


def _flops(case: Case) -> int:
    return 2 * case["N"] * case["V"] * case["C"] * (1 if case.get("pass", "forward") == "forward" else 2)


def _compile_cases(target: int) -> list[CompileCase]:
    config = TRITON_DEFAULT
    return [
        CompileCase(
            f"loss, gradient {want}",
            _loss_kernel,
            {
                "logits_ptr": "*bf16",
                "targets_ptr": "*i64",
                "weights_ptr": "*fp32",
                "losses_ptr": "*fp32",
                "V": "i32",
                "stride": "i32",
                "logit_scale": "fp32",
                "z_loss": "fp32",
            },
            {"HAS_WEIGHTS": True, "WANT_GRADIENT": want, "WHOLE_ROW": False, "BLOCK": config["BLOCK"]},
            num_warps=config["warps"],
            attrs={"V": 16, "stride": 16},
        )
        for want in (True, False)
    ]


def _tuning(case: Case) -> tuple[str, list[dict[str, Any]]]:
    return f"vocabulary {triton.next_power_of_2(case['V'])}", [
        {"ROWS": rows, "BLOCK": block, "warps": warps}
        for rows in (1024, 2048)
        for block, warps in ((2048, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16))
    ]


SPEC = KernelSpec(
    op="linear_cross_entropy",
    run=linear_cross_entropy,
    reference=linear_cross_entropy_reference,
    make_inputs=_make_inputs,
    test_cases=(
        {"N": 1, "C": 1, "V": 1, "pass": "both"},
        {"N": 33, "C": 17, "V": 257, "pass": "both"},
        {"N": 130, "C": 16, "V": 1031, "pass": "both", "ignored": 0.4, "weights": True},
        {"N": 64, "C": 24, "V": 129, "pass": "both", "ignored": 0.2, "z_loss": 0.01, "logit_scale": 0.5},
        {"N": 40, "C": 32, "V": 100, "pass": "both", "train_weight": True, "weights": True, "logit_scale": 2.0},
        {"N": 10, "C": 8, "V": 50, "ignored": 1.0, "pass": "both"},
        {"N": 0, "C": 8, "V": 50, "pass": "both"},
        {"N": 20, "C": 8, "V": 4099},
    ),
    bench_cases=tuple(
        {"model": m, "N": n, "C": c, "V": v, "pass": "both", "priority": p, "check_at": {"N": 256}}
        for m, n, c, v, p in (
            ("MPT-7B", 8192, 4096, 50432, 1),
            ("MPT-30B", 8192, 7168, 50432, 5),
            ("Llama-8B", 8192, 4096, 128256, 5),
            ("SmolLM2-135M", 8192, 576, 49152, 5),
        )
    ),
    bytes=_bytes,
    flops=_flops,
    compile_cases=_compile_cases,
    peers={
        "unfused": _unfused,
        "floor: GEMMs": lambda hidden, weight, **_: _GemmsAlone.apply(hidden, weight),
    },
    row_invariant=False,
    tuning=_tuning,
)
