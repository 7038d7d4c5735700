"""From drawn tokens to completions: text, stop strings, log-probabilities. Host work, none of it ahead of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .rows import Sequence as SequenceState
from .rows import StepPlan
from .sampler import Completion
from .scheduler import Scheduler
from .stops import StopWatcher

if TYPE_CHECKING:
    from .generator import Stats
    from .runner import Alternatives
    from .tokenizer import Tokenizer


class Outputs:
    """What is gathered for the running sequences of one stream. Takes sequences out of the scheduler as they end."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        end_ids: Sequence[int],
        stats: Stats,
        *,
        streaming: bool,
    ) -> None:
        self._scheduler, self._tokenizer, self._end_ids = scheduler, tokenizer, frozenset(end_ids)
        self._stats, self._streaming = stats, streaming
        self._watchers: dict[SequenceState, StopWatcher] = {}
        self._logprobs: dict[SequenceState, list[list[tuple[int, float]]]] = {}

    def after_step(
        self,
        plan: StepPlan,
        token_ids: np.ndarray,
        logprobs: np.ndarray,
        alternatives: Alternatives,
    ) -> list[Completion | str]:
        """Commits the tokens drawn and takes out what is done. Host time goes only to sequences that need it: new ones,
        those with stop strings or logprobs, and finished ones."""
        for chunk in plan.chunks:
            if chunk.stop == chunk.sequence.num_prompt and chunk.num_draws and not chunk.is_draft:
                self._begin(chunk.sequence)
        kept, finished = self._scheduler.commit(plan, token_ids)
        self._stats.generated_tokens += int(kept.sum())
        self._stats.dropped_tokens += int(len(kept) - kept.sum())
        events: list[Completion | str] = []
        done = dict.fromkeys(finished)
        errors: dict[SequenceState, str] = {}
        for i in np.flatnonzero(kept & ~np.isfinite(logprobs)).tolist():
            sequence = plan.sampled[i]
            if sequence not in errors:
                step = int(plan.sampled_at[i]) - sequence.num_prompt
                errors[sequence] = f"request {sequence.request_id}: no finite logits at step {step} of its generation"
                done[sequence] = None
                self._scheduler.cut(sequence, int(plan.sampled_at[i]))
        if self._logprobs or self._watchers:
            self._follow(plan, token_ids, logprobs, alternatives, kept, done, errors)
            if self._streaming:
                for sequence, watcher in self._watchers.items():
                    if sequence not in done and (piece := watcher.take()):
                        events.append(piece)
        for sequence in done:
            events += self._complete(sequence, errors.get(sequence))
        return events

    def _follow(
        self,
        plan: StepPlan,
        token_ids: np.ndarray,
        logprobs: np.ndarray,
        alternatives: Alternatives,
        kept: np.ndarray,
        done: dict[SequenceState, None],
        errors: dict[SequenceState, str],
    ) -> None:
        """Gives each token to those that watch for stop strings or gather log-probabilities."""
        stopped: set[SequenceState] = set()
        for i in np.flatnonzero(kept).tolist():
            sequence, drawn = plan.sampled[i], int(token_ids[i])
            if sequence in errors or sequence in stopped:
                continue
            if i in alternatives:
                pairs = alternatives[i]
                if all(token != drawn for token, _ in pairs):
                    pairs = [*pairs, (drawn, float(logprobs[i]))]
                self._logprobs[sequence].append(pairs)
            watcher = self._watchers.get(sequence)
            if watcher is None or self._ends(sequence, drawn):
                continue
            if watcher.push(drawn):
                sequence.finish_reason = "stop"
                self._scheduler.cut(sequence, int(plan.sampled_at[i]) + 1)
                stopped.add(sequence)
                done[sequence] = None

    def _begin(self, sequence: SequenceState) -> None:
        self._stats.prompt_tokens += sequence.num_prompt
        self._stats.cached_prompt_tokens += sequence.num_cached
        if sequence.params.logprobs is not None:
            self._logprobs[sequence] = []
        if self._tokenizer is not None and (sequence.params.stop or self._streaming):
            self._watchers[sequence] = StopWatcher(self._tokenizer.decoder(), sequence.params.stop)

    def _complete(self, sequence: SequenceState, error: str | None) -> list[Completion | str]:
        token_ids = self._scheduler.generated(sequence).tolist()
        self._scheduler.retire(sequence)
        watcher = self._watchers.pop(sequence, None)
        logprobs = self._logprobs.pop(sequence, None)
        events: list[Completion | str] = []
        if error is not None:
            self._stats.failed += 1
        reason = "error" if error else (sequence.finish_reason or "length")
        if watcher is not None:
            if watcher.finish():
                reason = "stop"
            text = watcher.text
            if self._streaming and (piece := watcher.take()):
                events.append(piece)
        else:
            text = self._decode(sequence, token_ids)
        events.append(
            Completion(
                sequence.request_id, sequence.index, sequence.num_prompt, text, token_ids, reason, logprobs, error
            )
        )
        return events

    def _ends(self, sequence: SequenceState, token_id: int) -> bool:
        return token_id in self._end_ids and not sequence.params.ignore_eos

    def _decode(self, sequence: SequenceState, token_ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        if token_ids and self._ends(sequence, token_ids[-1]):
            token_ids = token_ids[:-1]
        return self._tokenizer.decode(token_ids)
