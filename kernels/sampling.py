"""Choosing the next token of each sequence: penalty, temperature, top-k, top-p, min-p and a counter-based random draw.

logits [B, V]; every setting is a tensor [B], so one call serves any mix of requests. Per row, in this order:

1. repetition penalty r on seen tokens: ``l / r`` where l > 0, else ``l · r``;
2. temperature 0: the largest logit wins, the lowest id among equals; nothing below applies;
3. ``p = softmax(l / temperature)``;
4. kept = min-p ∩ top-k ∩ top-p: p ≥ min_p · max p; the k most probable; the fewest most probable tokens whose share
of what
   top-k left reaches top_p. Equals are ranked by id, lower first;
5. inverse CDF over the kept tokens in order of id: the first whose running sum exceeds ``u · total``.

``u = uniform(key, step)`` in [0, 1) with 53 bits is output number ``step`` of SplitMix64 seeded with the mixed key:
it depends on nothing else, so a request draws the same tokens alone and in a batch. One draw per row, against one per
token for a Gumbel race, is what a CPU can afford. The returned logprob is of the logits as given, before penalty and
temperature. Sources: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020) for top-p; Nguyen et al.,
"Turning Up the Heat: Min-p Sampling" (2024); Keskar et al., "CTRL" (2019) for the penalty; Steele, Lea & Flood, "Fast
Splittable Pseudorandom Number Generators" (2014) for the draw.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from . import cpu
from .dispatch import bad_argument, choose_backend
from .sampling_triton import compile_cases, sample_triton, tuning
from .spec import Case, KernelSpec

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)

# Candidates are sorted, not the vocabulary: those above the first floor, or where they do not suffice the next.
_CANDIDATE_FLOORS = (1e-4, 1e-6, 0.0)


def _mix64(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64 tensors: arithmetic wraps as unsigned does, shifts are made logical by masks."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX_1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX_2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def uniform(keys: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The draw of (key, step), both int64 of one shape: float64 in [0, 1), bit-equal on every backend."""
    bits = _mix64(_mix64(keys) + (steps + 1) * _GOLDEN)
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def _penalised(logits: torch.Tensor, penalty: torch.Tensor | None, seen: torch.Tensor | None) -> torch.Tensor:
    if penalty is None or seen is None:
        return logits
    r = penalty.to(logits.dtype).unsqueeze(1)
    return torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)


