"""Who holds which page of the KV cache, and which full pages can be used again by a prompt that begins alike.

A page is free (unused), idle (no holder, contents still good for reuse) or held (one or more holders). Idle pages are
given away, least recently used first, when no free page is left. Pure host bookkeeping: no tensor is touched here.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence


def page_key(previous: bytes, token_bytes: bytes) -> bytes:
    """Names a full page by its tokens and, through ``previous``, by all that came before it."""
    return hashlib.blake2b(token_bytes, key=previous, digest_size=16).digest()


class PageAllocator:
    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._holders = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: list[bytes | None] = [None] * num_pages

    @property
    def num_available(self) -> int:
        """Pages that ``allocate`` can still give."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    def acquire(self, keys: Sequence[bytes]) -> list[int]:
        """Takes hold of the longest run of leading pages whose contents are known."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            if self._holders[page] == 0:
                del self._idle[page]
            self._holders[page] += 1
            pages.append(page)
        return pages

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages of unknown contents with one holder each; None, and no change, if too few are left."""
        if count > self.num_available:
            return None
        num_kept = max(len(self._free) - count, 0)
        pages = self._free[num_kept:][::-1]
        del self._free[num_kept:]
        while len(pages) < count:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            pages.append(page)
        for page in pages:
            self._holders[page] = 1
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Says that a held page's contents are those of ``key``. The first page of a key stays the one found."""
        if self._key_of[page] is None and key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Gives up one hold on each page. Later pages of a sequence grow old before earlier ones: more share those."""
        for page in reversed(pages):
            if self._holders[page] <= 0:
                raise RuntimeError(f"page {page} is released but nobody holds it")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if self._key_of[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def forget_contents(self) -> None:
        """After a failed step no page can be trusted: nothing is found again; holders keep what they hold."""
        for page in list(self._idle):
            self._free.append(page)
        self._idle.clear()
        self._page_of.clear()
        self._key_of = [None] * self.num_pages

    def check(self) -> None:
        """Raises AssertionError where the books do not balance."""
        held = {page for page, holders in enumerate(self._holders) if holders > 0}
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a page is free twice"
        assert not (free & idle or free & held or idle & held), "a page is in two states"
        assert len(free) + len(idle) + len(held) == self.num_pages, "free + idle + held differs from the total"
        assert all(self._key_of[page] is not None for page in idle), "an idle page without known contents"
        assert all(self._key_of[page] is None for page in free), "a free page with known contents"
        assert all(self._key_of[page] == key for key, page in self._page_of.items()), "a key names another page"

    def _forget(self, page: int) -> None:
        key = self._key_of[page]
        self._key_of[page] = None
        if key is not None:
            del self._page_of[key]
