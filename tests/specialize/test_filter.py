"""The near-duplicate filter against brute force, and every reason of rejection."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import table_lcs

from specialize import filter as rules
from specialize.kinds import kinds_of
from specialize.metrics import rouge_words
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


def test_near_duplicates_are_quick_among_many():
    chooser = random.Random(0)
    words = [f"w{i}" for i in range(3000)]
    texts = [" ".join(chooser.choices(words, k=chooser.randint(6, 30))) for _ in range(20_000)]
    pool = rules.NearDuplicates(0.7, texts)
    started = time.perf_counter()
    for text in texts[:20]:
        assert pool.find(text)[1] == 1.0
        assert pool.find(" ".join(chooser.choices(words, k=18))) is None
    assert (time.perf_counter() - started) / 40 < 0.1


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
    assert found["tasks"]["t"] == {"examples": 2, "overlapping": 1}
