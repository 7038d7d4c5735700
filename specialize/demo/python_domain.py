"""Makes corpus and evaluation tasks about the Python language from what the running interpreter says of itself.

Some items are held out: the tasks ask about these, and neither they nor any text that names them is in the corpus or
among the seeds. Gold answers are structure: names of modules, parameters of signatures, names of exceptions. The same
interpreter gives the same files.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from specialize.errors import InputError

from ..filter import NearDuplicates
from .files import DemoFiles, task_file, write_demo
from .python_docs import Item

DOCUMENTS = 3000  # of the corpus: half a minute of embedding on two cores
EXAMPLES = 120  # per task
LEAST_EXAMPLES = 40
SHOTS = 5
RANDOM_SEED = 2026

# Six fields of the standard library and the modules that are plainly of one of them.
AREAS = {
    "text and data": "string re difflib textwrap unicodedata html xml csv configparser json shlex locale gettext "
    "plistlib pprint",
    "networking": "socket ssl http urllib ftplib poplib imaplib smtplib socketserver xmlrpc email ipaddress webbrowser "
    "wsgiref nntplib telnetlib netrc",
    "concurrency": "threading multiprocessing concurrent asyncio subprocess sched queue contextvars selectors",
    "numbers and dates": "math cmath decimal fractions random statistics datetime calendar time zoneinfo numbers",
    "files": "os pathlib shutil tempfile glob fnmatch filecmp fileinput zipfile tarfile gzip bz2 lzma zlib stat",
    "code": "ast dis inspect pdb bdb traceback trace cProfile profile pstats timeit tokenize unittest doctest symtable "
    "compileall py_compile importlib pkgutil code codeop runpy modulefinder",
}
_AREA_OF = {module: area for area, modules in AREAS.items() for module in modules.split()}
INSTRUCTIONS = {
    "module_area": f"What is the described part of Python's standard library for? Choose from: {', '.join(AREAS)}.",
    "default_parameters": "Which parameters of the function have a default value? List them, separated by commas.",
    "without_arguments": "Can this function be called without any argument? Answer with yes or no.",
    "exceptions": "List the exceptions that the text names, separated by commas.",
    "name_module": "Which module of Python's standard library has what is described here? Give its name.",
}
_EXCEPTION = re.compile(r"\b[A-Z]\w*(?:Error|Exception|Warning|Interrupt|Iteration|Exit)\b")


def build_python(items: Sequence[Item], seeds: Path, out: Path) -> DemoFiles:
    """Writes ``corpus.jsonl``, ``seeds.jsonl`` and ``tasks/*.json`` into ``out`` and says what was written. Files whose
    content is already right are left alone."""
    seed_text = seeds.read_text(encoding="utf-8")
    held_out = hold_out(items, seed_text)
    texts = hold_out_texts(items, held_out)
    apart = {item.title for item in (*held_out, *texts)}
    documents = [document(item) for item in _corpus_items([item for item in items if item.title not in apart])]
    tasks = make_tasks(held_out, texts, exceptions_of(items))
    return write_demo(out, documents, seed_text, tasks, len(apart))


def _corpus_items(items: Sequence[Item]) -> list[Item]:
    """Those with a text of some length; a sample of them in their order."""
    rich = [item for item in items if len(_text(item).split()) >= 8]
    chosen = {item.title for item in random.Random(RANDOM_SEED).sample(rich, min(DOCUMENTS, len(rich)))}
    return [item for item in rich if item.title in chosen]


def document(item: Item) -> dict[str, str]:
    """An item as a passage. A function's text begins with its signature where that has parameters."""
    return {"id": f"{item.kind}:{item.title}", "title": item.title, "text": _text(item)}


def _text(item: Item) -> str:
    prose = " ".join(item.paragraphs)
    return f"{item.signature}: {prose}" if item.kind == "function" and item.parameters else prose


def exceptions_of(items: Sequence[Item]) -> set[str]:
    """Names of the exceptions of the standard library that look like it."""
    return {item.name for item in items if item.kind == "class" and _EXCEPTION.fullmatch(item.name)}


# --- hold-out --------------------------------------------------------------------------------------------------------


def hold_out(items: Sequence[Item], seed_text: str, share: float = 0.85) -> list[Item]:
    """``share`` of the functions, methods and classes about which the tasks can ask: of a name that no other item's
    text and no seed has, of which no run of eight words stands elsewhere, and that resemble no other item."""
    owners: dict[str, str] = {}
    for text, owner in [(text, item.title) for item in items for text in _told(item)] + [(seed_text, "seeds")]:
        for word in set(_identifiers(text)):
            owners[word] = owner if owners.setdefault(word, owner) == owner else ""
    named = [item for item in items if len(item.bare_name) >= 4 and owners.get(item.bare_name.lower()) == item.title]
    exceptions = exceptions_of(items)
    asked = {
        item.title: " ".join(
            [item.signature, _first(item), *(row["input"] for row in _exception_rows([item], exceptions))]
        )
        for item in named
    }
    return _set_apart(items, asked, share)


def hold_out_texts(items: Sequence[Item], held_out: Sequence[Item]) -> list[Item]:
    """Most of the others that name exceptions. Asked is what their text names, so their own names may be known."""
    names, exceptions = {item.title for item in held_out}, exceptions_of(items)
    rows = {item.title: _exception_rows([item], exceptions) for item in items if item.title not in names}
    return _set_apart(items, {title: found[0]["input"] for title, found in rows.items() if found}, 0.7)


def _set_apart(items: Sequence[Item], asked: Mapping[str, str], share: float) -> list[Item]:
    """Of the items of these titles, with the text that a task may show of each, those whose text is theirs alone."""
    runs: Counter[tuple[str, ...]] = Counter()
    for item in items:
        runs.update(set(_runs(_text(item))))
    fit = [
        item
        for item in items
        if item.title in asked
        and item.kind in ("function", "method", "class")
        and len(" ".join(item.paragraphs).split()) >= 5
        and all(runs[run] <= 1 for run in _runs(asked[item.title]))
    ]
    random.Random(RANDOM_SEED).shuffle(fit)
    fit = fit[: int(share * len(fit))]
    chosen = {item.title for item in fit}
    duplicates = NearDuplicates(0.7)
    for item in items:
        if item.title not in chosen and item.kind != "topic":
            duplicates.add(_first(item))
    apart = []
    for item in fit:
        if duplicates.find(_first(item)) is None:
            apart.append(item)
        duplicates.add(_first(item))
    return apart


def _told(item: Item) -> Iterable[str]:
    return (item.title, item.signature, *item.paragraphs)


def _identifiers(text: str) -> list[str]:
    return re.findall(r"[a-z0-9_]+", text.lower())


def _runs(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [tuple(words[start : start + 8]) for start in range(len(words) - 7)]


def _first(item: Item, max_words: int = 45) -> str:
    """The first paragraphs of an item that fit, at least the beginning of the first one."""
    found: list[str] = []
    for paragraph in item.paragraphs:
        if found and len(" ".join((*found, paragraph)).split()) > max_words:
            break
        found.append(paragraph)
    return " ".join(" ".join(found).split()[:max_words])


# --- tasks -----------------------------------------------------------------------------------------------------------


def make_tasks(held_out: Sequence[Item], texts: Sequence[Item], exceptions: set[str]) -> list[dict]:
    """Five tasks in the format of the evaluation, from held-out items alone; ``texts`` for the exceptions only."""
    rng = random.Random(RANDOM_SEED + 1)
    calls = [item for item in held_out if item.parameters is not None]
    calls.sort(key=lambda item: not item.parameters)  # stable: those without any parameter are the last resort
    rows: dict[str, list[dict]] = {
        "module_area": _balanced(held_out, lambda item: _AREA_OF.get(item.module.split(".")[0], ""), _first),
        "default_parameters": [_row(_text_of_call(item), _defaults(item)) for item in calls if _mixed(item)],
        "without_arguments": _balanced(calls, _bare_call, _text_of_call),
        "exceptions": _exception_rows((*held_out, *texts), exceptions),
        "name_module": [
            _row(_first(item), item.module, *([item.module.rpartition(".")[2]] if "." in item.module else []))
            for item in held_out
            if item.module.rpartition(".")[2].lower() not in _identifiers(_first(item)) and item.kind != "method"
        ],
    }
    labels = {"module_area": list(AREAS), "without_arguments": ["yes", "no"]}
    tasks = []
    for name, found in rows.items():
        fit = [row for row in found if len(row["input"].split()) >= 6]
        wanted = min(EXAMPLES + SHOTS, len(fit))
        if wanted < LEAST_EXAMPLES + SHOTS:
            raise InputError(
                f"task {name}: this Python's documentation gives {len(fit)} examples, "
                f"{LEAST_EXAMPLES + SHOTS} are needed"
            )
        if name not in labels:
            rng.shuffle(fit)
        chosen = fit[:wanted]
        rng.shuffle(chosen)
        tasks.append(task_file(name, INSTRUCTIONS[name], chosen, SHOTS, labels.get(name)))
    return tasks


def _row(input: str, *outputs: str) -> dict:
    return {"input": input, "outputs": list(outputs)}


def _text_of_call(item: Item) -> str:
    return f"{item.signature}: {_first(item, 30)}"


def _mixed(item: Item) -> bool:
    """Some of the parameters have a default and some have not, so that neither all nor nothing is the answer."""
    named = [p for p in item.parameters or () if p.text != "*"]
    return 0 < sum(p.default for p in named) < len(named)


def _defaults(item: Item) -> str:
    return ", ".join(p.name for p in item.parameters or () if p.default)


def _bare_call(item: Item) -> str:
    return "yes" if all(p.optional for p in item.parameters or ()) else "no"


def _balanced(items: Sequence[Item], label: Callable[[Item], str], text: Callable[[Item], str]) -> list[dict]:
    """Rows whose labels come in turn, as many of each as the rarest has."""
    by_label: dict[str, list[dict]] = {}
    for item in items:
        if label(item) and len(text(item).split()) >= 6:
            by_label.setdefault(label(item), []).append(_row(text(item), label(item)))
    return [row for turn in zip(*(by_label[key] for key in sorted(by_label)), strict=False) for row in turn]


def _exception_rows(items: Sequence[Item], exceptions: set[str]) -> list[dict]:
    """The first paragraph of an item that names an exception which is not the item itself."""
    rows = []
    for item in items:
        for paragraph in item.paragraphs:
            found = [name for name in dict.fromkeys(_EXCEPTION.findall(paragraph)) if name in exceptions]
            if found and len(paragraph.split()) <= 60 and set(_EXCEPTION.findall(paragraph)) <= exceptions:
                rows.append(_row(paragraph, ", ".join(found)))
                break
    return rows
