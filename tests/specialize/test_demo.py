"""The demo's inputs: the ontology reader, our seeds, and that no evaluation text is in corpus or seeds."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from specialize.demo import __main__ as demo
from specialize.demo.build import SYSTEMS, DemoFiles, build_demo, document, lower_first, other_names
from specialize.demo.obo import Synonym, read_obo
from specialize.demo.sentences import write_sentence
from specialize.errors import InputError
from specialize.fetch import fetch
from specialize.filter import EvaluationOverlap
from specialize.kinds import kinds_of
from specialize.records import read_seeds, read_tasks

SEEDS = Path(demo.__file__).with_name("seeds.jsonl")

OBO = r"""format-version: 1.2
data-version: hp/releases/2099-01-01

[Term]
id: X:1
name: Abnormal thing
def: "A \"thing\" that\nis, well\, abnormal." [PMID:1]
comment: Seen often.

[Term]
id: X:2
name: Small thing
synonym: "Tiny thing" EXACT layperson []
synonym: "Tiny THING" EXACT []
synonym: "Smallish thing" RELATED []
synonym: "Small coloured thing" EXACT uk_spelling []
synonym: "ST" EXACT abbreviation []
is_a: X:1 {x="y"} ! Abnormal thing

[Term]
id: X:3
name: obsolete Gone
is_obsolete: true

