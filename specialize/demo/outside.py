"""``python -m specialize.demo.outside FOLDER``: two evaluation tasks of our own, of kinds that biomedical seeds lack.

An expert that was tuned on seeds of some kinds (naming entities in text, answering questions about abstracts) is asked
for something else of the same domain: which of four terms is the parent of a term, and whether two names mean the same.
Gold answers are relations of the Human Phenotype Ontology. ``specialize eval --tasks FOLDER`` scores them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

from specialize.errors import InputError

from ..fetch import fetch
from .build import ROOT, lower_first, other_names, phenotypes
from .files import task_file, write_tasks
from .obo import Ontology, Term, read_obo

EXAMPLES = 120
SHOTS = 5
RANDOM_SEED = 2027
INSTRUCTIONS = {
    "choose_parent": "The phenotype is a kind of one of the four choices. Which one? Answer with that choice.",
    "same_phenotype": "Do both names mean the same phenotype? Answer with yes or no.",
}


def build_outside(ontology: Ontology, out: Path) -> list[Path]:
    """Writes both tasks' files into ``out`` and returns them; the same ontology gives the same files."""
    terms = [term for term in phenotypes(ontology) if len(term.name) <= 50 and "," not in term.name]
    rng = random.Random(RANDOM_SEED)
    makers = {"choose_parent": _parent_rows, "same_phenotype": _same_rows}
    tasks = []
    for name, make in makers.items():
        rows = make(ontology, rng.sample(terms, len(terms)), rng)
        labels = ["yes", "no"] if name == "same_phenotype" else None
        tasks.append(task_file(name, INSTRUCTIONS[name], rows, SHOTS, labels))
    write_tasks(out, tasks)
    return [out / f"{name}.json" for name in makers]


def _parent_rows(ontology: Ontology, terms: Sequence[Term], rng: random.Random) -> list[dict]:
    """One choice is the only parent, one a sibling of that, two are parents of terms elsewhere. None of the wrong ones
    is above or below the term. The right one shares no long word with it, so that its letters do not give it away."""
    rows: list[dict] = []
    parents = [term for term in terms if ontology.children.get(term.id)]
    for term in terms:
        if len(rows) == EXAMPLES + SHOTS:
            break
        if len(term.parents) != 1 or not term.definition or ROOT in term.parents:
            continue
        parent = ontology.terms[term.parents[0]]
        above = ontology.ancestors(term.id)
        uncles = [
            uncle
            for grandparent in parent.parents
            for uncle in ontology.children[grandparent]
            if uncle not in above and ontology.children.get(uncle) and term.id not in ontology.children[uncle]
        ]
        far = [
            other
            for other in rng.sample(parents, 8)
            if other.id not in above and term.id not in ontology.ancestors(other.id)
        ]
        if not uncles or len(far) < 2 or _long_words(parent.name) & _long_words(term.name):
            continue
        choices = [parent.name, ontology.terms[rng.choice(uncles)].name, far[0].name, far[1].name]
        if len(set(choices)) < 4 or any("," in choice or len(choice) > 60 for choice in choices):
            continue
        rng.shuffle(choices)
        listed = "; ".join(lower_first(choice) for choice in choices)
        rows.append({"input": f"Phenotype: {term.name}\nChoices: {listed}", "outputs": [lower_first(parent.name)]})
    return rows


def _same_rows(ontology: Ontology, terms: Sequence[Term], rng: random.Random) -> list[dict]:
    """As many yes as no: another name of the term, or another name of a term with the same parent."""
    wanted = EXAMPLES + SHOTS
    rows: list[dict] = []
    for term in terms:
        if len(rows) == wanted:
            break
        siblings = [
            name
            for parent in term.parents
            for child in ontology.children[parent]
            if child != term.id
            for name in other_names(ontology.terms[child])
        ]
        own = other_names(term)
        answer = "yes" if len(rows) % 2 == 0 else "no"
        names = [n for n in (own if answer == "yes" else siblings) if n.lower() != term.name.lower() and "," not in n]
        if own and names:
            rows.append({"input": f"First: {term.name}\nSecond: {rng.choice(names)}", "outputs": [answer]})
    rng.shuffle(rows)
    return rows


def _long_words(name: str) -> set[str]:
    return {word for word in name.lower().split() if len(word) > 4} - {"abnormality", "abnormal"}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m specialize.demo.outside FOLDER", file=sys.stderr)
        raise SystemExit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    try:
        for path in build_outside(read_obo(fetch("hpo")), Path(sys.argv[1])):
            print(path)
    except InputError as error:
        print(f"specialize: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
