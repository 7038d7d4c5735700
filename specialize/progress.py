"""How long work shows itself: bars on a terminal, plain lines now and then elsewhere. Always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .log import LOGGER


class Bar:
    """One piece of work. ``advance`` and ``set`` are cheap; what they show is up to the reporter."""

    def __init__(self, reporter: Reporter, label: str, total: int | None, unit: str):
        self.reporter, self.label, self.total, self.unit = reporter, label, total, unit
        self.done = 0.0
        self.started = time.monotonic()
        self.first: float | None = None  # what was there before this process began, left out of the rate
        self.note = ""
        self._said = self.started
        self._task: Any = None

    def already(self, done: float) -> None:
        self.done = self.first = done
        self._show()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.set(self.done + amount, note)

    def set(self, done: float, note: str = "", total: int | None = None) -> None:
        self.done = done
        self.note = note or self.note
        if total is not None:
            self.total = total
        self._show()

    @property
    def rate(self) -> float:
        """Units a second since this process began."""
        return (self.done - (self.first or 0)) / max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        rate = f"{self.rate:.1f}" if self.rate < 100 else f"{self.rate:,.0f}"
        parts = [f"{self.label}: {self.done:,.0f}"]
        if self.total:
            parts[0] += f"/{self.total:,}"
        parts[0] += f" {self.unit}"
        if self.done > (self.first or 0):
            parts.append(f"{rate}/s")
            if self.total and self.done < self.total:
                parts.append(f"{_span((self.total - self.done) / max(self.rate, 1e-9))} left")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)

    def _show(self) -> None:
        self.reporter._update(self)


def _span(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Reporter:
    """Where messages and bars go. ``quiet`` or no terminal: plain lines, at most one in ``interval_s`` for a bar."""

    def __init__(self, *, quiet: bool = False, interval_s: float = 15.0, mute: bool = False):
        """``mute``: another process of the group says it."""
        self.mute = mute
        self.plain = quiet or mute or not sys.stderr.isatty()
        self.quiet = quiet or mute
        self.interval_s = interval_s
        self._progress: Any = None

    def say(self, text: str) -> None:
        if self.mute:
            return
        LOGGER.info(text)
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, label: str, total: int | None = None, unit: str = "") -> Iterator[Bar]:
        bar = Bar(self, label, total, unit)
        LOGGER.debug("%s: begins", label)
        if not self.plain:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.fields[line]}"), BarColumn(bar_width=24))
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=5)
            self._progress.start()
            bar._task = self._progress.add_task("", total=total, line=bar.line())
        failed = True
        try:
            yield bar
            failed = False
        finally:
            if self._progress is not None:
                self._progress.stop()
                self._progress = None
            if bar.done or not failed:  # what failed at its start has its error to say, and nothing else
                self.say(bar.line())

    def _update(self, bar: Bar) -> None:
        if self._progress is not None:
            self._progress.update(bar._task, completed=bar.done, total=bar.total, line=bar.line())
        elif self.plain and not self.quiet and time.monotonic() - bar._said >= self.interval_s:
            bar._said = time.monotonic()
            print(bar.line(), file=sys.stderr, flush=True)