def sample_reference(
    logits: torch.Tensor,
    *,
    keys: torch.Tensor,
    steps: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    repetition_penalty: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments and results as ``sample``: a loop over rows and a full sort, as the definition reads."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    penalised = _penalised(wide, repetition_penalty, seen)
    draws = uniform(keys, steps)
    chosen = []
    for row in range(wide.shape[0]):
        if temperature[row] == 0:
            chosen.append(int(penalised[row].argmax()))
            continue
        p = (penalised[row] / temperature[row].to(wide.dtype)).softmax(-1).double()
        ranked, ids = p.sort(descending=True, stable=True)
        kept = ranked >= min_p[row].double() * ranked[0]
        if top_k[row] > 0:
            kept[int(top_k[row]) :] = False
            ranked_share = ranked / ranked[: int(top_k[row])].sum()
        else:
            ranked_share = ranked
        if top_p[row] < 1:
            kept &= ranked_share.cumsum(0) - ranked_share < top_p[row].double()
        kept[0] = True
        kept_ids = ids[kept].sort().values
        running = p[kept_ids].cumsum(0)
        place = torch.searchsorted(running, draws[row] * running[-1], right=True)
        chosen.append(int(kept_ids[min(int(place), len(kept_ids) - 1)]))
    token_ids = torch.tensor(chosen, dtype=torch.int64, device=logits.device)
    return token_ids, wide.log_softmax(-1).gather(1, token_ids.unsqueeze(1)).squeeze(1).float()


def contrast(expert: torch.Tensor, base: torch.Tensor, strength: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """Logits [B, V] f32 that set an expert apart from its base: (1 + a)·expert − a·base with a = ``strength`` f32 [B],
    −∞ for tokens less than ``floor`` f32 [B] times as probable to the expert as its most probable one.

    Source: Li et al., "Contrastive Decoding: Open-ended Text Generation as Optimization" (2022), in the form of O'Brien
    & Lewis (2023), which keeps the expert's scale; the floor is the former's plausibility constraint.
    """
    expert, base, a = expert.float(), base.float(), strength.unsqueeze(1)
    least = expert.amax(1, keepdim=True) + floor.log().unsqueeze(1)
    return (expert + a * (expert - base)).masked_fill_(expert < least, -torch.inf)


def _draw_from(p: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Index of the first entry of each row of ``p`` [B, N] at which the running sum exceeds draw · total."""
    running = p.cumsum(-1, dtype=torch.float64)
    target = (draws * running[:, -1]).unsqueeze(1)
    return torch.searchsorted(running, target, right=True).squeeze(1).clamp_(max=p.shape[1] - 1)


def _draw_restricted(p, peak, draws, top_k, top_p, min_p, floor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from the kept tokens of each row, looking only at candidates with p ≥ floor [B].

    Returns the ids and which rows had all their kept tokens among the candidates. A row's result does not depend on its
    floor, once that is low enough: values are sorted stably and summed one after the other in fp64.
    """
    num_rows, vocab_size = p.shape
    rows, ids = (p >= floor.unsqueeze(1)).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=num_rows)
    starts = counts.cumsum(0) - counts
    places = torch.arange(rows.shape[0], device=p.device) - starts[rows]
    width = int(counts.max())
    candidates = p.new_zeros(num_rows, width)
    candidate_ids = rows.new_zeros(num_rows, width)
    candidates[rows, places] = p[rows, ids]
    candidate_ids[rows, places] = ids

    ranked, order = candidates.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(width, device=p.device).unsqueeze(0)
    k = torch.where(top_k > 0, top_k.long(), vocab_size).unsqueeze(1)
    running = ranked.cumsum(-1, dtype=torch.float64)
    mass = running.gather(1, k.clamp(max=width) - 1)
    total = torch.where(k < vocab_size, mass, 1.0)
    limit = torch.where(top_p < 1, top_p.double(), torch.inf).unsqueeze(1)
    kept = (rank < k) & (running - ranked < limit * total) & (ranked >= (min_p * peak).unsqueeze(1))
    kept[:, 0] = True
    enough_for_k = (counts.unsqueeze(1) >= k) | (k >= vocab_size)
    enough_for_p = (running[:, -1:] >= limit * total) & (k >= vocab_size)
    # Where top-p measures shares of what top-k left, min-p alone cannot bound the candidates: they must hold the top k.
    bounded = (floor <= min_p * peak) & ((k >= vocab_size).squeeze(1) | (top_p >= 1))
    complete = ((enough_for_k & (k < vocab_size)) | enough_for_p).squeeze(1) | bounded

    probabilities = torch.zeros_like(candidates).scatter_(1, order, ranked * kept)
    places = _draw_from(probabilities, draws)
    return candidate_ids.gather(1, places.unsqueeze(1)).squeeze(1), complete


def _sample_torch(logits, keys, steps, temperature, top_k, top_p, min_p, repetition_penalty, seen):
    logits = logits.float()
    penalised = _penalised(logits, repetition_penalty, seen)
    # max, log_softmax, softmax and cumsum treat each row by itself; sum would split a row between threads when B is
    # small.
    token_ids = penalised.max(-1).indices
    drawn = (temperature > 0).nonzero().squeeze(1)
    if drawn.numel():
        token_ids[drawn] = _draw(penalised, drawn, keys, steps, temperature, top_k, top_p, min_p)
    logprobs = logits.log_softmax(-1).gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return token_ids, logprobs


def _draw(penalised, rows, keys, steps, temperature, top_k, top_p, min_p) -> torch.Tensor:
    """Token ids of ``rows``, all with temperature > 0."""
    every = rows.numel() == penalised.shape[0]

    def pick(tensor, index=rows):
        return tensor if every else tensor[index]

    # A row of NaN keeps nothing; it must still give some id, and the other rows theirs.
    p = (pick(penalised) / pick(temperature).unsqueeze(1)).softmax(-1).nan_to_num_(0.0)
    draws = uniform(pick(keys), pick(steps))
    top_k, top_p, min_p = pick(top_k), pick(top_p), pick(min_p)
    vocab_size = p.shape[1]
    restricted = ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1) | (min_p > 0)
    free = (~restricted).nonzero().squeeze(1)
    if free.numel() == p.shape[0]:
        return _draw_from(p, draws)
    chosen = torch.empty_like(draws, dtype=torch.int64)
    if free.numel():
        chosen[free] = _draw_from(p[free], draws[free])
    todo = restricted.nonzero().squeeze(1)
    for floor in _CANDIDATE_FLOORS:
        whole = todo.numel() == p.shape[0]
        p_, draws_, k_, share_, min_p_ = (t if whole else t[todo] for t in (p, draws, top_k, top_p, min_p))
        peak = p_.amax(-1)
        least = torch.full_like(peak, floor).minimum(peak)
        least = torch.where((k_ > 0) & (share_ < 1), least, torch.maximum(min_p_ * peak, least))
        ids, complete = _draw_restricted(p_, peak, draws_, k_, share_, min_p_, least)
        chosen[todo] = ids
        todo = todo[~complete]
        if not todo.numel():
            break
    return chosen


@functools.cache
def _cpp_function():
    function = cpu.load("sampling").sample_rows
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, long, long, long, *[pointer] * 8, long, pointer, pointer, ctypes.c_int, ctypes.c_int]
    function.restype = None
    return function


