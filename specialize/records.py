"""The records a run is made of, and the readers that turn a user's files into them or say what is wrong with a line.

A *kind* is a kind of task among the seeds (their ``task`` field, or the instruction itself where there is none).
"""

# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); by path pyright cannot see them from here.
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError, parse_json

METRICS = ("token_f1", "entity_f1", "rouge_l")
_METRIC_ALIASES = {"f1": "token_f1", "rougeL": "rouge_l", "rouge-l": "rouge_l"}


@dataclass(frozen=True)
class Seed:
    """One task written by a person: the only supervision a run has."""

    id: str
    kind: str
    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Example:
    """One training row. ``source`` is "seed", "corpus" (input from real text) or "novel" (invented instruction)."""

    id: str
    source: str
    kind: str
    instruction: str
    input: str
    output: str
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What the filter says of a candidate: kept, or rejected for ``reason``, a fixed phrase that can be counted."""

    kept: bool
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Shot:
    input: str
    output: str


@dataclass(frozen=True)
class TaskExample:
    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One evaluation task. ``metric`` is its primary metric; all three are always reported."""

    name: str
    instruction: str
    metric: str
    labels: tuple[str, ...]
    shots: tuple[Shot, ...]
    examples: tuple[TaskExample, ...]


def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits that change when any part does. Parts must be JSON-serialisable."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(path: str | Path, *, whole: bool = True) -> str:
    """Hash of a file's content; of a folder, of its files' names, sizes and contents.

    Without ``whole`` only both ends of files beyond 8 MiB count, as for runs of earlier versions.
    """
    path = Path(path)
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path) if path.is_dir() else ''}:{size};".encode())
        if whole and size > 8 << 20:
            from .engine.digest import file_sha256

            digest.update(file_sha256(file).encode())
            continue
        with file.open("rb") as stream:
            if size <= 8 << 20:
                digest.update(stream.read())
            else:
                digest.update(stream.read(1 << 20))
                stream.seek(-(1 << 20), 2)
                digest.update(stream.read())
    return digest.hexdigest()[:16]


def read_json_lines(path: str | Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file. Raises InputError naming file and line."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{what}: no such file: {path}")
    found = False
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                found = True
                try:
                    row = parse_json(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
                except ValueError as error:
                    raise InputError(f"{path}:{number}: not usable JSON: {error}") from None
                if not isinstance(row, dict):
                    raise InputError(f"{path}:{number}: a {type(row).__name__} where a JSON object is wanted")
                yield number, row
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not found:
        raise InputError(f"{what}: {path} is empty")


def text_field(row: dict[str, Any], name: str, where: str, *, empty_ok: bool = False, missing_ok: bool = False) -> str:
    """The string ``row[name]``, or an InputError that says where it is missing or what it is instead."""
    if name not in row or row[name] is None:
        if missing_ok:
            return ""
        raise InputError(f'{where}: no "{name}" (found: {", ".join(map(str, row)) or "nothing"})')
    value = row[name]
    if not isinstance(value, str):
        raise InputError(f'{where}: "{name}" is a {type(value).__name__}, text is wanted')
    if not empty_ok and not value.strip():
        raise InputError(f'{where}: "{name}" is empty')
    return value.strip()


def read_seeds(path: str | Path) -> list[Seed]:
    """Read ``{"instruction", "input", "output", "task"?}`` lines. A repetition is an error that names both lines."""
    seeds: list[Seed] = []
    lines: dict[tuple[str, str], int] = {}
    for number, row in read_json_lines(path, "seeds"):
        where = f"{path}:{number}"
        instruction = text_field(row, "instruction", where)
        text = text_field(row, "input", where, empty_ok=True, missing_ok=True)
        output = text_field(row, "output", where)
        kind = text_field(row, "task", where, empty_ok=True, missing_ok=True) or instruction
        if (instruction, text) in lines:
            raise InputError(f"{where}: the same instruction and input as line {lines[instruction, text]}")
        lines[instruction, text] = number
        seeds.append(Seed(f"seed-{len(seeds):04d}", kind, instruction, text, output))
    return seeds


def _read_task(path: Path) -> Task:
    try:
        row = parse_json(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise InputError(f"{path}: not usable JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{path}: a {type(row).__name__} where a task object is wanted")
    metric = row.get("metric", "token_f1")
    metric = _METRIC_ALIASES.get(metric, metric) if isinstance(metric, str) else metric
    if metric not in METRICS:
        raise InputError(f'{path}: metric "{metric!s:.80}" is unknown; known: {", ".join(METRICS)}')
    shots, examples = [], []
    for name in ("shots", "examples"):
        rows = row.get(name, [])
        if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
            raise InputError(f'{path}: "{name}" must be a list of objects')
        for index, entry in enumerate(rows):
            where = f"{path}: {name}[{index}]"
            text = text_field(entry, "input", where, empty_ok=True, missing_ok=True)
            if name == "shots":
                shots.append(Shot(text, text_field(entry, "output", where)))
                continue
            outputs = entry.get("outputs", entry.get("output"))
            outputs = [outputs] if isinstance(outputs, str) else outputs
            if not isinstance(outputs, list) or not outputs or not all(isinstance(o, str) for o in outputs):
                raise InputError(f'{where}: "outputs" must be a list of one or more texts')
            examples.append(TaskExample(text, tuple(o.strip() for o in outputs)))
    if not examples:
        raise InputError(f"{path}: no examples")
    labels = row.get("labels") or []
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise InputError(f'{path}: "labels" must be a list of texts')
    return Task(
        name=text_field(row, "name", str(path), missing_ok=True) or path.stem,
        instruction=text_field(row, "instruction", str(path)),
        metric=metric,
        labels=tuple(labels),
        shots=tuple(shots),
        examples=tuple(examples),
    )


def read_tasks(path: str | Path) -> list[Task]:
    """Read one task file or every ``*.json`` of a folder, in the order of their names."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"tasks: no such file or folder: {path}")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"tasks: no .json file in {path}")
    tasks = [_read_task(file) for file in files]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f'tasks: two tasks named "{name}" in {path}')
    return tasks


def read_training_rows(path: str | Path) -> list[dict[str, str]]:
    """Read ``{"instruction", "input"?, "output"}`` or ``{"prompt", "response"}`` lines for tuning outside a run."""
    rows = []
    for number, row in read_json_lines(path, "training data"):
        where = f"{path}:{number}"
        if "prompt" in row:
            rows.append({"prompt": str(row["prompt"]), "response": text_field(row, "response", where)})
        else:
            rows.append(
                {
                    "instruction": text_field(row, "instruction", where),
                    "input": text_field(row, "input", where, empty_ok=True, missing_ok=True),
                    "output": text_field(row, "output", where),
                }
            )
    return rows
