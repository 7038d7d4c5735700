"""The second domain: what is read of the running Python, its seeds, and that no evaluation text is in either."""

import ast
import importlib.util
import inspect
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from specialize.demo import __main__ as demo
from specialize.demo import python_domain
from specialize.demo.python_docs import Item, Parameter, prose, read_python
from specialize.demo.python_domain import AREAS, build_python, document
from specialize.errors import InputError
from specialize.filter import EvaluationOverlap
from specialize.kinds import kinds_of
from specialize.records import read_seeds, read_tasks

SEEDS = Path(demo.__file__).with_name("seeds_python.jsonl")


@pytest.fixture(scope="module")
def items():
    return read_python()


@pytest.fixture(scope="module")
def built(items, tmp_path_factory):
    return build_python(items, SEEDS, tmp_path_factory.mktemp("python"))


@pytest.fixture(scope="module")
def tasks(built):
    return {task.name: task for task in read_tasks(built.tasks)}


@pytest.fixture(scope="module")
def owners(items):
    """The items whose text begins with what is shown."""
    texts = [(" ".join(item.paragraphs), item) for item in items]
    return lambda shown: [item for text, item in texts if text.startswith(shown)]


def test_prose_is_plain():
    text = """Return the *first* ``item`` of :class:`~a.b.Thing` -- or `other'.

    >>> first([1])
    1

        indented = code

    Heading
    =======

    A second paragraph
    on two lines.
    """
    assert prose(text) == ("Return the first item of a.b.Thing: or other.", "A second paragraph on two lines.")
    assert prose(None) == ()


def test_items_agree_with_inspect(items):
    """Signatures and docstrings that were parsed, against those that Python itself tells of the imported objects."""
    import base64
    import shutil
    import textwrap

    by_title = {item.title: item for item in items}
    functions = {
        "base64.b64decode": base64.b64decode,
        "shutil.copytree": shutil.copytree,
        "textwrap.fill": textwrap.fill,
    }
    for title, function in functions.items():
        item, signature = by_title[title], inspect.signature(function)
        assert [p.name for p in item.parameters or () if p.text != "*"] == list(signature.parameters)
        assert [p.name for p in item.parameters or () if p.default] == [
            name for name, p in signature.parameters.items() if p.default is not p.empty
        ]
        assert item.paragraphs[0].split()[:4] == (inspect.getdoc(function) or "").split()[:4]
    method = by_title["json.decoder.JSONDecoder.raw_decode"]
    assert method.kind == "method" and [p.text for p in method.parameters or ()] == ["s", "idx=0"]
    assert by_title["math.sqrt"].paragraphs == ("Return the square root of x.",)
    assert by_title["KeyError"].kind == "class" and by_title["KeyError"].module == "builtins"
    kinds = Counter(item.kind for item in items)
    assert min(kinds[kind] for kind in ("function", "method", "class", "module")) >= 100
    assert len(by_title) == len(items) and not any(part[:1] == "_" for title in by_title for part in title.split("."))


def test_signature_and_document():
    parameters = (Parameter("a", "a", False, False), Parameter("b", "b=1", True, True))
    item = Item("m", "C.f", "function", ("Do it well.",), parameters)
    assert item.signature == "def f(a, b=1)"
    assert document(item) == {"id": "function:m.C.f", "title": "m.C.f", "text": "def f(a, b=1): Do it well."}


def test_our_seeds():
    seeds = read_seeds(SEEDS)
    assert len(seeds) == 70 and len({(seed.kind, seed.input) for seed in seeds}) == 70
    kinds = {kind.name: kind for kind in kinds_of(seeds)}
    assert len(kinds) == 8 and all(len(kind.seeds) >= 6 for kind in kinds.values())
    assert kinds["module_area"].labels == set(AREAS) and kinds["without_arguments"].labels == {"yes", "no"}
    assert kinds["exceptions"].extractive and kinds["default_parameters"].extractive
    assert all(kind.unit == "sentence" for kind in kinds.values())  # inputs are cut from the corpus, none is invented
    for seed in kinds["default_parameters"].seeds:
        assert seed.output == ", ".join(_defaults(seed.input))
    for seed in kinds["without_arguments"].seeds:
        assert seed.output == ("no" if _required(seed.input) else "yes")
    for seed in kinds["name_module"].seeds:
        assert seed.output in sys.stdlib_module_names


