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
from .dispatch import bad_argument, choose_backend, tl, triton
from .spec import Case, CompileCase, KernelSpec
from .tuning import tuned_config

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)

# The Triton kernel's candidates: at least this times as probable as the most probable token; at most so many blocks.
_FLOOR = 2.0**-16
_CAPACITY = 4
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


@triton.jit
def _mix64_scalar(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _load_penalised(logits, seen, penalty, start, vocab_size, HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr):
    """Logits of one block as given and after the penalty, in fp32; -inf past the end. Shape [1, BLOCK]."""
    ids = start + tl.arange(0, BLOCK)[None, :]
    raw = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    value = raw
    if HAS_PENALTY:
        hit = tl.load(seen + ids, mask=ids < vocab_size, other=0) != 0
        value = tl.where(hit, tl.where(raw > 0, raw / penalty, raw * penalty), raw)
    return ids, raw, value


@triton.jit
def _load_exps(
    logits, seen, penalty, peak, inverse_t, start, size, few, few_exps, HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr
):
    """e = exp((l - peak) / temperature) of one block, 0 past the end, and its bits, which order as e does.

    With ``few`` the blocks are of the row's candidates, stored earlier, and ``size`` is their number.
    """
    places = start + tl.arange(0, BLOCK)[None, :]
    if few:
        exps = tl.load(few_exps + places, mask=places < size, other=0.0)
    else:
        _, _, value = _load_penalised(logits, seen, penalty, start, size, HAS_PENALTY, BLOCK)
        exps = tl.exp((value - peak) * inverse_t)
        exps = tl.where(exps >= 0, exps, 0.0)
    return places, exps, exps.to(tl.int32, bitcast=True)


@triton.jit
def _store_candidates(
    logits, seen, penalty, peak, inverse_t, vocab_size, few_exps, few_ids,
    HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr, FLOOR: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Stores the tokens with e ≥ FLOOR, in order of id; returns their number and mass and the mass of the row.

    Past CAPACITY of them the rest is left out, which the number tells.
    """
    found = tl.full([], 0, tl.int32)
    lane_total = tl.zeros([1, BLOCK], tl.float32)
    lane_few = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids, exps, _ = _load_exps(
            logits, seen, penalty, peak, inverse_t, start, vocab_size, False, few_exps, HAS_PENALTY, BLOCK
        )
        hit = (exps >= FLOOR) & (ids < vocab_size)
        count = hit.to(tl.int32)
        place = found + tl.cumsum(count, axis=1) - count
        tl.store(few_exps + place, exps, mask=hit & (place < CAPACITY))
        tl.store(few_ids + place, ids, mask=hit & (place < CAPACITY))
        found += tl.sum(count)
        lane_total += exps
        lane_few += tl.where(hit, exps, 0.0)
    # The candidates are read back by other threads than those that stored them.
    tl.debug_barrier()
    return found, tl.sum(lane_few), tl.sum(lane_total)


@triton.jit
def _search(
    logits, seen, penalty, peak, inverse_t, size, few, few_exps, goal, by_count,
    HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cut (bits, num_equals) of the fewest highest-ranked tokens whose count or mass reaches ``goal``.

    Kept are tokens of more bits and the first ``num_equals`` of just these bits. Also returns how many have these
    bits and the mass kept. Eight thresholds a pass, three bits of the answer: ten passes over the candidates, or a
    row in L2.
    """
    digits = tl.arange(0, 8)[:, None]
    cut = tl.full([], 0, tl.int32)
    for place in range(10):
        shift = 27 - 3 * place
        sums = tl.zeros([8, BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            _, exps, bits = _load_exps(
                logits, seen, penalty, peak, inverse_t, start, size, few, few_exps, HAS_PENALTY, BLOCK
            )
            weight = tl.where(by_count, 1.0, exps)
            sums += tl.where(bits >= cut + (digits << shift), weight, 0.0)
        reached = tl.sum(sums, axis=1)[:, None] >= goal
        cut += tl.max(tl.where(reached, digits, 0)) << shift
    above_mass = tl.zeros([1, BLOCK], tl.float32)
    above_count = tl.zeros([1, BLOCK], tl.float32)
    equal_count = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        _, exps, bits = _load_exps(
            logits, seen, penalty, peak, inverse_t, start, size, few, few_exps, HAS_PENALTY, BLOCK
        )
        above_mass += tl.where(bits > cut, exps, 0.0)
        above_count += tl.where(bits > cut, 1.0, 0.0)
        equal_count += tl.where(bits == cut, 1.0, 0.0)
    mass = tl.sum(above_mass)
    equals = tl.sum(equal_count)
    value = cut.to(tl.float32, bitcast=True)
    missing = tl.where(by_count, goal - tl.sum(above_count), tl.ceil((goal - mass) / tl.maximum(value, 1e-37)))
    kept = tl.minimum(tl.maximum(missing, 1.0), equals)
    return cut, kept, equals, mass + kept * value


@triton.jit
def _load_kept(
    logits, seen, penalty, peak, inverse_t, start, size, few, few_exps,
    cut, num_equals, ranked, equals_before, least, HAS_PENALTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block's e with all but the kept tokens zeroed, its places and its number of tokens that equal the cut."""
    places, exps, bits = _load_exps(
        logits, seen, penalty, peak, inverse_t, start, size, few, few_exps, HAS_PENALTY, BLOCK
    )
    equal = tl.where((bits == cut) & (places < size), 1.0, 0.0)
    kept = bits >= cut
    if ranked:
        rank = equals_before + tl.cumsum(equal, axis=1) - equal
        kept = kept & ((bits > cut) | (rank < num_equals))
    return places, tl.where(kept & (exps >= least), exps, 0.0), tl.sum(equal)


@triton.jit
def sampling_kernel(
    logits,
    seen,
    keys,
    steps,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    penalties,
    token_ids,
    logprobs,
    few_exps,
    few_ids,
    vocab_size,
    logits_stride,
    seen_stride,
    HAS_PENALTY: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    FLOOR: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    penalty = 1.0
    if HAS_PENALTY:
        seen += row * seen_stride
        penalty = tl.load(penalties + row)

    # Running maximum and sum of each lane, so that blocks meet only once, at the end.
    lane_max = tl.full([1, BLOCK], -1e38, tl.float32)
    lane_sum = tl.zeros([1, BLOCK], tl.float32)
    lane_best = tl.full([1, BLOCK], float("-inf"), tl.float32)
    lane_id = tl.full([1, BLOCK], 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        ids, raw, value = _load_penalised(logits, seen, penalty, start, vocab_size, HAS_PENALTY, BLOCK)
        larger = tl.maximum(lane_max, raw)
        lane_sum = lane_sum * tl.exp(lane_max - larger) + tl.exp(raw - larger)
        lane_max = larger
        lane_id = tl.where(value > lane_best, ids, lane_id)
        lane_best = tl.maximum(lane_best, value)
    raw_max = tl.max(lane_max)
    raw_sum = tl.sum(lane_sum * tl.exp(lane_max - raw_max))
    peak = tl.max(lane_best)
    chosen = tl.min(tl.where(lane_best == peak, lane_id, vocab_size - 1))

    temperature = tl.load(temperatures + row)
    if temperature > 0:
        inverse_t = 1.0 / temperature
        top_k = tl.load(top_ks + row)
        top_p = tl.load(top_ps + row)
        least = tl.load(min_ps + row)
        cut = tl.full([], 0, tl.int32)
        num_equals = tl.full([], 0.0, tl.float32)
        equals = tl.full([], 0.0, tl.float32)
        few = row < 0
        size = tl.full([], 0, tl.int32) + vocab_size
        by_count = (top_k > 0) & (top_k < vocab_size)
        if by_count | (top_p < 1):
            few_exps += row * CAPACITY
            few_ids += row * CAPACITY
            found, mass, total = _store_candidates(
                logits,
                seen,
                penalty,
                peak,
                inverse_t,
                vocab_size,
                few_exps,
                few_ids,
                HAS_PENALTY,
                BLOCK,
                FLOOR,
                CAPACITY,
            )
            # Where the candidates hold all that is kept, nothing below looks at the row again. A row without a single
            # number has no candidates: its ids were never written.
            few = (found > 0) & (found <= CAPACITY) & tl.where(by_count, found >= top_k, mass >= top_p * total)
            size = tl.where(few, found, vocab_size)
            if by_count:
                cut, num_equals, equals, total = _search(
                    logits, seen, penalty, peak, inverse_t, size, few, few_exps, top_k.to(tl.float32), True,
                    HAS_PENALTY, BLOCK,
                )  # fmt: skip
            if top_p < 1:
                p_cut, p_num_equals, p_equals, _ = _search(
                    logits, seen, penalty, peak, inverse_t, size, few, few_exps, top_p * total, False,
                    HAS_PENALTY, BLOCK,
                )  # fmt: skip
                if p_cut > cut:
                    cut = p_cut
                    num_equals = p_num_equals
                    equals = p_equals
                elif p_cut == cut:
                    num_equals = tl.where(equals > 0, tl.minimum(num_equals, p_num_equals), p_num_equals)
                    equals = p_equals
        ranked = num_equals < equals

        block_ids = tl.arange(0, NUM_BLOCKS)
        sums = tl.zeros([NUM_BLOCKS], tl.float32)
        befores = tl.zeros([NUM_BLOCKS], tl.float32)
        before = tl.full([], 0.0, tl.float32)
        for start in range(0, size, BLOCK):
            _, exps, count = _load_kept(
                logits, seen, penalty, peak, inverse_t, start, size, few, few_exps,
                cut, num_equals, ranked, before, least, HAS_PENALTY, BLOCK,
            )  # fmt: skip
            sums = tl.where(block_ids == start // BLOCK, tl.sum(exps), sums)
            befores = tl.where(block_ids == start // BLOCK, before, befores)
            before += count
        running = tl.cumsum(sums, axis=0)
        bits = _mix64_scalar(
            _mix64_scalar(tl.load(keys + row).to(tl.uint64, bitcast=True))
            + (tl.load(steps + row) + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
        )
        target = (bits >> 11).to(tl.float64) * 1.1102230246251565e-16 * tl.max(running).to(tl.float64)
        block = tl.sum((running.to(tl.float64) <= target).to(tl.int32))
        base = tl.sum(tl.where(block_ids == block - 1, running, 0.0)).to(tl.float64)
        before = tl.sum(tl.where(block_ids == block, befores, 0.0))
        places, exps, _ = _load_kept(
            logits, seen, penalty, peak, inverse_t, block * BLOCK, size, few, few_exps,
            cut, num_equals, ranked, before, least, HAS_PENALTY, BLOCK,
        )  # fmt: skip
        passed = (base + tl.cumsum(exps, axis=1).to(tl.float64) > target) & (exps > 0)
        first = tl.min(tl.where(passed, places, size))
        # Rounding may let the block's own running sum end short of the target: then its last kept token is drawn.
        last = tl.max(tl.where(exps > 0, places, 0))
        chosen = tl.where(first < size, first, last)
        if few:
            chosen = tl.load(few_ids + chosen)
    tl.store(token_ids + row, chosen.to(tl.int64))
    tl.store(logprobs + row, tl.load(logits + chosen).to(tl.float32) - raw_max - tl.log(raw_sum))


def _config(vocab_size: int) -> dict[str, int]:
    block = min(2048, max(32, triton.next_power_of_2(vocab_size)))
    return {"block": block, "num_warps": 16 if block == 2048 else 8}


def _bucket(vocab_size: int) -> str:
    return str(triton.next_power_of_2(vocab_size))


def _sample_triton(logits, keys, steps, temperature, top_k, top_p, min_p, repetition_penalty, seen):
    num_rows, vocab_size = logits.shape
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise bad_argument("sample", "logits", logits.dtype, "float32, float16 or bfloat16 with backend 'triton'")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    has_penalty = seen is not None
    marks = logits if seen is None else (seen if seen.stride(1) == 1 else seen.contiguous()).view(torch.uint8)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    config = tuned_config("sample", _bucket(vocab_size), _config(vocab_size))
    capacity = _CAPACITY * config["block"]
    few_exps = torch.empty((num_rows, capacity), dtype=torch.float32, device=logits.device)
    few_ids = torch.empty((num_rows, capacity), dtype=torch.int32, device=logits.device)
    sampling_kernel[(num_rows,)](
        logits, marks, keys.to(torch.int64), steps.to(torch.int64), temperature.float(),
        top_k.to(torch.int32), top_p.float(), min_p.float(), repetition_penalty.float() if has_penalty else temperature,
        token_ids, logprobs, few_exps, few_ids, vocab_size, logits.stride(0), marks.stride(0),
        HAS_PENALTY=has_penalty, BLOCK=config["block"], FLOOR=_FLOOR, CAPACITY=capacity,
        NUM_BLOCKS=triton.next_power_of_2(triton.cdiv(vocab_size, config["block"])), num_warps=config["num_warps"],
    )  # fmt: skip
    return token_ids, logprobs


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
    run = {"torch": _sample_torch, "triton": _sample_triton, "cpp": _sample_cpp}[name]
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


def _compile_cases(target: int) -> list[CompileCase]:
    cases = []
    for vocab_size, has_penalty in ((50432, False), (50432, True), (151936, False)):
        config = tuned_config("sample", _bucket(vocab_size), _config(vocab_size))
        cases.append(
            CompileCase(
                f"V={vocab_size}{' penalty' if has_penalty else ''}",
                sampling_kernel,
                {
                    "logits": "*fp32",
                    "seen": "*u8",
                    "keys": "*i64",
                    "steps": "*i64",
                    "temperatures": "*fp32",
                    "top_ks": "*i32",
                    "top_ps": "*fp32",
                    "min_ps": "*fp32",
                    "penalties": "*fp32",
                    "token_ids": "*i64",
                    "logprobs": "*fp32",
                    "few_exps": "*fp32",
                    "few_ids": "*i32",
                    **dict.fromkeys(("vocab_size", "logits_stride", "seen_stride"), "i32"),
                },
                {
                    "HAS_PENALTY": has_penalty,
                    "BLOCK": config["block"],
                    "NUM_BLOCKS": triton.next_power_of_2(triton.cdiv(vocab_size, config["block"])),
                    "FLOOR": _FLOOR,
                    "CAPACITY": _CAPACITY * config["block"],
                },
                num_warps=config["num_warps"],
                attrs=dict.fromkeys(("vocab_size", "logits_stride", "seen_stride"), 16),
            )
        )
    return cases


def _tuning(case: Case) -> tuple[str, list[dict[str, int]]]:
    return _bucket(case["V"]), [
        {"block": b, "num_warps": w} for b in (1024, 2048, 4096, 8192) for w in (8, 16, 32) if 2 <= b // (32 * w) <= 16
    ]


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
    compile_cases=_compile_cases,
    peers={"torch": lambda **inputs: sample(**inputs, backend="torch")},
    tuning=_tuning,
)
