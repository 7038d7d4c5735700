"""What is rejected and why: instructions that repeat others, and replies that are empty, cut off, looping or copied.

ROUGE-L F1 of two token lists equals the normalised Indel similarity of the two lists, so tokens are mapped to single
characters and rapidfuzz compares whole instructions exactly, bit-parallel.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

from .kinds import Kind, form_fault
from .metrics import rouge_words
from .records import Example, Task, Verdict

# Every reason there is, in the order in which they are looked for.
UNPARSABLE = "reply does not parse"
TOO_LONG_PROMPT = "prompt too long for the context"
EMPTY = "empty"
TOO_SHORT = "too short"
TOO_LONG = "too long"
CUT_OFF = "cut off at the token limit"
REPETITION = "repeats itself"
PLACEHOLDER = "placeholder instead of content"
NEAR_DUPLICATE = "near-duplicate of a kept one"
COPIED_DEMONSTRATION = "copied from a demonstration"
COPIED_INPUT = "copies its input"
OVERLAP = "overlaps the evaluation data"
LOW_AGREEMENT = "samples disagree"
SURPLUS = "more than wanted of its kind"

_PLACEHOLDERS = (
    "[insert",
    "<insert",
    "[your",
    "<your",
    "lorem ipsum",
    "[text]",
    "[input]",
    "<input>",
    "[passage]",
    "[name",
    "xxx",
)


class TokenCharacters:
    """Maps words to characters, one per distinct word, so that a word list becomes a string of equal length."""

    def __init__(self) -> None:
        self._characters: dict[str, str] = {}

    def encode(self, words: Iterable[str]) -> str:
        out = []
        for word in words:
            character = self._characters.get(word)
            if character is None:
                code = 0x21 + len(self._characters)
                code += 0x800 if code >= 0xD800 else 0  # surrogates are no characters
                if code > 0x10FFFF:
                    raise OverflowError("more than 1.1 million distinct words")
                character = self._characters[word] = chr(code)
            out.append(character)
        return "".join(out)


class NearDuplicates:
    """The kept texts, asked for one whose ROUGE-L F1 with a candidate exceeds ``threshold``. Exact at any size.

    Kept texts lie in buckets by length: F1 ≤ 2·min(a, b)/(a + b) bounds which lengths can exceed the threshold.
    """

    def __init__(self, threshold: float = 0.7, texts: Iterable[str] = ()):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold {threshold} is not in (0, 1]")
        self.threshold = threshold
        self._characters = TokenCharacters()
        self._buckets: dict[int, list[str]] = {}
        self._owners: dict[int, list[str]] = {}
        self._lengths: list[int] = []
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def add(self, text: str) -> None:
        encoded = self._characters.encode(rouge_words(text))
        if len(encoded) not in self._buckets:
            self._lengths.insert(bisect_left(self._lengths, len(encoded)), len(encoded))
        self._buckets.setdefault(len(encoded), []).append(encoded)
        self._owners.setdefault(len(encoded), []).append(text)

    def find(self, text: str) -> tuple[str, float] | None:
        """A kept text above the threshold and its ROUGE-L F1, or None."""
        from rapidfuzz.distance import Indel
        from rapidfuzz.process import extractOne

        encoded = self._characters.encode(rouge_words(text))
        size = len(encoded)
        # Lengths shrink or grow until even the shorter text as a whole subsequence would not exceed the threshold.
        for length in sorted(self._lengths, key=lambda n: abs(n - size)):
            shorter, longer = min(length, size), max(length, size)
            if size and length and 2 * shorter <= self.threshold * (shorter + longer):
                continue
            if not size or not length:
                if size == length:
                    return self._owners[length][0], 1.0
                continue
            best = extractOne(
                encoded,
                self._buckets[length],
                scorer=Indel.normalized_similarity,
                processor=None,
                score_cutoff=self.threshold,
                score_hint=self.threshold,
            )
            if best is not None and best[1] > self.threshold:
                return self._owners[length][best[2]], float(best[1])
        return None


def repeats_itself(text: str) -> bool:
    """A loop: the same four words in a row three times, or (from 24 words on) fewer than a third of them distinct.

    Written lists repeat their ``<Type>``, so types are left out of the count.
    """
    words = [w for w in text.lower().split() if not (w.startswith("<") or w.endswith((">", ">,")))]
    grams = Counter(tuple(words[i : i + 4]) for i in range(len(words) - 3))
    if grams and max(grams.values()) >= 3:
        return True
    parts = [part.strip() for part in text.lower().split(",") if part.strip()]
    if len(parts) >= 4 and Counter(parts).most_common(1)[0][1] >= 3:
        return True
    return len(words) >= 24 and 3 * len(set(words)) < len(words)


def check_instruction(text: str, *, min_words: int, max_words: int) -> Verdict:
    """Length, repetition and placeholders of an invented instruction."""
    words = text.split()
    if not words:
        return Verdict(False, EMPTY)
    if len(words) < min_words:
        return Verdict(False, TOO_SHORT, f"{len(words)} words")
    if len(words) > max_words:
        return Verdict(False, TOO_LONG, f"{len(words)} words")
    if repeats_itself(text):
        return Verdict(False, REPETITION)
    if any(p in text.lower() for p in _PLACEHOLDERS):
        return Verdict(False, PLACEHOLDER)
    return Verdict(True)


def check_reply(
    text: str,
    input: str,
    *,
    kind: Kind | None,
    finish_reason: str = "stop",
    demonstrations: Sequence[str] = (),
    max_words: int = 200,
) -> Verdict:
    """Everything that can be said of one answer without other samples. ``kind`` None is an invented instruction's."""
    words = text.split()
    if not words:
        return Verdict(False, EMPTY)
    if finish_reason == "length":
        return Verdict(False, CUT_OFF)
    if repeats_itself(text):
        return Verdict(False, REPETITION)
    if any(p in text.lower() for p in _PLACEHOLDERS) and not any(p in input.lower() for p in _PLACEHOLDERS):
        return Verdict(False, PLACEHOLDER)
    if kind is not None and kind.form == "text" and len(words) < kind.min_output_words:
        return Verdict(False, TOO_SHORT, f"{len(words)} words")
    limit = max_words if kind is None else kind.max_output_words
    if len(words) > limit and not (kind is not None and kind.extractive):
        return Verdict(False, TOO_LONG, f"{len(words)} words, at most {limit}")
    fault = form_fault(kind, text, input)
    if fault:
        return Verdict(False, fault, text[:200])
    free = kind is None or kind.form == "text"
    if free:
        folded = " ".join(text.lower().split())
        if len(words) >= 4 and any(folded == " ".join(d.lower().split()) for d in demonstrations):
            return Verdict(False, COPIED_DEMONSTRATION)
        if len(words) >= 8 and folded == " ".join(input.lower().split()):
            return Verdict(False, COPIED_INPUT)
    return Verdict(True)


