"""Text of a growing completion: decoded token by token, watched for stop strings, handed out only where certain."""

from __future__ import annotations

from typing import Protocol


class Decoder(Protocol):
    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class StopWatcher:
    """Finds the first stop string, also one that spans tokens. Work per token does not grow with the text."""

    def __init__(self, decoder: Decoder, stops: tuple[str, ...]) -> None:
        self._decoder = decoder
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._tail = ""  # a stop string may begin in it
        self._ready: list[str] = []  # certain, not handed out yet
        self._given: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All text before the stop string."""
        return "".join([*self._given, *self._ready, self._tail])

    def push(self, token_id: int) -> bool:
        """Takes the next token; True when a stop string is complete."""
        return self._append(self._decoder.push(token_id))

    def finish(self) -> bool:
        """No more tokens; True when their rest completes a stop string. After it, all text is certain."""
        found = not self.stopped and self._append(self._decoder.finish())
        self._ready.append(self._tail)
        self._tail = ""
        return found

    def take(self) -> str:
        """Text that no stop string can claim any more, each piece once."""
        piece = "".join(self._ready)
        self._given += self._ready
        self._ready.clear()
        return piece

    def _append(self, piece: str) -> bool:
        if not piece:
            return False
        self._tail += piece
        places = [place for stop in self._stops if (place := self._tail.find(stop)) >= 0]
        if places:
            self._tail = self._tail[: min(places)]
            self.stopped = True
            return True
        certain = len(self._tail) - self._held_back()
        self._ready.append(self._tail[:certain])
        self._tail = self._tail[certain:]
        return False

    def _held_back(self) -> int:
        """Length of the longest end of the tail that begins a stop string."""
        for length in range(min(len(self._tail), self._longest - 1), 0, -1):
            end = self._tail[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
