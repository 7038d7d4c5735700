import pytest
import torch
from proofs import assert_as_good, outputs_and_gradients, prove, widen
from specialize.kernels import tuning
from specialize.kernels.layernorm import SPEC, layernorm, layernorm_reference

ALL = [{**case, "pass": p, "train_weight": True} for case in SPEC.test_cases for p in ("forward", "backward")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_triton_is_as_good_as_the_reference(case, dtype):
    prove(SPEC, case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*ALL, *SPEC.bench_cases], ids=str)
def test_on_the_device(case, dtype):
    prove(SPEC, case, dtype, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels", [1, 5, 31, 32, 33, 255, 256, 257, 1009])
@pytest.mark.parametrize("rows", [1, 2, 13, 64])
def test_sweep(rows, channels, bias, residual):
    # Without a residual's gradient a row's own can all but cancel, and then a relative error says nothing.
    case = {
        "T": rows,
        "C": channels,
        "bias": bias,
        "residual": residual,
        "pass": "backward" if residual else "forward",
        "train_weight": True,
    }
    for dtype in (torch.float32, torch.float16):
        prove(SPEC, case, dtype)


@pytest.mark.parametrize("case", [case for case in SPEC.test_cases if case["C"] > 1], ids=str)
def test_torch_backend_is_as_good_as_the_reference(case):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = SPEC.make_inputs({**case, "pass": "backward", "train_weight": True}, "cpu", dtype, 1)
        ours = outputs_and_gradients(lambda **kw: layernorm(**kw, backend="torch"), inputs)
        reference = outputs_and_gradients(layernorm_reference, inputs)
        truth = outputs_and_gradients(layernorm_reference, widen(inputs))
        for a, b, c in zip(ours, reference, truth, strict=True):
            assert_as_good(a, b, c)


def test_a_large_mean_does_not_cancel():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) + 1000
    weight = torch.ones(64)
    truth = layernorm_reference(x.double(), weight.double(), None, 1e-5)
    assert_as_good(
        layernorm(x, weight, None, 1e-5, backend="triton"), layernorm_reference(x, weight, None, 1e-5), truth
    )


def test_rows_do_not_depend_on_their_neighbours():
    inputs = SPEC.make_inputs({"T": 9, "C": 65, "bias": True}, "cpu", torch.float32, 2)
    y, h = layernorm(**inputs, backend="triton")
    for row in range(9):
        alone = {k: v[row : row + 1] if k in ("x", "residual") else v for k, v in inputs.items()}
        y_alone, h_alone = layernorm(**alone, backend="triton")
        assert torch.equal(y_alone[0], y[row]) and torch.equal(h_alone[0], h[row])


def test_strided_rows_and_every_configuration():
    wide = torch.randn(6, 200, generator=torch.Generator().manual_seed(3))
    x, residual = wide[:, 7:107], wide.T[:100].T
    weight = torch.rand(100)
    expected = layernorm_reference(x, weight, None, 1e-5, residual=residual)
    for rows in (1, 2, 4, 8):
        with tuning.override("layernorm", "forward 128", {"rows": rows, "num_warps": 1}):
            y, h = layernorm(x, weight, None, 1e-5, residual=residual, backend="triton")
        assert torch.equal(h, expected[1])
        torch.testing.assert_close(y, expected[0])


def test_weight_gradient_over_more_rows_than_programs():
    prove(SPEC, {"T": 37, "C": 1024, "bias": True, "pass": "backward", "train_weight": True}, torch.float32)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"weight": torch.ones(5)}, "weight"),
        ({"bias": torch.ones(5)}, "bias"),
        ({"residual": torch.ones(3, 5)}, "residual"),
        ({"residual": torch.ones(3, 4, dtype=torch.float16)}, "residual"),
        ({"x": torch.ones(3, 4, dtype=torch.float64), "residual": None}, "x"),
    ],
)
def test_wrong_arguments_are_named(change, argument):
    arguments = {"x": torch.ones(3, 4), "weight": torch.ones(4), "bias": None, "eps": 1e-5} | change
    with pytest.raises(ValueError, match=f"layernorm: argument {argument}"):
        layernorm(**arguments, backend="triton")


def test_a_row_too_long_is_refused():
    with pytest.raises(ValueError, match="no configuration fits"):
        layernorm(torch.ones(1, 70000), torch.ones(70000), None, 1e-5, backend="triton")
