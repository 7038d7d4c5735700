"""From recipe, seeds and corpus to answered candidates: what is asked, with which text, and what the model said.

Everything here follows from (recipe seed, item id) alone, never from the order in which replies come back. So a resumed
run asks exactly what is missing.
"""

# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); by path pyright cannot see them from here.
from __future__ import annotations

import hashlib
import math
import random
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import filter as rules
from .errors import InputError
from .kinds import Kind, agreement, consensus, split_fields
from .ledger import Item, Ledger, Reply
from .metrics import entities, normalise
from .prompts import (
    STOP,
    clean_reply,
    input_prompt,
    instruction_prompt,
    openings,
    parse_instruction,
    response_prompt,
)
from .recipe import Recipe
from .records import Verdict

ANCHOR_SAMPLES, ANCHOR_TOKENS = 2, 96  # texts from each opening, and how long they may be
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|vs|cf|al|Fig|Figs|Dr|No|Nos|approx|ca|St|spp?|[A-Z])\.)$")


def number_of(*parts: Any, bits: int = 48) -> int:
    """A whole number fixed by its parts, for seeds and request ids."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - bits)


def sentences(text: str) -> list[str]:
    """The sentences of a text; no split after common abbreviations and initials."""
    parts: list[str] = []
    for piece in _SENTENCE_END.split(" ".join(text.split())):
        if parts and _ABBREVIATION.search(parts[-1]):
            parts[-1] = f"{parts[-1]} {piece}"
        elif piece:
            parts.append(piece)
    return parts


def seed_words(seed: Any) -> int:
    """Words of a seed's row, to tell how much training text a row of its kind is."""
    return sum(len(text.split()) for text in (seed.instruction, seed.input, seed.output))


def cut(text: str, max_words: int) -> str:
    """The first whole sentences of a text that fit into ``max_words``; the bare words when not even one does."""
    kept: list[str] = []
    size = 0
    for sentence in sentences(text):
        size += len(sentence.split())
        if size > max_words:
            break
        kept.append(sentence)
    return " ".join(kept) or " ".join(text.split()[:max_words])


@dataclass(frozen=True)
class Material:
    """A piece of corpus text that serves as (part of) an input."""

    text: str
    document_id: str


@dataclass(frozen=True)
class Job:
    """One prompt of the model; its replies get the samples ``first_sample``, ``first_sample + 1``, …"""

    item_id: str
    purpose: str
    prompt: str
    params: Any
    adapter: str | None = None
    first_sample: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)

    def reply_id(self, index: int) -> str:
        return f"{self.item_id}/{self.purpose}/{self.first_sample + index}"


def run_jobs(
    generator: Any,
    jobs: Sequence[Job],
    ledger: Ledger,
    *,
    origin: dict[str, Any],
    on_reply: Callable[[Reply], None] | None = None,
) -> int:
    """Generate what is missing of ``jobs`` and commit each reply as it arrives; returns how many were written.

    ``origin`` (model, adapter, …) joins each reply's provenance. The prompt is stored with sample 0.
    """
    from .engine.sampler import Request

    done: dict[str, set[str]] = {purpose: ledger.reply_ids(purpose) for purpose in {job.purpose for job in jobs}}
    waiting = {
        number_of(job.reply_id(0)): job
        for job in jobs
        if any(job.reply_id(i) not in done[job.purpose] for i in range(job.params.n))
    }

    def requests() -> Iterator[Request]:
        # Prompts that share demonstrations follow each other, so that these are computed once.
        for request_id, job in sorted(waiting.items(), key=lambda pair: (pair[1].adapter or "", pair[1].prompt)):
            ids = generator.tokenizer.encode(job.prompt)
            yield Request(prompt_ids=ids, params=job.params, adapter=job.adapter, request_id=request_id)

    written = 0
    for completion in generator.run(requests()):
        job = waiting[completion.request_id]
        index = completion.index
        provenance = origin | job.provenance | {"seed": job.params.seed, "temperature": job.params.temperature}
        if job.first_sample + index == 0:
            provenance["prompt"] = job.prompt
        if completion.error:
            provenance["error"] = completion.error
        reply = Reply(
            id=job.reply_id(index),
            item_id=job.item_id,
            purpose=job.purpose,
            sample=job.first_sample + index,
            raw=completion.text,
            finish_reason=completion.finish_reason,
            tokens=len(completion.token_ids),
            provenance=provenance,
        )
        if ledger.add_reply(reply):
            written += 1
            if on_reply is not None:
                on_reply(reply)
    return written