def _arguments(text):
    function = ast.parse(text[: text.index("): ") + 2] + " pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


def _defaults(text):
    a = _arguments(text)
    plain = [*a.posonlyargs, *a.args]
    late = [arg.arg for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True) if default is not None]
    return [arg.arg for arg in plain[len(plain) - len(a.defaults) :]] + late


def _required(text):
    a = _arguments(text)
    return [*a.posonlyargs, *a.args][: len(a.posonlyargs) + len(a.args) - len(a.defaults)] + [
        arg for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True) if default is None
    ]


def test_tasks_are_complete_and_right(tasks, owners):
    """Gold answers, worked out anew: signatures by the syntax tree of what is shown, modules by looking the text up."""
    assert set(tasks) == set(python_domain.INSTRUCTIONS)
    for task in tasks.values():
        assert len(task.examples) >= 40 and len(task.shots) == 5
        inputs = [example.input for example in task.examples] + [shot.input for shot in task.shots]
        assert len(set(inputs)) == len(inputs), task.name
    for example in tasks["default_parameters"].examples:
        assert example.outputs == (", ".join(_defaults(example.input)),)
    for example in tasks["without_arguments"].examples:
        assert example.outputs == ("no" if _required(example.input) else "yes",)
    for name in ("without_arguments", "module_area"):
        answers = Counter(example.outputs[0] for example in tasks[name].examples)
        assert max(answers.values()) <= min(answers.values()) + 10
    modules = {module: area for area, listed in AREAS.items() for module in listed.split()}
    for name in ("module_area", "name_module"):
        for example in tasks[name].examples:
            [module] = {item.module for item in owners(example.input)}
            assert example.outputs[0] == (module if name == "name_module" else modules[module.partition(".")[0]])
            assert importlib.util.find_spec(module.partition(".")[0]) is not None
    for example in tasks["exceptions"].examples:
        named = example.outputs[0].split(", ")
        assert [example.input.index(name) for name in named] == sorted(example.input.index(name) for name in named)


def test_nothing_of_the_evaluation_is_in_corpus_or_seeds(built, tasks, owners):
    documents = [json.loads(line) for line in built.corpus.read_text().splitlines()]
    assert len(documents) == built.num_documents
    told = " ".join(f"{row['title']} {row['text']}" for row in documents) + built.seeds.read_text()
    words = set(re.findall(r"[a-z0-9_]+", told.lower()))
    for name in ("default_parameters", "without_arguments"):
        for example in tasks[name].examples:
            assert example.input[len("def ") : example.input.index("(")].lower() not in words
    for name in ("module_area", "name_module"):
        for example in tasks[name].examples:
            for item in owners(example.input):
                assert item.bare_name.lower() not in words
    overlap = EvaluationOverlap(list(tasks.values()), n=8)
    for row in documents:
        assert not overlap.hits(f"{row['title']}. {row['text']}"), row
    for seed in read_seeds(SEEDS):
        assert not overlap.hits(f"{seed.input} {seed.output}")


def test_build_is_deterministic(items, built, tmp_path):
    again = build_python(items, SEEDS, tmp_path)
    for file in built.corpus.parent.rglob("*"):
        if file.is_file():
            assert (tmp_path / file.relative_to(built.corpus.parent)).read_bytes() == file.read_bytes()
    assert again.num_held_out == built.num_held_out


def test_a_python_without_docstrings_is_refused(monkeypatch):
    monkeypatch.setattr("specialize.demo.python_docs._parsed", lambda: iter(()))
    with pytest.raises(InputError, match=r"documents only .* items"):
        read_python()


def test_command_line(tmp_path, monkeypatch, capsys):
    assert demo._parse([]) == (Path("demo"), "phenotypes", [])
    assert demo._parse(["--domain", "python", "--threads", "1"]) == (Path("demo-python"), "python", ["--threads", "1"])
    assert demo._parse(["here", "--domain", "python"]) == (Path("here"), "python", [])
    for arguments, said in ((["--domain", "cooking"], "choose phenotypes or python"), (["a", "b"], "makes no sense")):
        monkeypatch.setattr(sys, "argv", ["demo", *arguments])
        with pytest.raises(SystemExit) as stop:
            demo.main()
        assert stop.value.code == 2 and said in capsys.readouterr().err
