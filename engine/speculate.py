"""Drafts of the next tokens for text that copies: what followed the last few tokens where they stood before.

A draft is run together with the token that it continues, and the token after each position is drawn from that
position's own logits with its own random number, as without a draft. Tokens are kept up to the first that differs from
the draft, so a draft changes how many tokens a step brings, and never which. Source of the lookup: Saxena, "Prompt
Lookup Decoding" (2023).
"""

from __future__ import annotations

import numpy as np

from specialize.errors import InputError

from .rows import Sequence

MODES = ("off", "prompt_lookup", "auto")
MAX_DRAFT_TOKENS = 8
_LONGEST, _SHORTEST = 3, 2  # tokens that must have stood together before
# In mode "auto": a sequence drafts on while this share of its drafted tokens is kept, judged from so many tokens on;
# one that does not tries again after so many tokens, for texts change.
_MIN_KEPT_SHARE = 0.25
_MIN_JUDGED = 3 * MAX_DRAFT_TOKENS
_PAUSE_TOKENS = 16


class PromptLookup:
    """Looks drafts up in a sequence's own tokens. ``sparing``: only for sequences whose drafts are mostly kept."""

    def __init__(self, *, sparing: bool) -> None:
        self._sparing = sparing

    def propose(self, sequence: Sequence, tokens: np.ndarray, room: int) -> np.ndarray:
        """At most ``room`` tokens that may follow ``tokens`` i32, which are all known; none where nothing speaks for
        any."""
        if room < 1 or (self._sparing and self._rests(sequence, len(tokens))):
            return tokens[:0]
        for length in range(_LONGEST, _SHORTEST - 1, -1):
            if len(tokens) <= length:
                continue
            match = tokens[:-length] == tokens[-length]
            for i in range(1, length):
                match &= tokens[i : i - length] == tokens[i - length]
            places = np.flatnonzero(match)
            if places.size:
                start = int(places[-1]) + length
                return tokens[start : start + min(room, MAX_DRAFT_TOKENS)]
        return tokens[:0]

    def _rests(self, sequence: Sequence, num_tokens: int) -> bool:
        if sequence.num_drafted >= _MIN_JUDGED and sequence.num_accepted < _MIN_KEPT_SHARE * sequence.num_drafted:
            sequence.rests_until = num_tokens + _PAUSE_TOKENS
            sequence.num_drafted = sequence.num_accepted = 0
        return num_tokens < sequence.rests_until


def make_drafter(mode: str) -> PromptLookup | None:
    """The drafter of a mode; None for "off"."""
    if mode not in MODES:
        raise InputError(f"engine: speculation is {mode!r}; allowed: {', '.join(MODES)}")
    return None if mode == "off" else PromptLookup(sparing=mode == "auto")
