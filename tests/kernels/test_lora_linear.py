import pytest
import torch
from proofs import assert_as_good, outputs_and_gradients, prove, widen
from specialize.kernels.lora_linear import SPEC, lora_linear, lora_linear_reference
from specialize.kernels.tuning import override

# The interpreter works tile by tile: small tiles let small shapes cross tile borders.
TILES = {"BM": 32, "BN": 64, "BK": 32, "GROUP": 2}


@pytest.fixture
def small_tiles():
    from specialize.kernels.lora_gemm import GEMM_DEFAULT, GRADIENT_DEFAULT, SHRINK_DEFAULT

    with (
        override("lora_linear", "forward", GEMM_DEFAULT | TILES),
        override("lora_linear", "backward", GEMM_DEFAULT | TILES),
        override("lora_linear", "forward fp32", GEMM_DEFAULT | TILES),
        override("lora_linear", "backward fp32", GEMM_DEFAULT | TILES),
        override("lora_linear", "shrink", SHRINK_DEFAULT | {"BM": 32, "BK": 32}),
        override("lora_linear", "gradient", GRADIENT_DEFAULT | {"BT": 16, "BK": 32, "SPLITS": 3}),
    ):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", SPEC.test_cases, ids=str)
def test_triton_is_as_good_as_the_reference(case, dtype, small_tiles):
    prove(SPEC, case, dtype)


@pytest.mark.parametrize("rank", [3, 65])
def test_the_update_after_the_loop_is_the_update_in_it(rank):
    case = {"T": 37, "in": 80, "out": 136, "R": rank, "bias": True, "pass": "both"}
    inputs = SPEC.make_inputs(case, "cpu", torch.float16, 0)
    results = []
    for merged in (False, True):
        tiles = TILES | {"MERGED": merged}
        with override("lora_linear", "forward", tiles), override("lora_linear", "backward", tiles):
            results.append(outputs_and_gradients(lambda **kw: lora_linear(**kw, backend="triton"), inputs))
    for after, inside in zip(*results, strict=True):
        torch.testing.assert_close(after, inside, rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        *SPEC.test_cases,
        {"T": 1000, "in": 576, "out": 1536, "R": 40, "pass": "both"},
        {"T": 300, "in": 200, "out": 264, "R": 200, "bias": True, "pass": "both"},
    ],
    ids=str,
)
@pytest.mark.parametrize("products", [0, 1 << 60])
def test_on_the_device(case, dtype, products):
    with override("lora_linear", "crossover", {"products": products}):
        prove(SPEC, case, dtype, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 8, 17, 64])
@pytest.mark.parametrize("num_out", [1, 8, 31, 64, 136])
@pytest.mark.parametrize("num_in", [8, 33, 64, 72])
@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 97])
def test_sweep(num_tokens, num_in, num_out, rank, small_tiles):
    case = {"T": num_tokens, "in": num_in, "out": num_out, "R": rank, "bias": True, "pass": "both"}
    for dtype in (torch.float32, torch.float16):
        prove(SPEC, case, dtype)


@pytest.mark.parametrize("case", SPEC.test_cases, ids=str)
def test_torch_backend_is_as_good_as_the_reference(case):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = SPEC.make_inputs(case, "cpu", dtype, 1)
        ours = outputs_and_gradients(lambda **kw: lora_linear(**kw, backend="torch"), inputs)
        reference = outputs_and_gradients(lora_linear_reference, inputs)
        truth = outputs_and_gradients(lora_linear_reference, widen(inputs))
        for a, b, c in zip(ours, reference, truth, strict=True):
            assert a.dtype == b.dtype
            assert_as_good(a, b, c)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_only_what_is_trained_gets_a_gradient(backend):
    inputs = SPEC.make_inputs(
        {"T": 5, "in": 16, "out": 24, "R": 4, "bias": True, "pass": "both"}, "cpu", torch.float32, 0
    )
    inputs["weight"].requires_grad_()
    inputs["x"].requires_grad_(False)
    lora_linear(**inputs, backend=backend).sum().backward()
    assert inputs["weight"].grad is None and inputs["x"].grad is None
    assert inputs["a"].grad is not None and inputs["b"].grad is not None


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_saved_is_written(backend):
    inputs = SPEC.make_inputs({"T": 9, "in": 16, "out": 24, "R": 4, "pass": "both"}, "cpu", torch.float32, 0)
    before = {k: v.detach().clone() for k, v in inputs.items() if torch.is_tensor(v)}
    y = lora_linear(**inputs, backend=backend)
    dy = torch.ones_like(y)
    first = torch.autograd.grad(y, (inputs["x"], inputs["a"], inputs["b"]), dy, retain_graph=True)
    second = torch.autograd.grad(y, (inputs["x"], inputs["a"], inputs["b"]), dy)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert all(torch.equal(inputs[k].detach(), v) for k, v in before.items())
    assert torch.equal(dy, torch.ones_like(dy))


def test_strided_input():
    wide = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    inputs = SPEC.make_inputs({"T": 12, "in": 32, "out": 16, "R": 4}, "cpu", torch.float32, 0)
    for x in (wide[:, :32], wide[:, ::2], wide[::2, :32]):
        inputs["x"] = x
        truth = lora_linear_reference(**widen(inputs))
        assert_as_good(lora_linear(**inputs, backend="triton"), lora_linear_reference(**inputs), truth)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": torch.zeros(3, 15)}, "weight"),
        ({"x": torch.zeros(3, 16, dtype=torch.int32)}, "x"),
        ({"weight": torch.zeros(8, 16, dtype=torch.float16)}, "weight"),
        ({"bias": torch.zeros(7)}, "bias"),
        ({"a": torch.zeros(4, 15)}, "a"),
        ({"b": torch.zeros(8, 3)}, "b"),
        ({"scaling": "half"}, "scaling"),
    ],
)
def test_what_does_not_fit_is_refused(change, name):
    inputs = SPEC.make_inputs({"T": 3, "in": 16, "out": 8, "R": 4}, "cpu", torch.float32, 0) | change
    with pytest.raises(ValueError, match=f"lora_linear: argument {name} .*allowed"):
        lora_linear(**inputs)
