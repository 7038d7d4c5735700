import pytest
import torch
from proofs import assert_as_good, poisoned, prove, widen
from specialize.kernels.lora_grouped import DECODE_DEFAULT, SPEC, lora_grouped_add_
from specialize.kernels.tuning import override


def _prove_both_forms(case, dtype, device):
    """Decode has a kernel that goes by tokens and one that goes by adapters."""
    for by_token in (True, False):
        rank = max(16, 1 << (case["R"] - 1).bit_length())
        bucket = f"decode {rank} {1 << (case['in'] - 1).bit_length()}"
        with override("lora_grouped_add_", bucket, DECODE_DEFAULT | {"BY_TOKEN": by_token, "BK": 64, "BN": 64}):
            prove(SPEC, case, dtype, device=device)
        if "lens" in case:
            return


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", SPEC.test_cases, ids=str)
def test_triton_is_as_good_as_the_reference(case, dtype):
    _prove_both_forms(case, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*SPEC.test_cases, *SPEC.bench_cases], ids=str)
def test_on_the_device(case, dtype):
    prove(SPEC, case, dtype, device="cuda")
    if case in SPEC.test_cases:
        _prove_both_forms(case, dtype, "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("segments", ["same", "different", "uniform", "skewed", "none"])
@pytest.mark.parametrize("lens", [(1,) * 33, (1, 1, 1, 65), (15, 16, 17), (0, 0, 5), (127, 1, 129)])
@pytest.mark.parametrize("rank", [1, 16, 31])
@pytest.mark.parametrize("width", [31, 128, 513])
def test_sweep(lens, rank, width, segments):
    case = {"lens": lens, "in": width, "out": width + 7, "R": rank, "N": 4, "segments": segments}
    for dtype in (torch.float32, torch.float16):
        prove(SPEC, case, dtype)


def _without_weight(case, dtype):
    inputs = SPEC.make_inputs(case, "cpu", dtype, 3)
    del inputs["weight"]
    return inputs, torch.randn(inputs["x"].shape[0], case["out"], generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SPEC.test_cases, ids=str)
def test_torch_backend_is_as_good_as_the_reference(case, dtype):
    inputs = SPEC.make_inputs(case, "cpu", dtype, 1)
    with poisoned():
        ours = SPEC.run(**inputs, backend="torch")
    assert_as_good(ours, SPEC.reference(**inputs), SPEC.reference(**widen(inputs)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", [SPEC.test_cases[2], SPEC.test_cases[7]], ids=str)
def test_rows_without_an_adapter_keep_every_bit(case, backend):
    inputs, y = _without_weight(case, torch.float16)
    inputs["adapter_index"][2] = -1
    out = lora_grouped_add_(y.clone(), **inputs, backend=backend)
    lens = inputs["query_starts"].diff().long()
    idle = inputs["adapter_index"].repeat_interleave(lens) < 0
    assert idle.any() and not idle.all()
    assert torch.equal(out[idle], y[idle])
    assert not torch.equal(out[~idle], y[~idle])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_zero_padded_rank_changes_nothing(backend):
    inputs, y = _without_weight({"B": 6, "in": 40, "out": 24, "R": 5, "N": 2}, torch.float32)
    padded = dict(inputs)
    padded["a"] = torch.nn.functional.pad(inputs["a"], (0, 0, 0, 3))
    padded["b"] = torch.nn.functional.pad(inputs["b"], (0, 3))
    out = lora_grouped_add_(y.clone(), **inputs, backend=backend)
    torch.testing.assert_close(out, lora_grouped_add_(y.clone(), **padded, backend=backend))


def test_a_decode_row_does_not_depend_on_its_neighbours():
    inputs, y = _without_weight({"B": 7, "in": 600, "out": 40, "R": 8, "N": 3}, torch.float32)
    batch = lora_grouped_add_(y.clone(), **inputs, backend="triton")
    for row in range(7):
        alone = inputs | {
            "x": inputs["x"][row : row + 1],
            "adapter_index": inputs["adapter_index"][row : row + 1],
            "query_starts": torch.tensor([0, 1], dtype=torch.int32),
        }
        assert torch.equal(lora_grouped_add_(y[row : row + 1].clone(), **alone, backend="triton")[0], batch[row])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"a": torch.zeros(2, 4, 15)}, "a"),
        ({"b": torch.zeros(2, 24, 3)}, "b"),
        ({"y": torch.zeros(5, 24)}, "y"),
        ({"y": torch.zeros(6, 24, dtype=torch.float16)}, "y"),
        ({"scalings": torch.zeros(3)}, "scalings"),
        ({"adapter_index": torch.zeros(6, dtype=torch.int64)}, "adapter_index"),
        ({"query_starts": torch.zeros(6, dtype=torch.int32)}, "query_starts"),
        ({"max_query_len": -1}, "max_query_len"),
    ],
)
def test_what_does_not_fit_is_refused(change, name):
    inputs, y = _without_weight({"B": 6, "in": 16, "out": 24, "R": 4, "N": 2}, torch.float32)
    with pytest.raises(ValueError, match=f"lora_grouped_add_: argument {name} .*allowed"):
        lora_grouped_add_(**({"y": y} | inputs | change))
