"""Decides, step by step, which sequences run, with how many tokens, on which pages.

Running sequences decode one token a step; what is left of the token budget goes to prompts, in chunks, first come
first served. When pages run out, the sequence admitted last gives its pages up and is computed again later. What is
known of running sequences lies in NumPy rows, so a step costs a few vectorised operations whatever the contexts'
lengths. No torch here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from specialize.errors import InputError

from .pages import PageAllocator, page_key

if TYPE_CHECKING:
    from .sampler import SamplingParams


@dataclass(frozen=True)
class EngineConfig:
    """Limits of a generator. None means: chosen from the model and from what the machine has.

    page_size: tokens in a page. max_batch_tokens: tokens of one step (decodes and prompt chunks together).
    max_sequences: sequences that run at once. memory_bytes: for the KV cache; num_pages overrides it.
    max_context: longest prompt plus output, at most the model's own. prefix_cache: reuse pages of equal prefixes.
    """

    page_size: int = 16
    max_batch_tokens: int | None = None
    max_sequences: int | None = None
    num_pages: int | None = None
    memory_bytes: int | None = None
    max_context: int | None = None
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise InputError(f"engine: page_size is {self.page_size}; allowed: an integer from 1")
        for name in ("max_batch_tokens", "max_sequences", "num_pages", "memory_bytes", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"engine: {name} is {value}; allowed: an integer from 1, or None")
        if self.max_batch_tokens and self.max_sequences and self.max_batch_tokens < self.max_sequences:
            raise InputError(
                f"engine: max_batch_tokens is {self.max_batch_tokens}; "
                f"allowed: from max_sequences, {self.max_sequences}, on"
            )


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
    num_tokens: int = 0
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    pages: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    finish_reason: str | None = None
    num_preemptions: int = 0


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start:stop`` of a sequence whose keys and values are not in the cache yet."""

    sequence: Sequence
    start: int
    stop: int


@dataclass(frozen=True)
class StepPlan:
    """One step: the decodes' rows in order, then the chunks. ``sampled`` lists who gets a token, in batch order."""

    decodes: list[Sequence]
    decode_rows: np.ndarray  # i64
    chunks: list[Chunk]
    sampled: list[Sequence]
    sampled_rows: np.ndarray  # i64

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(c.stop - c.start for c in self.chunks)


