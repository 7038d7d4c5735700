"""Makes the demo's corpus and evaluation tasks from the Human Phenotype Ontology.

Some terms are held out: the tasks ask about these, and neither they nor any text that names them is in the corpus or
among the seeds. Everything is drawn with one fixed random seed, so that the same ontology gives the same files.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..filter import NearDuplicates
from .files import DemoFiles, task_file, write_demo
from .obo import Ontology, Term
from .sentences import write_sentence

ROOT = "HP:0000118"  # Phenotypic abnormality; the other branches tell of inheritance, frequency and the like
DOCUMENTS = 6000  # of the corpus: a minute of embedding on two cores
EXAMPLES = 120  # per task
SHOTS = 5
RANDOM_SEED = 2025

LIMBS = "HP:0040064"  # a branch by place, beside those by system
# Branches of the ontology that are a label of the task organ_system.
SYSTEMS = {
    "HP:0000707": "nervous system",
    "HP:0000478": "eye",
    "HP:0000924": "skeletal system",
    "HP:0001626": "cardiovascular system",
    "HP:0025031": "digestive system",
    "HP:0000951": "skin",
}
_ORGANS = "nervous system, eye, skeletal system, cardiovascular system, digestive system, skin"
INSTRUCTIONS = {
    "name_phenotype": "Which phenotype does this definition describe? Give its name.",
    "synonyms": "List the synonyms of the phenotype, separated by commas.",
    "is_a": "Is the first phenotype a kind of the second one? Answer with yes or no.",
    "extract_phenotypes": "List the phenotypes of the patient that are named in the sentence, separated by commas.",
    "organ_system": f"To which part of the body does the described phenotype belong? Choose from: {_ORGANS}.",
}


def build_demo(ontology: Ontology, seeds: Path, out: Path) -> DemoFiles:
    """Writes ``corpus.jsonl``, ``seeds.jsonl`` and ``tasks/*.json`` into ``out`` and says what was written. Files whose
    content is already right are left alone."""
    seed_text = seeds.read_text(encoding="utf-8")
    terms = phenotypes(ontology)
    held_out = hold_out(ontology, terms, seed_text)
    kept = [term for term in terms if term.id not in held_out]
    documents = [document(ontology, term, held_out) for term in corpus_terms(kept)]
    tasks = make_tasks(ontology, [ontology.terms[term_id] for term_id in held_out], kept)
    return write_demo(out, documents, seed_text, tasks, len(held_out))


def phenotypes(ontology: Ontology) -> list[Term]:
    """The terms below *Phenotypic abnormality*, in the order of the file."""
    return [term for term in ontology.terms.values() if ROOT in ontology.ancestors(term.id)]


def corpus_terms(terms: Sequence[Term]) -> list[Term]:
    """The terms that make the richest passages: with a definition and another name; a sample of these in file order."""
    rich = [term for term in terms if term.definition and other_names(term)]
    chosen = {term.id for term in random.Random(RANDOM_SEED).sample(rich, min(DOCUMENTS, len(rich)))}
    return [term for term in rich if term.id in chosen]


# --- corpus ----------------------------------------------------------------------------------------------------------


def document(ontology: Ontology, term: Term, left_out: Iterable[str] = ()) -> dict[str, str]:
    """A term as a passage: definition, comment, other names, what it is a kind of and its kinds."""
    hidden = set(left_out)
    sentences = []
    if term.definition:
        sentences.append(_sentence(term.definition))
    if term.comment:
        sentences.append(_sentence(term.comment))
    names = other_names(term)
    if names:
        sentences.append(f"{term.name} is also called {_listed(names)}.")
    parents = [ontology.terms[parent].name for parent in term.parents if parent not in hidden and parent != ROOT]
    if parents:
        sentences.append(f"{term.name} is a kind of {_listed([lower_first(name) for name in parents])}.")
    children = [ontology.terms[child].name for child in ontology.children.get(term.id, ()) if child not in hidden]
    if children:
        shown = [lower_first(name) for name in children[:12]]
        sentences.append(f"Kinds of {lower_first(term.name)} are {_listed(shown)}.")
    return {"id": term.id, "title": term.name, "text": " ".join(sentences) or _sentence(term.name)}


def other_names(term: Term, scopes: Sequence[str] = ("EXACT",)) -> list[str]:
    """Synonyms of the given scopes without repetitions, spelling variants of British English and bare abbreviations."""
    found: dict[str, str] = {}
    for synonym in term.synonyms:
        key = synonym.text.lower()
        repeats = key == term.name.lower() or "obsolete" in key or synonym.kind in _NO_NAMES
        if synonym.scope in scopes and not repeats:
            found.setdefault(key, synonym.text)
    return list(found.values())


def lower_first(name: str) -> str:
    """A name inside a sentence: lower case at its start unless that is an abbreviation or a proper name."""
    first = name.split(maxsplit=1)[0]
    plain = first[1:].islower() or len(first) == 1
    proper = first in _PROPER or first.endswith("'s")
    return name[0].lower() + name[1:] if plain and not proper and not first.isdigit() else name


_NO_NAMES = {"uk_spelling", "abbreviation", "plural_form", "obsolete_synonym"}
_PROPER = {"Babinski", "Raynaud", "Romberg", "Hodgkin", "Brushfield", "Kayser-Fleischer", "Barrett", "Ewing", "Wilms"}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


# --- hold-out --------------------------------------------------------------------------------------------------------


def hold_out(ontology: Ontology, terms: Sequence[Term], seed_text: str, count: int = 900) -> dict[str, None]:
    """Ids of terms about which the tasks ask: kinds of phenotype without kinds of their own, defined, with a short
    name, whose names occur in no other term's text nor in the seeds, and whose definition resembles no other one."""
    rng = random.Random(RANDOM_SEED)
    texts_by_gram = _grams_of_terms(terms)
    seed_grams = set(_grams(seed_text, 6))
    candidates = [term for term in terms if _suitable(ontology, term)]
    rng.shuffle(candidates)
    alone: list[Term] = []
    for term in candidates:
        names = [_words(name) for name in (term.name, *other_names(term, ("EXACT", "NARROW", "BROAD", "RELATED")))]
        if any(not words or len(words) > 6 for words in names[:1]):
            continue
        short = [tuple(words) for words in names if 0 < len(words) <= 6]
        if all(texts_by_gram.get(gram, set()) <= {term.id} and gram not in seed_grams for gram in short):
            alone.append(term)
    duplicates = NearDuplicates(0.7)
    runs = _owners_of_runs(terms)
    alone = [term for term in alone if all(runs[run] == term.id for run in _runs(term.definition))]
    chosen = {term.id for term in alone[: count + count // 2]}
    for term in terms:
        if term.id not in chosen and term.definition:
            duplicates.add(term.definition)
    held_out: dict[str, None] = {}
    for term in alone[: count + count // 2]:
        if len(held_out) < count and duplicates.find(term.definition) is None:
            held_out[term.id] = None
        duplicates.add(term.definition)
    return held_out


def _suitable(ontology: Ontology, term: Term) -> bool:
    return (
        not ontology.children.get(term.id)
        and 6 <= len(term.definition.split()) <= 45
        and 1 <= len(term.name.split()) <= 4
        and re.fullmatch(r"[A-Za-z][A-Za-z' -]+", term.name) is not None
        and not re.search(r"\b(of the|left|right|unilateral|bilateral)\b", term.name.lower())
    )


def _runs(text: str) -> Iterable[tuple[str, ...]]:
    words = _words(text)
    return (tuple(words[start : start + 8]) for start in range(len(words) - 7))


def _owners_of_runs(terms: Sequence[Term]) -> dict[tuple[str, ...], str]:
    """For each run of eight words in the definitions and comments, the term it stands in, or "" for several."""
    owners: dict[tuple[str, ...], str] = {}
    for term in terms:
        for run in (*_runs(term.definition), *_runs(term.comment)):
            if owners.setdefault(run, term.id) != term.id:
                owners[run] = ""
    return owners


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _grams(text: str, max_words: int) -> Iterable[tuple[str, ...]]:
    words = _words(text)
    for size in range(1, max_words + 1):
        for start in range(len(words) - size + 1):
            yield tuple(words[start : start + size])


def _grams_of_terms(terms: Sequence[Term]) -> dict[tuple[str, ...], set[str]]:
    """For each name of a term (as a tuple of words) the ids of the terms in whose text it occurs."""
    names = {
        tuple(_words(name))
        for term in terms
        for name in (term.name, *other_names(term, ("EXACT", "NARROW", "BROAD", "RELATED")))
    }
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for term in terms:
        text = " | ".join((term.name, term.definition, term.comment, *(synonym.text for synonym in term.synonyms)))
        for gram in _grams(text, 6):
            if gram in names:
                found[gram].add(term.id)
    return found


# --- tasks -----------------------------------------------------------------------------------------------------------


def make_tasks(ontology: Ontology, held_out: Sequence[Term], kept: Sequence[Term]) -> list[dict]:
    """Five tasks in the format of the evaluation, from held-out terms alone (the is-a question's second term, a
    wider one, is the only text of the corpus that appears)."""
    rng = random.Random(RANDOM_SEED + 1)
    wanted = EXAMPLES + SHOTS
    tasks = []

    def task(name: str, rows: list[dict], labels: list[str] | None = None) -> None:
        if len(rows) < wanted:
            raise ValueError(f"task {name}: {len(rows)} examples can be made, {wanted} are needed")
        tasks.append(task_file(name, INSTRUCTIONS[name], rows[:wanted], SHOTS, labels))

    def shuffled() -> list[Term]:
        return rng.sample(list(held_out), len(held_out))

    task("name_phenotype", [_name_row(term) for term in shuffled() if not _names_itself(term)])
    task(
        "synonyms",
        [
            {"input": f"Term: {term.name}\nDefinition: {term.definition}", "outputs": [", ".join(names)]}
            for term in shuffled()
            if len(names := other_names(term)) >= 1
        ],
    )
    task("is_a", _is_a_rows(ontology, shuffled(), kept, wanted, rng), ["yes", "no"])
    findings = [term.name for term in shuffled() if _reads_as_finding(term.name)]
    sentences = []
    while len(sentences) < wanted:
        count = rng.choice((1, 2, 2, 3, 3, 4))
        names = [lower_first(name) for name in rng.sample(findings, count)]
        sentences.append({"input": write_sentence(names, rng), "outputs": [", ".join(names)]})
    task("extract_phenotypes", sentences)
    task("organ_system", _system_rows(ontology, shuffled(), wanted), list(SYSTEMS.values()))
    return tasks


def _name_row(term: Term) -> dict:
    return {"input": term.definition, "outputs": [lower_first(term.name), *other_names(term)]}


def _names_itself(term: Term) -> bool:
    """The definition contains the whole name, so naming the phenotype would be copying."""
    return " ".join(_words(term.name)) in " ".join(_words(term.definition))


def _reads_as_finding(name: str) -> bool:
    """Fits after 'had' in a sentence: neither a bare adjective nor a name with brackets, commas or 'and'."""
    last = name.split()[-1].lower()
    return len(name) <= 45 and " and " not in name and not last.endswith(("ed", "ic", "al", "able", "ive"))


def _is_a_rows(
    ontology: Ontology, held_out: Sequence[Term], kept: Sequence[Term], wanted: int, rng: random.Random
) -> list[dict]:
    """As many yes as no. The second term of a yes is an ancestor at most three steps below the root; that of a no is
    drawn from the second terms of the yes rows, so that it does not give the answer away."""
    kept_ids = {term.id for term in kept}
    wide = [term_id for term_id in _near_the_top(ontology) if term_id in kept_ids]
    rows, seconds, without = [], [], []
    for term in held_out:
        ancestors = ontology.ancestors(term.id)
        inside = [term_id for term_id in wide if term_id in ancestors]
        if inside and len(rows) < (wanted + 1) // 2:
            seconds.append(rng.choice(inside))
            rows.append(_is_a_row(ontology, term, seconds[-1], "yes"))
        elif inside:
            without.append(term)
    for term in without[: wanted - len(rows)]:
        ancestors = ontology.ancestors(term.id)
        fair = [second for second in seconds if second not in ancestors and not _shares_word(ontology, term, second)]
        rows.append(_is_a_row(ontology, term, rng.choice(fair), "no"))
    rng.shuffle(rows)
    return rows


def _is_a_row(ontology: Ontology, term: Term, second: str, answer: str) -> dict:
    return {"input": f"First: {term.name}\nSecond: {ontology.terms[second].name}", "outputs": [answer]}


def _near_the_top(ontology: Ontology) -> list[str]:
    """Ids one to three steps below *Phenotypic abnormality*, that have kinds of their own."""
    level, found = [ROOT], []
    for _ in range(3):
        level = [child for term_id in level for child in ontology.children.get(term_id, ())]
        found += [term_id for term_id in level if ontology.children.get(term_id)]
    return list(dict.fromkeys(found))


def _shares_word(ontology: Ontology, term: Term, other: str) -> bool:
    """Too near for a fair 'no': the ontology may well lack the relation by oversight."""
    return bool(
        {word for word in _words(term.name) if len(word) > 4} & set(_words(ontology.terms[other].name)) - {"abnormal"}
    )


def _system_rows(ontology: Ontology, held_out: Sequence[Term], wanted: int) -> list[dict]:
    """Definitions of terms that belong to one labelled branch and to no other; labels in turn, so they are balanced."""
    branches = set(ontology.children[ROOT])
    by_label: dict[str, list[dict]] = {label: [] for label in SYSTEMS.values()}
    for term in held_out:
        above = ontology.ancestors(term.id)
        systems = [label for root, label in SYSTEMS.items() if root in above]
        if len(systems) == 1 and len((above & branches) - {LIMBS}) == 1:
            by_label[systems[0]].append({"input": term.definition, "outputs": systems})
    rows = []
    for number in range(max(map(len, by_label.values()))):
        rows += [members[number] for members in by_label.values() if number < len(members)]
    rows = rows[:wanted]
    random.Random(RANDOM_SEED + 2).shuffle(rows)
    return rows
