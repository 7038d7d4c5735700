import pytest

from specialize.kinds import agreement, consensus, form_fault, kinds_of, split_fields, taken_as_text
from specialize.records import Seed


def make(kind, rows):
    return [Seed(f"{kind}-{i}", kind, f"Do {kind}.", text, output) for i, (text, output) in enumerate(rows)]


SENTENCE = "The patient had gout and a fever that lasted for nine days."
NER = make(
    "ner",
    [
        (SENTENCE, "gout <Disease>, fever <Disease>"),
        ("It was flu, not measles, said the doctor.", "flu <Disease>, measles <Disease>"),
    ],
)
PASSAGE = " ".join(["A long abstract with many words in it."] * 12)
QA = make("qa", [(f"Abstract: {PASSAGE}\nQuestion: Is it {i}?", "yes" if i % 2 else "no") for i in range(6)])
SYNONYMS = make(
    "synonyms", [("Gout", "podagra, urate arthritis"), ("Fever", "pyrexia, high temperature, febrile state")]
)
TITLE = make(
    "title", [(PASSAGE, "What a long abstract says about words."), (PASSAGE + " More.", "Words, and what is in them.")]
)


def test_kinds_are_read_off_the_seeds():
    ner, qa, synonyms, title = kinds_of([*NER, *QA, *SYNONYMS, *TITLE])
    assert (ner.form, ner.unit, ner.extractive, set(ner.labels)) == ("entities", "sentence", True, {"disease"})
    assert (qa.form, qa.unit, qa.fields, qa.material) == ("label", "fields", ("Abstract", "Question"), "Abstract")
    assert qa.labels == {"yes", "no"}
    assert (synonyms.form, synonyms.unit, synonyms.extractive) == ("list", "written", False)
    assert (title.form, title.unit) == ("text", "passage")
    for kind in (ner, qa, synonyms, title):
        assert all(form_fault(kind, s.output, s.input) == "" for s in kind.seeds)


def test_chance_agreement_is_how_often_two_labels_of_the_seeds_are_equal():
    for outputs in (["yes", "no", "Yes", "yes"], [*"xyzxyz", "z"], ["yes"] * 3):
        [kind] = kinds_of(make("qa", [(f"Is it {i}? {PASSAGE}", output) for i, output in enumerate(outputs)]))
        assert kind.form == "label"
        pairs = [a.lower() == b.lower() for a in outputs for b in outputs]
        assert kind.chance_agreement == pytest.approx(sum(pairs) / len(pairs))
    [ner] = kinds_of(NER)
    assert ner.chance_agreement == 0


def labelled(*labels):
    return make("sort", [(f"{SENTENCE} {i}", labels[i % len(labels)]) for i in range(3 * len(labels))])


@pytest.mark.parametrize("words", [1, 3, 4, 8])
def test_outputs_that_recur_are_labels_up_to_eight_words(words):
    [kind] = kinds_of(labelled(" ".join(["very"] * (words - 1) + ["good"]), "Bad."))
    assert kind.form == "label" and "bad" in kind.labels and len(kind.labels) == 2
    assert taken_as_text(kind) == ""
    assert form_fault(kind, "bad", SENTENCE) == ""
    assert form_fault(kind, "very bad", SENTENCE) == "label not among those of the seeds"
    assert agreement(kind, ["bad", "Bad.", "very good"]) == pytest.approx(1 / 3)  # equal or not, whatever they share


def test_longer_outputs_that_recur_are_text_and_it_is_said():
    [kind] = kinds_of(labelled("The claim is supported by all that the passage says here.", "It is not."))
    assert kind.form == "text"
    note = taken_as_text(kind)
    assert '"sort": its 6 seeds have 2 different outputs' in note and "9 words" in note and "at most 8" in note
    # lists that come twice are lists, and texts of their own are nothing to speak of
    [names] = kinds_of(labelled("high blood pressure, low mood", "fever, cough of long standing"))
    assert names.form == "list"
    assert not any(map(taken_as_text, kinds_of([*NER, *QA, *SYNONYMS, *TITLE])))


def test_fields():
    assert split_fields("Abstract: one\ntwo\nQuestion: three?") == [("Abstract", "one\ntwo"), ("Question", "three?")]
    assert split_fields("no field here") is None


def test_consensus_of_entities_is_the_sample_nearest_to_the_others():
    [kind] = kinds_of(NER)
    samples = ["nine <Disease>", "gout <Disease>, fever <Disease>", "gout <Disease>", "fever <Disease>, gout <Disease>"]
    assert consensus(kind, samples) == "gout <Disease>, fever <Disease>"
    assert consensus(kind, []) == ""


def test_consensus_of_labels_and_texts():
    [qa] = kinds_of(QA)
    assert consensus(qa, ["yes", "no", "No"]) == "no"
    assert consensus(qa, ["yes", "no"]) == "yes"  # the earlier sample wins a tie
    assert consensus(None, ["a b c d", "a b c e", "x y"]) == "a b c d"


def test_agreement():
    [ner] = kinds_of(NER)
    [qa] = kinds_of(QA)
    assert agreement(qa, ["yes", "Yes.", "no"]) == pytest.approx(1 / 3)
    assert agreement(ner, ["gout <Disease>", "gout <Disease>, fever <Disease>"]) == pytest.approx(2 / 3)
    assert agreement(None, ["same words here", "same words here"]) == 1.0
    assert agreement(ner, ["gout <Disease>"]) == 1.0
