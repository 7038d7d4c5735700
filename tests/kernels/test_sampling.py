import math

import pytest
import torch
from specialize.kernels import cpu, tuning
from specialize.kernels.sampling import SPEC, sample, sample_reference, uniform

from proofs import poisoned  # isort: skip

CPP = pytest.mark.skipif(cpu.find_compiler() is None, reason="no C++ compiler here")
BACKENDS = ["torch", "triton", pytest.param("cpp", marks=CPP)]
SETTINGS = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature in (0.7, 1.5)
    for top_k, top_p, min_p in (
        (0, 1.0, 0.0), (1, 1.0, 0.0), (50, 1.0, 0.0), (10**6, 1.0, 0.0), (0, 0.95, 0.0), (0, 1e-6, 0.0),
        (0, 1.0, 0.1), (50, 0.5, 0.0), (50, 0.9, 0.05), (900, 0.3, 0.1),
    )
]  # fmt: skip


def assert_same(ours, reference):
    assert torch.equal(ours[0], reference[0])
    torch.testing.assert_close(ours[1], reference[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SPEC.test_cases, ids=str)
def test_the_same_tokens_as_the_reference(case, backend):
    for dtype in (torch.float32, torch.float16):
        inputs = SPEC.make_inputs(case, "cpu", dtype, 0)
        with poisoned():
            ours = sample(**inputs, backend=backend)
        assert_same(ours, sample_reference(**inputs))


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=CPP)])
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 1000, 5003])
@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_settings_on_the_cpu(vocab_size, spread, backend):
    for number, settings in enumerate(SETTINGS):
        inputs = SPEC.make_inputs({"B": 4, "V": vocab_size, **settings}, "cpu", torch.float32, number)
        inputs["logits"] *= spread
        assert_same(sample(**inputs, backend=backend), sample_reference(**inputs))


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 1000, 1024, 1025, 5003])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_in_triton(vocab_size, settings):
    inputs = SPEC.make_inputs({"B": 3, "V": vocab_size, **settings}, "cpu", torch.float32, 0)
    assert_same(sample(**inputs, backend="triton"), sample_reference(**inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 50432, 151936])
def test_settings_on_the_device(vocab_size):
    for number, settings in enumerate(SETTINGS):
        for backend in ("triton", "torch"):
            inputs = SPEC.make_inputs({"B": 9, "V": vocab_size, **settings}, "cuda", torch.float32, number)
            assert_same(sample(**inputs, backend=backend), sample_reference(**inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_are_ranked_by_id(backend):
    logits = torch.zeros(6, 300)
    logits[:, 100:] = 1.0
    keys = torch.arange(6)
    settings = {
        "temperature": torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0, 1.0]),
        "top_k": torch.tensor([0, 1, 3, 250, 0, 0], dtype=torch.int32),
        "top_p": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.01, 1e-4]),
        "min_p": torch.zeros(6),
    }
    inputs = {"logits": logits, "keys": keys, "steps": keys, **settings}
    ours, reference = sample(**inputs, backend=backend), sample_reference(**inputs)
    assert_same(ours, reference)
    assert ours[0][:2].tolist() == [100, 100] and 100 <= ours[0][2] < 103 and ours[0][5] == 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_its_neighbours(backend):
    num_rows = 7 if backend == "triton" else 40
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(num_rows, 700, generator=generator)
    each = torch.arange(num_rows)
    inputs = {
        "logits": logits, "keys": each * 7919, "steps": each,
        "temperature": torch.where(each % 5 == 0, 0.0, 0.5 + each / num_rows),
        "top_k": torch.where(each % 3 == 0, 20, 0).int(), "top_p": torch.where(each % 2 == 0, 0.9, 1.0),
        "min_p": torch.where(each % 7 == 3, 0.02, 0.0),
    }  # fmt: skip
    together = sample(**inputs, backend=backend)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for row in range(num_rows):
                alone = sample(**{k: v[row : row + 1] for k, v in inputs.items()}, backend=backend)
                assert torch.equal(alone[0][0], together[0][row]) and torch.equal(alone[1][0], together[1][row])
            if backend == "triton":
                break
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=CPP)])
def test_frequencies_follow_the_distribution(backend):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0])
    num_draws = 20000
    inputs = SPEC.make_inputs({"B": num_draws, "V": 6, "temperature": 0.8, "top_p": 0.99}, "cpu", torch.float32, 0)
    inputs["logits"] = logits.expand(num_draws, 6)
    inputs["keys"] = torch.full((num_draws,), 1234)
    counts = torch.bincount(sample(**inputs, backend=backend)[0], minlength=6).double()
    p = (logits.double() / 0.8).softmax(0)
    p[5] = 0
    p /= p.sum()
    assert counts[5] == 0
    chi_square = ((counts - num_draws * p) ** 2 / (num_draws * p).clamp(min=1))[:5].sum()
    assert chi_square < 20  # 4 degrees of freedom: exceeded once in 2,000 seeds


