"""The C++ twins of row ops and packed attention against the references in fp64: outputs and gradients."""

import pytest
import torch
from specialize.kernels import cpu, cpu_prefill, cpu_rows
from specialize.kernels.activation import swiglu, swiglu_reference
from specialize.kernels.attention_prefill import alibi_slopes, attention_prefill, attention_prefill_reference
from specialize.kernels.layernorm import layernorm, layernorm_reference
from specialize.kernels.rmsnorm import rmsnorm, rmsnorm_reference
from specialize.kernels.rope import rope, rope_reference

pytestmark = pytest.mark.skipif(cpu.default_backend("rows") != "cpp", reason="no C++ compiler")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def worst_row(value, truth):
    value, truth = (t.detach().double().flatten(0, -2) for t in (value, truth))
    if truth.numel() == 0:
        return 0.0
    return float(((value - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-30)).max())


def results(function, tensors, graded, douts):
    leaves = [t.detach().clone().requires_grad_(name in graded) for name, t in tensors.items()]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [d.to(o.dtype) for d, o in zip(douts, outputs, strict=True)])
    return [*outputs, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def compare(ours, reference, tensors, graded, dtype):
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    generator = torch.Generator().manual_seed(9)
    shapes = reference(*tensors.values())
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    douts = [torch.randn(s.shape, generator=generator).to(dtype) for s in shapes]
    truth = results(reference, {n: t.double() for n, t in tensors.items()}, graded, douts)
    theirs = results(reference, tensors, graded, douts)
    for value, other, exact in zip(results(ours, tensors, graded, douts), theirs, truth, strict=True):
        assert value.dtype == dtype and value.shape == exact.shape
        assert worst_row(value, exact) <= 2 * worst_row(other, exact) + torch.finfo(dtype).eps


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 15), (37, 65), (3, 576), (0, 16)])
def test_norms(shape, dtype):
    tensors = {"x": normal(*shape), "w": normal(shape[1], seed=1), "r": normal(*shape, seed=2)}
    compare(
        lambda x, w, r: rmsnorm(x, w, 1e-5, residual=r, backend="cpp"),
        lambda x, w, r: rmsnorm_reference(x, w, 1e-5, residual=r), tensors, {"x", "r"}, dtype,
    )  # fmt: skip
    tensors["b"] = normal(shape[1], seed=3)
    if shape[1] > 1:
        compare(
            lambda x, w, r, b: layernorm(x + 3, w, b, 1e-5, residual=r, backend="cpp"),
            lambda x, w, r, b: layernorm_reference(x + 3, w, b, 1e-5, residual=r), tensors, {"x", "r"}, dtype,
        )  # fmt: skip
    compare(
        lambda x, w: rmsnorm(x.unsqueeze(1), w, 1e-5, backend="cpp"),
        lambda x, w: rmsnorm_reference(x.unsqueeze(1), w, 1e-5),
        {"x": tensors["x"], "w": tensors["w"]}, {"x"}, dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [1, 8, 33])
def test_rope_of_a_view_and_of_a_whole(half, dtype):
    cos, sin = normal(50, half), normal(50, half, seed=1)
    positions = torch.randint(0, 50, (19,), generator=torch.Generator().manual_seed(2))

    def split(x):
        return x.unflatten(1, (5, 2 * half))[:, 1:4]

    for pick in (split, lambda x: x.unflatten(1, (5, 2 * half))):
        compare(
            lambda x, pick=pick: rope(pick(x), cos, sin, positions, backend="cpp"),
            lambda x, pick=pick: rope_reference(pick(x), cos, sin, positions),
            {"x": normal(19, 10 * half, seed=3)}, {"x"}, dtype,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 30, 130])
def test_swiglu(width, dtype):
    x = {"x": 3 * normal(21, width)}
    compare(lambda x: swiglu(x, backend="cpp"), swiglu_reference, x, {"x"}, dtype)


