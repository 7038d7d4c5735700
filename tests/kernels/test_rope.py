import pytest
import torch
from proofs import prove
from specialize.kernels.rope import SPEC, rope, rope_reference

ALL = [{**case, "pass": p} for case in SPEC.test_cases for p in ("forward", "backward")]


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
@pytest.mark.parametrize("head_dim", [2, 6, 32, 64, 66, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_sweep(tokens, heads, head_dim):
    for dtype in (torch.float32, torch.float16):
        prove(SPEC, {"T": tokens, "H": heads, "D": head_dim, "M": 33, "pass": "backward"}, dtype)


def test_heads_inside_a_wider_projection_are_read_in_place():
    case = {"T": 7, "H": 3, "D": 16, "M": 64}
    inputs = SPEC.make_inputs(case, "cpu", torch.float32, 0)
    projection = torch.randn(7, 60)
    inputs["x"] = projection[:, 5:53].unflatten(1, (3, 16))
    torch.testing.assert_close(rope(**inputs, backend="triton"), rope_reference(**inputs))


def test_rotation_keeps_lengths_and_undoes_itself():
    inputs = SPEC.make_inputs({"T": 9, "H": 2, "D": 32, "M": 128}, "cpu", torch.float32, 1)
    turned = rope(**inputs, backend="triton")
    torch.testing.assert_close(turned.norm(dim=-1), inputs["x"].norm(dim=-1))
    back = rope(turned, inputs["cos"], -inputs["sin"], inputs["positions"], backend="triton")
    torch.testing.assert_close(back, inputs["x"])


def test_scores_depend_on_distance_alone():
    inputs = SPEC.make_inputs({"T": 1, "H": 1, "D": 64, "M": 200}, "cpu", torch.float32, 2)
    q, k = torch.randn(2, 1, 1, 64)

    def score(i, j):
        tables = inputs["cos"], inputs["sin"]
        a = rope(q, *tables, torch.tensor([i]), backend="triton")
        return (a * rope(k, *tables, torch.tensor([j]), backend="triton")).sum()

    torch.testing.assert_close(score(50, 40), score(150, 140), rtol=1e-4, atol=1e-4)


def test_a_position_outside_the_tables_reads_nothing():
    inputs = SPEC.make_inputs({"T": 3, "H": 1, "D": 4, "M": 8}, "cpu", torch.float32, 2)
    inputs["positions"] = torch.tensor([8, -1, 2])
    out = rope(**inputs, backend="triton")
    assert not out[:2].any() and out[2].any()


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"x": torch.ones(2, 1, 5)}, "x"),
        ({"x": torch.ones(2, 4)}, "x"),
        ({"cos": torch.ones(8, 3)}, "cos, sin"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions"),
        ({"x": torch.ones(2, 1, 4, dtype=torch.float64)}, "x"),
    ],
)
def test_wrong_arguments_are_named(change, argument):
    inputs = SPEC.make_inputs({"T": 2, "H": 1, "D": 4, "M": 8}, "cpu", torch.float32, 2) | change
    with pytest.raises(ValueError, match=f"rope: argument {argument}"):
        rope(**inputs, backend="triton")
