"""The AMX twin of frozen linear layers against fp64, and rows that do not depend on their neighbours or on threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from specialize.engine.linear import Linear
from specialize.kernels import cpu_linear

pytestmark = pytest.mark.skipif(not cpu_linear.available(), reason="needs a CPU with AMX and a C++ compiler")

SHAPES = [
    (1, 1, 1),
    (32, 64, 96),
    (16, 32, 32),
    (33, 70, 50),
    (47, 130, 577),
    (64, 576, 576),
    (7, 3072, 576),
    (128, 96, 31),
]


def operands(rows, num_out, num_in, bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_out, num_in, generator=generator).bfloat16()
    offset = torch.randn(num_out, generator=generator).bfloat16() if bias else None
    return torch.randn(rows, num_in, generator=generator).bfloat16(), weight, offset


def worst_row(got, truth):
    error = (got.double() - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(1e-30)
    return error.max().item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_equals_torch(shape, bias):
    x, weight, offset = operands(*shape, bias)
    truth = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    reference = worst_row(F.linear(x, weight, offset), truth)
    got = cpu_linear.PackedLinear(weight, offset)(x)
    assert worst_row(got, truth) <= 2 * reference + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(32, 64, 96), (33, 70, 50), (5, 3072, 576), (1, 2, 1), (17, 34, 64)])
def test_gated_product_equals_torch(shape, bias):
    x, weight, offset = operands(*shape, bias)
    x = x * 3  # gates far out, where an exponential could overflow
    gate, up = F.linear(x, weight, offset).chunk(2, dim=1)
    expected = (F.silu(gate.float()) * up.float()).bfloat16()
    got = cpu_linear.PackedLinear(weight, offset, gated=True)(x)
    assert got.isfinite().all()
    assert worst_row(got, expected.double()) < 4 * torch.finfo(torch.bfloat16).eps


def test_extreme_gates_stay_finite():
    weight = torch.tensor([[1.0], [1.0]]).bfloat16()
    x = torch.tensor([[-1e30], [-200.0], [0.0], [200.0], [1e15]]).bfloat16()
    got = cpu_linear.PackedLinear(weight, None, gated=True)(x).float().flatten()
    expected = (F.silu(x.float()) * x.float()).bfloat16().float().flatten()
    torch.testing.assert_close(got[1:], expected[1:], rtol=0.01, atol=1e-30)
    assert got[0].abs() < 1e-3 or got[0].isfinite()


def test_rows_depend_on_themselves_alone():
    x, weight, _ = operands(61, 200, 100, False)
    packed = cpu_linear.PackedLinear(weight, None)
    together = packed(x)
    for row in (0, 15, 16, 31, 32, 60):
        assert torch.equal(packed(x[row : row + 1])[0], together[row])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(packed(x), together)
    finally:
        torch.set_num_threads(threads)


def test_strided_operands():
    x, weight, _ = operands(32, 64, 64, False)
    wide, deep = torch.cat([x, x], 1), torch.cat([weight, weight], 1)
    expected = cpu_linear.PackedLinear(weight, None)(x)
    assert torch.equal(cpu_linear.PackedLinear(deep[:, 64:], None)(wide[:, 64:]), expected)
    assert torch.equal(cpu_linear.PackedLinear(weight.T.contiguous().T, None)(x.T.contiguous().T), expected)


def test_wrong_operands_are_named():
    x, weight, _ = operands(4, 64, 64, False)
    with pytest.raises(ValueError, match="packed_linear: weight is"):
        cpu_linear.PackedLinear(weight.float(), None)
    with pytest.raises(ValueError, match=r"packed_linear: x is .* allowed: bf16 \[T, 64\]"):
        cpu_linear.PackedLinear(weight, None)(x[:, :32])


@torch.no_grad()
def test_layers_use_it_for_rows_beyond_whole_blocks():
    x, weight, _ = operands(600, 64, 96, False)
    layer = Linear(weight, prepack=True)
    plain = F.linear(x, weight)
    assert torch.equal(layer(x[:512]), plain[:512]) and layer._packed is None
    for num_rows in (5, 255, 257, 600):
        assert worst_row(layer(x[:num_rows]), plain[:num_rows].double()) < 0.02 and layer._packed is not None
    assert torch.equal(layer(x)[512:], layer(x[512:])), "the rest does not depend on the blocks before it"
    assert layer(x[:0]).shape == (0, 64) and layer.swiglu(x[:0]).shape == (0, 32)
    gated = layer.swiglu(x[:512])
    assert worst_row(layer.swiglu(x[:5]), gated[:5].double()) < 0.03
    assert worst_row(layer.swiglu(x)[:512], gated.double()) == 0.0
    assert torch.equal(layer.swiglu(x)[512:], layer.swiglu(x[512:]))
