"""Reads what the running Python says of itself: docstrings and signatures of the standard library, and its topics.

Modules written in Python are parsed, not imported; only a fixed list of modules written in C is imported, as their
docstrings lie nowhere else. So the same interpreter on the same platform gives the same items in the same order.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specialize.errors import InputError

# Modules in C and the name under which they are public; others have Python sources or only numbers.
_COMPILED = {
    "builtins": "builtins",
    "math": "math",
    "cmath": "cmath",
    "itertools": "itertools",
    "time": "time",
    "zlib": "zlib",
    "binascii": "binascii",
    "unicodedata": "unicodedata",
    "gc": "gc",
    "posix": "os",
    "select": "select",
    "_heapq": "heapq",
    "_bisect": "bisect",
    "_collections": "collections",
    "_functools": "functools",
    "_operator": "operator",
    "_struct": "struct",
    "_socket": "socket",
    "_datetime": "datetime",
    "_random": "random",
}
_RENAMED = {"posixpath": "os.path"}
# Tests, programs and tables, and the other platforms' twins of what is read anyway.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data", "ntpath"}
_LEFT_OUT |= {"distutils", "tix", "antigravity", "this", "nturl2path", "site-packages", "__phello__", "config-3"}
_ROLE = re.compile(r":[a-z:]+:`~?([^`<]+?)(?:\s*<[^`>]*>)?`")
_QUOTED = re.compile(r"`([^`'\s]+)'")  # `name' of old docstrings
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(\w[^*\s]*)\*{1,2}(?![\w*])")


@dataclass(frozen=True)
class Parameter:
    """``text`` as in the signature; ``optional`` where a call may leave it out (a default, or ``*args``)."""

    name: str
    text: str
    default: bool
    optional: bool


@dataclass(frozen=True)
class Item:
    """Something documented. ``kind``: module, function, method, class or topic. ``parameters`` is None where the
    signature is unknown; a method's leave out ``self``. ``paragraphs`` are plain prose without examples."""

    module: str
    name: str  # within the module: "quote", "JSONDecoder.raw_decode"; empty for a module
    kind: str
    paragraphs: tuple[str, ...]
    parameters: tuple[Parameter, ...] | None = None
    bases: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.module}.{self.name}" if self.name and self.module != "builtins" else self.name or self.module

    @property
    def bare_name(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def signature(self) -> str:
        """``def quote(string, safe='/')``; empty where it is unknown."""
        if self.parameters is None:
            return ""
        return f"def {self.bare_name}({', '.join(p.text for p in self.parameters)})"


def read_python() -> list[Item]:
    """All documented public items of the standard library, modules in order of their names, then the topics of
    ``help()``. Raises InputError where this Python comes without its sources or its documentation."""
    found: dict[str, Item] = {}
    told: set[tuple[str, ...]] = set()
    for item in (*_parsed(), *_imported(), *_topics()):
        # What a class only inherits or a second module repeats is not told twice.
        if item.paragraphs and item.title not in found and item.paragraphs not in told:
            found[item.title] = item
            told.add(item.paragraphs)
    if len(found) < 1000:
        raise InputError(
            f"{sys.executable} documents only {len(found)} items of its standard library: "
            "take a Python installed with its sources and docstrings (not -OO, not a zip file)"
        )
    return list(found.values())


def prose(text: str | None) -> tuple[str, ...]:
    """The paragraphs of a docstring as plain sentences: no examples, code, tables or headings; markup taken off."""
    found = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text or "")):
        lines = block.splitlines() or [""]
        layout = ">>>" in block or lines[0].startswith(" ") or any("   " in line.strip() for line in lines)
        plain = _unmarked(" ".join(block.split()))
        sentence = len(plain.split()) >= 3 and plain[-1] in ".!?" and plain[0].isalpha()
        if not layout and sentence and not re.search(r"[=~^*#|+-]{4}|\.\. |:: ", plain):
            found.append(plain)
    return tuple(found)