class Rows:
    """Per running sequence: tokens, page table and sampling settings, one row each."""

    def __init__(self, num_rows: int, max_context: int, page_size: int) -> None:
        self.page_size = page_size
        self.tokens = np.zeros((num_rows, max_context + 1), np.int32)
        self.page_table = np.zeros((num_rows, -(-max_context // page_size)), np.int32)
        self.num_tokens = np.zeros(num_rows, np.int64)
        self.num_prompt = np.zeros(num_rows, np.int64)
        self.num_pages = np.zeros(num_rows, np.int64)
        self.max_tokens = np.zeros(num_rows, np.int64)  # of prompt and output together
        self.stop_at_end = np.zeros(num_rows, bool)
        self.stream_key = np.zeros(num_rows, np.int64)
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int32)
        self.top_p = np.ones(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.repetition_penalty = np.ones(num_rows, np.float32)
        self.num_logprobs = np.full(num_rows, -1, np.int32)
        self.adapter_id = np.full(num_rows, -1, np.int32)


class Scheduler:
    """Owns the sequences of one stream of requests. ``max_context`` tokens must fit in the allocator's pages."""

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_context: int,
        end_ids: tuple[int, ...] = (),
        prefix_cache: bool = True,
    ) -> None:
        if max_batch_tokens < max_sequences:
            raise ValueError(f"max_batch_tokens {max_batch_tokens} is below max_sequences {max_sequences}")
        if -(-max_context // allocator.page_size) > allocator.num_pages:
            raise ValueError(f"{allocator.num_pages} pages of {allocator.page_size} hold no context of {max_context}")
        self.allocator = allocator
        self.max_batch_tokens = max_batch_tokens
        self.max_context = max_context
        self.prefix_cache = prefix_cache
        self.rows = Rows(max_sequences, max_context, allocator.page_size)
        self.end_ids = np.asarray(sorted(end_ids), np.int64)
        self.num_preemptions = 0
        self._free_rows = list(range(max_sequences - 1, -1, -1))
        self._by_row: list[Sequence | None] = [None] * max_sequences
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # by admission
        self._decodes: list[Sequence] = []
        self._decode_rows = np.empty(0, np.int64)
        self._prefills: list[Sequence] = []
        self._dirty = False

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_wanted(self) -> int:
        """How many further sequences could find a row now, were they known."""
        return len(self._free_rows) - len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing is left. Pages of the plan are held and, where full, findable."""
        preempted = self._give_decodes_pages()
        self._collect_decode_rows()
        budget = self.max_batch_tokens - len(self._decodes)
        chunks: list[Chunk] = []
        for sequence in self._prefills:
            if budget <= 0:
                break
            budget -= self._take_chunk(sequence, budget, chunks)
        while budget > 0 and self._waiting and self._free_rows and not (preempted and self._running):
            if not self._admit(self._waiting[0]):
                break
            budget -= self._take_chunk(self._waiting.popleft(), budget, chunks)
        if not self._decodes and not chunks:
            if self._waiting:
                raise RuntimeError("the KV cache's pages are all held by other streams of this generator")
            return None
        ending = [c.sequence for c in chunks if c.stop == c.sequence.num_tokens]
        sampled_rows = self._decode_rows
        if ending:
            sampled_rows = np.concatenate([sampled_rows, np.fromiter((s.row for s in ending), np.int64, len(ending))])
        return StepPlan(list(self._decodes), self._decode_rows, chunks, self._decodes + ending, sampled_rows)

    def commit(self, plan: StepPlan, token_ids: np.ndarray) -> list[Sequence]:
        """Appends the tokens drawn, i64 in the order of ``plan.sampled``. Returns those that are finished by it; their
        rows stay readable until ``retire``."""
        rows = self.rows
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if chunk.stop == sequence.num_tokens:
                self._prefills.remove(sequence)
                self._decodes.append(sequence)
                self._dirty = True
        ids = plan.sampled_rows
        lens = rows.num_tokens[ids]
        rows.tokens[ids, lens] = token_ids
        lens += 1
        rows.num_tokens[ids] = lens
        at_end = rows.stop_at_end[ids] & np.isin(token_ids, self.end_ids)
        done = at_end | (lens >= rows.max_tokens[ids])
        finished = []
        for i in np.flatnonzero(done).tolist():
            sequence = plan.sampled[i]
            sequence.finish_reason = "stop" if at_end[i] else "length"
            finished.append(sequence)
        return finished

    def generated(self, sequence: Sequence) -> np.ndarray:
        """Tokens generated so far by a running sequence, i32."""
        return self.rows.tokens[sequence.row, sequence.num_prompt : self.rows.num_tokens[sequence.row]]

    def retire(self, sequence: Sequence) -> None:
        """Takes a running sequence out, finished or given up."""
        self._leave(sequence)

    def preempt_all(self) -> None:
        """Every running sequence waits again, to be computed anew in the same order."""
        for sequence in reversed(self._running.copy()):
            self._preempt(sequence)

    def shrink_budget(self) -> bool:
        """Halves the tokens of a step; False when it cannot get smaller."""
        smaller = max(self.max_batch_tokens // 2, len(self.rows.num_tokens))
        changed = smaller < self.max_batch_tokens
        self.max_batch_tokens = smaller
        return changed

    def abort(self) -> None:
        """Gives up everything; no page stays held."""
        for sequence in list(self._running):
            self._leave(sequence)
        self._waiting.clear()

    def _take_chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        start = sequence.num_computed
        stop = min(start + budget, sequence.num_tokens)
        chunks.append(Chunk(sequence, start, stop))
        sequence.num_computed = stop
        if self.prefix_cache:
            # Findable before it is computed: keys and values of a layer are written ahead of its attention, for the
            # whole batch, so even another sequence of this same step may read them.
            size = self.allocator.page_size
            for page_id in range(start // size, stop // size):
                self.allocator.publish(sequence.pages[page_id], sequence.page_keys[page_id])
        return stop - start

    def _admit(self, sequence: Sequence) -> bool:
        size = self.allocator.page_size
        num_tokens = len(sequence.tokens)
        shared: list[int] = []
        if self.prefix_cache:
            self._extend_keys(sequence, sequence.tokens, num_tokens // size)
            # The last token is always computed: its hidden state gives the next one.
            shared = self.allocator.acquire(sequence.page_keys[: (num_tokens - 1) // size])
        missing = -(-num_tokens // size) - len(shared)
        # One page in hand for each that runs keeps the next steps from preempting what was just admitted.
        own = None
        if not self._running or missing + len(self._running) <= self.allocator.num_available:
            own = self.allocator.allocate(missing)
        if own is None:
            self.allocator.release(shared)
            return False
        sequence.pages = shared + own
        sequence.num_tokens = num_tokens
        sequence.num_computed = len(shared) * size
        if sequence.num_preemptions == 0:
            sequence.num_cached = sequence.num_computed
        sequence.row = self._free_rows.pop()
        self._by_row[sequence.row] = sequence
        self._fill_row(sequence)
        self._running.append(sequence)
        self._prefills.append(sequence)
        return True

    def _fill_row(self, sequence: Sequence) -> None:
        rows, row, params = self.rows, sequence.row, sequence.params
        rows.tokens[row, : sequence.num_tokens] = sequence.tokens
        rows.page_table[row, : len(sequence.pages)] = sequence.pages
        rows.num_tokens[row] = sequence.num_tokens
        rows.num_prompt[row] = sequence.num_prompt
        rows.num_pages[row] = len(sequence.pages)
        rows.max_tokens[row] = min(sequence.num_prompt + params.max_tokens, self.max_context)
        rows.stop_at_end[row] = not params.ignore_eos
        rows.stream_key[row] = sequence.stream_key
        rows.temperature[row] = params.temperature
        rows.top_k[row] = params.top_k
        rows.top_p[row] = params.top_p
        rows.min_p[row] = params.min_p
        rows.repetition_penalty[row] = params.repetition_penalty
        rows.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        rows.adapter_id[row] = sequence.adapter_id

    def _give_decodes_pages(self) -> bool:
        """Each decode's next position gets a page, by preemption if need be. True if any sequence was preempted."""
        rows, size = self.rows, self.allocator.page_size
        self._collect_decode_rows()
        if not self._decodes:
            return False
        position = rows.num_tokens[self._decode_rows] - 1
        needy = [
            self._decodes[i] for i in np.flatnonzero(position >= rows.num_pages[self._decode_rows] * size).tolist()
        ]
        preempted = False
        for sequence in needy:
            if sequence.row < 0:
                continue  # preempted for another one
            page = self.allocator.allocate(1)
            while page is None:
                preempted = True
                victim = self._running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
                page = self.allocator.allocate(1)
            if page is not None:
                rows.page_table[sequence.row, len(sequence.pages)] = page[0]
                rows.num_pages[sequence.row] += 1
                sequence.pages += page
        if self.prefix_cache:
            filled = (position + 1) % size == 0
            if filled.any():
                for row, at in zip(self._decode_rows[filled].tolist(), position[filled].tolist(), strict=True):
                    self._publish_decoded(row, at // size)
        return preempted

    def _collect_decode_rows(self) -> None:
        if self._dirty:
            self._decode_rows = np.fromiter((s.row for s in self._decodes), np.int64, len(self._decodes))
            self._dirty = False

    def _publish_decoded(self, row: int, page_id: int) -> None:
        sequence = self._by_row[row]
        if sequence is None:
            return
        self._extend_keys(sequence, self.rows.tokens[row], page_id + 1)
        self.allocator.publish(sequence.pages[page_id], sequence.page_keys[page_id])

    def _extend_keys(self, sequence: Sequence, tokens: np.ndarray, count: int) -> None:
        size, keys = self.allocator.page_size, sequence.page_keys
        previous = keys[-1] if keys else sequence.cache_salt
        for page_id in range(len(keys), count):
            previous = page_key(previous, tokens[page_id * size : (page_id + 1) * size].tobytes())
            keys.append(previous)

    def _preempt(self, sequence: Sequence) -> None:
        sequence.tokens = self.rows.tokens[sequence.row, : self.rows.num_tokens[sequence.row]].copy()
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._leave(sequence)
        self._waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        if sequence in self._decodes:
            self._decodes.remove(sequence)
            self._dirty = True
        else:
            self._prefills.remove(sequence)
        self.allocator.release(sequence.pages)
        self._free_rows.append(sequence.row)
        self._by_row[sequence.row] = None
        sequence.pages = []
        sequence.row = -1
