import pytest
import torch
from proofs import assert_as_good, outputs_and_gradients, prove, widen
from specialize.kernels import tuning
from specialize.kernels.attention_prefill import alibi_slopes, attention_prefill, attention_prefill_reference
from specialize.kernels.attention_specs import PREFILL

# Small tiles, so that small shapes meet whole, masked and partial tiles.
TILES = {"BLOCK_M": 32, "BLOCK_N": 16}


@pytest.fixture(autouse=True)
def small_tiles(request):
    if "device" in request.node.name:
        yield
        return
    buckets = [(op, f"{bits}bit-d{d}") for op in ("attention_prefill", "attention_dkdv", "attention_dq")
               for bits in (16, 32) for d in (16, 32, 40, 64, 80, 112, 256)]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_overrides", dict.fromkeys(buckets, TILES))
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", PREFILL.test_cases, ids=str)
def test_triton_is_as_good_as_the_reference(case, dtype):
    prove(PREFILL, case, dtype)


BIG = (
    {"lens": [700, 1, 0, 300], "H": 4, "K": 2, "D": 128, "alibi": True, "pass": "both"},
    {"lens": [129, 128, 127], "H": 3, "K": 1, "D": 112, "alibi": True, "pass": "both"},
    {"lens": [513], "H": 9, "K": 3, "D": 64, "pass": "both"},
    {"lens": [300, 65], "H": 2, "K": 2, "D": 96, "window": 70, "pass": "both"},
    {"lens": [257], "H": 2, "K": 1, "D": 256, "alibi": True, "pass": "both"},
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*PREFILL.test_cases, *BIG], ids=str)
def test_on_the_device(case, dtype):
    prove(PREFILL, case, dtype, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (6, 1)])
def test_sweep(head_dim, heads):
    for lens in ([1], [2, 31], [32, 33], [0, 17, 0], [64, 65]):
        for extra in ({"alibi": True}, {"window": 13}, {"causal": False}, {"alibi": True, "window": 40}):
            case = {"lens": lens, "H": heads[0], "K": heads[1], "D": head_dim, "pass": "both", **extra}
            for dtype in (torch.float32, torch.float16):
                prove(PREFILL, case, dtype)


@pytest.mark.parametrize("case", PREFILL.test_cases, ids=str)
def test_torch_backend_is_right(case):
    inputs = PREFILL.make_inputs(case, "cpu", torch.float32, 1)
    ours = outputs_and_gradients(lambda **kw: attention_prefill(**kw, backend="torch"), inputs)
    reference = outputs_and_gradients(attention_prefill_reference, inputs)
    truth = outputs_and_gradients(attention_prefill_reference, widen(inputs))
    for a, b, c in zip(ours, reference, truth, strict=True):
        torch.testing.assert_close(a, c.float(), atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(b, c.float(), atol=2e-5, rtol=2e-5)


def test_the_reference_s_gradient_is_autograd_s():
    inputs = PREFILL.make_inputs(PREFILL.test_cases[3], "cpu", torch.float64, 0)
    qkv = [inputs[name].detach().requires_grad_() for name in "qkv"]
    rest = {k: v for k, v in inputs.items() if k not in "qkv"}

    def run(q, k, v):
        return attention_prefill_reference(
            q[:9], k[:9], v[:9], torch.tensor([0, 4, 9]), **(rest | {"query_starts": None})
        )

    rest.pop("query_starts")
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention_prefill_reference(q, k, v, torch.tensor([0, 4, 9]), **rest),
        [x[:9, :, :4].detach().clone().requires_grad_() for x in qkv],
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_log_sum_exp(backend):
    inputs = PREFILL.make_inputs(PREFILL.test_cases[1] | {"pass": "forward"}, "cpu", torch.float32, 3)
    _, lse = attention_prefill(**inputs, return_lse=True, backend=backend)
    _, truth = attention_prefill_reference(**widen(inputs), return_lse=True)
    torch.testing.assert_close(lse, truth.float(), atol=1e-5, rtol=1e-5)


def test_a_sequence_alone_gives_the_same_bits():
    case = {"lens": [37, 64, 5], "H": 2, "K": 1, "D": 32, "alibi": True, "pass": "both"}
    inputs = PREFILL.make_inputs(case, "cpu", torch.float32, 5)
    together = outputs_and_gradients(lambda **kw: attention_prefill(**kw, backend="triton"), inputs)
    rows = slice(37, 101)
    alone_inputs = inputs | {k: inputs[k].detach()[rows].requires_grad_() for k in "qkv"}
    alone_inputs |= {"query_starts": torch.tensor([0, 64], dtype=torch.int32), "max_query_len": 64}
    alone = attention_prefill(**alone_inputs, backend="triton")
    assert torch.equal(alone, together[0][rows])
    douts = torch.randn(together[0].shape, generator=torch.Generator().manual_seed(0))[rows]
    gradients = torch.autograd.grad(alone, [alone_inputs[k] for k in "qkv"], douts)
    for a, b in zip(gradients, together[1:], strict=True):
        assert torch.equal(a, b[rows])


def _assert_nan_stays(head_dim, dtype, device):
    """NaN in a sequence, its output gradient too, reaches neither neighbour, forward or backward."""
    case = {"lens": [20, 20, 20], "H": 2, "K": 2, "D": head_dim, "pass": "both"}
    inputs = PREFILL.make_inputs(case, device, dtype, 6)
    qkv = [inputs[name].detach().clone() for name in "qkv"]
    dout = torch.randn_like(qkv[0])
    for x in (*qkv, dout):
        x[20:40] = float("nan")
    leaves = [x.requires_grad_() for x in qkv]
    out = attention_prefill(**(inputs | dict(zip("qkv", leaves, strict=True))), backend="triton")
    for x in (out, *torch.autograd.grad(out, leaves, dout)):
        assert x[:20].isfinite().all() and x[40:].isfinite().all() and x[20:40].isnan().all()


def test_another_sequence_s_nan_stays_there():
    _assert_nan_stays(16, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 112, 128])
