"""The near-duplicate filter against brute force, and every reason of rejection."""

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import table_lcs

from specialize import filter as rules
from specialize.kinds import kinds_of
from specialize.metrics import rouge_l, rouge_words
from specialize.records import Example, Seed, Task, TaskExample

VOCABULARY = ["find", "list", "the", "all", "disease", "gene", "in", "text", "name", "every", "write", "a"]
TEXTS = st.lists(st.lists(st.sampled_from(VOCABULARY), max_size=12).map(" ".join), max_size=12)


def brute_force(candidate, kept, threshold):
    found = []
    for text in kept:
        a, b = rouge_words(candidate), rouge_words(text)
        f1 = 2 * table_lcs(a, b) / (len(a) + len(b)) if a or b else 1.0
        if f1 > threshold + 1e-12:
            found.append(f1)
    return found


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.lists(st.sampled_from(VOCABULARY), max_size=12).map(" ".join), st.sampled_from([0.3, 0.5, 0.7, 0.9]))
def test_near_duplicates_equal_brute_force(kept, candidate, threshold):
    found = rules.NearDuplicates(threshold, kept).find(candidate)
    expected = brute_force(candidate, kept, threshold)
    assert (found is not None) == bool(expected)
    if found:
        assert any(found[1] == pytest.approx(f1) for f1 in expected)
        assert found[0] in kept


def test_threshold_is_exclusive():
    # LCS 7 of 10 and 10 words: exactly 0.7, which is allowed
    a = "one two three four five six seven eight nine ten"
    b = "one two three four five six seven x y z"
    assert rules.NearDuplicates(0.7, [a]).find(b) is None
    assert rules.NearDuplicates(0.69, [a]).find(b) is not None


def instructions(count, seed):
    """Instructions as models write them: few openings and common words, the domain's terms by Zipf's law."""
    generator = np.random.default_rng(seed)
    openings = ["list all the", "write a short summary of the", "what is the cause of", "name every", "explain how the"]
    share = 1 / np.arange(1, 5001)
    share /= share.sum()
    sizes = generator.integers(3, 28, count)
    words = iter(generator.choice(5000, sizes.sum(), p=share))
    return [f"{openings[i % 5]} " + " ".join(f"w{next(words)}" for _ in range(size)) for i, size in enumerate(sizes)]