def anchor_jobs(recipe: Recipe) -> list[Job]:
    """Prompts for texts of no domain: the base goes on from the openings by plain sampling, its own distribution."""
    from .engine.sampler import SamplingParams

    length = min(ANCHOR_TOKENS, recipe.tune.anchor_tokens)
    return [
        Job(
            item_id=f"anchor-{number_of(recipe.seed, length, opening):x}",
            purpose="anchor",
            prompt=opening,
            params=SamplingParams(
                max_tokens=length,
                temperature=1.0,
                n=ANCHOR_SAMPLES,
                seed=number_of(recipe.seed, "anchor", opening, bits=31),
            ),
        )
        for opening in openings()
    ]


def anchor_texts(recipe: Recipe, ledger: Ledger) -> list[str]:
    """The anchor's texts as far as the base has written them into the ledger, two of each opening."""
    jobs = anchor_jobs(recipe)
    replies = ledger.replies("anchor", [job.item_id for job in jobs])
    return [job.prompt + reply.raw for job in jobs for reply in replies.get(job.item_id, ())]


class Synthesizer:
    """Owns the plan of one run: which candidates there are, their prompts, and the judgement of the replies."""

    def __init__(
        self,
        recipe: Recipe,
        kinds: Sequence[Kind],
        documents: Sequence[Any],
        *,
        index: Any = None,
        overlap: rules.EvaluationOverlap | None = None,
        embed: Callable[[list[str]], np.ndarray] | None = None,
        remember: Callable[[str, Callable[[], Any]], Any] | None = None,
    ):
        """``embed`` gives normalised vectors; ``remember(key, make)`` keeps what ``make()`` gave across restarts."""
        self.recipe = recipe
        self.kinds = list(kinds)
        self.seeds = [seed for kind in kinds for seed in kind.seeds]
        self.documents = documents
        self.index = index if recipe.retrieval.mode != "off" else None
        self.overlap = overlap
        self.embed = embed
        self.remember = remember or (lambda _, make: make())
        self._materials: dict[int, list[Material]] = {}
        self._by_document = {document.id: document for document in documents}
        self._shot_passages: dict[str, str] = {}

    # what text the inputs are cut from

    def _search(self, queries: Sequence[str], k: int) -> list[list[Any]]:
        if self.index is None:
            return [[] for _ in queries]
        return self.index.search(list(queries), k, mode=self.recipe.retrieval.mode)

    def _document_order(self, kind: Kind | None, wanted: int) -> list[Any]:
        """All documents: first, shuffled, those near the kind's seeds, enough for ``wanted`` inputs, then the rest."""
        generator = random.Random(number_of(self.recipe.seed, "documents", kind.id if kind else "novel"))
        rest = list(self.documents)
        generator.shuffle(rest)
        if kind is None or self.index is None or self.recipe.instructions.material == "random":
            return rest
        queries = [" ".join(seed.input.split()[:64]) for seed in kind.seeds]
        k = max(10, math.ceil(4 * wanted / len(queries)))
        score: dict[str, float] = {}
        for hits in self._search(queries, min(k, 300)):
            for rank, hit in enumerate(hits):
                identity = hit.passage.document_id
                score[identity] = score.get(identity, 0.0) + 1.0 / (10 + rank)
        near = sorted((i for i in score if i in self._by_document), key=lambda i: (-score[i], i))
        near = near[: max(20, wanted)]
        generator.shuffle(near)
        chosen = set(near)
        return [self._by_document[i] for i in near] + [d for d in rest if d.id not in chosen]

    def materials(self, kind: Kind | None) -> list[Material]:
        """Corpus pieces for a kind's inputs in order of use, no two alike, none a seed's own."""
        key = -1 if kind is None else kind.id
        if key not in self._materials:
            rows = self.remember(
                f"materials-{key}", lambda: [(m.text, m.document_id) for m in self._cut_materials(kind)]
            )
            try:
                self._materials[key] = [Material(*row) for row in rows]
            except TypeError:
                raise InputError(
                    f"the ledger is damaged (materials-{key} is no list of texts); choose another --out folder"
                ) from None
        return self._materials[key]

    def _cut_materials(self, kind: Kind | None) -> list[Material]:
        sentence = kind is not None and (kind.unit == "sentence" or (kind.unit == "fields" and kind.open_book))
        if kind is None or kind.unit in ("written", "none"):
            low, high = 15, self.recipe.retrieval.chunk_words
        else:
            low, high = kind.min_words, kind.max_words
        count = self.recipe.examples / max(1, len(self.kinds))
        if kind is not None and self.recipe.instructions.shares != "rows":
            count = self.targets()[f"k{kind.id:02d}"]
        wanted = math.ceil(count * self.recipe.instructions.candidates)
        seen = {normalise(seed.input) for seed in self.seeds}
        for seed in self.seeds:
            seen |= {normalise(value) for _, value in split_fields(seed.input) or []}
        found: list[Material] = []
        spare: list[Material] = []
        # One sentence of each document a pass, so that a long document does not fill the front of the list.
        pieces: list[list[Material]] = []
        for document in self._document_order(kind, wanted):
            texts = sentences(document.text) if sentence else [cut(document.text, high)]
            mine = []
            title = normalise(document.title) if kind is not None and kind.open_book and sentence else ""
            for text in texts:
                key_text = normalise(text)
                if low <= len(text.split()) <= high and key_text not in seen and key_text:
                    seen.add(key_text)
                    # A sentence that names what its document is about gives away what is asked for.
                    (spare if title and title in key_text else mine).append(Material(text, document.id))
            pieces.append(mine)
        if sentence:
            near = max(20, wanted)
            for part in (pieces[:near], pieces[near:]):
                for turn in range(max(map(len, part), default=0)):
                    found += [mine[turn] for mine in part if len(mine) > turn]
            if kind is not None:
                found = self._best_matching(kind, found, wanted)
        else:
            found = [material for mine in pieces for material in mine]
        return found + spare

    def _best_matching(self, kind: Kind, found: list[Material], wanted: int) -> list[Material]:
        """Of the first four times ``wanted`` sentences, those nearer to this kind's seeds than to other kinds' come
        first, shuffled: a sentence without a drug is no input for a task on drugs."""
        others = [k for k in self.kinds if k.unit == "sentence" and k.id != kind.id]
        if (
            kind.unit != "sentence"
            or self.embed is None
            or not others
            or self.recipe.instructions.material != "nearest"
        ):
            return found
        pool = found[: 4 * wanted]
        vectors = self.embed([material.text for material in pool])

        def nearness(seeds: Sequence[Any]) -> np.ndarray:
            similar = vectors @ self.embed([seed.input for seed in seeds]).T  # type: ignore[misc]
            return np.sort(similar, axis=1)[:, -3:].mean(axis=1)

        score = nearness(kind.seeds) - np.max([nearness(other.seeds) for other in others], axis=0)
        order = np.argsort(-score, kind="stable")
        half = [int(i) for i in order[: max(wanted, len(order) // 2)]]
        random.Random(number_of(self.recipe.seed, "matching", kind.id)).shuffle(half)
        chosen = set(half)
        return [pool[i] for i in half] + [m for i, m in enumerate(pool) if i not in chosen] + found[len(pool) :]

    # candidates

    def plan_wave(self, wave: int, missing: dict[str, int]) -> dict[str, int]:
        """How many candidates of each source a wave has: ``{"novel": n, "k00": n, …}``. Wave 0 covers the whole target,
        later ones what was ``missing`` by source, both times the recipe's ``candidates``."""
        factor = self.recipe.instructions.candidates
        return {source: math.ceil(count * factor) for source, count in missing.items() if count > 0}

    def targets(self) -> dict[str, int]:
        """Rows wanted of each source; they sum to the recipe's ``examples``."""
        novel = round(self.recipe.examples * self.recipe.instructions.novel)
        if not self.kinds:
            novel = self.recipe.examples
        parts = [1.0] * len(self.kinds)
        if self.recipe.instructions.shares == "words":
            parts = [1 / statistics.mean(seed_words(seed) for seed in kind.seeds) for kind in self.kinds]
        exact = [(self.recipe.examples - novel) * part / sum(parts) for part in parts]
        counts = [math.floor(value) for value in exact]
        # What rounding down left goes to the largest remainders, the first among equals.
        order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in order[: self.recipe.examples - novel - sum(counts) if parts else 0]:
            counts[i] += 1
        return {"novel": novel} | {f"k{kind.id:02d}": counts[i] for i, kind in enumerate(self.kinds)}

    @staticmethod
    def item_id(round: int, source: str, number: int) -> str:
        return f"r{round}-{source}-{number:06d}"

    def _group_generator(self, purpose: str, source: str, number: int) -> random.Random:
        """The random choice shared by a group of items, so that their prompts begin alike."""
        return random.Random(number_of(self.recipe.seed, purpose, source, number // self.recipe.instructions.group))

    def _wording(self, kind: Kind, source: str, number: int) -> str:
        """The instruction of an item: its kind's seeds may say the same in several ways, and all of them are used."""
        return self._group_generator("wording", source, number).choice(
            sorted({seed.instruction for seed in kind.seeds})
        )

    def draft_jobs(self, wave: int, source: str, numbers: Sequence[int]) -> tuple[list[Item], list[Job]]:
        """Items that need no model, and the jobs that write the instruction or input of the others."""
        if source == "novel":
            return [], [job for n in numbers if (job := self._instruction_job(n)) is not None]
        kind = self.kinds[int(source[1:])]
        if kind.unit == "none":
            items = [self._item(wave, source, n, kind, "", []) for n in numbers if n == 0]
            return items, []
        materials = self.materials(kind)
        usable = [n for n in numbers if n < len(materials)]
        if kind.unit in ("fields", "written"):
            return [], [self._input_job(kind, source, n, materials[n]) for n in usable]
        return [self._item(wave, source, n, kind, materials[n].text, [materials[n].document_id]) for n in usable], []

    def _item(self, wave: int, source: str, number: int, kind: Kind, text: str, documents: list[str]) -> Item:
        return Item(
            id=self.item_id(1, source, number),
            round=1,
            wave=wave,
            source="corpus",
            kind=kind.name,
            instruction=self._wording(kind, source, number),
            input=text,
            provenance={"documents": documents, "seeds": [], "number": number},
        )

    def _params(
        self, identity: str, *, temperature: float, top_p: float, max_tokens: int, n: int, stop: tuple[str, ...]
    ) -> Any:
        from .engine.sampler import SamplingParams

        return SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p if temperature > 0 else 1.0,
            n=n,
            stop=stop,
            seed=number_of(self.recipe.seed, identity, bits=31),
        )

    def _instruction_job(self, number: int) -> Job | None:
        settings = self.recipe.instructions
        chooser = self._group_generator("instruction", "novel", number)
        # One seed of each of several kinds: variety in the prompt is variety in the reply.
        kinds = chooser.sample(self.kinds, min(settings.demonstrations, len(self.kinds)))
        seeds = [chooser.choice(kind.seeds) for kind in kinds]
        while len(seeds) < min(settings.demonstrations, len(self.seeds)):
            seed = chooser.choice(self.seeds)
            if seed not in seeds:
                seeds.append(seed)
        text, documents = "", []
        if settings.novel_input == "corpus":
            materials = self.materials(None)
            if number >= len(materials):
                return None
            text, documents = materials[number].text, [materials[number].document_id]
        identity = self.item_id(1, "novel", number)
        shots = [(seed.instruction, cut(seed.input, 80)) for seed in seeds]
        stop = ("\nText:", "\n\n") if text else ("\nTask", "###")
        return Job(
            item_id=identity,
            purpose="instruction",
            prompt=instruction_prompt(shots, text),
            params=self._params(
                f"{identity}/instruction",
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_tokens,
                n=1,
                stop=stop,
            ),
            provenance={"seeds": [seed.id for seed in seeds], "documents": documents, "text": text, "number": number},
        )

    def _written_part(self, kind: Kind, text: str) -> str:
        """What a model must write of a seed's input: the fields that are no material, or all of it."""
        if kind.unit == "written":
            return text
        others = [(name, value) for name, value in split_fields(text) or [] if name != kind.material]
        return others[0][1] if len(others) == 1 else "\n".join(f"{name}: {value}" for name, value in others)

    def _seed_material(self, kind: Kind, seed: Any) -> str:
        if kind.unit == "fields":
            return dict(split_fields(seed.input) or [])[kind.material]
        if seed.id not in self._shot_passages:
            hits = self._search([f"{seed.input} {seed.output}"], 1)[0]
            self._shot_passages[seed.id] = cut(hits[0].passage.text, 80) if hits else seed.output
        return self._shot_passages[seed.id]

    def _input_job(self, kind: Kind, source: str, number: int, material: Material) -> Job:
        settings = self.recipe.instructions
        chooser = self._group_generator("input", source, number)
        seeds = chooser.sample(list(kind.seeds), min(settings.demonstrations, len(kind.seeds)))
        others = [name for name in kind.fields if name != kind.material]
        wanted = others[0].lower() if len(others) == 1 else f"lines {', '.join(others)}" if others else ""
        shots = [(cut(self._seed_material(kind, seed), 120), self._written_part(kind, seed.input)) for seed in seeds]
        identity = self.item_id(1, source, number)
        return Job(
            item_id=identity,
            purpose="input",
            prompt=input_prompt(kind.instruction, shots, material.text, wanted, kind.material.lower()),
            params=self._params(
                f"{identity}/input",
                temperature=min(settings.temperature, 0.7),
                top_p=0.95,
                max_tokens=min(settings.max_tokens, 96),
                n=1,
                stop=STOP if len(others) != 1 else ("\n",),
            ),
            provenance={
                "seeds": [seed.id for seed in seeds],
                "documents": [material.document_id],
                "material": material.text,
                "number": number,
            },
        )

    def drafted(self, wave: int, source: str, replies: Iterable[Reply], dedupe: rules.NearDuplicates) -> list[Item]:
        """Items from the replies to ``draft_jobs``, rejected ones among them. ``replies`` in the order of their items;
        accepted invented instructions join ``dedupe``."""
        items = []
        for reply in replies:
            origin = reply.provenance
            trail = {k: origin[k] for k in ("seeds", "documents", "number") if k in origin} | {"draft": reply.id}
            if source == "novel":
                instruction, text, verdict = self._judge_instruction(reply, dedupe)
                kind = "novel"
            else:
                group = self.kinds[int(source[1:])]
                kind, instruction = group.name, self._wording(group, source, int(origin["number"]))
                text, verdict = self._judge_input(group, reply)
            items.append(
                Item(
                    id=reply.item_id,
                    round=1,
                    wave=wave,
                    source="novel" if source == "novel" else "corpus",
                    kind=kind,
                    instruction=instruction,
                    input=text,
                    status="new" if verdict.kept else "rejected",
                    reason=verdict.reason,
                    detail=verdict.detail,
                    provenance=trail,
                )
            )
        return items

    def _judge_instruction(self, reply: Reply, dedupe: rules.NearDuplicates) -> tuple[str, str, Verdict]:
        settings = self.recipe.filter
        parsed = parse_instruction(reply.raw)
        given = reply.provenance.get("text", "")
        if parsed is None:
            return "", given, Verdict(False, rules.UNPARSABLE, reply.raw[:200])
        instruction, text = parsed
        text = given or text
        if not settings.enabled:
            return instruction, text, Verdict(True)
        verdict = rules.check_instruction(instruction, min_words=settings.min_words, max_words=settings.max_words)
        if verdict.kept and not given:
            if not text:
                verdict = Verdict(False, rules.UNPARSABLE, "no input")
            elif reply.finish_reason == "length":
                verdict = Verdict(False, rules.CUT_OFF)
            elif rules.repeats_itself(text):
                verdict = Verdict(False, rules.REPETITION)
        if verdict.kept:
            found = dedupe.find(instruction)
            if found:
                verdict = Verdict(False, rules.NEAR_DUPLICATE, f"ROUGE-L {found[1]:.2f}: {found[0][:120]}")
            else:
                dedupe.add(instruction)
        return instruction, text, verdict

    def _judge_input(self, kind: Kind, reply: Reply) -> tuple[str, Verdict]:
        written = clean_reply(reply.raw)
        if kind.unit == "written":
            text = written
        else:
            values = dict.fromkeys(kind.fields, "")
            values[kind.material] = reply.provenance["material"]
            others = [name for name in kind.fields if name != kind.material]
            if len(others) == 1:
                values[others[0]] = written
            else:
                values |= {n: v for n, v in split_fields(written) or [] if n in others}
            text = "\n".join(f"{name}: {values[name]}" for name in kind.fields)
            if not all(values.values()):
                return text, Verdict(False, rules.UNPARSABLE, written[:200])
        if not written:
            return text, Verdict(False, rules.EMPTY)
        if reply.finish_reason == "length":
            return text, Verdict(False, rules.CUT_OFF)
        if not self.recipe.filter.enabled:
            return text, Verdict(True)
        if rules.repeats_itself(written):
            return text, Verdict(False, rules.REPETITION)
        asked = [self._written_part(kind, seed.input).rstrip().endswith("?") for seed in kind.seeds]
        if all(asked) and not written.endswith("?"):
            return text, Verdict(False, rules.UNPARSABLE, f"no question: {written[:160]}")
        if kind.unit == "written" and split_fields(kind.seeds[0].input) and not split_fields(written):
            return text, Verdict(False, rules.UNPARSABLE, written[:200])
        if any(normalise(text) == normalise(seed.input) for seed in kind.seeds):
            return text, Verdict(False, rules.COPIED_DEMONSTRATION)
        return text, Verdict(True)

    # answers

    def kind_named(self, name: str) -> Kind | None:
        return next((kind for kind in self.kinds if kind.name == name), None)

    def answers_each(self, round: int) -> int:
        """Answers to each item of a round: the greedy one, the samples, and those after ``shots``."""
        return 1 + self.recipe.responses.samples + self._num_shown(round)

    def _num_shown(self, round: int) -> int:
        """Answers to each item after ``shots``: from round 2 on as many as there are samples."""
        settings = self.recipe.responses
        return settings.samples if settings.shots and round > 1 else 0

    def response_jobs(self, items: Sequence[Item], adapter: str | None, round: int = 1) -> list[Job]:
        """The greedy and the sampled prompts of items. Groups share their demonstrations; passages come after them.
        From round 2 on those after ``shots``, too: the n-th of a kind's items all after the same seeds."""
        settings = self.recipe.responses
        found = self.passages(
            [(i.id, self.kind_named(i.kind), i.instruction, i.input, i.provenance.get("documents", [])) for i in items]
        )
        jobs: list[Job] = []
        greedy: list[Job] = []
        sampled: list[Job] = []
        for item in items:
            source = item.id.split("-")[1]
            chooser = self._group_generator("response", source, int(item.provenance["number"]))
            pool = self._pool(item.kind)
            seeds = chooser.sample(pool, min(settings.demonstrations, len(pool)))
            prompt, trail = self._asked(item, seeds, found.get(item.id, []))
            first = self._params(
                f"{item.id}/greedy", temperature=0.0, top_p=1.0, max_tokens=settings.max_tokens, n=1, stop=STOP
            )
            greedy.append(Job(item.id, "response", prompt, first, adapter, 0, trail))
            if settings.samples:
                drawn = self._params(
                    f"{item.id}/sampled",
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    max_tokens=settings.max_tokens,
                    n=settings.samples,
                    stop=STOP,
                )
                sampled.append(Job(item.id, "response", prompt, drawn, adapter, 1, trail))
            if len(greedy) == self.recipe.instructions.group * 4 or item is items[-1]:
                # The samples come when the greedy answers' prompts are in the prefix cache already.
                jobs += greedy + sampled
                greedy, sampled = [], []
        for number in range(self._num_shown(round)):
            shown: dict[str, list[Any]] = {}  # by kind
            for item in items:
                if item.kind not in shown:
                    chooser = random.Random(number_of(self.recipe.seed, "shots", item.kind, number))
                    pool = self._pool(item.kind)
                    shown[item.kind] = chooser.sample(pool, min(settings.shots, len(pool)))
                prompt, trail = self._asked(item, shown[item.kind], found.get(item.id, []))
                params = self._params(
                    f"{item.id}/shown", temperature=0.0, top_p=1.0, max_tokens=settings.max_tokens, n=1, stop=STOP
                )
                jobs.append(Job(item.id, "response", prompt, params, adapter, 1 + settings.samples + number, trail))
        return jobs

    def _pool(self, kind_name: str) -> list[Any]:
        """The seeds that may be shown before an item: its kind's, or all where its instruction was invented."""
        kind = self.kind_named(kind_name)
        return list(kind.seeds) if kind else self.seeds

    def _asked(self, item: Item, seeds: Sequence[Any], passages: Sequence[Any]) -> tuple[str, dict[str, Any]]:
        """The prompt of an item, and what of the run's own went into it."""
        prompt = response_prompt(
            item.instruction,
            item.input,
            [(s.instruction, s.input, s.output) for s in seeds],
            [self.passage_text(passage) for passage in passages],
        )
        return prompt, {"seeds": [s.id for s in seeds], "passages": [passage.id for passage in passages]}

    def passages(self, asked: Sequence[tuple[str, Kind | None, str, str, Sequence[str]]]) -> dict[str, list[Any]]:
        """Passages by id for those of ``asked`` (id, kind, instruction, input, documents the input was cut from) whose
        answer the corpus can help with."""
        settings = self.recipe.responses
        if not settings.passages or self.index is None:
            return {}
        chosen = [row for row in asked if settings.passages_for == "all" or row[1] is None or row[1].open_book]
        queries = [
            " ".join(text.split()[:96]) if text and kind is not None else f"{instruction} {' '.join(text.split()[:96])}"
            for _, kind, instruction, text, _ in chosen
        ]
        found = {}
        for (identity, _, _, _, own), hits in zip(chosen, self._search(queries, settings.passages + 2), strict=True):
            # What the input was cut from says nothing new, unless its title does.
            useful = [hit.passage for hit in hits if hit.passage.title or hit.passage.document_id not in own]
            found[identity] = useful[: settings.passages]
        return found

    def passage_text(self, passage: Any) -> str:
        text = cut(passage.text, self.recipe.responses.passage_words)
        return text if not passage.title or text.startswith(passage.title) else f"{passage.title}: {text}"

    def seed_rows_with_passages(self) -> list[dict[str, str]]:
        """The seeds of kinds that get passages, as they look with them: what the teacher learns to read."""
        asked = [(s.id, kind, s.instruction, s.input, []) for kind in self.kinds if kind.open_book for s in kind.seeds]
        found = self.passages(asked)
        outputs = {seed.id: seed.output for seed in self.seeds}
        return [
            {
                "prompt": response_prompt(instruction, text, (), [self.passage_text(p) for p in found[identity]]),
                "response": outputs[identity],
            }
            for identity, _, instruction, text, _ in asked
            if found.get(identity)
        ]

    # judgement

    def judge(self, item: Item, replies: Sequence[Reply]) -> tuple[Verdict, str, float]:
        """(verdict, answer, agreement) of an answered item: half of the samples must be sound, one of them is taken.
        A prompt that was too long with its demonstrations is a sample that is not sound."""
        settings = self.recipe.filter
        kind = self.kind_named(item.kind)
        texts = [clean_reply(reply.raw) for reply in replies]
        if not texts or replies[0].finish_reason == "error":
            detail = next((str(r.provenance["error"]) for r in replies if "error" in r.provenance), "no reply")
            return Verdict(False, rules.TOO_LONG_PROMPT, detail), "", 0.0
        if not settings.enabled:
            return Verdict(bool(texts[0]), "" if texts[0] else rules.EMPTY), texts[0], 1.0
        demonstrations = [seed.output for seed in self.seeds]
        verdicts = [
            Verdict(False, rules.TOO_LONG_PROMPT)
            if reply.finish_reason == "error"
            else rules.check_reply(
                text,
                item.input,
                kind=kind,
                finish_reason=reply.finish_reason,
                demonstrations=demonstrations if kind is None or kind.form == "text" else (),
                max_words=settings.max_response_words,
            )
            for text, reply in zip(texts, replies, strict=True)
        ]
        sound = [text for text, verdict in zip(texts, verdicts, strict=True) if verdict.kept]
        if 2 * len(sound) < len(texts):
            first = next(v for v in verdicts if not v.kept)
            return first, texts[0], 0.0
        score = agreement(kind, sound)
        answer = consensus(kind, sound)
        verdict = Verdict(True)
        least = settings.min_agreement
        if least and kind is not None:
            least = max(least, kind.chance_agreement)
        if verdict.kept and score < least:
            verdict = Verdict(False, rules.LOW_AGREEMENT, f"{score:.2f}")
        if verdict.kept and self.overlap is not None and (hits := self.overlap.hits(item.input)):
            verdict = Verdict(False, rules.OVERLAP, ", ".join(sorted({name for name, _ in hits})))
        return verdict, answer, score

    def select(self, judged: Sequence[tuple[Item, Verdict, str, float]]) -> list[tuple[Item, Verdict, str, float]]:
        """Cut what passed to the recipe's number: by kind in equal shares, within a kind by agreement, labels in the
        proportions of the seeds, lists with as many parts as the seeds' have. What is cut gets a verdict of its own."""
        passed = [row for row in judged if row[1].kept]
        if not self.recipe.filter.enabled or not self.recipe.filter.balance:
            passed.sort(
                key=lambda row: row[0].id if not self.recipe.responses.samples else f"{1 - row[3]:.6f}{row[0].id}"
            )
            keep = {row[0].id for row in passed[: self.recipe.examples]}
        else:
            keep = self._balanced(passed)
        return [
            row
            if not row[1].kept or row[0].id in keep
            else (row[0], Verdict(False, rules.SURPLUS, f"{row[3]:.2f}"), *row[2:])
            for row in judged
        ]

    def _balanced(self, passed: Sequence[tuple[Item, Verdict, str, float]]) -> set[str]:
        targets = self.targets()
        groups: dict[str, list[tuple[Item, Verdict, str, float]]] = {source: [] for source in targets}
        for row in passed:
            groups[row[0].id.split("-")[1]].append(row)
        # A source that yields less than its share leaves the rest to the others, invented instructions last.
        quota = {source: min(len(groups[source]), targets[source]) for source in groups}
        room = min(self.recipe.examples, len(passed)) - sum(quota.values())
        for others in ([source for source in groups if source != "novel"], ["novel"]):
            while room > 0 and (able := [source for source in others if quota[source] < len(groups[source])]):
                quota[min(able, key=lambda source: quota[source])] += 1
                room -= 1
        keep: set[str] = set()
        for source, rows in groups.items():
            kind = None if source == "novel" else self.kinds[int(source[1:])]
            keep |= {row[0].id for row in self._stratified(kind, rows, quota[source])}
        return keep

    @staticmethod
    def _stratum(kind: Kind | None, answer: str) -> str:
        if kind is None or kind.form == "text":
            return ""
        if kind.form == "label":
            return normalise(answer)
        return str(min(4, len(entities(answer))))

    def _stratified(
        self, kind: Kind | None, rows: Sequence[tuple[Item, Verdict, str, float]], quota: int
    ) -> list[tuple[Item, Verdict, str, float]]:
        """``quota`` rows, strata in the proportions of the seeds as far as they reach, best agreement first."""
        ordered = sorted(rows, key=lambda row: (-row[3], row[0].id))
        if kind is None or quota >= len(ordered):
            return ordered[:quota]
        wanted: dict[str, int] = {}
        for seed in kind.seeds:
            stratum = self._stratum(kind, seed.output)
            wanted[stratum] = wanted.get(stratum, 0) + 1
        chosen, spare = [], []
        taken: dict[str, int] = {}
        for row in ordered:
            stratum = self._stratum(kind, row[2])
            if taken.get(stratum, 0) < round(quota * wanted.get(stratum, 0) / len(kind.seeds)) and len(chosen) < quota:
                taken[stratum] = taken.get(stratum, 0) + 1
                chosen.append(row)
            else:
                spare.append(row)
        return chosen + spare[: quota - len(chosen)]
