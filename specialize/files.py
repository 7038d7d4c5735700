"""Files that appear whole or not at all, their hashes, and what an interrupted write leaves behind."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TEMPORARY = (".tmp", ".part")  # endings of what is being written and has not got its name yet


@dataclass(frozen=True)
class Artefact:
    """A file that a stage made: its path within the run folder, its size and its SHA-256."""

    path: str
    num_bytes: int
    sha256: str


def write_text(path: Path, text: str) -> None:
    """Replace a file whole: a killed or failing write leaves the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def hash_file(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256 in hex digits) of a file's whole content."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def survey(folder: Path, names: Iterable[str]) -> list[Artefact]:
    """The files ``names`` of ``folder``, and all files within those that are folders; in order of their paths."""
    found = []
    for name in names:
        path = folder / name
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.exists() else []
        found += [Artefact(str(f.relative_to(folder)), *hash_file(f)) for f in files if f.suffix not in TEMPORARY]
    return found


def sweep(folder: Path) -> int:
    """Remove what interrupted writes left in a run folder that no process writes to; returns how many there were."""
    left = [path for path in folder.rglob("*") if path.suffix in TEMPORARY]
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(left)


def sync_folder(folder: Path) -> None:
    """Have the folder's entries on the disk: without it, a power cut may bring a deleted file back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
