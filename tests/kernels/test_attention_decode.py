import pytest
import torch
from proofs import assert_as_good, poisoned, prove, widen
from specialize.kernels import attention_paged as kernels
from specialize.kernels.attention_decode import attention_paged, attention_paged_reference
from specialize.kernels.attention_specs import PAGED, paged_inputs

FP8 = {"contexts": [80, 40, 19], "queries": [1, 1, 9], "H": 8, "K": 2, "D": 112, "S": 32, "cache": "fp8", "alibi": True}
BIG = (
    {"contexts": [700, 1500, 513, 512], "H": 4, "K": 4, "D": 128, "S": 16, "alibi": True},
    {"contexts": [1500, 700], "queries": [1, 300], "H": 8, "K": 2, "D": 128, "S": 64},
    {"contexts": [900, 800, 1025], "H": 4, "K": 2, "D": 128, "S": 256, "groups": [[2, 768], [1, 0]], "alibi": True},
    {"contexts": [700] * 40 + [90] * 3, "H": 8, "K": 2, "D": 64, "S": 16, "groups": [[33, 640], [7, 48], [3, 80]]},
    {**FP8, "contexts": [700, 513, 300]},
    {"contexts": [700, 513, 300], "H": 4, "K": 4, "D": 128, "S": 64, "cache": "fp8"},
    {"contexts": [700, 513, 300], "H": 4, "K": 4, "D": 128, "S": 64, "cache": "int8", "alibi": True},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", PAGED.test_cases, ids=str)
def test_triton_is_as_good_as_the_reference(case, dtype):
    prove(PAGED, case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*PAGED.test_cases, FP8, *BIG], ids=str)
def test_on_the_device(case, dtype):
    prove(PAGED, case, dtype, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (7, 1), (32, 2)])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 112, 128])
def test_sweep(page_size, heads, head_dim):
    around = [page_size - 1, page_size, page_size + 1, 1, 511, 512, 513]
    for extra in ({"alibi": True}, {"window": 33}, {"queries": [1, 1, 1, 1, 1, 13, 77]}):
        case = {"contexts": around, "H": heads[0], "K": heads[1], "D": head_dim, "S": page_size, **extra}
        for dtype in (torch.float32, torch.float16):
            prove(PAGED, case, dtype)


@pytest.mark.parametrize("case", PAGED.test_cases, ids=str)
def test_torch_backend_is_as_good_as_the_reference(case):
    inputs = PAGED.make_inputs(case, "cpu", torch.float32, 1)
    ours = attention_paged(**inputs, backend="torch")
    torch.testing.assert_close(ours, attention_paged_reference(**widen(inputs)).float(), atol=1e-5, rtol=1e-5)


def test_a_decode_alone_gives_the_same_bits():
    case = {"contexts": [600, 40, 1100, 512], "H": 4, "K": 2, "D": 32, "S": 16, "alibi": True}
    inputs = paged_inputs(case, "cpu", torch.float32, 4)
    together = attention_paged(**inputs, backend="triton")
    for row, context in enumerate(case["contexts"]):
        alone = inputs | {name: inputs[name][row : row + 1] for name in ("q", "page_table", "context_lens")}
        alone |= {"query_starts": inputs["query_starts"][:2], "max_context_len": context, "num_decodes": 1}
        assert torch.equal(attention_paged(**alone, backend="triton")[0], together[row])


@pytest.mark.parametrize("split", [16, 64, 512])
def test_any_span_gives_the_same_answer(split, monkeypatch):
    inputs = paged_inputs(PAGED.test_cases[1], "cpu", torch.float32, 4)
    truth = attention_paged_reference(**widen(inputs))
    reference = attention_paged_reference(**inputs)
    defaults = list(kernels.launch_paged.__defaults__)
    monkeypatch.setattr(kernels.launch_paged, "__defaults__", (*defaults[:-1], split))
    with poisoned():
        assert_as_good(attention_paged(**inputs, backend="triton"), reference, truth)