def test_another_sequence_s_nan_stays_there_on_the_device(head_dim):
    _assert_nan_stays(head_dim, torch.bfloat16, "cuda")


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 9, 12, 40, 64, 112])
@pytest.mark.parametrize("bias_max", [8, 4.0])
def test_slopes_follow_mpt(heads, bias_max):
    rounded = 1
    while rounded < heads:
        rounded *= 2
    slopes = [2 ** -(bias_max * i / rounded) for i in range(1, rounded + 1)]
    if rounded != heads:
        slopes = (slopes[1::2] + slopes[0::2])[:heads]
    torch.testing.assert_close(alibi_slopes(heads, bias_max), torch.tensor(slopes), rtol=1e-6, atol=0)


GOOD = {"lens": [5, 4], "H": 4, "K": 2, "D": 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(9, 4)}, r"argument q is of shape \(9, 4\); allowed: \[T,H,D\]"),
        ({"k": torch.zeros(9, 3, 32)}, "argument k is of 3 heads; allowed: a divisor"),
        ({"v": torch.zeros(8, 2, 32)}, "argument v is of shape"),
        ({"k": torch.zeros(9, 2, 16)}, "argument k is of head dim 16"),
        ({"k": torch.zeros(9, 2, 32, dtype=torch.float16)}, "argument k is torch.float16"),
        ({"q": torch.zeros(9, 4, 300)}, "head dim 300; allowed: 1 to 256"),
        ({"query_starts": torch.tensor([0, 5], dtype=torch.int32)}, "argument query_starts is"),
        ({"query_starts": torch.tensor([0.0, 9.0])}, "argument query_starts is torch.float32"),
        ({"softmax_scale": -1.0}, "argument softmax_scale is -1.0; allowed: a positive number"),
        ({"alibi_slopes": torch.ones(3)}, "argument alibi_slopes is"),
        ({"window": 0}, "argument window is 0"),
        ({"backend": "cuda"}, "backend 'cuda' is not available; allowed: triton"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    inputs = PREFILL.make_inputs(GOOD, "cpu", torch.float32, 0) | change
    with pytest.raises(ValueError, match=f"attention_prefill: .*{message}"):
        attention_prefill(**inputs)


def test_the_reference_rounds_only_what_it_says():
    inputs = PREFILL.make_inputs(PREFILL.test_cases[2], "cpu", torch.float16, 0)
    results = outputs_and_gradients(attention_prefill_reference, inputs)
    truth = outputs_and_gradients(attention_prefill_reference, widen(inputs))
    assert_as_good(results[0], results[0], truth[0])
    assert all(r.dtype == torch.float16 for r in results)