def changed(text, generator):
    """The text with a few words left out, put elsewhere or replaced: near-duplicates, and what is just none."""
    words = text.split()
    for _ in range(generator.integers(0, max(1, len(words) // 2))):
        place = generator.integers(len(words))
        word = words.pop(place)
        kind = generator.integers(3)
        if kind:
            words.insert(generator.integers(len(words) + 1), word if kind == 1 else f"x{generator.integers(99)}")
    return " ".join(words)


def best_rouge_l(candidate, kept):
    """The highest ROUGE-L F1 with any kept text as (LCS, words of both), by the textbook's table for all at once."""
    number = {}
    lists = [[number.setdefault(w, len(number)) for w in rouge_words(text)] for text in [candidate, *kept]]
    lengths = np.array([len(words) for words in lists[1:]])
    table = np.full((len(kept), lengths.max()), -1)
    for row, words in enumerate(lists[1:]):
        table[row, : len(words)] = words
    above = np.zeros((lengths.max() + 1, len(kept)), np.int32)
    for word in lists[0]:
        now = np.zeros_like(above)
        for column in range(1, len(above)):
            same = above[column - 1] + 1
            other = np.maximum(above[column], now[column - 1])
            now[column] = np.where(table[:, column - 1] == word, same, other)
        above = now
    best = max(range(len(kept)), key=lambda k: 2 * above[-1, k] / (lengths[k] + len(lists[0])))
    return int(above[-1, best]), int(lengths[best]) + len(lists[0])


def check_among(kept, candidates):
    """Each verdict against the brute force; returns the pool."""
    pool = rules.NearDuplicates(0.7, kept)
    near = 0
    for candidate in candidates:
        found = pool.find(candidate)
        lcs, words = best_rouge_l(candidate, kept)
        assert (found is not None) == (20 * lcs > 7 * words), candidate
        if found is not None:
            near += 1
            assert found[1] == pytest.approx(2 * lcs / words)
    assert 0 < near < len(candidates)
    return pool


def test_few_of_many_kept_texts_are_compared():
    kept = instructions(4000, 0)
    generator = np.random.default_rng(1)
    candidates = instructions(12, 2) + [changed(kept[i], generator) for i in range(0, 4000, 250)]
    pool = check_among(kept, candidates)
    assert pool.compared / len(candidates) < 0.01 * len(kept)


@pytest.mark.slow
def test_a_candidate_among_a_hundred_thousand_takes_under_20_ms():
    kept = instructions(100_000, 0)
    generator = np.random.default_rng(1)
    candidates = instructions(15, 2) + [changed(kept[i], generator) for i in range(0, 100_000, 4000)]
    pool = check_among(kept, candidates)
    seconds = []
    for text in candidates + instructions(200, 3):
        started = time.perf_counter()
        pool.find(text)
        seconds.append(time.perf_counter() - started)
    print(
        f"near-duplicates among {len(kept):,}: median {1e3 * np.median(seconds):.2f} ms, most {1e3 * max(seconds):.2f}"
    )
    assert np.mean(seconds) < 0.02
    assert np.median(seconds) < 0.02


def seeds(kind, rows):
    return [Seed(f"{kind}-{i}", kind, f"Do {kind}.", text, output) for i, (text, output) in enumerate(rows)]


ENTITIES = seeds(
    "ner",
    [("gout and fever here in this text", "gout <Disease>, fever <Disease>"), ("a case of flu today", "flu <Disease>")]
    * 2,
)
LABELS = seeds("qa", [("is it so one", "yes"), ("is it so two", "no"), ("is it so three", "yes"), ("and four", "no")])
FREE = seeds(
    "free", [("some long text to be told", "The heart is large and the rest is small."), ("more", "It is so, as told.")]
)
NER, QA, FREE_KIND = kinds_of([*ENTITIES, *LABELS, *FREE])


@pytest.mark.parametrize(
    ("text", "input", "kind", "finish", "reason"),
    [
        ("", "x", None, "stop", rules.EMPTY),
        ("something said", "x", None, "length", rules.CUT_OFF),
        ("one two three four " * 5, "x", None, "stop", rules.REPETITION),
        ("insert here: [insert name]", "x", None, "stop", rules.PLACEHOLDER),
        ("word " + " ".join(f"w{i}" for i in range(300)), "x", None, "stop", rules.TOO_LONG),
        ("so", "x", FREE_KIND, "stop", rules.TOO_SHORT),
        ("The heart is large and the rest is small.", "x", FREE_KIND, "stop", rules.COPIED_DEMONSTRATION),
        (
            "one two three four five six seven eight",
            "One two three four five  six seven eight",
            None,
            "stop",
            rules.COPIED_INPUT,
        ),
        ("perhaps", "x", QA, "stop", "label not among those of the seeds"),
        ("gout <Gene>", "gout here", NER, "stop", "label not among those of the seeds"),
        ("cancer <Disease>", "gout here", NER, "stop", "span not in the input"),
        ("it is gout", "gout here", NER, "stop", "not in the form of the seeds' answers"),
        ("gout <Disease>", "Gout here", NER, "stop", ""),
        ("Yes", "x", QA, "stop", ""),
        ("The liver is small.", "x", FREE_KIND, "stop", ""),
    ],
)
def test_replies(text, input, kind, finish, reason):
    demonstrations = [seed.output for seed in FREE]
    verdict = rules.check_reply(text, input, kind=kind, finish_reason=finish, demonstrations=demonstrations)
    assert verdict.reason == reason
    assert verdict.kept == (reason == "")


def test_typed_lists_are_no_repetition():
    text = ", ".join(f"name{i} <Disease>" for i in range(12))
    assert not rules.repeats_itself(text)
    assert rules.repeats_itself("flu <Disease>, gout <Disease>, flu <Disease>, flu <Disease>")


def test_instructions():
    check = lambda text: rules.check_instruction(text, min_words=4, max_words=12).reason  # noqa: E731
    assert check("") == rules.EMPTY
    assert check("List genes") == rules.TOO_SHORT
    assert check(" ".join(f"w{i}" for i in range(20))) == rules.TOO_LONG
    assert check("List the [insert thing] of the text") == rules.PLACEHOLDER
    assert check("List every gene that the text names.") == ""


def test_overlap_with_evaluation_data():
    text = " ".join(f"word{i}" for i in range(20))
    task = Task(
        "t", "Do.", "token_f1", (), (), (TaskExample(text, ("x",)), TaskExample("quite short text here", ("y",)))
    )
    overlap = rules.EvaluationOverlap([task], n=8)
    assert overlap.hits("before " + " ".join(text.split()[5:13]) + " after") == {("t", 0)}
    assert overlap.hits(" ".join(text.split()[5:12])) == set()
    assert overlap.hits("Quite short TEXT here!") == {("t", 1)}
    found = overlap.report(
        [Example("r1", "corpus", "k", "i", text, "o"), Example("r2", "corpus", "k", "i", "other", "o")]
    )
    assert found["training_rows"] == 1
    assert found["rows"] == ["r1"]
    assert found["tasks"]["t"] == {"examples": 2, "overlapping": 1, "near_duplicates": 1}


def test_near_duplicates_of_evaluation_inputs_are_those_of_brute_force():
    chooser = random.Random(5)
    words = ["one", "two", "three", "four", "five", "six"]

    def text():
        return " ".join(chooser.choices(words, k=chooser.randint(0, 9)))

    tasks = [
        Task(name, "Do.", "token_f1", (), (), tuple(TaskExample(text(), ("x",)) for _ in range(30))) for name in "ab"
    ]
    rows = [Example(f"r{i}", "corpus", "k", "Do.", text(), "y") for i in range(25)]
    found = rules.EvaluationOverlap(tasks).report(rows)
    count = 0
    for task in tasks:
        near = [max((rouge_l(e.input, [r.input]) for r in rows if r.input), default=0) for e in task.examples]
        near = [score for e, score in zip(task.examples, near, strict=True) if e.input and score > 0.7]
        assert found["tasks"][task.name]["near_duplicates"] == len(near) > 0
        count += len(near)
    assert found["near_duplicates"] == count and len(found["nearest"]) == min(10, count)
    inputs = {row.id: row.input for row in rows}
    for pair in found["nearest"]:
        assert inputs[pair["row"]] == pair["training_input"]
        assert pair["rouge_l"] == pytest.approx(rouge_l(pair["evaluation_input"], [pair["training_input"]]), abs=1e-3)
