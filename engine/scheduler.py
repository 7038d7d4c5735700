"""Decides, step by step, which sequences run, with how many tokens, on which pages.

Running sequences decode one token a step; what is left of the token budget goes to prompts, in chunks, first come
first served. When pages run out, the sequence admitted last gives its pages up and is computed again later. What is
known of running sequences lies in NumPy rows, so a step costs a few vectorised operations whatever the contexts'
lengths. No torch here.

A step may be planned while the one before it still runs (`commit` brings its tokens later). What its tokens decide,
such as an end token, is then noticed one step late, and the token drawn in between is dropped.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from specialize.errors import InputError

from .pages import PageAllocator, page_key
from .prefixes import MIN_PREFIX_TOKENS, group_by_prefix
from .rows import UNKNOWN, Chunk, DecodeSet, Rows, Sequence, StepPlan
from .speculate import PromptLookup, make_drafter

MAX_HELD_STEPS = 16
KV_DTYPE_CHOICES = ("auto", "fp32", "bf16", "fp16", "int8", "fp8")


@dataclass(frozen=True)
class EngineConfig:
    """Limits of a generator. None means: chosen from the model and from what the machine has.

    page_size: tokens in a page. max_batch_tokens: tokens of one step (decodes and prompt chunks together).
    max_sequences: sequences that run at once. memory_bytes: cap for everything that this process takes on the device
    (on a CPU its resident set, on CUDA torch's pool and the context); num_pages sets the KV cache's size regardless.
    max_context: longest prompt plus output, at most the model's own. prefix_cache: reuse pages of equal prefixes.
    overlap: launch a step before the tokens of the one before it are read (on a GPU, unless said otherwise).
    speculation: "prompt_lookup" drafts what followed the last tokens where they stood before, "auto" only for sequences
    whose drafts are mostly kept; the tokens are those of "off". Drafts look at the newest token, so nothing overlaps.
    kv_dtype: what the KV cache holds; "auto" the model's dtype, "int8" and "fp8" take half the memory of 16 bits.
    """

    page_size: int = 16
    max_batch_tokens: int | None = None
    max_sequences: int | None = None
    num_pages: int | None = None
    memory_bytes: int | None = None
    max_context: int | None = None
    prefix_cache: bool = True
    overlap: bool | None = None
    speculation: str = "off"
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPE_CHOICES:
            raise InputError(f"engine: kv_dtype is {self.kv_dtype!r}; allowed: {', '.join(KV_DTYPE_CHOICES)}")
        make_drafter(self.speculation)
        if self.overlap and self.speculation != "off":
            raise InputError("engine: overlap is on and speculation, too; allowed: one of them")
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


class Scheduler:
    """Owns the sequences of one stream of requests. ``max_context`` tokens must fit in the allocator's pages.

    ``group_share``: while sequences decode, further ones are admitted when this share of rows and pages is free, or
    after ``MAX_HELD_STEPS`` steps. For devices on which a step of decodes alone is launched as a whole.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_context: int,
        end_ids: tuple[int, ...] = (),
        prefix_cache: bool = True,
        drafter: PromptLookup | None = None,
        group_share: float = 0.0,
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
        self.end_ids = tuple(sorted(end_ids))
        self.num_preemptions = self.num_drafted = self.num_accepted = 0
        self._drafter, self._group_share = drafter, group_share
        self._num_held = 0  # steps in a row that admitted nobody though somebody waited
        self._num_in_flight = 0  # steps planned whose tokens are not known
        self._num_admitted = 0
        self._free_rows = list(range(max_sequences - 1, -1, -1))
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # by admission
        self._decodes: list[Sequence] = []
        self._decode_set = self.rows.decode_set([], np.empty(0, np.int64), None)
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

    def must_commit(self) -> bool:
        """Whether `schedule` has to wait for tokens in flight: pages are short, and only a sequence whose tokens are
        all known can be preempted."""
        if not self._num_in_flight or self.allocator.num_available >= len(self.rows.num_tokens):
            return False
        self._drop_spent()
        lacking = self._decode_set.rows[self._lacks_page()]
        return len(lacking) + int((self.rows.twin[lacking] >= 0).sum()) > self.allocator.num_available

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run (before `commit`, if tokens are in flight, else for good).

        Pages of the plan are held and, where full, findable.
        """
        self._drop_spent()
        preempted = self._give_decodes_pages()
        self._collect_decode_rows()
        budget = self.max_batch_tokens - len(self._decode_set.table_rows)
        chunks: list[Chunk] = []
        if self._drafter is not None:
            budget -= self._take_drafts(self._drafter, budget, chunks)
        for sequence in self._prefills:
            if budget < sequence.num_rows:
                break
            budget -= self._take_chunk(sequence, budget, chunks)
        may_admit = not (preempted and self._running) and not self._holds_back(chunks)
        while may_admit and self._waiting and budget >= self._waiting[0].num_rows:
            if not self._admit(self._waiting[0]):
                break
            budget -= self._take_chunk(self._waiting.popleft(), budget, chunks)
        if not self._decodes and not chunks:
            if self._waiting and not self._running:
                raise RuntimeError("the KV cache's pages are all held by other streams of this generator")
            return None
        return self._plan(chunks)

    def commit(self, plan: StepPlan, token_ids: np.ndarray) -> tuple[np.ndarray, list[Sequence]]:
        """Takes the tokens drawn, i64 in the order of ``plan.sampled``.

        Returns which of them count, bool (not those of sequences that were found finished in the meantime), and the
        sequences that they finish, whose rows stay readable until `retire`.
        """
        self._num_in_flight -= 1
        rows, ids, at = self.rows, plan.sampled_rows, plan.sampled_at
        kept = rows.serial[ids] == plan.serials
        ends = rows.stop_at_end[ids] & self._is_end(token_ids)
        if self._drafter is not None:
            self._judge_drafts(plan, token_ids, ends, kept)
        at_end = kept & ends
        done = at_end | (kept & (at + 1 >= rows.max_tokens[ids]))
        if not kept.all():
            ids, at, token_ids = ids[kept], at[kept], token_ids[kept]
        rows.tokens[ids, at] = token_ids
        rows.num_known[ids] = at + 1  # of several draws for a row, the last one counts
        if self._drafter is not None:  # else the plan counted them
            rows.num_tokens[ids] = np.maximum(rows.num_tokens[ids], at + 1)
        finished = []
        for i in np.flatnonzero(done).tolist():
            sequence = plan.sampled[i]
            sequence.finish_reason = "stop" if at_end[i] else "length"
            finished.append(sequence)
        return kept, finished

    def roll_back(self, plan: StepPlan) -> None:
        """The plan's step did not happen. No later step may be in flight."""
        self._num_in_flight -= 1
        ids = plan.sampled_rows[self.rows.serial[plan.sampled_rows] == plan.serials]
        self.rows.num_tokens[ids] = self.rows.num_known[ids]

    def generated(self, sequence: Sequence) -> np.ndarray:
        """Known tokens generated by a running sequence, i32."""
        return self.rows.tokens[sequence.row, sequence.num_prompt : self.rows.num_known[sequence.row]]

    def cut(self, sequence: Sequence, num_tokens: int) -> None:
        """Forgets what a running sequence, about to retire, holds beyond its first tokens."""
        self.rows.num_known[sequence.row] = num_tokens

    def retire(self, sequence: Sequence) -> None:
        """Takes a running sequence out, finished or given up."""
        self._leave(sequence)

    def preempt_all(self) -> None:
        """Every running sequence waits again, to be computed anew in the same order. No tokens may be in flight."""
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

    def _plan(self, chunks: list[Chunk]) -> StepPlan:
        """Puts decodes and chunks together and counts the tokens that they will bring."""
        rows, decode_set = self.rows, self._decode_set
        drafts = [c for c in chunks if c.is_draft]
        if drafts:
            others = {c.sequence for c in drafts}
            decode_set = self._in_groups([s for s in self._decodes if s not in others])
        ending = [c.sequence for c in chunks if c.num_draws == 1]
        sampled, settings, num_decodes = decode_set.sequences, decode_set.settings, len(decode_set.sequences)
        if drafts or ending:
            sampled = sampled + [c.sequence for c in drafts for _ in range(c.num_draws)] + ending
            rest = np.fromiter((s.row for s in sampled[num_decodes:]), np.int64, len(sampled) - num_decodes)
            settings = rows.draw_settings(np.concatenate([decode_set.rows, rest]))
        sampled_rows = single_rows = settings.rows
        sampled_at = single_at = rows.num_tokens[sampled_rows]
        if drafts:
            first = num_decodes
            for chunk in drafts:
                sampled_at[first : first + chunk.num_draws] += np.arange(chunk.num_draws)
                first += chunk.num_draws
            single = np.ones(len(sampled), bool)
            single[num_decodes:first] = False  # how many tokens a draft brings is not known yet
            single_rows, single_at = sampled_rows[single], sampled_at[single]
        rows.tokens[single_rows, single_at] = UNKNOWN
        rows.num_tokens[single_rows] = single_at + 1
        for sequence in ending:
            self._prefills.remove(sequence)
        if ending:
            self._decodes = self._decodes + ending
            self._dirty = True
        self._num_in_flight += 1
        return StepPlan(
            decode_set=decode_set,
            decode_at=sampled_at[:num_decodes] - 1,
            chunks=chunks,
            sampled=sampled,
            sampled_at=sampled_at,
            serials=decode_set.serials if settings is decode_set.settings else rows.serial[sampled_rows],
            settings=settings,
        )

    def _holds_back(self, chunks: list[Chunk]) -> bool:
        """Whether those who wait do so for a larger group, the step being one of decodes alone."""
        rows, pages = len(self.rows.num_tokens), self.allocator.num_pages
        few = len(self._free_rows) < self._group_share * rows
        few = few or self.allocator.num_available < self._group_share * pages
        held = bool(few and self._waiting and self._decodes and not chunks and self._num_held < MAX_HELD_STEPS)
        self._num_held = self._num_held + 1 if held else 0
        return held

    def _take_drafts(self, drafter: PromptLookup, budget: int, chunks: list[Chunk]) -> int:
        """Chunks of decodes that continue with a draft; returns the tokens that they run beyond the decodes' own."""
        rows, size, taken = self.rows, self.allocator.page_size, 0
        for sequence in self._decodes:
            if sequence.params.repetition_penalty != 1.0 or sequence.params.contrast:
                continue  # a penalty would have to know which drafts before it were right; the base takes no drafts
            row = sequence.row
            length = int(rows.num_tokens[row])
            room = min(budget - taken, int(rows.max_tokens[row]) - length - 1)
            draft = drafter.propose(sequence, rows.tokens[row, :length], room)
            missing = -(-(length + len(draft)) // size) - len(sequence.pages)
            if missing > 0 and self.allocator.num_available >= missing + len(self._running):
                self._give_pages(sequence, self.allocator.allocate(missing) or [])
            draft = draft[: len(sequence.pages) * size - length]
            if not len(draft):
                continue
            stop = length + len(draft)
            rows.tokens[row, length:stop] = draft
            chunks.append(Chunk(sequence, length - 1, stop, num_draws=1 + len(draft)))
            taken += len(draft)
        return taken

    def _judge_drafts(self, plan: StepPlan, token_ids: np.ndarray, ends: np.ndarray, kept: np.ndarray) -> None:
        """Drops from ``kept`` what was drawn after a wrong draft or after an end token."""
        first = len(plan.decodes)
        for chunk in plan.chunks:
            if not chunk.is_draft:
                continue
            draws = slice(first, first + chunk.num_draws)
            draft = self.rows.tokens[plan.sampled_rows[first], chunk.start + 1 : chunk.stop]
            last = (token_ids[draws][:-1] != draft) | ends[draws][:-1]
            num_kept = int(last.argmax()) + 1 if last.any() else chunk.num_draws
            kept[first + num_kept : first + chunk.num_draws] = False
            for counts in (self, chunk.sequence):
                counts.num_drafted += len(draft)
                counts.num_accepted += num_kept - 1
            first += chunk.num_draws

    def _is_end(self, token_ids: np.ndarray) -> np.ndarray:
        found = np.zeros(len(token_ids), bool)
        for end_id in self.end_ids:
            found |= token_ids == end_id
        return found

    def _take_chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        start = sequence.num_computed
        stop = min(start + budget // sequence.num_rows, sequence.num_tokens)
        chunks.append(Chunk(sequence, start, stop, num_draws=int(stop == sequence.num_tokens)))
        sequence.num_computed = stop
        if self.prefix_cache:
            # Findable before it is computed: keys and values of a layer are written ahead of its attention, for the
            # whole batch, so even another sequence of this same step may read them.
            size = self.allocator.page_size
            for page_id in range(start // size, stop // size):
                self._publish(sequence, page_id)
            self.rows.num_published[sequence.row] = stop // size
        return (stop - start) * sequence.num_rows

    def _publish(self, sequence: Sequence, page_id: int) -> None:
        self.allocator.publish(sequence.pages[page_id], sequence.page_keys[page_id])
        if sequence.twin_pages:
            self.allocator.publish(sequence.twin_pages[page_id], sequence.twin_keys[page_id])

    def _admit(self, sequence: Sequence) -> bool:
        size = self.allocator.page_size
        num_tokens, count = len(sequence.tokens), sequence.num_rows
        if len(self._free_rows) < count:
            return False
        shared: list[int] = []
        twin_shared: list[int] = []
        if self.prefix_cache:
            self._extend_keys(sequence, sequence.tokens, num_tokens // size)
            # The last token is always computed: its hidden state gives the next one.
            shared = self.allocator.acquire(sequence.page_keys[: (num_tokens - 1) // size])
            if count > 1:  # both go on from the same place
                twin_shared = self.allocator.acquire(sequence.twin_keys[: len(shared)])
                self.allocator.release(shared[len(twin_shared) :])
                shared = shared[: len(twin_shared)]
        missing = (-(-num_tokens // size) - len(shared)) * count
        # One page in hand for each that runs keeps the next steps from preempting what was just admitted.
        own = None
        taken = len(self.rows.num_tokens) - len(self._free_rows)
        if not self._running or missing + taken <= self.allocator.num_available:
            own = self.allocator.allocate(missing)
        if own is None:
            self.allocator.release(shared)
            self.allocator.release(twin_shared)
            return False
        sequence.pages = shared + own[: missing // count]
        sequence.twin_pages = twin_shared + own[missing // count :]
        sequence.num_tokens = num_tokens
        sequence.num_computed = len(shared) * size
        if sequence.num_preemptions == 0:
            sequence.num_cached = sequence.num_computed
        sequence.row = self._free_rows.pop()
        sequence.twin_row = self._free_rows.pop() if count > 1 else -1
        self._fill_row(sequence)
        self._running.append(sequence)
        self._prefills.append(sequence)
        return True

    def _fill_row(self, sequence: Sequence) -> None:
        rows, row, params = self.rows, sequence.row, sequence.params
        rows.tokens[row, : sequence.num_tokens] = sequence.tokens
        rows.page_table[row, : len(sequence.pages)] = sequence.pages
        rows.serial[row] = self._num_admitted
        self._num_admitted += 1
        rows.num_tokens[row] = rows.num_known[row] = sequence.num_tokens
        rows.num_prompt[row] = sequence.num_prompt
        rows.num_pages[row] = len(sequence.pages)
        longest = self.longest_context(sequence.num_rows)
        rows.max_tokens[row] = min(sequence.num_prompt + params.max_tokens, longest)
        rows.stop_at_end[row] = not params.ignore_eos
        rows.stream_key[row] = sequence.stream_key
        rows.temperature[row] = params.temperature
        rows.top_k[row] = params.top_k
        rows.top_p[row] = params.top_p
        rows.min_p[row] = params.min_p
        rows.repetition_penalty[row] = params.repetition_penalty
        rows.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        rows.adapter_id[row] = sequence.adapter_id
        rows.contrast[row] = params.contrast
        rows.contrast_floor[row] = params.contrast_floor
        rows.twin[row] = twin = sequence.twin_row
        if twin >= 0:
            rows.page_table[twin, : len(sequence.twin_pages)] = sequence.twin_pages
            rows.adapter_id[twin] = -1

    def longest_context(self, num_rows: int) -> int:
        """Tokens of the longest sequence that can run in so many rows."""
        return min(self.max_context, self.allocator.num_pages // num_rows * self.allocator.page_size)

    def _drop_spent(self) -> None:
        """A sequence whose last token is being drawn decodes no more."""
        self._collect_decode_rows()
        spent = self.rows.num_tokens[self._decode_set.rows] >= self._decode_set.max_tokens
        if spent.any():
            self._decodes = [s for s, over in zip(self._decodes, spent.tolist(), strict=True) if not over]
            self._dirty = True
            self._collect_decode_rows()

    def _lacks_page(self) -> np.ndarray:
        """Which decodes have no page for the token that is to be run, bool."""
        rows, ids = self.rows, self._decode_set.rows
        return rows.num_tokens[ids] > rows.num_pages[ids] * self.allocator.page_size

    def _give_decodes_pages(self) -> bool:
        """Each decode's next position gets a page, by preemption if need be. True if any sequence was preempted."""
        rows, size = self.rows, self.allocator.page_size
        if not self._decodes:
            return False
        preempted = False
        for sequence in [self._decodes[i] for i in np.flatnonzero(self._lacks_page()).tolist()]:
            if sequence.row < 0:
                continue  # preempted for another one
            page = self.allocator.allocate(sequence.num_rows)
            while page is None:
                preempted = True
                victim = self._running[-1]
                self._preempt(victim)
                if victim is sequence:
                    break
                page = self.allocator.allocate(sequence.num_rows)
            if page is not None:
                self._give_pages(sequence, page)
        if self.prefix_cache:
            self._collect_decode_rows()
            full = rows.num_known[self._decode_set.rows] // size
            for i in np.flatnonzero(full > rows.num_published[self._decode_set.rows]).tolist():
                self._publish_decoded(self._decodes[i], int(full[i]))
        return preempted

    def _give_pages(self, sequence: Sequence, pages: list[int]) -> None:
        """Half of them are the base's where it runs beside."""
        row, count = sequence.row, len(sequence.pages)
        if sequence.twin_row >= 0:
            half = len(pages) // 2
            pages, twins = pages[:half], pages[half:]
            self.rows.page_table[sequence.twin_row, count : count + half] = twins
            sequence.twin_pages += twins
        self.rows.page_table[row, count : count + len(pages)] = pages
        self.rows.num_pages[row] += len(pages)
        sequence.pages += pages

    def _collect_decode_rows(self) -> None:
        """After sequences came or went."""
        if self._dirty:
            self._dirty = False
            self._decode_set = self._in_groups(self._decodes)
            self._decodes = self._decode_set.sequences.copy()

    def _in_groups(self, decodes: list[Sequence]) -> DecodeSet:
        """The decodes, those that begin with the same pages side by side."""
        rows, size, prefixes = self.rows, self.allocator.page_size, None
        ids = np.fromiter((s.row for s in decodes), np.int64, len(decodes))
        if self.prefix_cache and len(ids) > 1:
            num_full = (rows.num_known[ids] - 1) // size
            tables = rows.page_table[ids, : int(num_full.max())]
            order, prefixes = group_by_prefix(tables, num_full, -(-MIN_PREFIX_TOKENS // size))
            if prefixes is not None:
                decodes = [decodes[i] for i in order.tolist()]
                ids = ids[order]
        return rows.decode_set(decodes, ids, prefixes)

    def _publish_decoded(self, sequence: Sequence, num_full: int) -> None:
        """Makes pages of generated tokens findable: all their tokens are known, and run by this step at the latest."""
        row = sequence.row
        self._extend_keys(sequence, self.rows.tokens[row], num_full)
        for page_id in range(int(self.rows.num_published[row]), num_full):
            self._publish(sequence, page_id)
        self.rows.num_published[row] = num_full

    def _extend_keys(self, sequence: Sequence, tokens: np.ndarray, count: int) -> None:
        size, chains = self.allocator.page_size, [(sequence.page_keys, sequence.cache_salt)]
        if sequence.num_rows > 1:
            chains.append((sequence.twin_keys, b""))
        for keys, salt in chains:
            previous = keys[-1] if keys else salt
            new = tokens[len(keys) * size : count * size].tobytes()
            for start in range(0, len(new), size * tokens.itemsize):
                previous = page_key(previous, new[start : start + size * tokens.itemsize])
                keys.append(previous)

    def _preempt(self, sequence: Sequence) -> None:
        sequence.tokens = self.rows.tokens[sequence.row, : self.rows.num_known[sequence.row]].copy()
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._leave(sequence)
        self._waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        if sequence in self._decodes:
            self._decodes.remove(sequence)
            self._dirty = True
        elif sequence in self._prefills:
            self._prefills.remove(sequence)
        self.allocator.release(sequence.pages)
        self.allocator.release(sequence.twin_pages)
        if sequence.twin_row >= 0:
            self._free_rows.append(sequence.twin_row)
            self.rows.twin[sequence.row] = -1
        self._free_rows.append(sequence.row)
        self.rows.serial[sequence.row] = -1
        sequence.pages, sequence.twin_pages = [], []
        sequence.row = sequence.twin_row = -1
