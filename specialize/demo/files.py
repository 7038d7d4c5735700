"""What every domain of the demo writes: corpus, seeds and tasks in the forms that ``specialize run`` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoFiles:
    """Where the demo's inputs lie, and how many there are."""

    corpus: Path
    seeds: Path
    tasks: Path
    num_documents: int
    num_held_out: int


def write_demo(
    out: Path, documents: Sequence[dict[str, str]], seed_text: str, tasks: Iterable[dict], num_held_out: int
) -> DemoFiles:
    """Writes ``corpus.jsonl``, ``seeds.jsonl`` and ``tasks/*.json``; files whose content is right are left alone."""
    write_tasks(out / "tasks", tasks)
    corpus = out / "corpus.jsonl"
    _write(corpus, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in documents))
    _write(out / "seeds.jsonl", seed_text)
    return DemoFiles(corpus, out / "seeds.jsonl", out / "tasks", len(documents), num_held_out)


def write_tasks(folder: Path, tasks: Iterable[dict]) -> None:
    """A file for each task of ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        _write(folder / f"{task['name']}.json", json.dumps(task, ensure_ascii=False, indent=1) + "\n")


def task_file(
    name: str, instruction: str, rows: Sequence[dict], num_shots: int, labels: Sequence[str] | None = None
) -> dict:
    """A task of ``rows`` ``{"input", "outputs"}``: the first are its shots, the others its examples."""
    shots = [{"input": row["input"], "output": row["outputs"][0]} for row in rows[:num_shots]]
    made: dict = {"name": name, "instruction": instruction, "metric": "token_f1"}
    if labels:
        made["labels"] = list(labels)
    return made | {"shots": shots, "examples": list(rows[num_shots:])}


def _write(path: Path, text: str) -> None:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