GROUPS = [[[3, 48]], [[1, 0], [2, 80]], [[2, 64], [1, 0]], [[0, 0], [3, 32], [0, 0]]]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_a_shared_prefix_changes_nothing_but_rounding(groups):
    case = {"contexts": [100, 90, 81, 120], "queries": [1, 1, 1, 30], "decodes": 3, "H": 4, "K": 2, "D": 32, "S": 16}
    inputs = paged_inputs(case | {"groups": groups, "alibi": True}, "cpu", torch.float32, 8)
    shared = attention_paged(**inputs, backend="triton")
    separate = attention_paged(**(inputs | {"max_prefix_len": 0}), backend="triton")
    torch.testing.assert_close(shared, separate, atol=1e-6, rtol=1e-5)
    assert torch.equal(shared[3:], separate[3:])


def test_a_group_of_more_rows_than_a_tile():
    case = {"contexts": [50 + n for n in range(40)], "H": 6, "K": 2, "D": 16, "S": 16, "groups": [[37, 48], [3, 32]]}
    prove(PAGED, case, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_prefix_len": 100}, "max_prefix_len is 100; allowed: 0 to 99"),
        ({"prefix_groups": None}, "prefix_groups is None"),
        ({"prefix_groups": torch.tensor([0, 3])}, "prefix_groups is torch.int64"),
        ({"prefix_lens": torch.zeros(2, dtype=torch.int32)}, "prefix_lens is"),
        ({"prefix_groups": torch.tensor([0, 2], dtype=torch.int32)}, "rising from 0 to num_decodes, 3"),
        ({"prefix_lens": torch.tensor([48, 48, 32], dtype=torch.int32)}, "one length in each group"),
        ({"prefix_lens": torch.tensor([40] * 3, dtype=torch.int32)}, "whole pages of 16"),
        ({"prefix_lens": torch.tensor([96] * 3, dtype=torch.int32)}, "less than the context"),
        ({"context_lens": torch.tensor([100, 48, 81], dtype=torch.int32)}, "less than the context"),
        ({"page_table": torch.arange(24, dtype=torch.int32).view(3, 8)}, "page_table is different in decodes 0 to 2"),
    ],
)
def test_wrong_groups_are_named(change, message):
    case = {"contexts": [100, 90, 81], "H": 4, "K": 2, "D": 32, "S": 16, "groups": [[3, 48]]}
    with pytest.raises(ValueError, match=message):
        attention_paged(**(PAGED.make_inputs(case, "cpu", torch.float32, 0) | change))


GOOD = {"contexts": [20, 33, 40], "queries": [1, 1, 5], "H": 4, "K": 2, "D": 32, "S": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_cache": torch.zeros(3, 16, 2, 32)}, "argument k_cache, v_cache is"),
        ({"page_table": torch.zeros(3, 2, dtype=torch.int64)}, "argument page_table is torch.int64"),
        ({"context_lens": torch.tensor([20, 33], dtype=torch.int32)}, "argument context_lens is"),
        ({"context_lens": torch.tensor([20, 33, 4], dtype=torch.int32)}, "context_lens is 4 for sequence 2"),
        ({"num_decodes": 3}, "5 queries in decode 2; allowed: 1 query"),
        ({"num_decodes": 4}, "argument num_decodes is 4"),
        ({"max_context_len": 10**6}, "argument max_context_len is 1000000"),
        ({"max_context_len": 30}, "argument context_lens is 33 for sequence 1"),
        ({"k_scale": torch.ones(3)}, "argument k_scale is"),
        ({"backend": "flash"}, "backend 'flash'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    inputs = PAGED.make_inputs(GOOD, "cpu", torch.float32, 0) | change
    with pytest.raises(ValueError, match=f"attention_paged: .*{message}"):
        attention_paged(**inputs)
