import pytest
import torch
from proofs import assert_as_good, outputs_and_gradients, prove, widen
from specialize.kernels import tuning
from specialize.kernels.activation import GELU_SPEC, SPEC, gelu, gelu_reference, swiglu, swiglu_reference

SPECS = {"gelu": GELU_SPEC, "swiglu": SPEC}
ALL = [(n, {**c, "pass": p}) for n, s in SPECS.items() for c in s.test_cases for p in ("forward", "backward")]
BENCH = [(name, case) for name, spec in SPECS.items() for case in spec.bench_cases]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("name", "case"), ALL, ids=str)
def test_triton_is_as_good_as_the_reference(name, case, dtype):
    prove(SPECS[name], case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "case"), ALL + BENCH, ids=str)
def test_on_the_device(name, case, dtype):
    prove(SPECS[name], case, dtype, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 1023, 1025, 2730])
@pytest.mark.parametrize("rows", [1, 2, 11])
def test_sweep(rows, columns):
    for dtype in (torch.float32, torch.float16):
        for spec in SPECS.values():
            prove(spec, {"T": rows, "I": columns, "pass": "backward"}, dtype)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_backend_is_as_good_as_the_reference(name, dtype):
    spec = SPECS[name]
    inputs = spec.make_inputs({"T": 17, "I": 96, "pass": "backward"}, "cpu", dtype, 1)
    ours = outputs_and_gradients(lambda **kw: spec.run(**kw, backend="torch"), inputs)
    reference = outputs_and_gradients(spec.reference, inputs)
    truth = outputs_and_gradients(spec.reference, widen(inputs))
    for a, b, c in zip(ours, reference, truth, strict=True):
        assert_as_good(a, b, c, name)


def test_extremes_stay_finite():
    x = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4, 0.5]])
    torch.testing.assert_close(gelu(x, backend="triton"), gelu_reference(x))
    torch.testing.assert_close(swiglu(x, backend="triton"), swiglu_reference(x))


def test_rows_of_a_wider_tensor_and_every_configuration():
    wide = torch.randn(6, 500, generator=torch.Generator().manual_seed(0))
    x = wide[:, 3:403]
    for rows, block in ((1, 128), (2, 256), (4, 512)):
        with tuning.override("swiglu", "forward 200", {"rows": rows, "block": block, "num_warps": 1}):
            torch.testing.assert_close(swiglu(x, backend="triton"), swiglu_reference(x))
    torch.testing.assert_close(gelu(x, backend="triton"), gelu_reference(x))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="swiglu: argument gate_up is of shape"):
        swiglu(torch.ones(2, 3))
    for op in (gelu, swiglu):
        with pytest.raises(ValueError, match=r"is torch.float64; allowed: float32"):
            op(torch.ones(2, 4, dtype=torch.float64), backend="triton")
    with pytest.raises(ValueError, match="gelu: backend 'cuda' is not available; allowed: torch, triton"):
        gelu(torch.ones(2), backend="cuda")
