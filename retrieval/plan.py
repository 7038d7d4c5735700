"""What building an index takes of memory and disk, from the number of passages, told before the work.

The stages follow one another, so the peak is the largest of them beside what the process holds and keeps:

    reading   DOCUMENT_BYTES of a document: its id and a digest, to know it again; the allocator keeps LEFT_BYTES
    words     the passages' word ids (4 bytes each) and BM25's matrix while it is sorted (SORTED_BYTES an entry)
    graph     hnswlib: 8 M + 12 bytes of links and label and 4 D of vector an element, pointers, locks and the table of
              labels (ELEMENT_BYTES), and (4 M + 20) / (M - 1) for the levels above the lowest

Embeddings are made and read a file of 512 at a time; passages and BM25's finished matrix stay on disk, mapped.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from specialize.errors import InputError

from .corpus import DEFAULT_MAX_WORDS

DOCUMENT_BYTES = 300
LEFT_BYTES = 120
ARRAY_BYTES = 112  # a passage's array of word ids, without the ids
DISTINCT_SHARE = 0.95  # of a passage's words; each is an entry of BM25's matrix
SORTED_BYTES = 36  # score, row, column, sort key, order, and the sorted copies
WORD_BYTES = 500  # of a word of the vocabulary: text, number, counts
ELEMENT_BYTES = 102  # 8 pointer, 4 level, 40 lock, 48 label table, 2 visited marks
LINE_BYTES_A_WORD = 8  # of passages.jsonl, for a word that is no stop word; low, so that words are not undercounted
TEXT_BYTES_A_WORD = 9.4  # English with its stop words
DISK_BYTES_A_WORD = 30  # of the vocabulary
LINE_BYTES = 90  # of a passage in passages.jsonl beside its text
WORKING_BYTES = 64 << 20  # a block of embeddings, its products with the sampled queries, buffers


@dataclass(frozen=True)
class IndexPlan:
    """Sizes in bytes. ``dim`` is 0 without an embedder, ``num_words`` counts all passages' words but stop words."""

    num_passages: int
    dim: int
    num_words: int
    M: int
    reading_bytes: int
    words_bytes: int
    graph_bytes: int
    kept_bytes: int
    text_bytes: int
    disk_bytes: int

    @property
    def peak_bytes(self) -> int:
        """What the build takes at most, beside what the process holds before."""
        return WORKING_BYTES + self.kept_bytes + max(self.reading_bytes, self.words_bytes, self.graph_bytes)

    def require(self, available_bytes: int) -> None:
        """Raises InputError in one line where the peak is above what can be had."""
        if self.peak_bytes > available_bytes:
            parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size, _ in self.rows())
            fewer = "--embedder none, " if self.graph_bytes >= self.words_bytes else ""
            raise InputError(
                f"index: {self.num_passages:,} passages need {self.peak_bytes / 1e9:.2f} GB of memory ({parts}), "
                f"{max(available_bytes, 0) / 1e9:.2f} GB can be had: {fewer}fewer passages, or more memory"
            )

    def rows(self) -> list[tuple[str, int, str]]:
        """(stage, bytes, note); the stages follow one another, the last two rows are there all the time."""
        rows = [
            ("reading", self.reading_bytes, "ids and digests of the documents"),
            ("words", self.words_bytes, f"BM25 over {self.num_words:,} words, while it is sorted"),
            ("graph", self.graph_bytes, f"hnswlib, dim {self.dim}, M {self.M}"),
            ("kept", self.kept_bytes, "places of the passages, vocabulary, what the allocator does not give back"),
            ("working", WORKING_BYTES, "a block at a time"),
        ]
        return [row for row in rows if row[1]]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak_bytes": self.peak_bytes}


def plan_index(
    num_passages: int, dim: int, *, words_a_passage: float = 0.65 * DEFAULT_MAX_WORDS, M: int = 16
) -> IndexPlan:
    """The plan of a build; ``words_a_passage`` without stop words (by default: full passages of English).

    A vocabulary of 40 √words is assumed (Heaps' law as measured on English text, Manning et al. 2008, ch. 5).
    """
    num_words = round(num_passages * words_a_passage)
    vocabulary = min(num_words, round(40 * num_words**0.5))
    entries = DISTINCT_SHARE * num_words
    element = 8 * M + 12 + 4 * dim + ELEMENT_BYTES + (4 * M + 20) / (M - 1)
    text_bytes = round(LINE_BYTES * num_passages + TEXT_BYTES_A_WORD * num_words)
    return IndexPlan(
        num_passages=num_passages,
        dim=dim,
        num_words=num_words,
        M=M,
        reading_bytes=DOCUMENT_BYTES * num_passages,
        words_bytes=round(ARRAY_BYTES * num_passages + 4 * num_words + SORTED_BYTES * entries),
        graph_bytes=round(element * num_passages) if dim else 0,
        kept_bytes=(9 + LEFT_BYTES) * num_passages + WORD_BYTES * vocabulary,
        text_bytes=text_bytes,
        disk_bytes=round(
            text_bytes
            + DISK_BYTES_A_WORD * vocabulary
            + 8 * entries
            + ((element - ELEMENT_BYTES + 4 * dim) * num_passages if dim else 0)
        ),
    )
