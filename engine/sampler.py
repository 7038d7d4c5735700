"""What a user asks of generation and gets back, and how a request's random stream is keyed.

These types import no torch: the scheduler works with them on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specialize.errors import InputError

if TYPE_CHECKING:
    import numpy as np

MAX_LOGPROBS = 100
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. ``n`` samples are drawn per prompt, each with its own
    random stream. ``stop`` strings end a completion and are cut from its text. ``logprobs`` K reports, for each
    generated token, the K most likely tokens and the one drawn, by the model's own distribution (before temperature).

    ``contrast`` a > 0 decodes a request's adapter against the base: logits (1 + a)·expert − a·base, over the tokens
    that the expert finds at least ``contrast_floor`` times as probable as its first choice (Li et al., "Contrastive
    Decoding", 2022). All other settings then apply to these logits; logprobs are theirs.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: int | None = None
    contrast: float = 0.0
    contrast_floor: float = 0.1

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer from 1")
        _require(_is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(_is_int(self.top_k) and 0 <= self.top_k < 2**31, "top_k", self.top_k, "an integer from 0 (off)")
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")
        penalty = self.repetition_penalty
        _require(_is_number(penalty) and penalty > 0, "repetition_penalty", penalty, "above 0 (1 is off)")
        _require(_is_int(self.n) and 1 <= self.n <= 65536, "n", self.n, "an integer from 1 to 65536")
        _require(all(isinstance(s, str) and s for s in stop), "stop", stop, "strings that are not empty")
        _require(_is_int(self.seed), "seed", self.seed, "an integer")
        k = self.logprobs
        allowed = f"None or an integer from 0 to {MAX_LOGPROBS}"
        _require(k is None or (_is_int(k) and 0 <= k <= MAX_LOGPROBS), "logprobs", k, allowed)
        _require(_is_number(self.contrast) and 0 <= self.contrast <= 100, "contrast", self.contrast, "0 (off) to 100")
        floor = self.contrast_floor
        _require(_is_number(floor) and 0 < floor <= 1, "contrast_floor", floor, "above 0 and at most 1")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(ok: bool, name: str, value: Any, allowed: str) -> None:
    if not ok:
        raise InputError(f"sampling: {name} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True)
class Request:
    """One prompt to continue. ``request_id`` names it in the results and, with the seed, fixes its random stream."""

    prompt_ids: Sequence[int] | np.ndarray
    params: SamplingParams
    adapter: str | None = None
    request_id: int = 0


@dataclass(frozen=True)
class Completion:
    """What came of one sample of a request. ``index`` counts the request's samples (0 … n-1).

    ``finish_reason`` is "stop" (end token or stop string), "length" (max_tokens or the context's end) or "error",
    which ``error`` explains. ``token_ids`` holds all that was generated, an end token included. ``logprobs`` has per
    generated token a list of (token_id, logprob), most likely first, the drawn token last where it is none of the K.
    """

    request_id: int
    index: int
    prompt_tokens: int
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[list[tuple[int, float]]] | None = None
    error: str | None = None


def stream_key(seed: int, request_id: int, index: int = 0) -> int:
    """The key of a sample's random stream as a signed 64-bit integer; the draw of step t is uniform(key, t).

    Three rounds of the splitmix64 finaliser (Steele et al., 2014), so that near seeds and ids give unrelated streams.
    """
    state = 0
    for word in (seed, request_id, index):
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state - (1 << 64) if state >> 63 else state
