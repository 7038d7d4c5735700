"""What the seeds of one kind say about any answer of that kind: its form, its labels, how its input is built.

From this follow the label-form checks, the agreement between several samples of an answer, and their consensus.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .metrics import entities, entity_set, normalise, rouge_l
from .records import Seed

_TYPED_LIST = re.compile(r"^\s*[^<>]+<[^<>]+>(\s*[,;]\s*[^<>]+<[^<>]+>)*\s*\.?\s*$")
_FIELD = re.compile(r"^([A-Z][\w /()-]{0,30}):\s*(.*)$")
SENTENCE_WORDS = 60  # inputs longer than this are passages
LABEL_WORDS = 8  # outputs that come again and again are labels up to this length
SHORT_WORDS = 8  # inputs shorter than this are terms or questions, which no text yields by cutting


@dataclass(frozen=True)
class Kind:
    """A kind of seed task. ``form`` of its answers: "entities" (name <Type>, …), "list" (a, b, …), "label" (one
    of few outputs that recur among the seeds, `LABEL_WORDS` long at most) or "text".

    ``unit`` of its inputs: "sentence" or "passage" (cut from the corpus), "fields" (lines ``Name: value`` of which
    ``material`` is cut from the corpus and the others are written), "written" (by a model, from a passage), "none".
    """

    id: int
    name: str
    instruction: str
    seeds: tuple[Seed, ...]
    form: str
    labels: frozenset[str]  # for "label" the normalised labels, for "entities" the lower-case types
    extractive: bool  # what is listed occurs in the input
    unit: str
    fields: tuple[str, ...]
    material: str
    min_words: int  # of the part that is cut from the corpus
    max_words: int
    max_output_words: int
    min_output_words: int

    @property
    def open_book(self) -> bool:
        """The answer lies neither in the input nor follows from a long one: passages of the corpus can help."""
        return not self.extractive and self.max_words <= SENTENCE_WORDS

    @property
    def chance_agreement(self) -> float:
        """Of labels: how often two draws from the seeds' are equal, Σ p², so what samples that say nothing reach; of
        other forms 0."""
        if self.form != "label":
            return 0.0
        counts = Counter(normalise(seed.output) for seed in self.seeds)
        return sum(count * count for count in counts.values()) / len(self.seeds) ** 2

    def answer_parts(self, text: str) -> list[tuple[str, str]]:
        return entities(text) if self.form in ("entities", "list") else [(text.strip(), "")]


def split_fields(text: str) -> list[tuple[str, str]] | None:
    """``Name: value`` blocks of an input, or None when it does not start with one. A value may span lines."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        match = _FIELD.match(line)
        if match:
            found.append((match[1], match[2]))
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]}\n{line}".strip())
        else:
            return None
    return found or None


def _form(seeds: Sequence[Seed]) -> tuple[str, frozenset[str]]:
    outputs = [seed.output for seed in seeds]
    if sum(bool(_TYPED_LIST.match(o)) for o in outputs) >= 0.8 * len(outputs):
        return "entities", frozenset(t.lower() for o in outputs for _, t in entities(o))
    labels = frozenset(normalise(o) for o in outputs)
    words = max(len(label.split()) for label in labels)
    if words <= 3 and _recur(outputs):
        return "label", labels
    parts = [[name for name, _ in entities(o)] for o in outputs]
    lists = sum(len(p) >= 2 for p in parts) >= 0.4 * len(outputs)
    brief = median([len(name.split()) for p in parts for name in p] or [99]) <= 5
    plain = sum(o.rstrip().endswith((".", "?", "!")) for o in outputs) <= 0.2 * len(outputs)
    if lists and brief and plain:
        return "list", frozenset()
    return ("label", labels) if words <= LABEL_WORDS and _recur(outputs) else ("text", frozenset())


def _recur(outputs: Sequence[str]) -> bool:
    """Whether there are about twice as many outputs as different ones."""
    return len(outputs) >= 3 and 2 * len({normalise(o) for o in outputs}) <= len(outputs) + 1


def taken_as_text(kind: Kind) -> str:
    """What to tell of a kind whose outputs recur like labels and are taken as free text for their length; else ""."""
    if kind.form != "text" or not _recur([seed.output for seed in kind.seeds]):
        return ""
    outputs = {normalise(seed.output) for seed in kind.seeds}
    name, longest = " ".join(kind.name.split()), max(len(output.split()) for output in outputs)
    return (
        f'kind "{name:.60}": its {len(kind.seeds)} seeds have {len(outputs)} different outputs, as labels have, but '
        f"one is {longest} words long (without articles) and labels are at most {LABEL_WORDS}; its answers are taken "
        "as free text. If they are labels, shorten them in the seeds and task files"
    )