def _sample_cpp(logits, keys, steps, temperature, top_k, top_p, min_p, repetition_penalty, seen):
    num_rows, vocab_size = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if seen is not None and seen.stride(1) != 1:
        seen = seen.contiguous()
    # Held by name, so that a converted copy lives until the call returns.
    integers = [t.to(torch.int64).contiguous() for t in (keys, steps)]
    settings = [temperature.float().contiguous(), top_k.to(torch.int32).contiguous()]
    settings += [t.float().contiguous() for t in (top_p, min_p)]
    penalty = None if repetition_penalty is None else repetition_penalty.float().contiguous()
    token_ids = torch.empty(num_rows, dtype=torch.int64)
    logprobs = torch.empty(num_rows, dtype=torch.float32)
    _cpp_function()(
        logits.data_ptr(), logits.stride(0), num_rows, vocab_size, *(t.data_ptr() for t in (*integers, *settings)),
        None if penalty is None else penalty.data_ptr(), None if seen is None else seen.data_ptr(),
        0 if seen is None else seen.stride(0), token_ids.data_ptr(), logprobs.data_ptr(),
        cpu.DTYPE_CODES[logits.dtype], cpu.num_threads(),
    )  # fmt: skip
    return token_ids, logprobs


def sample(
    logits: torch.Tensor,
    *,
    keys: torch.Tensor,
    steps: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    repetition_penalty: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token per row of ``logits`` [B, V]; returns (token_ids i64 [B], logprobs f32 [B]).

    keys, steps i64 [B]; temperature f32 [B] (0 = greedy); top_k i32 [B] (0 = off); top_p f32 [B] (1 = off); min_p f32
    [B] (0 = off); repetition_penalty f32 [B] with seen bool [B, V], or neither. A row's result is independent of the
    other rows. Raises ValueError where shapes do not fit.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise bad_argument("sample", "logits", f"of shape {tuple(logits.shape)}", "[B, V], V ≥ 1")
    num_rows = logits.shape[:1]
    for name, setting in (
        ("keys", keys),
        ("steps", steps),
        ("temperature", temperature),
        ("top_k", top_k),
        ("top_p", top_p),
        ("min_p", min_p),
        ("repetition_penalty", repetition_penalty),
    ):
        if setting is not None and setting.shape != num_rows:
            raise bad_argument("sample", name, f"of shape {tuple(setting.shape)}", f"[{num_rows[0]}], one per row")
    if (repetition_penalty is None) != (seen is None):
        raise bad_argument("sample", "seen", "given without repetition_penalty, or the reverse", "both or neither")
    if seen is not None and (seen.shape != logits.shape or seen.dtype != torch.bool):
        raise bad_argument(
            "sample", "seen", f"{seen.dtype} of shape {tuple(seen.shape)}", f"bool {tuple(logits.shape)}"
        )
    cpu_default = cpu.default_backend("sampling") if logits.dtype in cpu.DTYPE_CODES else "torch"
    name = choose_backend("sample", logits, backend, ("torch", "triton", "cpp"), cpu_default)
    if logits.shape[0] == 0:
        return keys.to(torch.int64), temperature.float()
    run = {"torch": _sample_torch, "triton": sample_triton, "cpp": _sample_cpp}[name]
    return run(logits, keys, steps, temperature, top_k, top_p, min_p, repetition_penalty, seen)


def _make_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(seed)
    num_rows, vocab_size = case["B"], case["V"]

    def each(value: float | int, kind: torch.dtype) -> torch.Tensor:
        return torch.full((num_rows,), value, dtype=kind, device=device)

    inputs: dict[str, Any] = {
        "logits": (3 * torch.randn(num_rows, vocab_size, generator=generator, device=device)).to(dtype),
        "keys": torch.randint(-(2**62), 2**62, (num_rows,), generator=generator, device=device),
        "steps": torch.arange(num_rows, device=device),
        "temperature": each(case.get("temperature", 1.0), torch.float32),
        "top_k": each(case.get("top_k", 0), torch.int32),
        "top_p": each(case.get("top_p", 1.0), torch.float32),
        "min_p": each(case.get("min_p", 0.0), torch.float32),
    }
    if "penalty" in case:
        inputs["repetition_penalty"] = each(case["penalty"], torch.float32)
        inputs["seen"] = torch.rand(num_rows, vocab_size, generator=generator, device=device) < 0.2
    return inputs


_EXACT = {"check": "reference", "dtype": "fp32"}

SPEC = KernelSpec(
    op="sample",
    run=sample,
    reference=sample_reference,
    make_inputs=_make_inputs,
    test_cases=(
        {"B": 1, "V": 1},
        {"B": 3, "V": 7, "temperature": 0.7, "top_p": 0.5},
        {"B": 2, "V": 300, "temperature": 0.0},
        {"B": 2, "V": 300, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
        {"B": 2, "V": 257, "temperature": 0.9, "top_k": 5, "penalty": 1.3},
        {"B": 2, "V": 2051, "temperature": 0.8, "top_p": 0.95},
        {"B": 2, "V": 2048, "temperature": 0.8, "min_p": 0.05},
    ),
    bench_cases=(
        {"model": "MPT", "B": 128, "V": 50432, "temperature": 0.7, "top_p": 0.95, "priority": 2, **_EXACT},
        {"model": "MPT", "B": 128, "V": 50432, "temperature": 1.0, **_EXACT},
        {"model": "MPT", "B": 128, "V": 50432, "temperature": 0.0, **_EXACT},
        {"model": "Llama-8B", "B": 64, "V": 128256, "temperature": 0.7, "top_k": 50, "top_p": 0.95, **_EXACT},
    ),
    bytes=lambda case: case["B"] * case["V"] * 4,
    flops=lambda case: 4 * case["B"] * case["V"],
    compile_cases=compile_cases,
    peers={"torch": lambda **inputs: sample(**inputs, backend="torch")},
    tuning=tuning,
)
