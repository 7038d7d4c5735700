import pytest
import torch
from proofs import poisoned
from specialize.kernels.nf4 import (
    BLOCK,
    CODEBOOK,
    SPEC,
    NF4Weight,
    absmax_of,
    dequantize_nf4,
    dequantize_nf4_reference,
    dynamic_map,
    quantize_nf4,
    unpack,
)


def test_codebook_is_the_published_one():
    """QLoRA's construction: quantiles of the normal distribution at evenly spaced probabilities, scaled to ±1."""
    offset = 1 - (1 / 32 + 1 / 30) / 2
    normal = torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((positive, negative, torch.zeros(1))).sort().values
    values /= values.max()
    assert torch.allclose(torch.tensor(CODEBOOK, dtype=torch.float64), values, atol=2e-4)
    assert len(CODEBOOK) == 16 and 0.0 in CODEBOOK


def test_dynamic_map_has_256_ascending_values():
    values = dynamic_map()
    assert len(values) == len(set(values)) == 256
    assert list(values) == sorted(values)
    assert values[-1] == 1.0 and 0.0 in values
    assert min(v for v in values if v > 0) == pytest.approx(5.5e-7)


def test_codes_are_the_nearest_entries():
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    weight = quantize_nf4(w)
    blocks = w.view(8, -1, BLOCK)
    unit = blocks / blocks.abs().amax(-1, keepdim=True)
    nearest = (unit[..., None] - torch.tensor(CODEBOOK)).abs().argmin(-1)
    assert torch.equal(unpack(weight.codes).transpose(0, 1).long(), nearest)


def test_block_scales_come_back_within_the_map_s_step():
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)) * torch.rand(64, 1)
    absmax = w.view(64, -1, BLOCK).abs().amax(-1)
    weight = quantize_nf4(w)
    centred = (absmax - weight.absmax_offset).abs().max()
    assert (absmax_of(weight) - absmax).abs().max() <= 0.01 * centred
    assert weight.num_bytes * 8 / w.numel() == pytest.approx(4.127, abs=0.01)


def test_values_of_the_codebook_survive():
    """Blocks whose entries are codebook values times one absmax come back as they went in."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (4, 128), generator=generator)
    codes[:, ::BLOCK] = 15
    w = torch.tensor(CODEBOOK)[codes] * 0.75
    assert torch.equal(dequantize_nf4(quantize_nf4(w), torch.float32), w)


def test_zeros_stay_zeros():
    assert torch.equal(dequantize_nf4(quantize_nf4(torch.zeros(3, 128))), torch.zeros(3, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", SPEC.test_cases, ids=str)
def test_triton_equals_the_reference_bit_for_bit(case, dtype):
    inputs = SPEC.make_inputs(case, "cpu", dtype, 0)
    with poisoned():
        assert torch.equal(dequantize_nf4(**inputs, backend="triton"), dequantize_nf4_reference(**inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*SPEC.test_cases, *SPEC.bench_cases], ids=str)
def test_on_the_device(case, dtype):
    inputs = SPEC.make_inputs(case, "cuda", dtype, 0)
    with poisoned():
        assert torch.equal(dequantize_nf4(**inputs), dequantize_nf4_reference(**inputs))


@pytest.mark.gpu
def test_quantising_on_the_device_gives_the_same_bits():
    w = torch.randn(300, 640, generator=torch.Generator().manual_seed(0))
    here, there = quantize_nf4(w), quantize_nf4(w.cuda())
    assert torch.equal(here.codes, there.codes.cpu())
    # the mean of the scales is summed in another order there: an index at a border may move by one
    assert (here.absmax_index.int() - there.absmax_index.cpu().int()).abs().max() <= 1


@pytest.mark.parametrize("w", [torch.zeros(4, 65), torch.zeros(0, 64), torch.zeros(64), torch.zeros(2, 64).int()])
def test_what_does_not_fit_is_refused(w):
    with pytest.raises(ValueError, match=r"quantize_nf4: argument w .*allowed"):
        quantize_nf4(w)


def test_infinities_are_refused():
    w = torch.zeros(2, 64)
    w[1, 3] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        quantize_nf4(w)


def test_parts_that_do_not_fit_each_other_are_refused():
    weight = quantize_nf4(torch.randn(4, 128))
    wrong = NF4Weight(weight.codes, weight.absmax_index[:1], weight.absmax_scale, weight.absmax_offset)
    with pytest.raises(ValueError, match="absmax_index"):
        dequantize_nf4(wrong)
