"""``specialize verify``: whether a run folder is whole, each finding in words.

Compared are the ledger with its seal and its own rules, every file with the hash that the ledger recorded when its
stage was done, ``dataset.jsonl`` with the rows that the ledger calls kept, and adapters with the base. Nothing in the
folder is changed.
"""

# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); by path pyright cannot see them from here.
from __future__ import annotations

import json
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import tally
from .errors import InputError
from .files import TEMPORARY, hash_file
from .ledger import SCHEMA, Artefact, reading_lock
from .recipe import read_recipe
from .records import file_fingerprint
from .seal import SEAL, check_seal, open_read_only

STATUSES = ("new", "kept", "rejected")
# What a stage leaves, to say when no hash of it was recorded.
_MAKES = {"index": "index/", "teacher": "teacher/", "filter": "dataset.jsonl", "tune": "rounds/"}


@dataclass
class Findings:
    """What is wrong, and what could not be looked at; ``checked`` counts what was."""

    folder: Path
    wrong: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        return {
            "run": str(self.folder),
            "whole": not self.wrong,
            "findings": self.wrong,
            "not_checked": self.not_checked,
            "checked": dict(self.checked),
        }

    def lines(self) -> list[str]:
        notes = [f"not checked: {text}" for text in self.not_checked]
        if self.wrong:
            return [*self.wrong, *notes]
        counts = ", ".join(f"{count:,} {name}" for name, count in self.checked.items())
        return [f"{self.folder}: whole ({counts})", *notes]


def verify(folder: Path) -> Findings:
    """Check a run folder. Raises InputError where there is no run, or one is at work in it."""
    path = folder / "ledger.sqlite"
    known = [name for name in ("recipe.yaml", SEAL, "dataset.jsonl") if (folder / name).exists()]
    if not path.is_file() and not known:
        raise InputError(f"{folder} is no run folder (no ledger.sqlite, no recipe.yaml)")
    found = Findings(folder)
    with reading_lock(folder):
        if not path.is_file():
            found.wrong.append("ledger.sqlite is missing: no row and no hash of this run is left")
            return found
        sealed = check_seal(path)
        if sealed is None:
            found.wrong.append(
                f"ledger.sqlite has no seal ({SEAL}): its last process was killed or failed, or is of an older "
                "version; the same 'specialize run' goes on and seals it"
            )
        else:
            found.wrong += sealed
        try:
            with closing(open_read_only(path)) as db:
                _check_ledger(db, found)
        except (sqlite3.Error, UnicodeDecodeError, ValueError, TypeError) as error:
            found.wrong.append(f"ledger.sqlite cannot be read whole: {' '.join(str(error).split())}")
        _check_recipe_and_base(folder, found)
        left = sorted(p for p in folder.rglob("*") if p.suffix in TEMPORARY)
        found.wrong += [
            f"{p.relative_to(folder)} was left by an interrupted write; the same 'specialize run' removes it"
            for p in left
        ]
    return found


# the ledger


def _check_ledger(db: sqlite3.Connection, found: Findings) -> None:
    for (text,) in db.execute("PRAGMA integrity_check(20)"):
        if text != "ok":
            found.wrong.append(f"ledger.sqlite is damaged: {' '.join(text.split())}")
    missing = _missing_columns(db)
    if missing:
        found.wrong.append(
            f"ledger.sqlite lacks {', '.join(missing)}: it is damaged, or of an earlier version, then the same "
            "'specialize run' adds what it can"
        )
        return
    found.wrong += [f"ledger.sqlite: {text}" for text in tally.check(db)]
    culprit = tally.wrong_type(db)
    if culprit is not None:
        found.wrong.append(f"ledger.sqlite: {culprit}")
        return
    stages = {
        name: (bool(done), _object(info)) for name, done, info in db.execute("SELECT name, done, info FROM stages")
    }
    for name, (_, info) in stages.items():
        if info is None:
            found.wrong.append(f"ledger.sqlite: stage {name} has no readable record of what it did")
    _check_rows(db, found, stages)
    _check_artefacts(db, found, stages)
    _check_dataset(db, found, stages)


