"""The run's ledger: one SQLite file in write-ahead mode with one row per item, from its prompt to its verdict.

Every write is one committed transaction, so that a killed process loses at most the item it was working on. Item ids
are computed from the recipe, never counted from the table, and are inserted once; a resumed run asks which are missing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from . import tally
from .errors import InputError
from .files import Artefact
from .sqlite_reader import Connection, check_numbers, stored_json, stored_object

_FORMAT = 2  # 1 had no tallies
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS stages (
  name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, settings TEXT NOT NULL, done INTEGER NOT NULL DEFAULT 0,
  seconds REAL NOT NULL DEFAULT 0, info TEXT NOT NULL DEFAULT '{}');
CREATE TABLE IF NOT EXISTS items (
  id TEXT PRIMARY KEY, round INTEGER NOT NULL, wave INTEGER NOT NULL, source TEXT NOT NULL, kind TEXT NOT NULL,
  instruction TEXT NOT NULL, input TEXT NOT NULL, output TEXT NOT NULL DEFAULT '',
  status TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', detail TEXT NOT NULL DEFAULT '', score REAL,
  provenance TEXT NOT NULL, created REAL NOT NULL, decided REAL);
CREATE INDEX IF NOT EXISTS items_by_status ON items (round, status);
CREATE TABLE IF NOT EXISTS replies (
  id TEXT PRIMARY KEY, item_id TEXT NOT NULL, purpose TEXT NOT NULL, sample INTEGER NOT NULL, raw TEXT NOT NULL,
  finish_reason TEXT NOT NULL, tokens INTEGER NOT NULL, provenance TEXT NOT NULL, created REAL NOT NULL);
CREATE INDEX IF NOT EXISTS replies_by_item ON replies (item_id, purpose);
CREATE TABLE IF NOT EXISTS artefacts (
  path TEXT PRIMARY KEY, stage TEXT NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL);
"""


# Of what stages note, the numbers that others count with.
_NUMBERS = ("tokens", "wanted_tokens", "seconds", "held_out_loss", "passages", "recall_at_10")

# What SQLite says when the place, not the file, is at fault.
_NOT_ITS_FAULT = ("full", "readonly", "disk I/O", "unable to open", "locked")


@dataclass(frozen=True)
class Item:
    """A candidate on its way: status "new" (has an instruction and input), "kept" or "rejected"."""

    id: str
    round: int
    wave: int
    source: str
    kind: str
    instruction: str
    input: str
    output: str = ""
    status: str = "new"
    reason: str = ""
    detail: str = ""
    score: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """One raw model output for an item: ``purpose`` is "instruction", "input" or "response"; sample 0 is greedy."""

    id: str
    item_id: str
    purpose: str
    sample: int
    raw: str
    finish_reason: str
    tokens: int
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    name: str
    fingerprint: str
    settings: dict[str, Any]
    done: bool
    seconds: float
    info: dict[str, Any]