def test_the_draw_is_split_mix_64():
    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    keys = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    steps = [0, 1, 2**40, 7, 3, 10**6]
    expected = [
        (mix((mix(k % 2**64) + (s + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53
        for k, s in zip(keys, steps, strict=True)
    ]
    assert uniform(torch.tensor(keys), torch.tensor(steps)).tolist() == expected


def test_draws_are_uniform_and_unrelated():
    draws = uniform(torch.arange(300).repeat_interleave(300), torch.arange(300).repeat(300)).view(300, 300)
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(float(draws.mean()) - 0.5) < 4 / math.sqrt(12 * 90000)
    for a, b in ((draws[:, 1:], draws[:, :-1]), (draws[1:], draws[:-1])):
        assert abs(float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])) < 4 / math.sqrt(90000)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logprobs_are_of_the_logits_as_given(backend):
    inputs = SPEC.make_inputs({"B": 3, "V": 90, "temperature": 0.3, "penalty": 2.0}, "cpu", torch.float32, 5)
    token_ids, logprobs = sample(**inputs, backend=backend)
    expected = inputs["logits"].log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_and_broken_logits(backend, top_k):
    logits = torch.full((5, 130), -math.inf)
    logits[0, 77] = 1.0
    logits[1, 5:9] = 0.0
    logits[2] = math.nan
    logits[4] = math.inf
    inputs = SPEC.make_inputs({"B": 5, "V": 130, "top_p": 0.9, "top_k": top_k}, "cpu", torch.float32, 5)
    with poisoned():  # an id that was never written would lie far outside the row
        token_ids, _ = sample(**inputs | {"logits": logits}, backend=backend)
    assert token_ids[0] == 77 and 5 <= token_ids[1] < 9 and all(0 <= t < 130 for t in token_ids[2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_logits_and_no_rows(backend):
    inputs = SPEC.make_inputs({"B": 3, "V": 60, "penalty": 1.2, "top_p": 0.8}, "cpu", torch.float32, 5)
    expected = sample_reference(**inputs)
    wide = torch.zeros(3, 200)
    wide[:, 20:140:2] = inputs["logits"]
    assert_same(sample(**inputs | {"logits": wide[:, 20:140:2]}, backend=backend), expected)
    wide[:, 20:80] = inputs["logits"]
    assert_same(sample(**inputs | {"logits": wide[:, 20:80]}, backend=backend), expected)
    none = sample(**{k: v[:0] for k, v in inputs.items()}, backend=backend)
    assert [t.shape for t in none] == [(0,), (0,)] and none[0].dtype == torch.int64


def test_configurations_agree():
    inputs = SPEC.make_inputs(
        {"B": 2, "V": 500, "temperature": 0.8, "top_k": 40, "top_p": 0.8}, "cpu", torch.float32, 5
    )
    for segment, levels in ((64, 16), (256, 8), (512, 4)):
        with tuning.override(
            "sample", "512", {"segment": segment, "num_warps": 4, "levels": levels, "lanes": 64, "row_warps": 8}
        ):
            assert_same(sample(**inputs, backend="triton"), sample_reference(**inputs))


@pytest.mark.parametrize("spread", [0.02, 0.4, 1.0, 3.0])
def test_cuts_across_segments(spread):
    # From nearly flat, where what brackets the cut overflows a segment's room and the row is searched, to peaked.
    rows = [SPEC.make_inputs({"B": 1, "V": 900, **s}, "cpu", torch.float32, n) for n, s in enumerate(SETTINGS[:10])]
    inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    inputs["logits"] = inputs["logits"] * spread
    inputs["logits"][::3] = inputs["logits"][::3].bfloat16().float()  # equal logits in many segments
    config = {"segment": 128, "num_warps": 4, "levels": 16, "lanes": 128, "row_warps": 4}
    with tuning.override("sample", "1024", config), poisoned():
        ours = sample(**inputs, backend="triton")
    assert_same(ours, sample_reference(**inputs))


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"logits": torch.ones(2)}, "logits"),
        ({"keys": torch.ones(3, dtype=torch.int64)}, "keys"),
        ({"top_p": torch.ones(2, 1)}, "top_p"),
        ({"repetition_penalty": torch.ones(2)}, "seen"),
        ({"repetition_penalty": torch.ones(2), "seen": torch.ones(2, 7)}, "seen"),
    ],
)
def test_wrong_arguments_are_named(change, argument):
    inputs = SPEC.make_inputs({"B": 2, "V": 7}, "cpu", torch.float32, 5) | change
    with pytest.raises(ValueError, match=f"sample: argument {argument}"):
        sample(**inputs)
