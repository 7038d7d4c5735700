"""The seal of a ledger: what its file and its tables held when the last process closed it.

SQLite has no checksums of its own. So whoever closes a run's ledger writes the file's SHA-256 and one for the rows of
each table into ``ledger.seal`` beside it, and whoever opens the ledger to write compares first and takes the seal away
until it is closed again. A killed process leaves no seal; then the ledger's own running hashes are compared (`tally`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import hash_file, sync_folder, write_text
from .ledger import Ledger

SEAL = "ledger.seal"
_FORMAT = 1


def table_digests(db: sqlite3.Connection) -> dict[str, list[Any]]:
    """For each table [number of rows, SHA-256 of all of them in the order of their first column]."""
    found: dict[str, list[Any]] = {}
    for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall():
        digest, count = hashlib.sha256(), 0
        for row in db.execute(f'SELECT * FROM "{name}" ORDER BY 1'):
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
            count += 1
        found[name] = [count, digest.hexdigest()]
    return found


def open_read_only(path: Path) -> sqlite3.Connection:
    """A connection that changes nothing, not even beside the file where no process has it open."""
    mode = "mode=ro" if _log_bytes(path) else "mode=ro&immutable=1"
    return sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, isolation_level=None)


def _log_bytes(path: Path) -> int:
    """Size of SQLite's write-ahead log beside the file: what was committed and is not in the file yet."""
    log = path.with_name(path.name + "-wal")
    return log.stat().st_size if log.is_file() else 0


def write_seal(path: Path) -> None:
    """Seal the closed ledger at ``path``; not while its log holds what the file does not, for the file will change."""
    if _log_bytes(path):
        return
    num_bytes, sha256 = hash_file(path)
    with closing(open_read_only(path)) as db:
        body = json.dumps({"format": _FORMAT, "bytes": num_bytes, "sha256": sha256, "tables": table_digests(db)})
    write_text(path.with_name(SEAL), f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n")


def check_seal(path: Path) -> list[str] | None:
    """What is wrong with the ledger by its seal, one text a finding; None where there is no seal to compare with."""
    try:
        raw = path.with_name(SEAL).read_bytes()
    except FileNotFoundError:
        return None
    body, _, rest = raw.partition(b"\n")
    if rest != f"{hashlib.sha256(body).hexdigest()}\n".encode():
        return [f"{SEAL} is damaged: its content is not the one it was written with"]
    sealed = json.loads(body)
    if not isinstance(sealed, dict) or not {"format", "bytes", "sha256", "tables"} <= sealed.keys():
        return [f"{SEAL} is damaged: it does not say what a seal says"]
    if sealed["format"] != _FORMAT:
        return [f"{SEAL} has format {sealed['format']}, this version reads {_FORMAT}"]
    if not path.is_file():
        return [f"{path.name} is missing"]
    findings = []
    if _log_bytes(path):
        findings.append(f"{path.name} was written to after its run had closed it ({path.name}-wal is not empty)")
    num_bytes, sha256 = hash_file(path)
    if (num_bytes, sha256) == (sealed["bytes"], sealed["sha256"]):
        return findings
    size = f", {num_bytes:,} bytes where {sealed['bytes']:,} were" if num_bytes != sealed["bytes"] else ""
    return [
        *findings,
        f"{path.name} is not the file that its run closed{size}: {_what_differs(path, sealed['tables'])}",
    ]


def _what_differs(path: Path, sealed: dict[str, list[Any]]) -> str:
    try:
        with closing(open_read_only(path)) as db:
            now = table_digests(db)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        return f"it cannot be read ({error})"
    changed = [name for name in sealed.keys() | now.keys() if sealed.get(name) != now.get(name)]
    if not changed:
        return "its rows are unchanged"
    parts = []
    for name in sorted(changed):
        before, after = sealed.get(name, [0])[0], now.get(name, [0])[0]
        parts.append(f"{name} ({after} rows where {before} were)" if before != after else f"rows of {name}")
    return f"{', '.join(parts)} differ"


@contextmanager
def sealed_ledger(path: Path) -> Iterator[Ledger]:
    """The ledger of a run, to be written by the one process that holds the run's lock.

    Raises InputError where the file is not the one that was sealed. The seal is off while the ledger is open.
    """
    findings = check_seal(path)
    if findings:
        raise InputError(
            f"{path.parent}: {'; '.join(findings)}. Bring the folder back from a copy, or delete {SEAL} to go on with "
            f"the ledger as it is ('specialize verify {path.parent}' says more)"
        )
    if findings is not None:
        path.with_name(SEAL).unlink()
        sync_folder(path.parent)
    with Ledger(path, upgrade=True) as ledger:
        changed = ledger.changed_rows() if findings is None else []
        if changed:
            raise InputError(
                f"{path}: {'; '.join(changed)}: it was changed after its last run was killed. Bring the folder back "
                "from a copy, or choose another --out folder"
            )
        failed = True
        try:
            yield ledger
            failed = False
        finally:
            # An error on its way must not be hidden by one of sealing, such as a second report of a full disk.
            with contextlib.suppress(OSError, sqlite3.Error) if failed else contextlib.nullcontext():
                ledger.flush()
                ledger.close()
                write_seal(path)
