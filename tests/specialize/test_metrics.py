"""Metrics against independent formulations: brute-force loops and dynamic programming written for the test alone."""

import itertools
import re
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specialize.metrics import (
    entities,
    entity_counts,
    entity_set,
    interval,
    lcs_length,
    mean_statistic,
    micro_f1_statistic,
    normalise,
    p_value,
    permuted,
    resample,
    rouge_l,
    token_f1,
)

WORDS = st.lists(
    st.sampled_from(["a", "the", "Cell", "cell,", "gene", "<Gene>", "p53", "An", "x.", "yes", "no"]), max_size=9
)


def plain_normalise(text):
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [w for w in re.split(r"\s+", kept) if w and w not in ("a", "an", "the")]


def plain_f1(said, wanted):
    left = list(wanted)
    common = 0
    for word in said:
        if word in left:
            left.remove(word)
            common += 1
    if not said or not wanted:
        return float(said == wanted)
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def table_lcs(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_token_f1_equals_a_plain_count(said, references):
    reply, wanted = " ".join(said), [" ".join(r) for r in references]
    expected = max(plain_f1(plain_normalise(reply), plain_normalise(w)) for w in wanted)
    assert token_f1(reply, wanted) == pytest.approx(expected, abs=1e-12)
    assert normalise(reply).split() == plain_normalise(reply)


@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 5), max_size=30))
def test_lcs_equals_the_table(a, b):
    assert lcs_length(a, b) == table_lcs(a, b)


@given(WORDS, WORDS)
def test_rouge_l_equals_the_definition(said, wanted):
    a, b = (re.findall(r"[a-z0-9]+", " ".join(x).lower()) for x in (said, wanted))
    if a and b:
        common = table_lcs(a, b)
        precision, recall = common / len(a), common / len(b)
        expected = 0.0 if not common else 2 * precision * recall / (precision + recall)
    else:
        expected = float(a == b)
    assert rouge_l(" ".join(said), [" ".join(wanted)]) == pytest.approx(expected, abs=1e-12)


def test_known_token_f1():
    assert token_f1("The Yes.", ["yes"]) == 1.0
    assert token_f1("gout <Disease>", ["gout <Disease>, fever <Disease>"]) == pytest.approx(2 * 1.0 * 0.5 / 1.5)


def test_entities_may_hold_commas_and_types_are_part_of_them():
    assert entities("N, N-dimethyl <Chemical>, DNA <Gene>") == [("N, N-dimethyl", "Chemical"), ("DNA", "Gene")]
    assert entities("fever, cough;pain\nache.") == [("fever", ""), ("cough", ""), ("pain", ""), ("ache", "")]
    assert entity_set("HeLa  Cells <cell>, hela cells <Cell>") == {("hela cells", "cell")}
    assert entity_counts("DNA <Gene>, RNA <Gene>", ["dna <gene>", "RNA <Cell>"]) == (1, 2, 1)
    assert entity_counts("DNA <Cell>", ["DNA <Gene>"]) == (0, 1, 1)


def test_micro_f1_sums_before_it_divides():
    rows = np.array([[1, 1, 1], [0, 3, 1], [2, 2, 4]], dtype=float)
    precision, recall = 3 / 6, 3 / 6
    assert micro_f1_statistic(rows[None])[0] == pytest.approx(2 * precision * recall / (precision + recall))


def test_bootstrap_interval_is_that_of_the_mean():
    rows = np.random.default_rng(0).normal(0.5, 0.2, size=(400, 1))
    found = interval(rows, mean_statistic, seed=3, resamples=4000)
    half = 1.96 * rows.std() / 20
    assert found.value == pytest.approx(rows.mean())
    assert found.low == pytest.approx(rows.mean() - half, abs=0.002)
    assert found.high == pytest.approx(rows.mean() + half, abs=0.002)
    assert interval(rows, mean_statistic, seed=3) == interval(rows, mean_statistic, seed=3)


def test_resamples_of_two_systems_are_paired():
    rows = np.random.default_rng(0).random((50, 1))
    one, other = (resample(r, mean_statistic, seed=5) for r in (rows, rows + 0.1))
    assert np.allclose(other - one, 0.1)


@pytest.mark.parametrize("name", ["mean", "micro"])
def test_the_randomization_test_approaches_all_exchanges(name):
    generator = np.random.default_rng(1)
    if name == "mean":
        statistic, one, other = mean_statistic, generator.random((9, 1)) + 0.2, generator.random((9, 1))
    else:
        statistic = micro_f1_statistic
        said, wanted = generator.integers(1, 5, (2, 9, 1)), generator.integers(1, 5, (2, 9, 1))
        correct = generator.integers(0, 2, (2, 9, 1)) + np.array([[[1]], [[0]]])
        one, other = np.concatenate([np.minimum(correct, np.minimum(said, wanted)), said, wanted], axis=2).astype(float)
    observed = statistic(one[None])[0] - statistic(other[None])[0]
    differences = []
    for exchanged in itertools.product([False, True], repeat=9):
        pairs = [(b, a) if swap else (a, b) for a, b, swap in zip(one, other, exchanged, strict=True)]
        mine, his = (np.array(rows)[None] for rows in zip(*pairs, strict=True))
        differences.append(statistic(mine)[0] - statistic(his)[0])
    exact = np.mean(np.abs(differences) >= abs(observed) - 1e-12)
    drawn = permuted(one, other, statistic, seed=2, resamples=20000)
    assert 0.01 < exact < 0.9
    assert p_value(observed, drawn) == pytest.approx(exact, abs=0.012)


def test_the_same_replies_do_not_differ():
    rows = np.random.default_rng(0).random((5, 1))
    assert p_value(0.0, permuted(rows, rows, mean_statistic, seed=0)) == 1.0