def test_extremes_stay_finite_and_nans_stay_nans():
    x = torch.tensor([[200.0, -200.0, 0.0, 1.0, 2.0, 2.0]])
    assert torch.isfinite(swiglu(x, backend="cpp")).all()
    y = swiglu(torch.full((2, 40), float("nan"), dtype=torch.bfloat16), backend="cpp")
    assert torch.isnan(y).all()
    q = torch.full((3, 1, 32), float("nan"), dtype=torch.bfloat16)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    assert torch.isnan(attention_prefill(q, q, q, starts, max_query_len=3, softmax_scale=1.0, backend="cpp")).all()


def test_a_row_does_not_depend_on_the_others_or_on_threads():
    x, w = normal(300, 576).bfloat16(), normal(576, seed=1).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        many = cpu_rows.norm(x, w, None, 1e-5, None, centre=False)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(many[7:8], cpu_rows.norm(x[7:8], w, None, 1e-5, None, centre=False))


def test_a_trained_weight_or_fp64_goes_to_torch():
    weight = torch.ones(4, requires_grad=True)
    rmsnorm(torch.ones(2, 4), weight, 1e-5).sum().backward()
    assert weight.grad is not None
    assert rmsnorm(torch.ones(2, 4).double(), torch.ones(4).double(), 1e-5).dtype == torch.float64


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "dim", "alibi", "window", "causal"),
    [
        ([5], 2, 1, 64, False, None, True),
        ([1, 64, 65, 63, 130], 4, 2, 64, False, None, True),
        ([700, 3], 4, 2, 32, True, None, True),
        ([300, 129], 6, 6, 80, True, 100, True),
        ([0, 77], 2, 2, 16, False, None, False),
        ([600], 2, 1, 128, False, 50, True),
        ([600, 10], 2, 1, 64, False, 50, False),
    ],
)
def test_packed_attention(lengths, heads, kv_heads, dim, alibi, window, causal):
    total = sum(lengths)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    qkv = normal(total, heads + 2 * kv_heads, dim).bfloat16()
    settings = {
        "max_query_len": max(lengths), "softmax_scale": dim**-0.5, "window": window, "causal": causal,
        "alibi_slopes": alibi_slopes(heads) if alibi else None, "return_lse": True,
    }  # fmt: skip
    dout = normal(total, heads, dim, seed=5).bfloat16()

    def run(function, x, **more):
        x = x.detach().requires_grad_()
        out, lse = function(*x.split((heads, kv_heads, kv_heads), dim=1), starts, **settings, **more)
        out.backward(dout.to(out.dtype))
        return out.detach(), lse.detach(), x.grad

    out, lse, grad = run(attention_prefill, qkv, backend="cpp")
    exact_out, exact_lse, exact_grad = run(attention_prefill_reference, qkv.double())
    other_out, _, other_grad = run(attention_prefill_reference, qkv)
    eps = torch.finfo(torch.bfloat16).eps
    assert worst_row(out, exact_out) <= 2 * worst_row(other_out, exact_out) + eps
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)

    def distance(g):  # a row's gradient can be zero by cancellation, so rows are measured by the largest of them
        return float((g.double() - exact_grad).norm(dim=-1).max() / exact_grad.norm(dim=-1).max())

    assert distance(grad) <= 2 * distance(other_grad) + eps


def test_attention_of_one_sequence_does_not_see_its_neighbours():
    x = normal(90, 3, 32).bfloat16()
    starts = torch.tensor([0, 20, 90], dtype=torch.int32)
    settings = {"softmax_scale": 0.2, "slopes": None, "window": None, "causal": True, "return_lse": False}
    both = cpu_prefill.attention(*x.split(1, dim=1), starts, **settings)
    alone = cpu_prefill.attention(*x[20:].split(1, dim=1), torch.tensor([0, 70], dtype=torch.int32), **settings)
    assert torch.equal(both[20:], alone)
