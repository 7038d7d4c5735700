"""Folders for what is being written and has not got its name yet, and what is left of them when a process was killed.

A process holds a lock on what it writes; the kernel takes it away when the process dies, however it does.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ENDING = ".tmp"


@contextmanager
def staging(parent: Path, name: str) -> Iterator[Path]:
    """A new hidden folder in ``parent``, gone at the end unless it was renamed; abandoned ones of ``name`` go first."""
    remove_abandoned(parent, f".{glob.escape(name)}-*{ENDING}")
    folder = Path(tempfile.mkdtemp(prefix=f".{name}-", suffix=ENDING, dir=parent))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        hold(descriptor)
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def hold(descriptor: int) -> None:
    """Say that a living process writes this file or folder. A file system without locks has no clean-up either."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_abandoned(parent: Path, pattern: str = f".*{ENDING}") -> None:
    """Remove what matches in ``parent`` and no living process holds."""
    for path in parent.glob(pattern):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or not ours to open
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        except OSError:  # held, or not ours to remove
            continue
        finally:
            os.close(descriptor)
