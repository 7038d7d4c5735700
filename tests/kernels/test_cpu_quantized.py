"""The C++ twins of quantised linear layers: dequantised to the bit, products against fp64 and integers in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from specialize.engine.linear import Linear
from specialize.kernels import cpu, cpu_quantized
from specialize.kernels.channelwise import ChannelWeight
from specialize.kernels.quantized_linear import QUANTIZERS, dequantize, quantized_linear, quantized_linear_reference

needs_compiler = pytest.mark.skipif(
    cpu.default_backend("quantized_linear") != "cpp", reason="needs a C++ compiler on Linux"
)
needs_amx = pytest.mark.skipif(not cpu_quantized.available(), reason="needs a CPU with AMX and a C++ compiler")
EPS = torch.finfo(torch.bfloat16).eps
SHAPES = [(1, 1, 64), (16, 32, 64), (32, 64, 192), (33, 70, 128), (47, 130, 576), (7, 3072, 64), (100, 96, 320)]
ODD_WIDTHS = [(1, 1, 1), (33, 70, 50), (5, 31, 577)]


def operands(form, rows, num_out, num_in, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = QUANTIZERS[form](torch.randn(num_out, num_in, generator=generator) * 0.1)
    offset = torch.randn(num_out, generator=generator).bfloat16() if bias else None
    return torch.randn(rows, num_in, generator=generator).bfloat16(), weight, offset


def worst_row(got, truth):
    return ((got.double() - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(1e-30)).max().item()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", QUANTIZERS)
def test_dequantising_is_bit_equal(form, dtype):
    for num_out, num_in in ((1, 64), (33, 192), (129, 576)):
        _, weight, _ = operands(form, 1, num_out, num_in)
        assert torch.equal(dequantize(weight, dtype, backend="cpp"), dequantize(weight, dtype, backend="torch"))
    if form != "nf4":
        _, weight, _ = operands(form, 1, 6, 50)
        strided = ChannelWeight(weight.values[:, 10:30], weight.scales)
        assert torch.equal(dequantize(strided, dtype), dequantize(strided, dtype, backend="torch"))


@needs_compiler
def test_products_in_other_dtypes_equal_the_reference():
    for form in QUANTIZERS:
        x, weight, _ = operands(form, 5, 33, 64)
        for dtype in (torch.float32, torch.float16):
            assert torch.equal(quantized_linear(x.to(dtype), weight), quantized_linear_reference(x.to(dtype), weight))


@needs_amx
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", QUANTIZERS)
def test_product_is_as_good_as_the_reference(form, bias):
    for shape in SHAPES if form == "nf4" else SHAPES + ODD_WIDTHS:
        x, weight, offset = operands(form, *shape, bias)
        dense = dequantize(weight, torch.float32, backend="torch")
        truth = F.linear(x.double(), dense.double(), None if offset is None else offset.double())
        reference = worst_row(quantized_linear_reference(x, weight, offset), truth)
        got = cpu_quantized.PackedQuantized(weight, offset)(x)
        assert worst_row(got, truth) <= 2 * reference + EPS, shape


@needs_amx
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", QUANTIZERS)
def test_gated_product_equals_torch(form, bias):
    for rows, num_out, num_in in ((32, 64, 64), (33, 70, 128), (5, 3072, 64), (1, 2, 64), (90, 34, 192)):
        x, weight, offset = operands(form, rows, num_out, num_in, bias)
        x = x * 20  # gates far out, where an exponential could overflow
        gate, up = quantized_linear_reference(x, weight, offset).chunk(2, dim=1)
        expected = (F.silu(gate.float()) * up.float()).double()
        got = cpu_quantized.PackedQuantized(weight, offset, gated=True)(x)
        assert got.isfinite().all() and worst_row(got, expected) < 6 * EPS


@needs_amx
@pytest.mark.parametrize("terms", [1, 2])
def test_integer_sums_are_exact(terms):
    """With scales that are powers of two nothing is rounded before the result is: bit-equal to the reference."""
    for rows, num_out, num_in in ((33, 70, 577), (16, 32, 64), (64, 31, 1), (300, 40, 1024)):
        x, weight, _ = operands("int8", rows, num_out, num_in, seed=3)
        x[:, 0] = 127  # the largest magnitude of its row, so that a row's scale is 1 or 1/256
        weight = ChannelWeight(weight.values, torch.exp2(torch.arange(num_out) % 5 - 2.0))
        got = cpu_quantized.PackedQuantized(weight, None, terms=terms)(x)
        assert torch.equal(got, cpu_quantized.int8_linear_reference(x, weight, terms=terms))


@needs_amx
def test_rows_become_the_integers_of_the_reference():
    """Identity weights hand the quantised activations through."""
    x, _, _ = operands("int8", 40, 1, 96, seed=5)
    x[3], x[4], x[5] = 0, x[4] * 1e-20, x[5] * 1e20
    x[6] = torch.arange(-48, 48).bfloat16() / 16  # ties
    eye = ChannelWeight(torch.eye(96, dtype=torch.int8), torch.ones(96))
    for terms, limit in cpu_quantized.LIMITS.items():
        q, scales = cpu_quantized.quantize_rows(x, terms)
        assert (q.abs().amax(1)[x.float().abs().amax(1) > 0] == limit).all() and scales[3] == 0
        got = cpu_quantized.PackedQuantized(eye, None, terms=terms)(x)
        assert torch.equal(got, (q.float() * scales[:, None]).bfloat16())


@needs_amx
@pytest.mark.parametrize("form", QUANTIZERS)
def test_rows_depend_on_themselves_alone(form):
    x, weight, _ = operands(form, 101, 200, 128)
    packed = cpu_quantized.PackedQuantized(weight, None)
    together = packed(x)
    for row in (0, 15, 16, 31, 32, 60, 100):
        assert torch.equal(packed(x[row : row + 1])[0], together[row])
    assert torch.equal(packed(x[:40]), together[:40])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(packed(x), together)
    finally:
        torch.set_num_threads(threads)
    wide = torch.cat([x, x], 1)
    assert torch.equal(packed(wide[:, 128:]), together) and packed(x[:0]).shape == (0, 200)


@needs_amx
@torch.no_grad()
@pytest.mark.parametrize("form", QUANTIZERS)
def test_layers_use_it_where_no_gradient_is_wanted(form):
    x, weight, offset = operands(form, 300, 64, 128, True)
    layer = Linear(weight, offset, prepack=True)
    truth = quantized_linear_reference(x, weight, offset)
    assert worst_row(layer(x), truth.double()) < 2 * EPS and layer._packed is not None
    assert worst_row(layer.swiglu(x), (F.silu(truth[:, :32].float()) * truth[:, 32:].float()).double()) < 6 * EPS
    assert torch.equal(layer.dense(torch.float32), dequantize(weight, torch.float32))
    before = layer._packed
    with torch.enable_grad():
        x.requires_grad_()
        assert layer(x).requires_grad and layer._packed is before
    layer.replace(QUANTIZERS[form](-dequantize(weight, torch.float32)), offset)
    assert layer._packed is None


@needs_amx
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", QUANTIZERS)
def test_packing_loses_nothing(form, gated):
    for num_out, num_in in ((2, 64), (70, 128), (34, 192), (3072, 64)):
        _, weight, _ = operands(form, 1, num_out, num_in)
        back = cpu_quantized.PackedQuantized(weight, None, gated=gated).unpack()
        assert type(back) is type(weight)
        for name, tensor in vars(weight).items():
            assert torch.equal(getattr(back, name).float(), tensor.float()), name


@needs_amx
def test_wrong_operands_are_named():
    x, weight, _ = operands("int8", 4, 64, 64)
    with pytest.raises(ValueError, match=r"packed_quantized: .*terms 3; allowed"):
        cpu_quantized.PackedQuantized(weight, None, terms=3)
    with pytest.raises(ValueError, match=r"packed_quantized: x is .* allowed: bf16 \[T, 64\]"):
        cpu_quantized.PackedQuantized(weight, None)(x.float())
