"""How a kernel is held against its reference: worst-row error, poisoned outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

FEW_NUMBERS = 16


def worst_row_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest ‖out - truth‖ / ‖truth‖ over rows (all but the last dimension); a NaN anywhere gives inf."""
    if out.shape != truth.shape:
        return float("inf")
    if out.numel() == 0:
        return 0.0
    out, truth = out.detach().double(), truth.detach().double()
    if out.dim() == 0:
        out, truth = out.reshape(1), truth.reshape(1)
    scale = truth.norm(dim=-1).clamp(min=1e-3 * float(truth.norm(dim=-1).max()) + 1e-30)
    worst = ((out - truth).norm(dim=-1) / scale).max()
    return float("inf") if worst.isnan() else float(worst)


def assert_as_good(ours: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, what: str = "") -> None:
    """Ours may err at most twice as much as the reference at the same dtype, plus that dtype's eps."""
    _assert_within(worst_row_error(ours, truth), worst_row_error(reference, truth), ours.dtype, what)


def _assert_within(error: float, references: float, dtype: torch.dtype, what: str) -> None:
    allowed = 2 * references + torch.finfo(dtype).eps
    assert error <= allowed, f"{what}: worst row's error {error:.2e}, allowed {allowed:.2e}"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, ``torch.empty`` is filled with NaN, so an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def widen(inputs: dict) -> dict:
    """A copy with every floating tensor in fp64, gradients wanted as before."""
    return {
        k: v.detach().double().requires_grad_(v.requires_grad) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }


def outputs_and_gradients(
    function, inputs: dict, seed: int = 0, dout_dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Outputs of ``function``, then the gradients of the leaves that want one, for fixed random output gradients.

    These are rounded to ``dout_dtype`` first: what is compared must be given the same.
    """
    inputs = {k: v.detach().requires_grad_(v.requires_grad) if torch.is_tensor(v) else v for k, v in inputs.items()}
    outputs = function(**inputs)
    outputs = [outputs] if torch.is_tensor(outputs) else list(outputs)
    leaves = [v for v in inputs.values() if torch.is_tensor(v) and v.requires_grad]
    if not leaves:
        return outputs
    generator = torch.Generator().manual_seed(seed)
    douts = [torch.randn(o.shape, generator=generator).to(dout_dtype or o.dtype).to(o.device, o.dtype) for o in outputs]
    return outputs + list(torch.autograd.grad(outputs, leaves, douts, allow_unused=True))


def prove(spec, case, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0) -> None:
    """Runs the Triton kernel of ``spec`` on poisoned memory and holds outputs and gradients against the fp64 truth.

    Where a result is a handful of numbers, one draw of inputs compares two roundings that fell as they fell: the
    worst errors over many draws are compared, ours with the reference's.
    """
    errors: dict[int, tuple[float, float]] = {}
    draws = 1
    done = 0
    while done < draws:
        inputs = spec.make_inputs(case, device, dtype, seed + done)
        with poisoned():
            ours = outputs_and_gradients(lambda **kw: spec.run(**kw, backend="triton"), inputs, dout_dtype=dtype)
        given = inputs | ({spec.saved: ours[0].detach()} if spec.saved else {})
        reference = outputs_and_gradients(spec.reference, given, dout_dtype=dtype)
        truth = outputs_and_gradients(spec.reference, widen(given), dout_dtype=dtype)
        for number, (a, b, c) in enumerate(zip(ours, reference, truth, strict=True)):
            assert a.dtype == b.dtype
            if 0 < a.numel() < FEW_NUMBERS:
                draws = FEW_NUMBERS
            worst = errors.get(number, (0.0, 0.0))
            errors[number] = max(worst[0], worst_row_error(a, c)), max(worst[1], worst_row_error(b, c))
        done += 1
    for number, (error, references) in errors.items():
        _assert_within(error, references, ours[number].dtype, f"{spec.op} {dict(case)} result {number}")