[Typedef]
id: part_of
name: part of
"""


def test_obo_reader(tmp_path):
    file = tmp_path / "x.obo"
    file.write_text(OBO)
    ontology = read_obo(file)
    assert ontology.version == "hp/releases/2099-01-01"
    assert list(ontology.terms) == ["X:1", "X:2"]
    assert ontology.terms["X:1"].definition == 'A "thing" that is, well, abnormal.'
    small = ontology.terms["X:2"]
    assert small.synonyms[0] == Synonym("Tiny thing", "EXACT", "layperson")
    assert small.parents == ("X:1",) and ontology.children == {"X:1": ("X:2",)}
    assert ontology.ancestors("X:2") == {"X:1"}
    assert other_names(small) == ["Tiny thing"]
    assert document(ontology, small)["text"] == (
        "Small thing is also called Tiny thing. Small thing is a kind of abnormal thing."
    )
    assert document(ontology, ontology.terms["X:1"])["text"].endswith("Kinds of abnormal thing are small thing.")
    assert "small thing" not in document(ontology, ontology.terms["X:1"], {"X:2"})["text"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[Term]\nid: X:1\n", ":1: a .Term. without id or name"),
        ("[Term]\nid: X:1\nname: a\ndef: none\n", ":4: def without a quoted text"),
        ("[Term]\nid: X:1\nname: a\nis_a: X:9\n", "X:9, which is not in the file"),
        ("", "holds no .Term."),
    ],
)
def test_obo_errors(tmp_path, text, says):
    file = tmp_path / "x.obo"
    file.write_text(text)
    with pytest.raises(InputError, match=says):
        read_obo(file)


def test_names_inside_a_sentence():
    assert lower_first("Renal cyst") == "renal cyst"
    assert lower_first("EEG abnormality") == "EEG abnormality"
    assert lower_first("Babinski sign") == "Babinski sign"
    assert lower_first("2-3 toe syndactyly") == "2-3 toe syndactyly"


def test_sentences_name_the_findings_in_order():
    rng = random.Random(1)
    for count in (1, 2, 3, 4) * 50:
        names = [f"finding{n}" for n in range(count)]
        sentence = write_sentence(names, rng)
        assert re.findall(r"finding\d", sentence) == names
        assert sentence[0].isupper() and sentence.endswith(".") and "{" not in sentence and "  " not in sentence


def test_our_seeds():
    seeds = read_seeds(SEEDS)
    assert len(seeds) == 80
    assert len({seed.input for seed in seeds}) == 80
    kinds = {kind.name: kind for kind in kinds_of(seeds)}
    assert len(kinds) >= 8 and all(len(kind.seeds) >= 6 for kind in kinds.values())
    assert len({seed.instruction for seed in seeds}) >= 24
    assert kinds["is_a"].labels == {"yes", "no"}
    assert kinds["organ_system"].labels == set(SYSTEMS.values())
    assert Counter(seed.output for seed in kinds["is_a"].seeds) == {"yes": 6, "no": 6}
    for seed in (*kinds["extract_phenotypes"].seeds, *kinds["body_part"].seeds):
        assert all(part in seed.input for part in seed.output.split(", "))


@pytest.fixture(scope="module")
def ontology():
    return read_obo(fetch("hpo"))


@pytest.fixture(scope="module")
def built(ontology, tmp_path_factory):
    return build_demo(ontology, SEEDS, tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def tasks(built):
    return {task.name: task for task in read_tasks(built.tasks)}


def test_tasks_are_complete(tasks):
    assert len(tasks) >= 4
    for task in tasks.values():
        assert len(task.examples) >= 100 and len(task.shots) >= 5
        inputs = [example.input for example in task.examples] + [shot.input for shot in task.shots]
        assert len(set(inputs)) == len(inputs), task.name
    answers = Counter(example.outputs[0] for example in tasks["is_a"].examples)
    assert set(answers) == {"yes", "no"} and min(answers.values()) >= 55
    systems = Counter(example.outputs[0] for example in tasks["organ_system"].examples)
    assert set(systems) == set(SYSTEMS.values()) and min(systems.values()) >= 15


def test_answers_are_those_of_the_ontology(ontology, tasks):
    by_name = {term.name: term for term in ontology.terms.values()}
    for example in tasks["is_a"].examples:
        first, second = (by_name[line.split(": ", 1)[1]] for line in example.input.splitlines())
        assert (second.id in ontology.ancestors(first.id)) == (example.outputs == ("yes",))
    by_definition = {term.definition: term for term in ontology.terms.values()}
    roots = {label: root for root, label in SYSTEMS.items()}
    for example in tasks["organ_system"].examples:
        assert roots[example.outputs[0]] in ontology.ancestors(by_definition[example.input].id)
    for example in tasks["name_phenotype"].examples:
        assert example.outputs[0].lower() == by_definition[example.input].name.lower()
    for example in tasks["extract_phenotypes"].examples:
        places = [example.input.index(name) for name in example.outputs[0].split(", ")]
        assert places == sorted(places)


def test_nothing_of_the_evaluation_is_in_corpus_or_seeds(ontology, built, tasks):
    documents = [json.loads(line) for line in built.corpus.read_text().splitlines()]
    assert len(documents) == built.num_documents
    corpus = " | ".join(f"{row['title']} | {row['text']}" for row in documents) + built.seeds.read_text()
    folded = " ".join(re.findall(r"[a-z0-9]+", corpus.lower()))
    asked = {example.outputs[0] for example in tasks["name_phenotype"].examples}
    asked |= {example.input.splitlines()[0].split(": ", 1)[1] for example in tasks["is_a"].examples}
    asked |= {example.input.splitlines()[0].split(": ", 1)[1] for example in tasks["synonyms"].examples}
    for example in tasks["extract_phenotypes"].examples:
        asked |= set(example.outputs[0].split(", "))
    titles = {row["title"].lower() for row in documents}
    for name in asked:
        assert name.lower() not in titles
        assert f" {' '.join(re.findall(r'[a-z0-9]+', name.lower()))} " not in f" {folded} ", name
    # Definitions, too: no run of eight words of an evaluation input, and none of its inputs as a whole.
    overlap = EvaluationOverlap([task for task in tasks.values() if task.name != "is_a"], n=8)
    for row in documents:
        assert not overlap.hits(f"{row['title']}. {row['text']}"), row
    for seed in read_seeds(SEEDS):
        assert not overlap.hits(f"{seed.input} {seed.output}")


def test_build_is_deterministic_and_leaves_right_files_alone(ontology, built):
    out = built.corpus.parent
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.rglob("*") if file.is_file()}
    build_demo(ontology, SEEDS, out)
    assert before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.rglob("*") if file.is_file()}


def test_command(tmp_path, monkeypatch, capsys, smollm2, minilm):
    """The command builds its inputs once, calls the run and ends with one command for the user."""
    calls = []

    def fake(arguments):
        calls.append(arguments)
        raise SystemExit(0)

    builds = []

    def small_build(_, seeds: Path, out: Path) -> DemoFiles:
        builds.append(out)
        (out / "tasks").mkdir(parents=True, exist_ok=True)
        for name in ("corpus.jsonl", "seeds.jsonl", "tasks/one.json"):
            (out / name).write_text(seeds.name)
        return DemoFiles(out / "corpus.jsonl", out / "seeds.jsonl", out / "tasks", 1, 1)

    monkeypatch.setattr(demo, "command_line", fake)
    monkeypatch.setattr(demo, "build_demo", small_build)
    monkeypatch.setattr(demo, "read_obo", lambda path: path)
    assert demo.run(tmp_path / "demo") == 0 and demo.run(tmp_path / "demo") == 0
    assert len(builds) == 1 and len(calls) == 2
    assert calls[0][0] == "run" and calls[0] == calls[1]
    for name in ("--model", "--seeds", "--corpus", "--tasks"):
        assert Path(calls[0][calls[0].index(name) + 1]).exists()
    assert "specialize generate --model smollm2-135m-instruct --adapter" in capsys.readouterr().out
    (tmp_path / "demo" / "corpus.jsonl").write_text("damaged")
    demo.run(tmp_path / "demo")
    assert len(builds) == 2
