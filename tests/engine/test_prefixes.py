"""Groups of decodes with a common prefix: what they say is true, and no better choice is missed."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from specialize.engine.prefixes import group_by_prefix


def tree_tables(choices: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Page tables of sequences that each took some way through a tree: equal ways so far, equal pages."""
    names: dict[tuple[int, ...], int] = {}
    tables = np.zeros((len(choices), max(map(len, choices), default=0)), np.int32)
    for row, path in enumerate(choices):
        for depth in range(len(path)):
            tables[row, depth] = names.setdefault(tuple(path[: depth + 1]), len(names) + 1)
    return tables, np.asarray([len(path) for path in choices], np.int64)


def common(choices: list[list[int]], members) -> int:
    rows = [choices[i] for i in members]
    return sum(all(r[: d + 1] == rows[0][: d + 1] for r in rows) for d in range(min(map(len, rows))))


def partitions(items: list[int]):
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            left = [i for i in rest if i not in others]
            for tail in partitions(left):
                yield [[first, *others], *tail]


@settings(max_examples=150, deadline=None)
@given(
    choices=st.lists(st.lists(st.integers(0, 1), max_size=4), min_size=1, max_size=6),
    min_pages=st.integers(1, 3),
)
def test_groups_are_true_and_spare_the_most(choices, min_pages):
    tables, num_full = tree_tables(choices)
    order, groups = group_by_prefix(tables, num_full, min_pages)
    assert sorted(order.tolist()) == list(range(len(choices)))
    spared = 0
    if groups is not None:
        assert groups.starts[0] == 0 and groups.starts[-1] == len(choices)
        assert groups.lens.shape == (len(choices),)
        for start, stop, pages in zip(groups.starts, groups.starts[1:], groups.num_pages, strict=False):
            members = order[start:stop].tolist()
            assert pages == 0 or pages >= min_pages
            assert pages <= common(choices, members)
            spared += (len(members) - 1) * int(pages)
        assert spared == groups.num_spared > 0

    def worth(part: list[int]) -> int:
        pages = common(choices, part)
        return (len(part) - 1) * pages if pages >= min_pages else 0

    assert spared == max(sum(map(worth, split)) for split in partitions(list(range(len(choices)))))
