"""Reciprocal rank fusion: several rankings of the same passages become one, without comparing their scores."""

from __future__ import annotations

from collections.abc import Sequence

RANK_OFFSET = 60  # Cormack, Clarke and Büttcher (SIGIR 2009); damps the lead of the very first ranks


def reciprocal_rank_fusion(
    rankings: Sequence[Sequence[int]], weights: Sequence[float] | None = None, rank_offset: int = RANK_OFFSET
) -> list[tuple[int, float]]:
    """``(passage number, score)`` with the best first; score = Σ weight / (rank_offset + rank), rank from 1.
    Equal scores are ordered by passage number, so the result does not depend on the order of the rankings."""
    scores: dict[int, float] = {}
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        for rank, number in enumerate(ranking, start=1):
            scores[number] = scores.get(number, 0.0) + weight / (rank_offset + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))