def _missing_columns(db: sqlite3.Connection) -> list[str]:
    with closing(sqlite3.connect(":memory:")) as model:
        model.executescript(SCHEMA + tally.SCHEMA)
        wanted = _columns(model)
    there = _columns(db)
    lacking = [name for name in wanted if name not in there]
    return [f"table {name}" for name in lacking] + [
        f"column {name}.{column}" for name in wanted.keys() & there.keys() for column in wanted[name] - there[name]
    ]


def _columns(db: sqlite3.Connection) -> dict[str, set[str]]:
    names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()]
    return {name: {row[1] for row in db.execute(f'PRAGMA table_info("{name}")')} for name in names}


def _object(text: Any) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, TypeError):
        return None
    return value if isinstance(value, dict) else None


def _check_rows(db: sqlite3.Connection, found: Findings, stages: dict[str, tuple[bool, Any]]) -> None:
    """The rules that every row keeps, and the counts that the filter wrote down."""
    wrong = found.wrong
    items: dict[str, int] = {}
    counts: dict[int, Counter[str]] = {}
    for id, round, status, reason, provenance in db.execute("SELECT id, round, status, reason, provenance FROM items"):
        items[id] = round
        counts.setdefault(round, Counter())[status] += 1
        if not str(id).startswith(f"r{round}-"):
            wrong.append(f"item {id}: its id does not belong to round {round}")
        if status not in STATUSES:
            wrong.append(f"item {id}: status {status!r}; there are {', '.join(STATUSES)}")
        if status == "rejected" and not reason:
            wrong.append(f"item {id}: rejected without a reason")
        if _object(provenance) is None:
            wrong.append(f"item {id}: its provenance is not readable")
    found.checked["items"] += len(items)
    seen: set[tuple[str, str, int]] = set()
    for id, item, purpose, sample, provenance in db.execute(
        "SELECT id, item_id, purpose, sample, provenance FROM replies"
    ):
        found.checked["replies"] += 1
        if id != f"{item}/{purpose}/{sample}":
            wrong.append(f"reply {id}: says it is sample {sample} of {item} for {purpose}")
        if (item, purpose, sample) in seen:
            wrong.append(f"reply {id}: sample {sample} of {item} for {purpose} is there twice")
        seen.add((item, purpose, sample))
        if purpose == "response" and item not in items:
            wrong.append(f"reply {id}: answers {item}, which is no item of the ledger")
        if _object(provenance) is None:
            wrong.append(f"reply {id}: its provenance is not readable")
    for name, (done, info) in stages.items():
        stage, _, number = name.partition("-")
        if stage != "filter" or not done or not info:
            continue
        round = int(number or 1)
        if info.get("counts") != dict(counts.get(round, {})):
            wrong.append(f"round {round}: the filter counted {info.get('counts')}, now {dict(counts.get(round, {}))}")
        if counts.get(round, {}).get("new"):
            wrong.append(f"round {round}: {counts[round]['new']} items have no verdict though the filter is done")


# the files


def _check_artefacts(db: sqlite3.Connection, found: Findings, stages: dict[str, tuple[bool, Any]]) -> None:
    owners = set()
    for owner, *row in db.execute("SELECT stage, path, bytes, sha256 FROM artefacts ORDER BY path").fetchall():
        owners.add(owner)
        found.checked["files"] += 1
        check_file(found, Artefact(*row), owner)
    for name, (done, _) in stages.items():
        if done and name not in owners and name.partition("-")[0] in _MAKES:
            found.wrong.append(f"stage {name}: no hash of {_MAKES[name.partition('-')[0]]} is recorded")


def check_file(found: Findings, recorded: Artefact, owner: str) -> None:
    """Whether a file is the one that ``owner``, a stage or what is published beside them, left."""
    path = found.folder / recorded.path
    if Path(recorded.path).is_absolute() or ".." in Path(recorded.path).parts:
        found.wrong.append(f"{recorded.path!r:.200} ({owner}) is no place within the run folder")
        return
    if not path.is_file():
        found.wrong.append(f"{recorded.path} ({owner}) is missing")
        return
    try:
        num_bytes, sha256 = path.stat().st_size, recorded.sha256
        if num_bytes == recorded.num_bytes:
            num_bytes, sha256 = hash_file(path)
    except OSError as error:
        found.wrong.append(f"{recorded.path} ({owner}) cannot be read: {error.strerror}")
        return
    if num_bytes != recorded.num_bytes:
        found.wrong.append(
            f"{recorded.path} ({owner}) has {num_bytes:,} bytes, {recorded.num_bytes:,} were written: "
            + ("it is cut off" if num_bytes < recorded.num_bytes else "something was added")
        )
    elif sha256 != recorded.sha256:
        found.wrong.append(f"{recorded.path} ({owner}) is not what was written: its SHA-256 differs")


