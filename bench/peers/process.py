"""A peer's process: started, told what to do a line of JSON at a time, stopped while it is not its turn, ended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from .install import PeerError


class PeerProcess:
    """One peer in its own process group; what it prints beside its answers goes to ``log``."""

    def __init__(self, name: str, python: str | Path, script: Path, log: Path) -> None:
        self.name = name
        self.log = log
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("PYTHONPATH", None)  # the peer's own packages and no others
        environment.setdefault("OMP_PROC_BIND", "true")  # two threads on one core wait for each other
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [str(python), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self._pending = b""

    def ask(self, command: str, timeout_s: float = 900.0, **arguments: Any) -> dict[str, Any]:
        """The answer to a command. Raises PeerError where the peer says so, ends, or takes too long."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({command: arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"ended with code {self._process.wait()}; {self._last_words()}") from None
        answer = json.loads(self._read_line(command, timeout_s))
        if "error" in answer:
            raise PeerError(str(answer["error"])[:1000])
        return answer

    def _read_line(self, command: str, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise PeerError(f"no answer to {command} within {timeout_s:.0f} s")
                got = os.read(self._process.stdout.fileno(), 1 << 20)
                if not got:
                    raise PeerError(f"ended with code {self._process.wait()}; {self._last_words()}")
                self._pending += got
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"its last words: {lines[-1][:300]}" if lines else "it said nothing"

    def memory_bytes(self) -> int:
        """Resident memory of the process and its children, now."""
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(self._process.pid)
            return sum(p.memory_info().rss for p in (parent, *parent.children(recursive=True)))
        return 0

    def pause(self) -> None:
        """Stops it until ``resume``: a library's waiting threads must not take cores from the next in turn."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Ends the peer and all it started."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self.resume()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
