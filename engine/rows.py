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


@dataclass(frozen=True)
class StepPlan:
    """One step: the decodes' rows in order, then the chunks.

    ``sampled`` lists who gets a token, in batch order and once per draw; ``sampled_at`` is the token's place in its
    sequence. ``serials`` tell whether a row still has the sequence that it was planned for. In the batch the base's
    decodes follow the decodes, its chunks the chunks.
    """

    decodes: list[Sequence]
    decode_rows: np.ndarray  # i64
    decode_at: np.ndarray  # i64, the place of the token that is run
    chunks: list[Chunk]
    sampled: list[Sequence]
    sampled_rows: np.ndarray  # i64
    sampled_at: np.ndarray  # i64
    serials: np.ndarray  # i64
    twins: np.ndarray  # i64, which of the decodes run on the base, too
    prefixes: PrefixGroups | None = None  # of the decodes

    @property
    def num_tokens(self) -> int:
        chunked = sum((c.stop - c.start) * c.sequence.num_rows for c in self.chunks)
        return len(self.decodes) + len(self.twins) + chunked

    @property
    def has_twins(self) -> bool:
        return len(self.twins) > 0 or any(c.sequence.num_rows > 1 for c in self.chunks)


class Rows:
    """Per running sequence: tokens, page table and sampling settings, one row each.

    ``num_tokens`` counts tokens up to the newest that is drawn or being drawn, ``num_known`` those whose value the host
    has.
    """

    def __init__(self, num_rows: int, max_context: int, page_size: int) -> None:
        self.page_size = page_size
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