def _check_dataset(db: sqlite3.Connection, found: Findings, stages: dict[str, tuple[bool, Any]]) -> None:
    """``dataset.jsonl`` holds each kept row of the last filtered round once and nothing else."""
    rounds = [int(n.partition("-")[2] or 1) for n, (done, _) in stages.items() if done and n.startswith("filter")]
    path = found.folder / "dataset.jsonl"
    if not rounds or not path.is_file():
        return
    kept = {
        row[0]: list(row[1:])
        for row in db.execute(
            "SELECT id, instruction, input, output, kind FROM items WHERE status = 'kept' AND round = ?", (max(rounds),)
        )
    }
    seen: set[str] = set()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        row = _object(line)
        if row is None or not all(
            isinstance(row.get(n), str) for n in ("id", "instruction", "input", "output", "task")
        ):
            found.wrong.append(f"dataset.jsonl:{number}: no row of id, instruction, input, output and task")
            continue
        found.checked["rows"] += 1
        if row["id"] in seen:
            found.wrong.append(f"dataset.jsonl:{number}: {row['id']} is there twice")
        elif row["id"] not in kept:
            found.wrong.append(f"dataset.jsonl:{number}: {row['id']} is no kept item of the ledger")
        elif kept[row["id"]] != [row["instruction"], row["input"], row["output"], row["task"]]:
            found.wrong.append(f"dataset.jsonl:{number}: {row['id']} differs from the ledger's item")
        seen.add(row["id"])
    lost = sorted(kept.keys() - seen)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        found.wrong.append(f"dataset.jsonl: {lost[0]}{more}, kept in the ledger, is not in it")


# settings, base and adapters


def _check_recipe_and_base(folder: Path, found: Findings) -> None:
    try:
        _, inputs = read_recipe(folder / "recipe.yaml")
    except (InputError, OSError) as error:
        found.wrong.append(f"recipe.yaml cannot be read: {error}")
        inputs = {}
    base = Path(inputs["model"]) if "model" in inputs else None
    if base is not None and not base.exists():
        found.not_checked.append(f"adapters against their base: {base} is not there")
        base = None
    if base is not None:
        _check_base(folder, base, found)
    from .engine.adapter_format import CONFIG_FILE, load_modules

    config = None
    if base is not None:
        from .engine.weights import open_checkpoint

        try:
            config = open_checkpoint(base)[0]
        except InputError as error:
            found.wrong.append(f"the base cannot be read: {error}")
    for path in sorted(folder.rglob(CONFIG_FILE)):
        try:
            saved = load_modules(path.parent)
            if config is not None:
                from .engine.merge import require_fit

                require_fit(saved, config, path.parent, base)
            found.checked["adapters"] += 1
        except InputError as error:
            found.wrong.append(str(error))
    from .train.checkpoint import load_checkpoint
    from .train.loop import BEST_FILE, CHECKPOINT_FILE

    for path in sorted(p for name in (CHECKPOINT_FILE, BEST_FILE) for p in folder.rglob(name)):
        try:
            load_checkpoint(path)
            found.checked["checkpoints"] += 1
        except InputError as error:
            found.wrong.append(str(error))


def _check_base(folder: Path, base: Path, found: Findings) -> None:
    """The base is the one whose hash the training stages wrote down with their settings."""
    try:
        with closing(open_read_only(folder / "ledger.sqlite")) as db:
            rows = db.execute("SELECT name, settings FROM stages").fetchall()
    except (sqlite3.Error, UnicodeDecodeError):
        return  # said already
    now, older = file_fingerprint(base), file_fingerprint(base, whole=False)  # the latter is of earlier versions
    for name, settings in rows:
        recorded = (_object(settings) or {}).get("model", now)
        if recorded not in (now, older):
            found.wrong.append(f"stage {name} was made with another base: {base} now has hash {now}, then {recorded}")
