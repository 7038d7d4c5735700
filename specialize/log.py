"""``run.log`` in a run folder: what happened, when, in which process. A line is time (UTC), level, run id, message.

Each process that opens the folder appends under an id of its own, so that interrupted and resumed runs can be told
apart. The log is for people: nothing reads it, and where it cannot be written the run goes on.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import __version__
from .errors import InputError

LEVELS = ("debug", "info", "warning", "error")
LOGGER = logging.getLogger("specialize")
LOGGER.addHandler(logging.NullHandler())  # silent until a run folder is open


class _Lines(logging.Formatter):
    converter = time.gmtime

    def __init__(self, run_id: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03dZ %(levelname)-7s {run_id} %(message)s", "%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", "\n    ")  # a new line begins with a time


class _File(logging.FileHandler):
    """Appends and flushes; a full disk or a folder that became read-only costs lines, not the run."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def run_log(folder: Path, level: str = "info") -> Iterator[str]:
    """Everything logged meanwhile from ``level`` on goes to the folder's ``run.log``; gives the id of this process's
    part. How it ended is its last line, an unexpected error with its traceback."""
    if level not in LEVELS:
        raise InputError(f"log level {level!r}: allowed are {', '.join(LEVELS)}")
    run_id = secrets.token_hex(4)
    handler = _File(folder / "run.log", encoding="utf-8", delay=True)
    handler.setFormatter(_Lines(run_id))
    before = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level.upper())
    try:
        LOGGER.info("begins: specialize %s, Python %s, process %s", __version__, platform.python_version(), os.getpid())
        LOGGER.debug("command: %s", " ".join(sys.argv))
        yield run_id
        LOGGER.info("ends: done")
    except InputError as error:
        LOGGER.error("ends: %s", error)
        raise
    except KeyboardInterrupt:
        LOGGER.warning("ends: interrupted")
        raise
    except BaseException:
        LOGGER.exception("ends: failed")
        raise
    finally:
        LOGGER.setLevel(before)
        LOGGER.removeHandler(handler)
        handler.close()