class EvaluationOverlap:
    """Word n-grams of the evaluation inputs. Texts shorter than n words count as one gram of their own."""

    def __init__(self, tasks: Sequence[Task], n: int = 13):
        self.n = n
        self._grams: dict[tuple[str, ...], set[tuple[str, int]]] = {}
        self._num_examples = {task.name: len(task.examples) for task in tasks}
        for task in tasks:
            for index, example in enumerate(task.examples):
                for gram in self._of(example.input):
                    self._grams.setdefault(gram, set()).add((task.name, index))

    def _of(self, text: str) -> set[tuple[str, ...]]:
        words = rouge_words(text)
        if len(words) < self.n:
            return {tuple(words)} if len(words) >= 4 else set()
        return {tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)}

    def hits(self, text: str) -> set[tuple[str, int]]:
        """(task, example index) of the evaluation inputs that share an n-gram with ``text``."""
        found: set[tuple[str, int]] = set()
        for gram in self._of(text):
            found |= self._grams.get(gram, set())
        return found

    def report(self, examples: Iterable[Example]) -> dict:
        """How many training rows and how many evaluation examples share an n-gram, by task."""
        touched: set[tuple[str, int]] = set()
        rows = []
        for example in examples:
            found = self.hits(f"{example.input}\n{example.output}")
            touched |= found
            if found:
                rows.append(example.id)
        by_task = {
            name: {"examples": count, "overlapping": sum(t == name for t, _ in touched)}
            for name, count in self._num_examples.items()
        }
        return {"n": self.n, "training_rows": len(rows), "rows": rows[:50], "tasks": by_task}
