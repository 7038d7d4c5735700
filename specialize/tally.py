"""A running hash of each table of a ledger, written in the transaction of the rows themselves.

A killed process leaves no seal. So the ledger holds, for each table, the number of its rows and the sum of their
SHA-256 modulo 2²⁵⁶: adding a row adds its hash, deleting one takes it off, and the order does not matter (the additive
multiset hash of Bellare and Micciancio, 1997; it guards against damage, not against somebody who writes it anew).
Triggers of the connection keep it, so that no write can forget to.
"""

from __future__ import annotations

import hashlib
import sqlite3
from typing import Any

TABLES = ("meta", "stages", "items", "replies", "artefacts")
SCHEMA = "CREATE TABLE IF NOT EXISTS tallies (name TEXT PRIMARY KEY, rows INTEGER NOT NULL, digest TEXT NOT NULL);"
_MODULUS = 1 << 256
_MOST = 10**15  # no time, count or score of a run is larger


def _row_hash(values: tuple[Any, ...]) -> int:
    same = tuple(v + 0.0 if isinstance(v, float) else v for v in values)  # SQLite knows no -0.0
    return int.from_bytes(hashlib.sha256(repr(same).encode("utf-8", "surrogatepass")).digest(), "big")


def _added(digest: str, *values: Any) -> str:
    return f"{(int(digest, 16) + _row_hash(values)) % _MODULUS:064x}"


def _removed(digest: str, *values: Any) -> str:
    return f"{(int(digest, 16) - _row_hash(values)) % _MODULUS:064x}"


def _columns(db: sqlite3.Connection, table: str) -> list[tuple[str, str, bool]]:
    """(name, type as declared, whether it may be empty) of each column."""
    return [(r[1], r[2], not r[3] and not r[5]) for r in db.execute(f'PRAGMA table_info("{table}")').fetchall()]


def keep(db: sqlite3.Connection) -> None:
    """Have every write of this connection bring the tallies up to date. They must be there (`begin`)."""
    db.create_function("tally_added", -1, _added, deterministic=True)
    db.create_function("tally_removed", -1, _removed, deterministic=True)
    db.execute("PRAGMA recursive_triggers=ON")  # so that a row replaced counts as one deleted
    db.execute("PRAGMA temp_store=MEMORY")  # the triggers are this connection's alone, and no file
    for table in TABLES:
        names = [name for name, _, _ in _columns(db, table)]
        new, old = (", ".join(f'{row}."{name}"' for name in names) for row in ("NEW", "OLD"))
        removed = f"tally_removed(digest, {old})"
        for event, rows, digest in (
            ("INSERT", "rows + 1", f"tally_added(digest, {new})"),
            ("UPDATE", "rows", f"tally_added({removed}, {new})"),
            ("DELETE", "rows - 1", removed),
        ):
            db.execute(
                f"CREATE TEMP TRIGGER tally_{table}_{event} AFTER {event} ON main.{table} BEGIN "
                f"UPDATE tallies SET rows = {rows}, digest = {digest} WHERE name = '{table}'; END"
            )


def _there(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'tallies'").fetchone() is not None


def present(db: sqlite3.Connection) -> bool:
    """Whether the ledger has running hashes."""
    return _there(db) and db.execute("SELECT 1 FROM tallies LIMIT 1").fetchone() is not None


def begin(db: sqlite3.Connection) -> None:
    """Write the tallies of the rows that are there; within a transaction of the caller's."""
    for table in TABLES:
        db.execute("INSERT OR REPLACE INTO tallies VALUES (?, ?, ?)", (table, *_count(db, table)))


def check(db: sqlite3.Connection) -> list[str]:
    """What differs between the rows and their tallies, one text a table."""
    kept = {name: (rows, digest) for name, rows, digest in db.execute("SELECT name, rows, digest FROM tallies")}
    findings = []
    for table in TABLES:
        found = _count(db, table)
        if table not in kept:
            findings.append(f"the running hash of {table} is lost")
        elif kept[table][0] != found[0]:
            findings.append(f"{table} has {found[0]} rows where {kept[table][0]} were written")
        elif kept[table] != found:
            findings.append(f"rows of {table} are not what was written")
    return findings


def _count(db: sqlite3.Connection, table: str) -> tuple[int, str]:
    rows = total = 0
    for row in db.execute(f'SELECT * FROM "{table}"'):
        rows, total = rows + 1, total + _row_hash(tuple(row))
    return rows, f"{total % _MODULUS:064x}"


def wrong_type(db: sqlite3.Connection) -> str | None:
    """The first value that is not of its column's type, in words. SQLite itself takes any value in any column."""
    for table in (*TABLES, "tallies") if _there(db) else TABLES:
        tests = []
        for name, kind, optional in _columns(db, table):
            wrong = f"typeof(\"{name}\") <> '{kind.lower()}'"
            if kind != "TEXT":
                wrong += f' OR abs("{name}") > {_MOST}'
            if optional:
                wrong = f'"{name}" IS NOT NULL AND ({wrong})'
            tests.append(f"WHEN {wrong} THEN '{name}'")
        found = db.execute(
            f'SELECT rowid, culprit FROM (SELECT rowid, CASE {" ".join(tests)} END AS culprit FROM "{table}") '
            "WHERE culprit IS NOT NULL LIMIT 1"
        ).fetchone()
        if found is not None:
            return f"{table}.{found[1]} of row {found[0]} is not a value that a run writes"
    return None
