"""Sequences on their way, what is known of those that run, and the plan of a step. No torch here.

A step may be planned before the tokens of the one before it are known: a place that waits for its token holds
`UNKNOWN`, and the device fills it in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .prefixes import PrefixGroups
    from .sampler import SamplingParams

UNKNOWN = -1


@dataclass(eq=False)
class Sequence:
    """One sample of one request on its way. Only the scheduler changes it."""

    request_id: int
    index: int
    params: SamplingParams
    tokens: np.ndarray  # i32; the prompt, and after a preemption what was generated so far
    num_prompt: int
    stream_key: int
    adapter_id: int = -1
    cache_salt: bytes = b""  # names what, beside the tokens, the KV values depend on
    row: int = -1
    num_tokens: int = 0  # at admission: all of them are computed as a prompt
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    pages: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    twin_row: int = -1  # with contrast: the base's own row, pages and their names
    twin_pages: list[int] = field(default_factory=list)
    twin_keys: list[bytes] = field(default_factory=list)
    finish_reason: str | None = None
    num_preemptions: int = 0
    num_drafted: int = 0  # tokens, lately; see speculate.py
    num_accepted: int = 0
    rests_until: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the batch that it takes: with contrast the base runs the same tokens beside it."""
        return 2 if self.params.contrast else 1


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start:stop`` of a sequence, run together. ``num_draws`` tokens are drawn after its last positions: none
    where a prompt goes on, one where it ends, one per position where all but the first token are drafts."""

    sequence: Sequence
    start: int
    stop: int
    num_draws: int

    @property
    def is_draft(self) -> bool:
        return self.num_draws > 1


@dataclass(frozen=True, eq=False)
class DrawSettings:
    """How tokens of some rows are drawn, one entry a draw. It holds for as long as the rows have the same sequences."""

    rows: np.ndarray  # i64
    num_prompt: np.ndarray  # i64
    arrays: dict[str, np.ndarray]  # what `kernels.sampling.sample` takes, but for steps and the tokens seen
    penalised: bool  # whether any repetition is
    wanted: dict[int, int]  # draws that report alternatives → how many


@dataclass(frozen=True, eq=False)
class DecodeSet:
    """Sequences that decode together, in batch order, and all about them that one token more leaves as it is."""

    sequences: list[Sequence]
    rows: np.ndarray  # i64
    serials: np.ndarray  # i64
    max_tokens: np.ndarray  # i64
    twins: np.ndarray  # i64, which of them run on the base, too
    table_rows: np.ndarray  # i64, of the page table: their own, then those of the base
    token_rows: np.ndarray  # i64, whose tokens are run: their own, then those of the twins once more
    adapter_ids: np.ndarray  # i32, as table_rows
    adapters: frozenset[int]
    prefixes: PrefixGroups | None
    settings: DrawSettings
    name: object = field(default_factory=object)  # tells one set from another without holding it


@dataclass(frozen=True)
class StepPlan:
    """One step: the decodes' rows in order, then the chunks.

    ``sampled`` lists who gets a token, in batch order and once per draw; ``sampled_at`` is the token's place in its
    sequence. ``serials`` tell whether a row still has the sequence that it was planned for. In the batch the base's
    decodes follow the decodes, its chunks the chunks.
    """

    decode_set: DecodeSet
    decode_at: np.ndarray  # i64, the place of the token that is run
    chunks: list[Chunk]
    sampled: list[Sequence]
    sampled_at: np.ndarray  # i64
    serials: np.ndarray  # i64
    settings: DrawSettings  # of the sampled

    @property
    def decodes(self) -> list[Sequence]:
        return self.decode_set.sequences

    @property
    def sampled_rows(self) -> np.ndarray:
        """i64"""
        return self.settings.rows

    @property
    def prefixes(self) -> PrefixGroups | None:
        """Of the decodes."""
        return self.decode_set.prefixes

    @property
    def num_tokens(self) -> int:
        chunked = sum((c.stop - c.start) * c.sequence.num_rows for c in self.chunks)
        return len(self.decode_set.table_rows) + chunked

    @property
    def has_twins(self) -> bool:
        return len(self.decode_set.twins) > 0 or any(c.sequence.num_rows > 1 for c in self.chunks)

    @property
    def draws_by_row(self) -> bool:
        """Whether each token follows from its row's own logits and settings: no penalty, no contrast."""
        return not (self.settings.penalised or self.has_twins)


class Rows:
    """Per running sequence: tokens, page table and sampling settings, one row each.

    ``num_tokens`` counts tokens up to the newest that is drawn or being drawn, ``num_known`` those whose value the host
    has.
    """

    def __init__(self, num_rows: int, max_context: int, page_size: int) -> None:
        self.page_size, self.nobody = page_size, num_rows  # the latter is one past the last row
        self.tokens = np.zeros((num_rows, max_context + 1), np.int32)
        self.page_table = np.zeros((num_rows, -(-max_context // page_size)), np.int32)
        self.serial = np.full(num_rows, -1, np.int64)  # counts admissions; -1: nobody
        self.num_tokens = np.zeros(num_rows, np.int64)
        self.num_known = np.zeros(num_rows, np.int64)
        self.num_prompt = np.zeros(num_rows, np.int64)
        self.num_pages = np.zeros(num_rows, np.int64)
        self.num_published = np.zeros(num_rows, np.int64)  # full pages that the prefix cache was told of
        self.max_tokens = np.zeros(num_rows, np.int64)  # of prompt and output together
        self.stop_at_end = np.zeros(num_rows, bool)
        self.stream_key = np.zeros(num_rows, np.int64)
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int32)
        self.top_p = np.ones(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.repetition_penalty = np.ones(num_rows, np.float32)
        self.contrast = np.zeros(num_rows, np.float32)
        self.contrast_floor = np.ones(num_rows, np.float32)
        self.twin = np.full(num_rows, -1, np.int64)  # the row of the base beside it
        self.num_logprobs = np.full(num_rows, -1, np.int32)
        self.adapter_id = np.full(num_rows, -1, np.int32)

    def draw_settings(self, rows: np.ndarray) -> DrawSettings:
        """Of these rows i64."""
        counts = self.num_logprobs[rows]
        penalty = self.repetition_penalty[rows]
        return DrawSettings(
            rows=rows,
            num_prompt=self.num_prompt[rows],
            arrays={
                "keys": self.stream_key[rows],
                "temperature": self.temperature[rows],
                "top_k": self.top_k[rows],
                "top_p": self.top_p[rows],
                "min_p": self.min_p[rows],
                "repetition_penalty": penalty,
            },
            penalised=bool((penalty != 1.0).any()),
            wanted={i: int(counts[i]) for i in np.flatnonzero(counts >= 0).tolist()},
        )

    def decode_set(self, sequences: list[Sequence], rows: np.ndarray, prefixes: PrefixGroups | None) -> DecodeSet:
        """Of the sequences in these rows i64."""
        twins = np.flatnonzero(self.twin[rows] >= 0)
        table_rows = np.concatenate((rows, self.twin[rows[twins]]))
        adapter_ids = self.adapter_id[table_rows]
        return DecodeSet(
            sequences=sequences,
            rows=rows,
            serials=self.serial[rows],
            max_tokens=self.max_tokens[rows],
            twins=twins,
            table_rows=table_rows,
            token_rows=np.concatenate((rows, rows[twins])),
            adapter_ids=adapter_ids,
            adapters=frozenset(adapter_ids.tolist()),
            prefixes=prefixes,
            settings=self.draw_settings(rows),
        )
