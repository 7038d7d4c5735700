"""Which decodes begin alike: found in their page tables, so that attention reads a common prefix once. And the order of
requests that puts such sequences side by side. No torch here."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
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

    @cached_property
    def longest(self) -> int:
        """Pages of the longest prefix."""
        return int(self.num_pages.max())

    @cached_property
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
            tree = _tree(tables, num_full, members, 0)
            chosen = _choose(tree, 0, max(min_pages, 1), {})[1]
            groups += _assign(tree, chosen)
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
    differs = np.flatnonzero(np.diff(values[order])) + 1
    if len(differs) == len(values) - 1:
        return []
    bounds = [0, *differs.tolist(), len(values)]
    return [members[order[a:b]] for a, b in itertools.pairwise(bounds) if b - a > 1]


@dataclass(eq=False)
class _Node:
    """Sequences with their first ``num_pages`` pages in common: ``direct`` ones, and those of the children, who share
    more."""

    num_pages: int
    direct: np.ndarray
    children: list[_Node]


def _tree(tables: np.ndarray, num_full: np.ndarray, members: np.ndarray, depth: int) -> _Node:
    """The members share their first ``depth`` pages at least."""
    limit = int(num_full[members].min())
    same = (tables[members, depth:limit] == tables[members[0], depth:limit]).all(0)
    end = depth + (len(same) if same.all() else int(same.argmin()))
    longer = members[num_full[members] > end]
    parts = _equal(tables[longer, end], longer) if len(longer) > 1 else []
    direct = np.setdiff1d(members, np.concatenate(parts)) if parts else members
    return _Node(end, direct, [_tree(tables, num_full, part, end) for part in parts])


def _choose(
    node: _Node, fallback: int, min_pages: int, known: dict[tuple[_Node, int], tuple[int, list[_Node]]]
) -> tuple[int, list[_Node]]:
    """Pages spared, and the nodes whose prefix becomes a group's, if a group with ``fallback`` pages can be joined.

    A group costs one reading of its pages and spares every member its own.
    """
    if (node, fallback) not in known:
        options = []
        for pages, cost, opened in ((fallback, 0, []), (node.num_pages, node.num_pages, [node])):
            if opened and pages < min_pages:
                continue
            value, chosen = len(node.direct) * pages - cost, list(opened)
            for child in node.children:
                more, below = _choose(child, pages, min_pages, known)
                value, chosen = value + more, chosen + below
            options.append((value, chosen))
        known[node, fallback] = max(options, key=lambda option: option[0])
    return known[node, fallback]


def _assign(node: _Node, chosen: list[_Node]) -> list[tuple[np.ndarray, int]]:
    """Members and pages of each chosen group."""
    members: dict[_Node, list[np.ndarray]] = {}

    def walk(at: _Node, group: _Node | None) -> None:
        group = at if at in chosen else group
        if group is not None:
            members.setdefault(group, []).append(at.direct)
        for child in at.children:
            walk(child, group)

    walk(node, None)
    return [(np.concatenate(parts), group.num_pages) for group, parts in members.items()]
