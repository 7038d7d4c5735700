"""Which decodes begin alike: found in their page tables, so that attention reads a common prefix once. And the order of
requests that puts such sequences side by side. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .sampler import Request

MIN_PREFIX_TOKENS = 64  # shorter ones are not worth a pass of their own


@dataclass(frozen=True)
class PrefixGroups:
    """Decodes ``starts[g]:starts[g+1]`` have their first ``num_pages[g]`` pages in common."""

    starts: np.ndarray  # i32[G+1], from 0 to the number of decodes
    num_pages: np.ndarray  # i32[G]

    @property
    def num_spared(self) -> int:
        """Pages that are not read once more."""
        return int(((np.diff(self.starts) - 1) * self.num_pages).sum())

    @property
    def lens(self) -> np.ndarray:
        """Shared pages of each decode, i32."""
        return np.repeat(self.num_pages, np.diff(self.starts))


def prefix_order(request: Request) -> tuple[str, bytes]:
    """Sorts requests so that the longest common prefixes are neighbours: they then run at the same time, and their
    pages are computed, kept and read once."""
    return request.adapter or "", np.asarray(request.prompt_ids, ">i4").tobytes()


def group_by_prefix(tables: np.ndarray, num_full: np.ndarray, min_pages: int) -> tuple[np.ndarray, PrefixGroups | None]:
    """An order of the decodes in which groups are adjacent, i64 [B], and the groups; None where nothing is shared.

    ``tables`` [B, N] are page-table rows, of which the first ``num_full`` [B] pages are full. Of nested prefixes (all
    share a little, some a lot) those are taken that spare the most page reads.
    """
    groups: list[tuple[np.ndarray, int]] = []
    if tables.shape[1]:
        for members in _equal(tables[:, 0], np.arange(len(tables))):
            groups += _best(tables, num_full, members, 0, max(min_pages, 1))[1]
    shared = np.zeros(len(tables), bool)
    for members, _ in groups:
        shared[members] = True
    alone = np.flatnonzero(~shared)
    if not groups:
        return alone, None
    order = [members for members, _ in groups]
    num_pages = [pages for _, pages in groups]
    if alone.size:
        order.append(alone)
        num_pages.append(0)
    starts = np.zeros(len(order) + 1, np.int32)
    np.cumsum([len(members) for members in order], out=starts[1:])
    return np.concatenate(order), PrefixGroups(starts, np.asarray(num_pages, np.int32))


def _equal(values: np.ndarray, members: np.ndarray) -> list[np.ndarray]:
    """The members with equal values, for each value that two or more have."""
    order = np.argsort(values, kind="stable")
    bounds = np.flatnonzero(np.diff(values[order])) + 1
    return [members[part] for part in np.split(order, bounds) if len(part) > 1]


def _best(
    tables: np.ndarray, num_full: np.ndarray, members: np.ndarray, depth: int, min_pages: int
) -> tuple[int, list[tuple[np.ndarray, int]]]:
    """Pages spared, and the groups, of members that share their first ``depth`` pages at least."""
    limit = int(num_full[members].min())
    same = (tables[members, depth:limit] == tables[members[0], depth:limit]).all(0)
    end = depth + (len(same) if same.all() else int(same.argmin()))
    whole = (len(members) - 1) * end if end >= min_pages else 0
    spared, groups = 0, []
    longer = members[num_full[members] > end]
    if len(longer) > 1:
        for part in _equal(tables[longer, end], longer):
            more, found = _best(tables, num_full, part, end, min_pages)
            spared += more
            groups += found
    if whole >= spared:
        return whole, [(members, end)] if whole else []
    return spared, groups
