"""Scores of one reply against its references, and what a set of scores says: means with bootstrap intervals.

All values are shares between 0 and 1 here; the evaluation report turns them into percent.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TYPED = re.compile(r"(?P<text>[^<>]+?)\s*<(?P<type>[^<>]+)>")
_WORD = re.compile(r"[a-z0-9]+")


def normalise(text: str) -> str:
    """SQuAD's answer normalisation: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(reply: str, references: Sequence[str]) -> float:
    """SQuAD token F1 of bags of normalised words, best over the references."""
    said = Counter(normalise(reply).split())
    best = 0.0
    for reference in references:
        wanted = Counter(normalise(reference).split())
        if not said or not wanted:
            best = max(best, float(said == wanted))
            continue
        common = sum((said & wanted).values())
        if common:
            best = max(best, 2 * common / (sum(said.values()) + sum(wanted.values())))
    return best


def entities(text: str) -> list[tuple[str, str]]:
    """The (name, type) pairs of ``name <Type>, name <Type>``; a plain list split at commas and lines has type "".

    A name may hold commas: it reaches from the end of the previous type to its own.
    """
    found: list[tuple[str, str]] = []
    if "<" in text and ">" in text:
        for match in _TYPED.finditer(text):
            name = match["text"].strip().lstrip(",;").strip()
            if name:
                found.append((name, match["type"].strip()))
        return found
    for part in re.split(r"[,;\n]", text):
        if part.strip():
            found.append((part.strip().rstrip(".").strip(), ""))
    return found


def entity_set(text: str) -> frozenset[tuple[str, str]]:
    """The entities for strict comparison: case and inner spaces folded, nothing else."""
    return frozenset((" ".join(n.lower().split()), " ".join(t.lower().split())) for n, t in entities(text))


def entity_counts(reply: str, references: Sequence[str]) -> tuple[int, int, int]:
    """(correct, said, wanted) under strict matching of name and type, for the reference that matches best."""
    said = entity_set(reply)
    best, best_f1 = (0, len(said), 0), -1.0
    for reference in references:
        wanted = entity_set(reference)
        correct = len(said & wanted)
        f1 = 2 * correct / max(1, len(said) + len(wanted))
        if f1 > best_f1:
            best, best_f1 = (correct, len(said), len(wanted)), f1
    return best


def rouge_words(text: str) -> list[str]:
    """The words ROUGE compares: runs of letters and digits, lower case, unstemmed."""
    return _WORD.findall(text.lower())


def lcs_length(a: Sequence, b: Sequence) -> int:
    """Length of the longest common subsequence, by bit-parallel rapidfuzz."""
    from rapidfuzz.distance import LCSseq

    ids: dict = {}
    return int(LCSseq.similarity([ids.setdefault(x, len(ids)) for x in a], [ids.setdefault(x, len(ids)) for x in b]))


def rouge_l(reply: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 (Lin 2004), best over the references."""
    said = rouge_words(reply)
    best = 0.0
    for reference in references:
        wanted = rouge_words(reference)
        if said and wanted:
            best = max(best, 2 * lcs_length(said, wanted) / (len(said) + len(wanted)))
        elif not said and not wanted:
            best = 1.0
    return best


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


# A statistic takes the rows of a resampled task, [resamples, n, columns], and gives one value per resample.
Statistic = Callable[[np.ndarray], np.ndarray]
_DRAWS_AT_ONCE = 1 << 20


def mean_statistic(rows: np.ndarray) -> np.ndarray:
    return rows[..., 0].mean(axis=-1)


def micro_f1_statistic(rows: np.ndarray) -> np.ndarray:
    """Micro F1 from columns (correct, said, wanted)."""
    correct, said, wanted = (rows[..., i].sum(axis=-1) for i in range(3))
    return np.where(said + wanted > 0, 2 * correct / np.maximum(said + wanted, 1), 1.0)


def _in_parts(resamples: int, n: int) -> list[int]:
    """``resamples`` of ``n`` examples in parts of bounded memory; a generator's draws are the same as in one."""
    at_once = max(1, _DRAWS_AT_ONCE // n)
    return [min(at_once, resamples - start) for start in range(0, resamples, at_once)]


def resample(rows: np.ndarray, statistic: Statistic, *, seed: int, resamples: int = 2000) -> np.ndarray:
    """Bootstrap values [resamples] of a statistic of ``rows`` [n, columns]; the same seed draws the same examples,
    so that values of two systems on the same examples are paired."""
    generator, n = np.random.default_rng(seed), len(rows)
    picks = (generator.integers(0, n, size=(count, n)) for count in _in_parts(resamples, n))
    return np.concatenate([statistic(rows[picked]) for picked in picks])


def permuted(
    one: np.ndarray, other: np.ndarray, statistic: Statistic, *, seed: int, resamples: int = 2000
) -> np.ndarray:
    """Differences [resamples] of a statistic of two systems' rows [n, columns] on the same examples, with the two
    exchanged in a random half of the examples: what the difference would be if it did not matter who answered
    (approximate randomization, Noreen 1989)."""
    generator, n = np.random.default_rng(seed), len(one)
    found = []
    for count in _in_parts(resamples, n):
        swapped = generator.random((count, n, 1)) < 0.5
        found.append(statistic(np.where(swapped, other, one)) - statistic(np.where(swapped, one, other)))
    return np.concatenate(found)


def p_value(difference: float, under_null: np.ndarray) -> float:
    """Two-sided: the share of ``under_null`` at least as far from 0, the difference itself counted among them."""
    as_far = np.abs(under_null) >= abs(difference) - 1e-12
    return float((1 + as_far.sum()) / (1 + len(under_null)))


def interval(rows: np.ndarray, statistic: Statistic, *, seed: int, resamples: int = 2000) -> Interval:
    """The statistic of all rows with its 95 % percentile bootstrap interval."""
    values = resample(rows, statistic, seed=seed, resamples=resamples)
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(statistic(rows[None])[0]), float(low), float(high))
