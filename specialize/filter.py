"""What is rejected and why: instructions that repeat others, and replies that are empty, cut off, looping or copied.

ROUGE-L F1 of two token lists equals the normalised Indel similarity of the two lists, so tokens are mapped to single
characters and rapidfuzz compares whole instructions exactly, bit-parallel, where counting words could not settle it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

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

# An evaluation input whose ROUGE-L F1 with a training row's exceeds this counts as a near-duplicate of it.
NEAR_EVALUATION = 0.7

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

    F1 = 2·LCS / (a + b) of texts of a and b words, and LCS is at most the number of words that both have, repetitions
    counted. So every text is listed under each of its words (a word's second occurrence is a word of its own), the
    candidate's words are counted from the rarest on, and what can no longer have enough in common is left out, as in
    the prefix and count filters of similarity joins. The few texts that stay are compared in full.
    ``compared`` counts these comparisons.
    """

    def __init__(self, threshold: float = 0.7, texts: Iterable[str] = ()):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold {threshold} is not in (0, 1]")
        self.threshold = threshold
        self.compared = 0
        self._ratio = Fraction(repr(float(threshold)))  # 0.7 means 7/10: equality is decided in whole numbers
        self._characters = TokenCharacters()
        self._texts: list[str] = []
        self._encoded: list[str] = []
        self._lengths = array("i")
        self._holders: dict[str, array[int]] = {}  # of the n-th occurrence of a word: the character n times
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        encoded = self._characters.encode(rouge_words(text))
        for token in _occurrences(encoded):
            self._holders.setdefault(token, array("i")).append(len(self._texts))
        self._texts.append(text)
        self._encoded.append(encoded)
        self._lengths.append(len(encoded))

    def find(self, text: str) -> tuple[str, float] | None:
        """The kept text nearest to ``text``, the first among equals, and its ROUGE-L F1; None if none is above the
        threshold."""
        from rapidfuzz.distance import Indel
        from rapidfuzz.process import cdist

        encoded = self._characters.encode(rouge_words(text))
        if not self._texts:
            return None
        lengths = np.frombuffer(self._lengths, np.int32)
        if not encoded:
            empty = np.flatnonzero(lengths == 0)
            return (self._texts[empty[0]], 1.0) if len(empty) and self.threshold < 1 else None
        places = self._possible(encoded, lengths)
        if not len(places):
            return None
        self.compared += len(places)
        twice_lcs = cdist([encoded], [self._encoded[p] for p in places], scorer=Indel.similarity, dtype=np.int64)[0]
        total = lengths[places].astype(np.int64) + len(encoded)
        near = twice_lcs * self._ratio.denominator > self._ratio.numerator * total
        if not near.any():
            return None
        best = int(np.argmax(np.where(near, twice_lcs / total, -1.0)))
        return self._texts[places[best]], float(twice_lcs[best] / total[best])

    def _possible(self, encoded: str, lengths: np.ndarray) -> np.ndarray:
        """Places of the kept texts that have enough words in common with ``encoded`` to be above the threshold."""
        size = len(encoded)
        # needed[n]: the least LCS with a text of n words; more than either text has words where n is too far off.
        every = np.arange(lengths.max() + 1)
        needed = self._ratio.numerator * (every + size) // (2 * self._ratio.denominator) + 1
        feasible = needed <= np.minimum(every, size)
        if not feasible.any():
            return np.empty(0, np.int64)
        least = int(needed[feasible].min())
        wanted = np.where(feasible, needed, 2 * size + 1).astype(np.int32)[lengths]
        holders = sorted((self._holders.get(token, array("i")) for token in _occurrences(encoded)), key=len)
        common = np.zeros(len(lengths), np.int32)
        count = size - least + 1  # after so many words those left could not suffice by themselves
        for places in holders[:count]:
            common[np.frombuffer(places, np.int32)] += 1
        # The commonest words' lists are long: each is read only while it is shorter than comparing what still stands.
        found = np.flatnonzero((common > 0) & (common + (size - count) >= wanted))
        while count < size and _COMPARISON * len(found) > len(holders[count]):
            common[np.frombuffer(holders[count], np.int32)] += 1
            count += 1
            found = found[common[found] + (size - count) >= wanted[found]]
        return found


# Reading an entry of a word's list takes 3 to 5 ns, comparing two texts 200 to 400 (CPU): only speed depends on it.
_COMPARISON = 64


def _occurrences(encoded: str) -> list[str]:
    """One token an occurrence: a character that was seen n - 1 times before becomes itself n times over."""
    seen: Counter[str] = Counter()
    tokens = []
    for character in encoded:
        seen[character] += 1
        tokens.append(character * seen[character])
    return tokens


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
        self._tasks = tasks
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
        """How many training rows and how many evaluation examples share an n-gram, by task; and how many evaluation
        inputs have a near-duplicate among the rows' inputs, with the nearest pairs."""
        examples = list(examples)
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
        by_input = {example.input: example.id for example in reversed(examples) if rouge_words(example.input)}
        near = NearDuplicates(NEAR_EVALUATION, by_input)
        pairs = []
        for task in self._tasks:
            found = [(i, near.find(e.input)) for i, e in enumerate(task.examples) if rouge_words(e.input)]
            hits = [(i, *hit) for i, hit in found if hit is not None]
            by_task[task.name]["near_duplicates"] = len(hits)
            pairs += [
                {"task": task.name, "example": i, "rouge_l": round(score, 3), "row": by_input[text]}
                | {"evaluation_input": task.examples[i].input[:300], "training_input": text[:300]}
                for i, text, score in hits
            ]
        pairs.sort(key=lambda pair: (-pair["rouge_l"], pair["task"], pair["example"]))
        return {
            "n": self.n, "training_rows": len(rows), "rows": rows[:50], "tasks": by_task,
            "rouge_l": NEAR_EVALUATION, "near_duplicates": len(pairs), "nearest": pairs[:10],
        }  # fmt: skip
