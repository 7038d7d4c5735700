"""Exact search by inner product, a block of rows at a time, and the recall of an approximate one against it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

BLOCK_ROWS = 16384
BLOCK_QUERIES = 256


def exact_search(rows: np.ndarray | Iterable[np.ndarray], vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Best ``k`` (or all, if fewer) rows by inner product for each vector, best first, ties by row number: numbers
    i64[Q, k] and scores f32[Q, k].

    ``rows`` is f32[N, D], or blocks of it in order: then only one block is in memory.
    """
    if isinstance(rows, np.ndarray):
        whole = rows
        rows = (whole[start : start + BLOCK_ROWS] for start in range(0, len(whole), BLOCK_ROWS))
    numbers, scores = np.empty((len(vectors), 0), np.int64), np.empty((len(vectors), 0), np.float32)
    first = 0
    for block in rows:
        count = min(k, len(block))
        top = np.empty((len(vectors), count), np.int64)
        found = np.empty((len(vectors), count), np.float32)
        for start in range(0, len(vectors), BLOCK_QUERIES):
            part = slice(start, start + BLOCK_QUERIES)
            products = vectors[part] @ block.T
            top[part] = np.argpartition(-products, count - 1, axis=1)[:, :count]
            found[part] = np.take_along_axis(products, top[part], 1)
        numbers, scores = np.concatenate([numbers, top + first], 1), np.concatenate([scores, found], 1)
        order = np.lexsort((numbers, -scores), axis=1)[:, :k]
        numbers, scores = np.take_along_axis(numbers, order, 1), np.take_along_axis(scores, order, 1)
        first += len(block)
    return numbers, scores


def normalised(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; the same array where they have it already."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows if np.allclose(norms, 1.0, atol=1e-6) else rows / np.maximum(norms, 1e-12)


def recall_of(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the numbers in ``truth`` i64[Q, k] that ``found`` has in the same row."""
    hits = sum(len(np.intersect1d(row, true)) for row, true in zip(found, truth, strict=True))
    return hits / max(truth.size, 1)
