"""Evaluation tasks of kinds outside the seeds: complete, balanced, and right by the ontology."""

import random
from collections import Counter
from pathlib import Path

import pytest

from specialize.demo import __main__ as demo
from specialize.demo.obo import read_obo
from specialize.demo.outside import INSTRUCTIONS, build_outside
from specialize.fetch import fetch
from specialize.records import read_seeds, read_tasks


@pytest.fixture(scope="module")
def ontology():
    return read_obo(fetch("hpo"))


def test_tasks_outside_the_seeds(ontology, tmp_path):
    build_outside(ontology, tmp_path)
    tasks = {task.name: task for task in read_tasks(tmp_path)}
    assert set(tasks) == set(INSTRUCTIONS)
    by_name = {}
    for term in ontology.terms.values():
        by_name.setdefault(term.name.lower(), term)
    for task in tasks.values():
        assert len(task.examples) == 120 and len(task.shots) == 5
        assert len({example.input for example in task.examples}) == 120
    places = Counter()
    for example in tasks["choose_parent"].examples:
        name, choices = (line.split(": ", 1)[1] for line in example.input.splitlines())
        term, options = by_name[name.lower()], choices.split("; ")
        assert [ontology.terms[i].name.lower() for i in term.parents] == [example.outputs[0].lower()]
        assert len(set(options)) == 4 and example.outputs[0] in options
        places[options.index(example.outputs[0])] += 1
        wrong = {by_name[o.lower()].id for o in options if o != example.outputs[0]}
        assert not wrong & ontology.ancestors(term.id)
    assert min(places.values()) >= 15  # a fixed place would give the answer away
    for example in tasks["same_phenotype"].examples:
        first, second = (line.split(": ", 1)[1] for line in example.input.splitlines())
        names = {synonym.text.lower() for synonym in by_name[first.lower()].synonyms}
        assert (second.lower() in names) == (example.outputs[0] == "yes"), example
    answers = Counter(example.outputs[0] for example in tasks["same_phenotype"].examples)
    assert abs(answers["yes"] - answers["no"]) <= 5
    state = random.getstate()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    build_outside(ontology, tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()} and random.getstate() == state


def test_their_kinds_are_in_no_seeds():
    """Neither in the biomedical seeds that we ship: other instructions, and no seed asks for a choice or for names."""
    asked = {seed.instruction for seed in read_seeds(Path(demo.__file__).with_name("seeds.jsonl"))}
    assert not asked & set(INSTRUCTIONS.values())
    assert not any("choices" in instruction.lower() or "both names" in instruction.lower() for instruction in asked)
