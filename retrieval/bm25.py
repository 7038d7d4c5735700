"""BM25 over passages (bm25s holds the sparse score matrix; the words, the order of ties and the files are ours)."""

from __future__ import annotations

import re
import shutil
import sys
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from specialize.errors import InputError


@contextmanager
def _without_jax() -> Iterator[None]:
    """bm25s tries JAX when it is imported, which then takes three quarters of a GPU's memory; we select with numpy."""
    hidden = "jax" not in sys.modules
    if hidden:
        sys.modules["jax"] = None  # type: ignore[assignment] - the mark of a module that cannot be imported
    try:
        yield
    finally:
        if hidden:
            del sys.modules["jax"]


with _without_jax():
    import bm25s

K1, B = 1.5, 0.75

# Function words that say nothing about a passage; short on purpose, rare words weigh more anyway.
STOPWORDS = frozenset(
    """a an and are as at be been but by for from had has have if in into is it its of on or such that the their then
    there these they this to was were which will with""".split()  # noqa: SIM905
)


def words(text: str) -> list[str]:
    """Lower-case words and numbers without stopwords."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in STOPWORDS]


class BM25:
    """A BM25 index (Lucene's variant, k1 = 1.5, b = 0.75) over texts numbered from 0."""

    def __init__(self, scorer: bm25s.BM25, count: int) -> None:
        self._scorer = scorer
        self.count = count

    @classmethod
    def build(cls, texts: Iterable[str]) -> BM25:
        vocabulary: dict[str, int] = {}
        ids = [array("i", [vocabulary.setdefault(w, len(vocabulary)) for w in words(text)]) for text in texts]
        if not vocabulary:
            raise InputError("BM25 needs at least one passage with a word in it")
        scorer = bm25s.BM25(k1=K1, b=B, method="lucene")
        scorer.index((ids, vocabulary), create_empty_token=False, show_progress=False)
        return cls(scorer, len(ids))

    def search(self, query: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and scores of the best ``k`` texts that share a word with the query (so maybe fewer than ``k``);
        equal scores in the order of the texts."""
        ids = [self._scorer.vocab_dict[word] for word in words(query) if word in self._scorer.vocab_dict]
        if not ids or k < 1:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        scores = self._scorer.get_scores_from_ids(ids)
        k = min(k, self.count)
        threshold = np.partition(scores, self.count - k)[self.count - k]
        candidates = np.flatnonzero(scores >= max(threshold, np.finfo(np.float32).tiny))
        order = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
        return order.astype(np.int64), scores[order]

    def save(self, folder: Path) -> None:
        """Writes the folder anew; it appears under its name only when complete."""
        partial = folder.with_name(folder.name + ".part")
        shutil.rmtree(partial, ignore_errors=True)
        self._scorer.save(partial, show_progress=False)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    @classmethod
    def load(cls, folder: Path, count: int) -> BM25:
        try:
            scorer = bm25s.BM25.load(folder, mmap=True, load_vocab=True)
            scores = scorer.scores
            found, starts, ids = int(scores["num_docs"]), np.asarray(scores["indptr"]), np.asarray(scores["indices"])
            whole = (
                len(starts) == len(scorer.vocab_dict) + 1
                and starts[0] == 0
                and bool((np.diff(starts) >= 0).all())
                and starts[-1] == len(ids) == len(scores["data"])
                and (len(ids) == 0 or (ids.min() >= 0 and ids.max() < found))
                and all(type(i) is int and 0 <= i < len(starts) - 1 for i in scorer.vocab_dict.values())
                and bool(np.isfinite(scores["data"]).all())
            )
        except Exception as error:
            raise InputError(f"{folder} is damaged ({error}); delete it and build the index again") from error
        if not whole:
            raise InputError(f"{folder} is damaged (its numbers contradict each other); build the index again")
        if found != count:
            raise InputError(f"{folder} counts {found} passages, the manifest {count}; build the index again")
        return cls(scorer, count)
