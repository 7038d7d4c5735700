import pytest
import torch
from proofs import assert_as_good, outputs_and_gradients, prove, widen
from specialize.kernels.cross_entropy import SPEC, linear_cross_entropy, linear_cross_entropy_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", SPEC.test_cases, ids=str)
def test_triton_is_as_good_as_the_reference(case, dtype):
    prove(SPEC, case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*SPEC.test_cases, {"N": 300, "C": 576, "V": 49152, "pass": "both"}], ids=str)
def test_on_the_device(case, dtype):
    prove(SPEC, case, dtype, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [2, 255, 256, 257, 4096, 5003])
@pytest.mark.parametrize("num_rows", [1, 2, 31, 300])
@pytest.mark.parametrize("ignored", [0, 0.5])
@pytest.mark.parametrize("z_loss", [0, 0.1])
def test_sweep(num_rows, vocabulary, ignored, z_loss):
    case = {"N": num_rows, "C": 16, "V": vocabulary, "ignored": ignored, "z_loss": z_loss, "pass": "both"}
    for dtype in (torch.float32, torch.float16):
        prove(SPEC, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SPEC.test_cases, ids=str)
def test_torch_backend_is_as_good_as_the_reference(case, dtype):
    inputs = SPEC.make_inputs(case, "cpu", dtype, 1)
    ours = outputs_and_gradients(lambda **kw: linear_cross_entropy(**kw, backend="torch"), inputs)
    reference = outputs_and_gradients(linear_cross_entropy_reference, inputs)
    truth = outputs_and_gradients(linear_cross_entropy_reference, widen(inputs))
    for a, b, c in zip(ours, reference, truth, strict=True):
        assert_as_good(a, b, c)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_agrees_with_torch_s_own_loss(backend):
    inputs = SPEC.make_inputs({"N": 300, "C": 16, "V": 77, "ignored": 0.3}, "cpu", torch.float32, 0)
    expected = torch.nn.functional.cross_entropy(
        inputs["hidden"] @ inputs["weight"].t(), inputs["targets"], reduction="sum"
    )
    torch.testing.assert_close(linear_cross_entropy(**inputs, backend=backend), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ignored_rows_get_no_gradient_and_change_nothing(backend):
    inputs = SPEC.make_inputs({"N": 40, "C": 16, "V": 77, "ignored": 0.5, "pass": "both"}, "cpu", torch.float32, 0)
    counted = inputs["targets"] != -100
    loss = linear_cross_entropy(**inputs, backend=backend)
    (gradient,) = torch.autograd.grad(loss, inputs["hidden"])
    assert torch.equal(gradient[~counted], torch.zeros_like(gradient[~counted]))
    alone = inputs | {"hidden": inputs["hidden"][counted], "targets": inputs["targets"][counted]}
    assert torch.equal(linear_cross_entropy(**alone, backend=backend), loss)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_probability_that_underflows_keeps_a_finite_loss(backend):
    hidden = torch.tensor([[300.0, 0.0]], requires_grad=True)
    weight = torch.eye(2)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]), backend=backend)
    assert loss.item() == pytest.approx(300.0)
    (gradient,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_backward_pass_can_run_twice(backend):
    inputs = SPEC.make_inputs({"N": 9, "C": 8, "V": 20, "pass": "both"}, "cpu", torch.float32, 0)
    loss = linear_cross_entropy(**inputs, backend=backend)
    first = torch.autograd.grad(loss * 2, inputs["hidden"], retain_graph=True)[0]
    second = torch.autograd.grad(loss, inputs["hidden"])[0]
    torch.testing.assert_close(first, 2 * second)


def test_no_gradient_is_made_where_none_is_wanted():
    inputs = SPEC.make_inputs({"N": 9, "C": 8, "V": 20, "pass": "both"}, "cpu", torch.float32, 0)
    with torch.no_grad():
        assert not linear_cross_entropy(**inputs).requires_grad


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"hidden": torch.zeros(3, 7)}, "weight"),
        ({"weight": torch.zeros(20, 8, dtype=torch.float16)}, "weight"),
        ({"weight": torch.zeros(0, 8)}, "weight"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets"),
        ({"targets": torch.zeros(9, dtype=torch.int32)}, "targets"),
        ({"weights": torch.zeros(3)}, "weights"),
        ({"logit_scale": 0.0}, "logit_scale"),
        ({"z_loss": -1.0}, "z_loss"),
    ],
)
def test_what_does_not_fit_is_refused(change, name):
    inputs = SPEC.make_inputs({"N": 9, "C": 8, "V": 20}, "cpu", torch.float32, 0) | change
    with pytest.raises(ValueError, match=f"linear_cross_entropy: argument {name} .*allowed"):
        linear_cross_entropy(**inputs)