def _unmarked(text: str) -> str:
    text = _QUOTED.sub(r"\1", _ROLE.sub(r"\1", text))
    return _EMPHASIS.sub(r"\1", text).replace("``", "").replace("`", "").replace(" -- ", ": ")


def _parsed() -> Iterator[Item]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        hidden = any(part.startswith("_") or part in _LEFT_OUT for part in parts)
        if not parts or hidden or parts[0] not in sys.stdlib_module_names:
            continue
        module = ".".join(parts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in strings
            tree = ast.parse(path.read_bytes())
        yield from _of_body(_RENAMED.get(module, module), "", tree)


def _of_body(module: str, inside: str, node: ast.Module | ast.ClassDef) -> Iterator[Item]:
    """A module or class and, in their order, the public functions and classes it defines."""
    bases = tuple(ast.unparse(base) for base in node.bases) if isinstance(node, ast.ClassDef) else ()
    kind = "class" if isinstance(node, ast.ClassDef) else "module"
    yield Item(module, inside, kind, prose(ast.get_docstring(node)), bases=bases)
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and child.name[0] != "_":
            name = f"{inside}.{child.name}" if inside else child.name
            if isinstance(child, ast.ClassDef):
                yield from _of_body(module, name, child)
            else:
                yield _function(module, name, child, "method" if inside else "function")


def _function(module: str, name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, kind: str) -> Item:
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    parameters = [_parameter(arg.arg, default) for arg, default in zip(plain, defaults, strict=True)]
    if arguments.vararg:
        parameters.append(Parameter(arguments.vararg.arg, f"*{arguments.vararg.arg}", False, True))
    elif arguments.kwonlyargs:
        parameters.append(Parameter("*", "*", False, True))
    for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(_parameter(arg.arg, default))
    if arguments.kwarg:
        parameters.append(Parameter(arguments.kwarg.arg, f"**{arguments.kwarg.arg}", False, True))
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    if kind == "method" and not static:
        parameters = parameters[1:]
    return Item(module, name, kind, prose(ast.get_docstring(node)), tuple(parameters))


def _parameter(name: str, default: ast.expr | None) -> Parameter:
    given = default is not None
    return Parameter(name, f"{name}={ast.unparse(default)}" if given else name, given, given)


def _imported() -> Iterator[Item]:
    for source, public in _COMPILED.items():
        try:
            module = importlib.import_module(source)
        except ImportError:  # another platform, another build
            continue
        yield Item(public, "", "module", prose(module.__doc__))
        for name in sorted(vars(module)):
            value = getattr(module, name)
            home = getattr(value, "__module__", None)
            if name[0] == "_" or not callable(value) or home not in (source, public, None):
                continue
            if isinstance(value, type):
                bases = tuple(base.__name__ for base in value.__bases__ if base is not object)
                yield Item(public, name, "class", prose(value.__doc__), bases=bases)
                for method in sorted(vars(value)):
                    member = vars(value)[method]
                    if method[0] != "_" and callable(member):
                        yield Item(public, f"{name}.{method}", "method", prose(member.__doc__))
            else:
                yield Item(public, name, "function", prose(value.__doc__), _signature(value))


def _signature(value: Any) -> tuple[Parameter, ...] | None:
    """Of a function in C; None where it does not tell its own."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    found = []
    for p in parameters:
        default = p.default is not p.empty
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        if p.kind is p.KEYWORD_ONLY and not any(other.text[0] == "*" for other in found):
            found.append(Parameter("*", "*", False, True))
        text = f"{p.name}={p.default!r}" if default else star + p.name
        found.append(Parameter(p.name, text, default, default or bool(star)))
    return tuple(found)


def _topics() -> Iterator[Item]:
    """What ``help("for")`` and the like show: sections of the language reference."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        yield Item("help", name, "topic", prose(topics[name]))