def _within(name: str, text: str) -> bool:
    return " ".join(name.lower().split()) in " ".join(text.lower().split())


def kind_of(id: int, name: str, seeds: Sequence[Seed]) -> Kind:
    form, labels = _form(seeds)
    extractive = False
    if form in ("entities", "list"):
        named = [(part, seed.input) for seed in seeds for part, _ in entities(seed.output)]
        extractive = sum(_within(part, text) for part, text in named) >= 0.9 * len(named)
    split = [split_fields(seed.input) for seed in seeds]
    names = {tuple(n for n, _ in fields) if fields else () for fields in split}
    fields: tuple[str, ...] = ()
    material = ""
    lengths = [len(seed.input.split()) for seed in seeds]
    if len(names) == 1 and len(only := next(iter(names))) >= 2 and len(set(only)) == len(only):
        sizes = {n: median(len(dict(f or ())[n].split()) for f in split) for n in only}
        material = max(only, key=lambda n: sizes[n])
        if sizes[material] > SHORT_WORDS:
            fields, lengths = only, [len(dict(f or ())[material].split()) for f in split]
    if fields:
        unit = "fields"
    elif median(lengths) == 0:
        unit = "none"
    elif median(lengths) <= SHORT_WORDS or 2 * sum(map(bool, split)) > len(seeds):
        unit = "written"
    else:
        unit = "passage" if median(lengths) > SENTENCE_WORDS else "sentence"
    sizes_out = sorted(len(seed.output.split()) for seed in seeds)
    return Kind(
        id=id,
        name=name,
        instruction=Counter(seed.instruction for seed in seeds).most_common(1)[0][0],
        seeds=tuple(seeds),
        form=form,
        labels=labels,
        extractive=extractive,
        unit=unit,
        fields=fields,
        material=material if fields else "",
        min_words=max(3, int(0.7 * min(lengths))),
        max_words=max(8, int(1.3 * max(lengths))),
        max_output_words=max(8, 2 * sizes_out[-1]),
        min_output_words=max(1, sizes_out[0] // 2),
    )


def kinds_of(seeds: Sequence[Seed]) -> list[Kind]:
    """The kinds among the seeds, in the order of their first seed."""
    grouped: dict[str, list[Seed]] = {}
    for seed in seeds:
        grouped.setdefault(seed.kind, []).append(seed)
    return [kind_of(i, name, members) for i, (name, members) in enumerate(grouped.items())]


def form_fault(kind: Kind | None, text: str, input: str) -> str:
    """Why ``text`` cannot be an answer of this kind ("" when it can): label unknown, span not in the input, …"""
    if kind is None or kind.form == "text":
        return ""
    if kind.form == "label":
        return "" if normalise(text) in kind.labels else "label not among those of the seeds"
    if kind.form == "entities" and not _TYPED_LIST.match(text):
        return "not in the form of the seeds' answers"
    parts = kind.answer_parts(text)
    if len(entity_set(text)) < len(parts):
        return "names something twice"
    for name, type_ in kind.answer_parts(text):
        if (
            kind.form == "entities"
            and type_.lower() not in kind.labels
            and type_.lower() not in kind.instruction.lower()
        ):
            return "label not among those of the seeds"
        if kind.extractive and not _within(name, input):
            return "span not in the input"
    return ""


def agreement(kind: Kind | None, texts: Sequence[str]) -> float:
    """Mean agreement of all pairs of samples, 0 to 1: equal labels, F1 of entities, ROUGE-L of free text."""
    pairs = [(a, b) for i, a in enumerate(texts) for b in texts[i + 1 :]]
    if not pairs:
        return 1.0
    total = 0.0
    for a, b in pairs:
        if kind is not None and kind.form == "label":
            total += normalise(a) == normalise(b)
        elif kind is not None and kind.form in ("entities", "list"):
            x, y = entity_set(a), entity_set(b)
            total += 2 * len(x & y) / (len(x) + len(y)) if x or y else 1.0
        else:
            total += rouge_l(a, [b])
    return total / len(pairs)


def consensus(kind: Kind | None, texts: Sequence[str]) -> str:
    """The answer of several samples: the commonest label, else the sample that agrees best with all the others.

    Ties fall to the earlier sample. (Entities that half of the samples name were tried as an answer: they are
    right more often, but so few that the list as a whole is worse than a single sample. See bench/LOG.md.)
    """
    if not texts:
        return ""
    if kind is not None and kind.form == "label":
        votes = Counter(normalise(t) for t in texts)
        first = {normalise(t): t for t in reversed(texts)}
        return first[max(votes, key=lambda label: votes[label])]
    scores = [sum(agreement(kind, [a, b]) for j, b in enumerate(texts) if j != i) for i, a in enumerate(texts)]
    return texts[max(range(len(texts)), key=lambda i: scores[i])]
