import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import rows
from specialize.train.data import (
    TrainExample,
    build_micro_batches,
    encode_examples,
    fingerprint_examples,
    fit_examples,
    pack,
    step_indices,
)

from specialize.errors import InputError


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 80))
def test_packing_keeps_every_row_once_and_the_budget(lengths, budget):
    bins = pack(lengths, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or sum(lengths[i] for i in b) <= budget for b in bins)
    assert bins == pack(lengths, budget)
    if lengths and max(lengths) <= budget:  # no two bins could have been one
        used = sorted(sum(lengths[i] for i in b) for b in bins)
        assert len(bins) == 1 or used[0] + used[1] > budget


def test_best_fit_fills_the_budget():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.normal(380, 95, 1000), 16, 512).astype(int).tolist()  # like abstracts with a question
    assert sum(lengths) / (len(pack(lengths, 4096)) * 4096) >= 0.98


@pytest.mark.parametrize("budget", [4096, 8192])
def test_no_fewer_bins_could_hold_rows_like_abstracts(budget):
    for seed in range(3):
        generator = np.random.default_rng(seed)
        lengths = np.clip(generator.normal(380, 95, 1000), 16, 512).astype(int).tolist()
        bins = pack(lengths, budget)
        assert len(bins) == -(-sum(lengths) // budget)
        fills = sorted(sum(lengths[i] for i in b) / budget for b in bins)
        assert np.mean(fills[1:]) >= 0.98  # what is left over lies in one partial bin


def test_subset_sums_help_where_best_fit_needs_more_bins():
    lengths = [5, 4, 4, 3, 2, 2]  # of 10 best fit fills 5 + 4, 4 + 3 + 2 and a third bin with the last 2
    assert sorted(sorted(lengths[i] for i in b) for b in pack(lengths, 10)) == [[2, 3, 5], [2, 4, 4]]
    generator = np.random.default_rng(7)
    awkward = generator.integers(700, 760, 1000).tolist()
    assert len(pack(awkward, 8192)) <= 91  # 90 is the least there could be, best fit alone needs 93


def test_an_epoch_shows_every_row_once_in_an_order_of_its_own():
    steps = [step_indices(s, num_examples=10, batch_size=4, seed=1) for s in range(6)]
    assert [len(s) for s in steps] == [4, 4, 2, 4, 4, 2]
    first, second = [i for s in steps[:3] for i in s], [i for s in steps[3:] for i in s]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first[:4] != step_indices(0, num_examples=10, batch_size=4, seed=2)
    assert step_indices(4, num_examples=10, batch_size=4, seed=1, shuffle=False) == [4, 5, 6, 7]


def test_long_rows_are_cut_on_the_left_or_dropped_and_counted():
    examples = [TrainExample(range(10), [90, 91]), TrainExample([1], range(20, 30)), TrainExample([1, 2], [3])]
    kept, report = fit_examples(examples, max_length=6, long_examples="truncate")
    assert [(list(e.prompt_ids), list(e.response_ids)) for e in kept] == [([6, 7, 8, 9], [90, 91]), ([1, 2], [3])]
    assert (report.num_truncated, report.num_dropped, report.longest) == (1, 1, 12)
    kept, report = fit_examples(examples, max_length=6, long_examples="drop")
    assert len(kept) == 1 and (report.num_truncated, report.num_dropped) == (0, 2)
    with pytest.raises(InputError, match="row 1: 12 tokens, but max_length is 6"):
        fit_examples(examples, max_length=6, long_examples="error")
    with pytest.raises(InputError, match=r"all 1 rows are longer than max_length 6 \(longest 11\)"):
        fit_examples(examples[1:2], max_length=6)


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (TrainExample([1, 2], [], name="seed 7"), "seed 7: the response is empty"),
        (TrainExample([], [5]), "row 1: the prompt is empty"),
        (TrainExample([1], [2], weight=float("nan")), "row 1: weight nan"),
        (TrainExample([1], [2, 3], counted=[True]), "row 1: of 2 response tokens 1 of 1 carry a loss"),
        (TrainExample([1], [2, 3], counted=[False, False]), "row 1: of 2 response tokens 0 of 2 carry a loss"),
        (TrainExample([], [2, 3], counted=[True, False]), "row 1: the prompt is empty"),
    ],
)
def test_unusable_rows_are_named(example, said):
    with pytest.raises(InputError, match=said):
        fit_examples([example], max_length=10)


def test_text_without_a_prompt_is_learned_from_its_second_token_on():
    kept, _ = fit_examples([TrainExample([], [5, 6, 7])], max_length=10)
    assert (list(kept[0].prompt_ids), list(kept[0].response_ids)) == ([5], [6, 7])


@pytest.mark.parametrize("normalise", ["tokens", "examples"])
def test_losses_sit_on_response_tokens_only_and_weights_sum_to_one(normalise):
    examples = rows(7)
    parts = build_micro_batches(examples, max_batch_tokens=40, device="cpu", normalise=normalise)
    assert len(parts) > 1 and sum(p.num_tokens for p in parts) == sum(e.num_tokens for e in examples)
    assert sum(float(p.weights.sum()) for p in parts) == pytest.approx(1.0)
    by_name = {e.name: e for e in examples}
    for part in parts:
        assert part.batch.num_tokens <= 40
        targets, at = part.targets.tolist(), 0
        for sequence, name in enumerate(part.names):
            example = by_name[name]
            start, stop = part.batch.query_starts[sequence : sequence + 2].tolist()
            count = len(example.response_ids)
            assert part.batch.token_ids[start:stop].tolist() == [*example.prompt_ids, *example.response_ids[:-1]]
            assert part.loss_rows[at : at + count].tolist() == list(range(stop - count, stop))
            assert targets[at : at + count] == list(example.response_ids)
            at += count
        assert at == len(targets) == part.num_response_tokens


def test_a_row_of_weight_zero_counts_for_nothing():
    examples = [TrainExample([1], [2, 3], weight=0.0), TrainExample([4], [5], weight=2.0)]
    (part,) = build_micro_batches(examples, max_batch_tokens=10, device="cpu")
    assert part.weights.tolist() == [0.0, 0.0, 1.0]


def test_fingerprints_see_ids_borders_and_weights():
    base = [TrainExample([1, 2], [3])]
    prints = {
        fingerprint_examples(e)
        for e in (base, [TrainExample([1], [2, 3])], [TrainExample([1, 2], [4])], [TrainExample([1, 2], [3], 2.0)])
    }
    assert len(prints) == 4 and fingerprint_examples(base) in prints
    halves = [fingerprint_examples([TrainExample([1], [2, 3], counted=c)]) for c in ((True, False), (False, True), ())]
    assert len(set(halves)) == 3


class Letters:
    eos_ids = (0,)

    def encode(self, text, add_special_tokens=True):
        return ([1] if add_special_tokens else []) + [ord(c) for c in text]


def test_texts_become_rows_that_end():
    (row,) = encode_examples(Letters(), [("ab", "c")], weights=[0.5], names=["x"])
    assert (row.prompt_ids, row.response_ids, row.weight, row.name) == ([1, 97, 98], [99, 0], 0.5, "x")
    with pytest.raises(InputError, match="row 2: the response is empty"):
        encode_examples(Letters(), [("a", "b"), ("a", " ")])


def test_batches_are_torch_tensors_of_the_right_type():
    (part,) = build_micro_batches(rows(2), max_batch_tokens=100, device="cpu")
    assert (part.loss_rows.dtype, part.targets.dtype, part.weights.dtype) == (torch.int64, torch.int64, torch.float32)
