"""Reads the terms of an ontology in OBO format: names, definitions, comments, synonyms and is-a relations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from specialize.errors import InputError

_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(.*)')
_SPACES = {"\\n", "\\t", "\\W"}  # escapes that stand for white space


@dataclass(frozen=True)
class Synonym:
    """Another name. ``scope`` is EXACT, BROAD, NARROW or RELATED; ``kind`` is a type such as layperson, or empty."""

    text: str
    scope: str
    kind: str


@dataclass(frozen=True)
class Term:
    """A term that is not obsolete. ``parents`` holds the ids it is a kind of."""

    id: str
    name: str
    definition: str = ""
    comment: str = ""
    synonyms: tuple[Synonym, ...] = ()
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ontology:
    version: str
    terms: dict[str, Term]
    children: dict[str, tuple[str, ...]] = field(repr=False)

    def ancestors(self, term_id: str) -> set[str]:
        """Ids of everything the term is a kind of, without itself."""
        found: set[str] = set()
        waiting = list(self.terms[term_id].parents)
        while waiting:
            parent = waiting.pop()
            if parent not in found:
                found.add(parent)
                waiting += self.terms[parent].parents
        return found


def read_obo(path: str | Path) -> Ontology:
    """The ontology in an OBO file. Raises InputError with file and line for what cannot be read."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the ontology {path}: {error}") from error
    version = ""
    terms: dict[str, Term] = {}
    for start, kind, tags in _stanzas(lines):
        if kind == "":
            version = next((value for _, key, value in tags if key == "data-version"), "")
        elif kind == "Term":
            term = _term(path, start, tags)
            if term is not None:
                terms[term.id] = term
    if not terms:
        raise InputError(f"{path} holds no [Term]: give an ontology in OBO format")
    children: dict[str, list[str]] = {}
    for term in terms.values():
        for parent in term.parents:
            if parent not in terms:
                raise InputError(f"{path}: {term.id} is a kind of {parent}, which is not in the file")
            children.setdefault(parent, []).append(term.id)
    return Ontology(version, terms, {key: tuple(value) for key, value in children.items()})


def _stanzas(lines: list[str]) -> Iterator[tuple[int, str, list[tuple[int, str, str]]]]:
    """``(line number, kind, [(line number, tag, value)])``; the header is the stanza of kind ''."""
    start, kind, tags = 1, "", []
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if line.startswith("[") and line.endswith("]"):
            yield start, kind, tags
            start, kind, tags = number, line[1:-1], []
        elif line and not line.startswith("!"):
            tag, _, value = line.partition(":")
            tags.append((number, tag.strip(), value.strip()))
    yield start, kind, tags


def _term(path: Path, start: int, tags: list[tuple[int, str, str]]) -> Term | None:
    single: dict[str, str] = {}
    synonyms: list[Synonym] = []
    parents: list[str] = []
    for number, tag, value in tags:
        if tag == "is_obsolete" and value.startswith("true"):
            return None
        if tag in ("id", "name", "comment"):
            single[tag] = _plain(value)
        elif tag == "is_a":
            parents.append(value.split("!")[0].split("{")[0].strip())
        elif tag in ("def", "synonym"):
            match = _QUOTED.match(value)
            if match is None:
                raise InputError(f"{path}:{number}: {tag} without a quoted text")
            if tag == "def":
                single["def"] = _plain(match[1])
            else:
                words = match[2].split("[")[0].split()
                synonyms.append(Synonym(_plain(match[1]), words[0] if words else "RELATED", " ".join(words[1:])))
    if "id" not in single or "name" not in single:
        raise InputError(f"{path}:{start}: a [Term] without id or name")
    return Term(
        single["id"],
        single["name"],
        single.get("def", ""),
        single.get("comment", ""),
        tuple(synonyms),
        tuple(parents),
    )


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\\.", lambda match: " " if match[0] in _SPACES else match[0][1], text).split())
