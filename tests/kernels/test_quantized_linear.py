import pytest
import torch
from proofs import assert_as_good, prove, widen
from specialize.kernels.channelwise import ChannelWeight, dequantize_channelwise, quantize_fp8, quantize_int8
from specialize.kernels.nf4 import CODEBOOK, quantize_nf4
from specialize.kernels.quantized_linear import (
    FEW_ROWS,
    QUANTIZERS,
    SPEC,
    quantized_linear,
    quantized_linear_reference,
)
from specialize.kernels.tuning import override


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", SPEC.test_cases, ids=str)
def test_triton_is_as_good_as_the_reference(case, dtype):
    prove(SPEC, case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*SPEC.test_cases, *SPEC.bench_cases], ids=str)
def test_on_the_device(case, dtype):
    prove(SPEC, case, dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("form", QUANTIZERS)
def test_on_the_device_results_repeat_bit_for_bit(form):
    inputs = SPEC.make_inputs({"T": 16, "in": 4096, "out": 512, "format": form}, "cuda", torch.bfloat16, 0)
    first = quantized_linear(**inputs)
    assert all(torch.equal(first, quantized_linear(**inputs)) for _ in range(20))


@pytest.mark.slow
@pytest.mark.parametrize("form", QUANTIZERS)
@pytest.mark.parametrize("num_out", [1, 31, 63, 64, 65, 129])
@pytest.mark.parametrize("num_in", [64, 192, 1024])
@pytest.mark.parametrize("num_rows", [1, 2, 16, 33, 64])
def test_sweep(num_rows, num_in, num_out, form):
    for dtype in (torch.float32, torch.float16):
        prove(SPEC, {"T": num_rows, "in": num_in, "out": num_out, "format": form, "bias": True}, dtype)


@pytest.mark.parametrize("form", QUANTIZERS)
def test_the_sum_over_programs_is_complete(form):
    """Many programs share a row's channels; the counter that finds the last one is left as it was."""
    case = {"T": 3, "in": 2048, "out": 40, "format": form}
    with override("quantized_linear", f"{form} small 16", FEW_ROWS | {"PER_SM": 64}):
        prove(SPEC, case, torch.float32)


@pytest.mark.parametrize("case", SPEC.test_cases, ids=str)
def test_torch_backend_is_as_good_as_the_reference(case):
    inputs = SPEC.make_inputs(case, "cpu", torch.bfloat16, 0)
    ours = quantized_linear(**inputs)
    assert_as_good(ours, quantized_linear_reference(**inputs), quantized_linear_reference(**widen(inputs)))


def test_int8_rounds_to_nearest():
    w = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    weight = quantize_int8(w)
    assert weight.values.dtype == torch.int8
    assert weight.values.abs().amax(1).eq(127).all()
    assert ((dequantize_channelwise(weight) - w).abs() <= 0.5001 * weight.scales[:, None]).all()


def test_fp8_keeps_three_bits_of_mantissa():
    w = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    weight = quantize_fp8(w)
    assert weight.values.dtype == torch.float8_e4m3fn
    error = (dequantize_channelwise(weight) - w).abs()
    assert (error <= w.abs() / 16 + weight.scales[:, None] * 2**-10).all()


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_fp8])
def test_a_channel_of_zeros(quantize):
    w = torch.randn(3, 16)
    w[1] = 0
    assert torch.equal(dequantize_channelwise(quantize(w))[1], torch.zeros(16))


def _decodes_every_fp8_value(device, dtype):
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = torch.where(values.float().isnan(), torch.zeros(()), values.float()).to(torch.float8_e4m3fn)
    weight = ChannelWeight(values.view(256, 1).repeat(1, 16).contiguous(), torch.ones(256)).to(device)
    x = torch.zeros(1, 16, dtype=dtype, device=device)
    x[0, 3] = 1
    return torch.equal(quantized_linear(x, weight, backend="triton")[0].cpu(), values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_fp8_value_is_decoded_exactly(dtype):
    assert _decodes_every_fp8_value("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_fp8_value_is_decoded_exactly_on_the_device(dtype):
    assert _decodes_every_fp8_value("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shuffled", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_way_of_looking_up_gives_the_codebook(shuffled, dtype):
    """One token with a single 1 reads a column of W off, which must be codebook · absmax to the bit before rounding."""
    codes = torch.arange(16).repeat(64, 4)
    weight = quantize_nf4(torch.tensor(CODEBOOK)[codes]).to("cuda")
    x = torch.eye(64, dtype=dtype, device="cuda")[:16]
    with override("quantized_linear", "nf4 small 16", FEW_ROWS | {"SHUFFLED": shuffled}):
        y = quantized_linear(x, weight)
    assert torch.equal(y.t().cpu(), torch.tensor(CODEBOOK)[codes][:, :16].to(dtype))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": torch.zeros(2, 63)}, "x"),
        ({"x": torch.zeros(2, 64).int()}, "x"),
        ({"bias": torch.zeros(7)}, "bias"),
        ({"weight": ChannelWeight(torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8))}, "weight"),
        ({"weight": ChannelWeight(torch.zeros(8, 64, dtype=torch.int8), torch.ones(7))}, "weight"),
    ],
)
def test_what_does_not_fit_is_refused(change, name):
    inputs = SPEC.make_inputs({"T": 2, "in": 64, "out": 8, "format": "int8"}, "cpu", torch.float32, 0) | change
    with pytest.raises(ValueError, match=f"quantized_linear: argument {name} .*allowed"):
        quantized_linear(**inputs)