class Ledger:
    """Reads and writes of one run's ledger. One process writes; readers may look at any time."""

    def __init__(self, path: str | Path, *, upgrade: bool = False):
        """``upgrade`` gives a ledger of an earlier version what it lacks; writers do so (`seal.sealed_ledger`)."""
        self.path = Path(path)
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=30, factory=Connection)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(SCHEMA)
            damage = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if any(text in str(error) for text in _NOT_ITS_FAULT):
                raise
            raise InputError(f"{self.path}: not a usable ledger ({error}); choose another --out folder") from None
        if damage != "ok":
            raise InputError(
                f"{self.path}: the ledger is damaged ({' '.join(damage.split())}); bring the folder back from a copy, "
                "or choose another --out folder"
            )
        culprit = tally.wrong_type(self._db)
        if culprit is not None:
            raise InputError(f"{self.path}: the ledger is damaged ({culprit}); choose another --out folder")
        if self._begin(upgrade):
            tally.keep(self._db)

    def _begin(self, upgrade: bool) -> bool:
        """Make a new ledger's tallies, or with ``upgrade`` those of an older one; returns whether it has some."""
        found, tallied = self.meta("format"), tally.present(self._db)
        if found == _FORMAT and tallied:
            return True
        if found not in (None, 1, _FORMAT):
            raise InputError(
                f"{self.path}: ledger format {found}, this version reads {_FORMAT}; choose another --out folder"
            )
        used = any(self._db.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() for name in tally.TABLES)
        if found == _FORMAT or tallied or (found is None and used):
            raise InputError(
                f"{self.path}: the ledger is damaged (its format or its running hashes are lost); bring the folder "
                "back from a copy, or choose another --out folder"
            )
        if found == 1 and not upgrade:  # somebody who only reads leaves the file, and its seal, as they are
            return False
        with self.transaction():
            self._db.execute(tally.SCHEMA)
            self.set_meta("format", _FORMAT)
            tally.begin(self._db)
        return True

    def changed_rows(self) -> list[str]:
        """What differs between the rows and the hashes that were written with them, or between tables and their
        indexes; one text each. Reads the whole ledger."""
        damage = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        return tally.check(self._db) if damage == "ok" else [" ".join(damage.split())]

    def flush(self) -> None:
        """Bring everything from the write-ahead log into the file. Closing does so as well, but says nothing when it
        fails, and comes late where an error's traceback still holds a cursor."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside are one: on disk together or not at all."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # SQLite rolls back by itself when the disk is full
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # meta and stages

    def meta(self, key: str, default: Any = None) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return default if row is None else stored_json(row[0])

    def set_meta(self, key: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def stages(self) -> dict[str, Stage]:
        rows = self._db.execute("SELECT name, fingerprint, settings, done, seconds, info FROM stages ORDER BY rowid")
        found = {r[0]: Stage(r[0], r[1], stored_object(r[2]), bool(r[3]), r[4], stored_object(r[5])) for r in rows}
        for name, stage in found.items():
            check_numbers(f"stage {name}", stage.info, _NUMBERS)
        return found

    def begin_stage(self, name: str, fingerprint: str, settings: dict[str, Any]) -> None:
        self._db.execute(
            "INSERT OR IGNORE INTO stages (name, fingerprint, settings) VALUES (?, ?, ?)",
            (name, fingerprint, json.dumps(settings)),
        )

    def add_seconds(self, name: str, seconds: float) -> None:
        self._db.execute("UPDATE stages SET seconds = seconds + ? WHERE name = ?", (seconds, name))

    def end_stage(self, name: str, info: dict[str, Any], artefacts: Iterable[Artefact] = ()) -> None:
        """The stage is done and left these files."""
        with self.transaction():
            self._db.execute("UPDATE stages SET done = 1, info = ? WHERE name = ?", (json.dumps(info), name))
            self._record(name, artefacts)

    def forget_stages(self, names: Iterable[str]) -> None:
        with self.transaction():
            for name in names:
                self._db.execute("DELETE FROM stages WHERE name = ?", (name,))
                self._db.execute("DELETE FROM artefacts WHERE stage = ?", (name,))

    def record(self, owner: str, artefacts: Iterable[Artefact]) -> None:
        """The files of ``owner`` (a stage, or what is published beside the stages) are these and no others."""
        with self.transaction():
            self._record(owner, artefacts)

    def _record(self, owner: str, artefacts: Iterable[Artefact]) -> None:
        self._db.execute("DELETE FROM artefacts WHERE stage = ?", (owner,))
        self._db.executemany(
            "INSERT OR REPLACE INTO artefacts VALUES (?, ?, ?, ?)",
            [(a.path, owner, a.num_bytes, a.sha256) for a in artefacts],
        )

    def artefacts(self) -> dict[str, list[Artefact]]:
        """The files recorded, by stage or other owner."""
        found: dict[str, list[Artefact]] = {}
        for stage, *row in self._db.execute("SELECT stage, path, bytes, sha256 FROM artefacts ORDER BY path"):
            found.setdefault(stage, []).append(Artefact(*row))
        return found

    # items

    def add_items(self, items: Iterable[Item]) -> int:
        """Insert items that are not there yet; returns how many were new."""
        written = self._db.executemany(
            "INSERT OR IGNORE INTO items (id, round, wave, source, kind, instruction, input, output, status, reason, "
            "detail, score, provenance, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    *(i.id, i.round, i.wave, i.source, i.kind, i.instruction, i.input, i.output, i.status, i.reason),
                    *(i.detail, i.score, json.dumps(i.provenance, ensure_ascii=False), time.time()),
                )
                for i in items
            ],
        )
        return max(written.rowcount, 0)  # total_changes would count what triggers do, too

    def items(self, *, round: int | None = None, status: str | None = None, wave: int | None = None) -> list[Item]:
        where, values = ["1"], []
        for name, value in (("round", round), ("status", status), ("wave", wave)):
            if value is not None:
                where.append(f"{name} = ?")
                values.append(value)
        rows = self._db.execute(
            "SELECT id, round, wave, source, kind, instruction, input, output, status, reason, detail, score, "
            f"provenance FROM items WHERE {' AND '.join(where)} ORDER BY id",
            values,
        )
        found = [Item(*row[:12], provenance=stored_object(row[12])) for row in rows]
        for item in found:
            check_numbers(f"item {item.id}", item.provenance, ("number",))
        return found

    def item_ids(self, *, round: int | None = None) -> set[str]:
        rows = self._db.execute("SELECT id FROM items WHERE ? IS NULL OR round = ?", (round, round))
        return {row[0] for row in rows}

    def decide(self, decisions: Iterable[tuple[str, str, str, str, str, float | None]]) -> None:
        """Write (id, status, reason, detail, output, score) of items; the whole list is one transaction."""
        now = time.time()
        with self.transaction():
            self._db.executemany(
                "UPDATE items SET status = ?, reason = ?, detail = ?, output = ?, score = ?, decided = ? WHERE id = ?",
                [
                    (status, reason, detail, output, score, now, id)
                    for id, status, reason, detail, output, score in decisions
                ],
            )

    def reopen(self, round: int) -> None:
        """Take back every verdict of a round on answered items, so that it can be filtered anew."""
        self._db.execute(
            "UPDATE items SET status = 'new', reason = '', detail = '', output = '', score = NULL, decided = NULL "
            "WHERE round = ? AND decided IS NOT NULL",
            (round,),
        )

    def delete_synthesis(self) -> None:
        """Every candidate, its replies and the plans of the waves. Replies of evaluations stay."""
        with self.transaction():
            self._db.execute("DELETE FROM replies WHERE purpose NOT LIKE 'eval/%'")
            self._db.execute("DELETE FROM items")
            self._db.execute("DELETE FROM meta WHERE key LIKE 'wave-%' OR key LIKE 'materials-%' OR key LIKE 'taken/%'")

    def delete_responses(self, round: int) -> None:
        """The answers of a round; the candidates of round 1 stay, later rounds' are copies and go."""
        with self.transaction():
            self._db.execute(
                "DELETE FROM replies WHERE purpose = 'response' AND item_id IN (SELECT id FROM items WHERE round = ?)",
                (round,),
            )
            if round > 1:
                self._db.execute("DELETE FROM items WHERE round = ?", (round,))
        self.reopen(round)

    # replies

    def add_reply(self, reply: Reply) -> bool:
        """Insert one raw reply; False when it was there already."""
        written = self._db.execute(
            "INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(reply.id, reply.item_id, reply.purpose, reply.sample, reply.raw, reply.finish_reason, reply.tokens),
                *(json.dumps(reply.provenance, ensure_ascii=False), time.time()),
            ),
        )
        return written.rowcount > 0

    def replies(self, purpose: str, item_ids: Iterable[str] | None = None) -> dict[str, list[Reply]]:
        """Replies by item id, samples in order."""
        wanted = None if item_ids is None else set(item_ids)
        found: dict[str, list[Reply]] = {}
        rows = self._db.execute(
            "SELECT id, item_id, purpose, sample, raw, finish_reason, tokens, provenance FROM replies "
            "WHERE purpose = ? ORDER BY item_id, sample",
            (purpose,),
        )
        for row in rows:
            if wanted is None or row[1] in wanted:
                provenance = stored_object(row[7])
                check_numbers(f"reply {row[0]}", provenance, ("number",))
                found.setdefault(row[1], []).append(Reply(*row[:7], provenance=provenance))
        return found

    def reply_ids(self, purpose: str) -> set[str]:
        return {row[0] for row in self._db.execute("SELECT id FROM replies WHERE purpose = ?", (purpose,))}

    # what the report asks

    def reasons(self, round: int | None = None) -> dict[str, int]:
        """Rejections by reason, most frequent first."""
        rows = self._db.execute(
            "SELECT reason, COUNT(*) FROM items WHERE status = 'rejected' AND (? IS NULL OR round = ?) "
            "GROUP BY reason ORDER BY COUNT(*) DESC, reason",
            (round, round),
        )
        return dict(rows.fetchall())

    def counts(self, round: int | None = None) -> dict[str, int]:
        rows = self._db.execute(
            "SELECT status, COUNT(*) FROM items WHERE ? IS NULL OR round = ? GROUP BY status", (round, round)
        )
        return dict(rows.fetchall())

    def reply_times(self, purpose: str) -> list[tuple[float, int]]:
        """(when, tokens) of every reply in the order of arrival."""
        rows = self._db.execute("SELECT created, tokens FROM replies WHERE purpose = ? ORDER BY created", (purpose,))
        return rows.fetchall()

    def answer_times(self, round: int) -> list[tuple[float, str]]:
        """(time of the last reply, status) of each answered item of a round, in order of time."""
        rows = self._db.execute(
            "SELECT MAX(replies.created) AS at, items.status FROM items JOIN replies ON replies.item_id = items.id "
            "WHERE items.round = ? GROUP BY items.id ORDER BY at",
            (round,),
        )
        return rows.fetchall()


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; a second run on it is refused. The lock dies with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"{folder}: cannot be written to ({error.strerror}); choose another --out") from None
        raise
    try:
        _lock(folder, descriptor, fcntl.LOCK_EX, "another run", "wait for it or choose another --out")
        os.ftruncate(descriptor, 0)
        started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        os.pwrite(descriptor, f"{os.getpid()}\n{started}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def reading_lock(folder: Path) -> Iterator[None]:
    """Keep runs off the folder while it is looked at; InputError while one is at work. Writes nothing."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY)
    except FileNotFoundError:  # a copy without the lock file: nobody can hold it
        yield
        return
    try:
        _lock(folder, descriptor, fcntl.LOCK_SH, "a run", "wait until it is done")
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, descriptor: int, kind: int, who: str, advice: str) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: {who} ({_holder(descriptor)}) is at work here; {advice}") from None


def _holder(descriptor: int) -> str:
    """Who wrote the lock file, as far as it can be read: a process may have the lock and not have written yet."""
    number, _, started = os.pread(descriptor, 128, 0).decode(errors="replace").strip().partition("\n")
    if not number.isdigit():
        return "process unknown"
    return f"process {number}, started {started}" if started else f"process {number}"
