"""A domain's folder: what ``specialize init`` writes, and what of it still waits to be filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from .errors import InputError
from .recipe import read_recipe, shipped

MARK = "FILL IN"
INPUT_FILES = {"seeds": "seeds.jsonl", "corpus": "corpus", "tasks": "tasks"}
_TEMPLATES = Path(__file__).parent / "templates" / "domain"


def create(domain: str, folder: Path) -> Path:
    """Write recipe.yaml, seeds.jsonl, tasks/example.json, an empty corpus/ and README.md into ``folder``.

    A domain with a shipped recipe and seeds gets these; any other a commented template and a skeleton. Raises
    InputError for a name that is none and for a folder that holds something.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", domain):
        raise InputError(
            f"init {domain}: a domain's name has letters, digits, - and _; another folder is --out's to say"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out {folder}: exists and is not empty; choose another, or delete it")
    texts = {name: (_TEMPLATES / name).read_text(encoding="utf-8") for name in ("seeds.jsonl", "README.jinja")}
    recipe = _TEMPLATES / "recipe.yaml"
    seeds = read_recipe(domain)[1].get("seeds") if domain in shipped() else None
    if seeds is not None:
        recipe = shipped()[domain]
        texts["seeds.jsonl"] = Path(seeds).read_text(encoding="utf-8")
    settings = recipe.read_text(encoding="utf-8").partition("\ninputs:")[0].replace("DOMAIN", domain)
    inputs = (_TEMPLATES / "inputs.yaml").read_text(encoding="utf-8")
    try:
        for name in ("corpus", "tasks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(f"{settings}\n{inputs}", encoding="utf-8")
        (folder / "seeds.jsonl").write_text(texts["seeds.jsonl"], encoding="utf-8")
        (folder / "tasks" / "example.json").write_text(
            (_TEMPLATES / "task.json").read_text(encoding="utf-8"), encoding="utf-8"
        )
        (folder / "README.md").write_text(_readme(texts["README.jinja"], domain, folder, seeds), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {folder}: {error.strerror}") from None
    return folder


def _readme(template: str, domain: str, folder: Path, seeds: str | None) -> str:
    import jinja2

    lines = {"domain": domain, "folder": folder, "shipped_seeds": seeds is not None, "mark": MARK}
    return (
        jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        .from_string(template)
        .render(lines)
    )


def unfilled(inputs: Mapping[str, str]) -> list[str]:
    """What of seeds, corpus and tasks still is as ``specialize init`` left it, each with its place."""
    found = []
    for name in ("seeds", "tasks"):
        path = Path(inputs.get(name, "")).expanduser()
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        for file in files if name in inputs else []:
            if file.is_file():
                text = file.read_text(encoding="utf-8-sig", errors="replace")
                lines = [number for number, line in enumerate(text.splitlines(), 1) if MARK in line]
                found += [f'{name} ({file}:{lines[0]} still says "{MARK}")'] if lines else []
    corpus = Path(inputs.get("corpus", "")).expanduser()
    if "corpus" in inputs and corpus.is_dir() and not any(file.is_file() for file in corpus.rglob("*")):
        found.append(f"corpus ({corpus} is empty; put .txt or .md files there)")
    return found


def require_filled(inputs: Mapping[str, str]) -> None:
    """InputError, in one line, for a folder of ``specialize init`` that is not filled in."""
    if found := unfilled(inputs):
        raise InputError(f"still to fill in: {'; '.join(found)}")
