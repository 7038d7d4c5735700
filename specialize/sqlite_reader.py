"""SQLite connections whose complaints about the file are the user's: a damaged or foreign ledger is an InputError."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import InputError, parse_json

# What SQLite and its binding say of the file's content. The rest (full, read-only, locked) is the machine's.
_DAMAGE = (
    "malformed", "not a database", "no such", "no column", "decode", "corrupt", "constraint", "datatype", "view",
    "syntax", "unsupported", "file format", "unrecognized", "trigger", "collation", "values were supplied",
    "not authorized",
)  # fmt: skip


@contextmanager
def _told(source: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:  # the binding fails to decode SQLite's own message, which quotes the file
        raise InputError(f"{source}: not a usable ledger (a name is no text); choose another --out folder") from None
    except sqlite3.DatabaseError as error:
        if not any(word in str(error) for word in _DAMAGE):
            raise
        why = " ".join(str(error).split())[:200]  # it may quote a whole row
        raise InputError(f"{source}: not a usable ledger ({why}); choose another --out folder") from None


class _Cursor(sqlite3.Cursor):
    def execute(self, *args: Any) -> sqlite3.Cursor:
        with _told(self.connection.source):  # type: ignore[attr-defined]
            return super().execute(*args)

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        with _told(self.connection.source):  # type: ignore[attr-defined]
            return super().executemany(*args)

    def executescript(self, *args: Any) -> sqlite3.Cursor:
        with _told(self.connection.source):  # type: ignore[attr-defined]
            return super().executescript(*args)

    def fetchone(self) -> Any:
        with _told(self.connection.source):  # type: ignore[attr-defined]
            return super().fetchone()

    def fetchall(self) -> list[Any]:
        with _told(self.connection.source):  # type: ignore[attr-defined]
            return super().fetchall()

    def __next__(self) -> Any:
        with _told(self.connection.source):  # type: ignore[attr-defined]
            return super().__next__()


class Connection(sqlite3.Connection):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.source = str(args[0])
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA trusted_schema=OFF")  # a stranger's file may hold views and triggers

    def execute(self, *args: Any) -> sqlite3.Cursor:
        return self.cursor(_Cursor).execute(*args)

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        return self.cursor(_Cursor).executemany(*args)

    def executescript(self, *args: Any) -> sqlite3.Cursor:
        return self.cursor(_Cursor).executescript(*args)


def stored_json(text: Any) -> Any:
    """The value of a column that holds JSON."""
    try:
        return parse_json(text)
    except (TypeError, ValueError) as error:
        raise InputError(f"the ledger is damaged (a value is no JSON: {error}); choose another --out folder") from None


class StoredObject(dict[str, Any]):
    """A JSON object of the ledger: who asks for what every run writes and does not find it has a damaged ledger."""

    def __missing__(self, key: str) -> Any:
        raise InputError(
            f'the ledger is damaged (an object has no "{key}", only: {", ".join(self) or "nothing"}); '
            "choose another --out folder"
        )


def stored_object(text: Any) -> StoredObject:
    """The value of a column that holds a JSON object."""
    value = stored_json(text)
    if not isinstance(value, dict):
        raise InputError("the ledger is damaged (a value is no JSON object); choose another --out folder")
    return StoredObject(value)


def check_numbers(owner: str, values: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises InputError where one of the values with these names is there and no number."""
    for name in names:
        if name in values and type(values[name]) not in (int, float):
            raise InputError(
                f'the ledger is damaged ("{name}" of {owner} is a {type(values[name]).__name__}, not a number); '
                "choose another --out folder"
            )
