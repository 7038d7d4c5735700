import pytest
import torch
from specialize.kernels.kv_write import SPEC, kv_write, kv_write_reference

FP8 = {"T": 20, "K": 2, "D": 112, "P": 2, "S": 32, "cache": "fp8", "rope": True, "clip": 2.0}


def both(case, dtype, device="cpu"):
    inputs = SPEC.make_inputs(case, device, dtype, 0)
    return SPEC.run(**inputs, backend="triton"), SPEC.reference(**inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", SPEC.test_cases, ids=str)
def test_triton_writes_the_same_bits(case, dtype):
    ours, reference = both(case, dtype)
    assert torch.equal(ours, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*SPEC.test_cases, FP8], ids=str)
def test_on_the_device(case, dtype):
    ours, reference = both(case, dtype, "cuda")
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_untouched_slots_stay(backend):
    inputs = SPEC.make_inputs({"T": 5, "K": 2, "D": 16, "P": 2, "S": 16, "skip": 2}, "cpu", torch.float32, 3)
    inputs["k_cache"].fill_(7.0)
    kv_write(**inputs, backend=backend)
    written = inputs["slots"][inputs["slots"] >= 0]
    flat = inputs["k_cache"].flatten(0, 1)
    assert torch.equal(flat[written], inputs["k"][inputs["slots"] >= 0])
    others = torch.ones(32, dtype=torch.bool)
    others[written] = False
    assert (flat[others] == 7.0).all()


def test_int8_rounds_to_even_and_saturates():
    k = torch.tensor([0.5, 1.5, -2.5, 1000.0, -1000.0, 126.5]).reshape(1, 1, 6)
    caches = [torch.zeros(1, 16, 1, 6, dtype=torch.int8) for _ in range(2)]
    for backend in ("torch", "triton"):
        kv_write(k, k, *caches, torch.tensor([3]), k_scale=torch.ones(1), v_scale=torch.ones(1), backend=backend)
        assert caches[0][0, 3, 0].tolist() == [0, 2, -2, 127, -127, 126]


def test_clip_comes_before_rope():
    inputs = SPEC.make_inputs({"T": 4, "K": 1, "D": 8, "P": 1, "S": 16, "rope": True}, "cpu", torch.float32, 3)
    big = inputs | {"k": inputs["k"] * 100, "clip": 0.5}
    kv_write_reference(**big)
    norms = big["k_cache"].flatten(0, 1)[big["slots"]].norm(dim=-1)
    torch.testing.assert_close(norms, big["k"].clamp(-0.5, 0.5).norm(dim=-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(4, 1, 6)}, "argument k, v is"),
        ({"slots": torch.tensor([1, 2, 3, 16])}, "argument slots is from 1 to 16; allowed: −1 to 15"),
        ({"slots": torch.tensor([1, 2, 3, 4], dtype=torch.int32)}, "argument slots is torch.int32"),
        ({"k_cache": torch.zeros(1, 16, 2, 8)}, "argument k_cache is of shape"),
        ({"cos": None}, "given in part"),
        ({"clip": -1.0}, "argument clip is -1.0"),
        ({"k_scale": torch.ones(2)}, "argument k_scale is"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    case = {"T": 4, "K": 1, "D": 8, "P": 1, "S": 16, "rope": True}
    inputs = SPEC.make_inputs(case, "cpu", torch.float32, 3) | change
    before = inputs["v_cache"].clone()
    with pytest.raises(ValueError, match=f"kv_write: .*{message}"):
        kv_write(**inputs)
    assert torch.equal(before, inputs["v_cache"])
