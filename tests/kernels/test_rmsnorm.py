import pytest
import torch
from proofs import assert_as_good, outputs_and_gradients, prove, widen
from specialize.kernels import tuning
from specialize.kernels.rmsnorm import SPEC, rmsnorm, rmsnorm_reference

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
@pytest.mark.parametrize("channels", [1, 2, 3, 31, 32, 33, 255, 256, 257, 1009])
@pytest.mark.parametrize("rows", [1, 2, 13, 64])
def test_sweep(rows, channels, residual):
    # Without a residual's gradient a row's own can all but cancel, and then a relative error says nothing.
    case = {
        "T": rows,
        "C": channels,
        "residual": residual,
        "pass": "backward" if residual else "forward",
        "train_weight": True,
    }
    for dtype in (torch.float32, torch.float16):
        prove(SPEC, case, dtype)


@pytest.mark.parametrize("case", SPEC.test_cases, ids=str)
def test_torch_backend_is_as_good_as_the_reference(case):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = SPEC.make_inputs({**case, "pass": "backward", "train_weight": True}, "cpu", dtype, 1)
        ours = outputs_and_gradients(lambda **kw: rmsnorm(**kw, backend="torch"), inputs)
        reference = outputs_and_gradients(rmsnorm_reference, inputs)
        truth = outputs_and_gradients(rmsnorm_reference, widen(inputs))
        for a, b, c in zip(ours, reference, truth, strict=True):
            assert_as_good(a, b, c)


def test_rows_do_not_depend_on_their_neighbours():
    inputs = SPEC.make_inputs({"T": 9, "C": 65}, "cpu", torch.float32, 2)
    y, h = rmsnorm(**inputs, backend="triton")
    for row in range(9):
        alone = {k: v[row : row + 1] if k in ("x", "residual") else v for k, v in inputs.items()}
        y_alone, h_alone = rmsnorm(**alone, backend="triton")
        assert torch.equal(y_alone[0], y[row]) and torch.equal(h_alone[0], h[row])


def test_heads_inside_a_wider_projection_are_read_in_place():
    projection = torch.randn(5, 3 * 16 + 9, generator=torch.Generator().manual_seed(3))
    heads = projection[:, 4:52].unflatten(1, (3, 16))
    weight = torch.rand(16)
    torch.testing.assert_close(rmsnorm(heads, weight, 1e-6, backend="triton"), rmsnorm_reference(heads, weight, 1e-6))


def test_gradient_through_heads_inside_a_wider_projection():
    projection = torch.randn(5, 57, generator=torch.Generator().manual_seed(3))
    weight = torch.rand(16)
    gradients = []
    for backend in ("triton", "torch"):
        leaf = projection.clone().requires_grad_()
        rmsnorm(leaf[:, 4:52].unflatten(1, (3, 16)), weight, 1e-6, backend=backend).pow(3).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_gradient_of_the_sum_alone():
    x, residual = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    _, h = rmsnorm(x, torch.ones(8), 1e-6, residual=residual, backend="triton")
    h.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8)) and torch.equal(residual.grad, torch.ones(3, 8))


def test_every_configuration_agrees():
    inputs = SPEC.make_inputs({"T": 11, "C": 100}, "cpu", torch.float32, 4)
    expected = rmsnorm_reference(**inputs)
    for rows in (1, 2, 4, 8):
        with tuning.override("rmsnorm", "forward 128", {"rows": rows, "num_warps": 1}):
            y, h = rmsnorm(**inputs, backend="triton")
        assert torch.equal(h, expected[1])
        torch.testing.assert_close(y, expected[0])


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"weight": torch.ones(5)}, "weight"),
        ({"residual": torch.ones(3, 5)}, "residual"),
        ({"x": torch.ones(3, 4, dtype=torch.float64)}, "x"),
    ],
)
def test_wrong_arguments_are_named(change, argument):
    arguments = {"x": torch.ones(3, 4), "weight": torch.ones(4), "eps": 1e-5} | change
    with pytest.raises(ValueError, match=f"rmsnorm: argument {argument}"):
        rmsnorm(**arguments, backend="triton")
