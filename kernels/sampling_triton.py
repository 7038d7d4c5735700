"""Triton kernels of ``sample`` (sampling.py holds the rule and its order): two by segments of a row, one by rows.

``scan_kernel`` reads each segment once: maximum and sum for the log-sum-exp, the best token, the mass at the row's
temperature and, where a row has top-k or top-p, the count or mass above each of LEVELS powers of two of e^(l / t).
Those powers are the same for all segments, so their sums over the segments bracket the cut within a factor of two.
``gather_kernel``, with the row's maximum at hand, reads the segment again (from L2), sums what lies above the bracket
and stores what lies in it. ``draw_kernel``, one program a row, searches the cut among what was stored, adds the kept of
these to the segments' sums, and reads the one segment in which the draw falls. Where the bracket misses the cut (by
rounding, or below the last level) or overflows a segment's room, it searches the row instead.

Segments depend on the vocabulary's size only and every sum has a fixed order: a result depends on its row alone.
"""

from __future__ import annotations

import torch

from .dispatch import bad_argument, tl, triton
from .spec import Case, CompileCase
from .tuning import tuned_config

# What each segment of a row leaves in ``stats`` [B, _FIELDS + LEVELS, segments], fp32, by field. From scan_kernel:
# 0 maximum and 1 sum of e^(l - maximum) of the logits as given, 2 largest penalised logit, 3 its id (the bits of an
# int32), 4 sum of e^((l - largest) / t), and from field 9 on what reaches each level. From gather_kernel, all in
# e = e^((l - row's largest) / t): 5 mass above the bracket, 6 of it what min-p keeps, 7 how many lie in the bracket,
# 8 their mass.
_FIELDS = 9


@triton.jit
def _mix64(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _load_penalised(logits, seen, penalty, start, vocab_size, HAS_PENALTY: tl.constexpr, SEGMENT: tl.constexpr):
    """Ids and logits of one segment as given and after the penalty, in fp32; -inf past the end. Shape [SEGMENT]."""
    ids = start + tl.arange(0, SEGMENT)
    raw = tl.load(logits + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    value = raw
    if HAS_PENALTY:
        hit = tl.load(seen + ids, mask=ids < vocab_size, other=0) != 0
        value = tl.where(hit, tl.where(raw > 0, raw / penalty, raw * penalty), raw)
    return ids, raw, value


@triton.jit
def _exps(value, peak, inverse_t):
    """e = exp((l - peak) / temperature), 0 for a NaN."""
    exps = tl.exp((value - peak) * inverse_t)
    return tl.where(exps >= 0, exps, 0.0)


@triton.jit
def _load_exps(
    logits, seen, penalty, peak, inverse_t, start, vocab_size, HAS_PENALTY: tl.constexpr, SEGMENT: tl.constexpr
):
    """Ids and e of one segment, 0 past the end."""
    ids, _, value = _load_penalised(logits, seen, penalty, start, vocab_size, HAS_PENALTY, SEGMENT)
    return ids, _exps(value, peak, inverse_t)


@triton.jit
def _field(stats, field, num_segments, other, SEGMENTS: tl.constexpr):
    """One field of all segments of a row, [SEGMENTS]; ``stats`` points at the row."""
    segments = tl.arange(0, SEGMENTS)
    return tl.load(stats + field * SEGMENTS + segments, mask=segments < num_segments, other=other)


@triton.jit
def _in_levels(logit, inverse_t, OCTAVES: tl.constexpr):
    """log(e^(l / t)) with the distance of two levels, OCTAVES powers of two, as its unit."""
    return logit * (inverse_t * (1.4426950408889634 / OCTAVES))


@triton.jit
def scan_kernel(
    logits, seen, temperatures, top_ks, top_ps, penalties, stats, vocab_size, num_segments, logits_stride, seen_stride,
    HAS_PENALTY: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, FIELDS: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // num_segments).to(tl.int64)
    segment = program % num_segments
    logits += row * logits_stride
    stats += row * ((FIELDS + LEVELS) * SEGMENTS) + segment
    penalty = 1.0
    if HAS_PENALTY:
        seen += row * seen_stride
        penalty = tl.load(penalties + row)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    ids, raw, value = _load_penalised(logits, seen, penalty, segment * SEGMENT, vocab_size, HAS_PENALTY, SEGMENT)

    raw_max = tl.maximum(tl.max(raw), -1e38)
    tl.store(stats, raw_max)
    tl.store(stats + SEGMENTS, tl.sum(tl.exp(raw - raw_max)))
    value = tl.where(value > float("-inf"), value, float("-inf"))  # no NaN
    largest = tl.max(value)
    best = tl.min(tl.where(value == largest, ids, vocab_size - 1))
    tl.store(stats + 2 * SEGMENTS, largest)
    tl.store(stats + 3 * SEGMENTS, best.to(tl.float32, bitcast=True))
    if temperature > 0:
        inverse_t = 1.0 / temperature
        exps = _exps(value, largest, inverse_t)
        tl.store(stats + 4 * SEGMENTS, tl.sum(exps))
        by_count = (top_k > 0) & (top_k < vocab_size)
        if by_count | (top_p < 1):
            levels = tl.arange(0, LEVELS)
            at = _in_levels(largest, inverse_t, 16 // LEVELS)
            least = tl.exp2((tl.ceil(at) - at - 1.0 - levels) * (16 // LEVELS))
            weight = tl.where(by_count, 1.0, exps)
            # A product, not a choice: one comparison and one multiply-add for each level.
            reached = tl.sum((exps[None, :] >= least[:, None]).to(tl.float32) * weight[None, :], axis=1)
            tl.store(stats + (FIELDS + levels) * SEGMENTS, reached)


@triton.jit
def _bracket(
    stats, largest, factors, peak, inverse_t, top_k, top_p, by_count, num_segments,
    SEGMENTS: tl.constexpr, FIELDS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Two values of e, low ≤ high, between which the cut lies as far as the levels tell.

    For a cut by count the upper one is infinite: top-p, applied to what top-k leaves, may put its cut anywhere above.
    """
    OCTAVES: tl.constexpr = 16 // LEVELS
    tops = tl.ceil(_in_levels(largest, inverse_t, OCTAVES))
    at = _in_levels(peak, inverse_t, OCTAVES)
    top = tl.ceil(at)
    levels = tl.arange(0, LEVELS)
    segments = tl.arange(0, SEGMENTS)
    lower = tl.where(tops > -1e30, top - tops, 1e6)
    places = levels[:, None] - tl.minimum(lower, 1e6).to(tl.int32)[None, :]
    sums = tl.load(
        stats + (FIELDS + places) * SEGMENTS + segments[None, :],
        mask=(places >= 0) & (segments < num_segments)[None, :], other=0.0,
    )  # fmt: skip
    reached = tl.sum(sums * tl.where(by_count, 1.0, factors)[None, :], axis=1)
    total = tl.sum(_field(stats, 4, num_segments, 0.0, SEGMENTS) * factors)
    goal = tl.where(by_count, top_k.to(tl.float32), top_p * total)
    missed = tl.sum((reached < goal).to(tl.int32))
    high = tl.exp2((top - at - missed) * OCTAVES)
    low = tl.where(missed < LEVELS, tl.exp2((top - at - missed - 1.0) * OCTAVES), 0.0)
    return low, tl.where(by_count | (missed == 0), float("inf"), high)


@triton.jit
def gather_kernel(
    logits, seen, temperatures, top_ks, top_ps, min_ps, penalties, stats, few_exps, vocab_size, num_segments,
    logits_stride, seen_stride,
    HAS_PENALTY: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, ROOM: tl.constexpr,
    FIELDS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    # From the last segment back: what was read last is what L2 still holds.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (program // num_segments).to(tl.int64)
    segment = program % num_segments
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
    by_count = (top_k > 0) & (top_k < vocab_size)
    restricted = by_count | (top_p < 1)
    if (temperature > 0) & (restricted | (min_p > 0)):
        logits += row * logits_stride
        stats += row * ((FIELDS + LEVELS) * SEGMENTS)
        few_exps += (row * SEGMENTS + segment) * ROOM
        penalty = 1.0
        if HAS_PENALTY:
            seen += row * seen_stride
            penalty = tl.load(penalties + row)
        inverse_t = 1.0 / temperature
        ids, _, value = _load_penalised(logits, seen, penalty, segment * SEGMENT, vocab_size, HAS_PENALTY, SEGMENT)
        largest = _field(stats, 2, num_segments, float("-inf"), SEGMENTS)
        peak = tl.max(largest)
        low = 0.0
        high = 0.0
        if restricted:
            low, high = _bracket(
                stats, largest, _exps(largest, peak, inverse_t), peak, inverse_t, top_k, top_p, by_count,
                num_segments, SEGMENTS, FIELDS, LEVELS,
            )  # fmt: skip
        exps = _exps(value, peak, inverse_t)
        hit = (exps >= low) & (exps < high) & (ids < vocab_size)
        above = tl.where(exps >= high, exps, 0.0)
        count = hit.to(tl.int32)
        place = tl.cumsum(count, axis=0) - count
        tl.store(few_exps + place, exps, mask=hit & (place < ROOM))
        stats += segment
        tl.store(stats + 5 * SEGMENTS, tl.sum(above))
        tl.store(stats + 6 * SEGMENTS, tl.sum(tl.where(above >= min_p, above, 0.0)))
        tl.store(stats + 7 * SEGMENTS, tl.sum(count).to(tl.float32))
        tl.store(stats + 8 * SEGMENTS, tl.sum(tl.where(hit, exps, 0.0)))


@triton.jit
def _search_block(
    logits, seen, penalty, peak, inverse_t, start, vocab_size, few, few_exps, column, found,
    HAS_PENALTY: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """e of the next LANES tokens to search, 0 where there is none: of the row from ``start`` on or, with ``few``, the
    columns from ``start`` on of what every segment stored; ``few_exps``, ``column`` and ``found`` are by lane."""
    if few:
        exps = tl.load(few_exps + start, mask=start + column < found, other=0.0)
    else:
        _, exps = _load_exps(logits, seen, penalty, peak, inverse_t, start, vocab_size, HAS_PENALTY, LANES)
    return exps, exps.to(tl.int32, bitcast=True)


@triton.jit
def _search(
    logits, seen, penalty, peak, inverse_t, vocab_size, few, few_exps, column, found, size, step, low, high, goal,
    by_count, HAS_PENALTY: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The cut (bits, num_equals) of the fewest highest-ranked tokens whose count or mass reaches ``goal``.

    e is a positive float, so its bits order as its value does. The cut lies between the bits ``low`` and ``high``. Kept
    are tokens of more bits and the first ``num_equals`` of just these bits. Also returns how many have these bits and
    the mass kept. Eight thresholds a pass, three bits of the answer.
    """
    digits = tl.arange(0, 8)[:, None]
    cut = low
    shift = tl.full([], 27, tl.int32)
    while (shift > 0) & (((high - low) >> shift) == 0):
        shift -= 3
    while shift >= 0:
        limits = (cut + (digits << shift)).to(tl.float32, bitcast=True)
        sums = tl.zeros([8, LANES], tl.float32)
        for start in range(0, size, step):
            exps, _ = _search_block(
                logits, seen, penalty, peak, inverse_t, start, vocab_size, few, few_exps, column, found,
                HAS_PENALTY, LANES,
            )  # fmt: skip
            weight = tl.where(by_count, 1.0, exps)
            sums += (exps[None, :] >= limits).to(tl.float32) * weight[None, :]
        reached = tl.sum(sums, axis=1)[:, None] >= goal
        cut += tl.max(tl.where(reached, digits, 0)) << shift
        shift -= 3
    above_mass = tl.zeros([LANES], tl.float32)
    above_count = tl.zeros([LANES], tl.float32)
    equal_count = tl.zeros([LANES], tl.float32)
    for start in range(0, size, step):
        exps, bits = _search_block(
            logits, seen, penalty, peak, inverse_t, start, vocab_size, few, few_exps, column, found,
            HAS_PENALTY, LANES,
        )  # fmt: skip
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
    logits, seen, penalty, peak, inverse_t, start, vocab_size, cut, num_equals, ranked, equals_before, min_p,
    HAS_PENALTY: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """One segment's ids, e with all but the kept tokens zeroed, and its number of tokens that equal the cut."""
    ids, exps = _load_exps(logits, seen, penalty, peak, inverse_t, start, vocab_size, HAS_PENALTY, SEGMENT)
    bits = exps.to(tl.int32, bitcast=True)
    equal = tl.where((bits == cut) & (ids < vocab_size), 1.0, 0.0)
    kept = bits >= cut
    if ranked:
        rank = equals_before + tl.cumsum(equal, axis=0) - equal
        kept = kept & ((bits > cut) | (rank < num_equals))
    return ids, tl.where(kept & (exps >= min_p), exps, 0.0), tl.sum(equal)


@triton.jit
def draw_kernel(
    logits, seen, keys, steps, temperatures, top_ks, top_ps, min_ps, penalties, token_ids, logprobs, stats, few_exps,
    vocab_size, num_segments, logits_stride, seen_stride,
    HAS_PENALTY: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, ROOM: tl.constexpr,
    LANES: tl.constexpr,
    FIELDS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    stats += row * ((FIELDS + LEVELS) * SEGMENTS)
    penalty = 1.0
    if HAS_PENALTY:
        seen += row * seen_stride
        penalty = tl.load(penalties + row)
    segments = tl.arange(0, SEGMENTS)
    raw_maxima = _field(stats, 0, num_segments, -1e38, SEGMENTS)
    raw_max = tl.max(raw_maxima)
    raw_sum = tl.sum(_field(stats, 1, num_segments, 0.0, SEGMENTS) * tl.exp(raw_maxima - raw_max))
    largest = _field(stats, 2, num_segments, float("-inf"), SEGMENTS)
    peak = tl.max(largest)
    bests = _field(stats, 3, num_segments, 0.0, SEGMENTS).to(tl.int32, bitcast=True)
    chosen = tl.min(tl.where((largest == peak) & (segments < num_segments), bests, vocab_size - 1))

    temperature = tl.load(temperatures + row)
    if temperature > 0:
        inverse_t = 1.0 / temperature
        top_k = tl.load(top_ks + row)
        top_p = tl.load(top_ps + row)
        min_p = tl.load(min_ps + row)
        by_count = (top_k > 0) & (top_k < vocab_size)
        restricted = by_count | (top_p < 1)
        factors = _exps(largest, peak, inverse_t)
        sums = _field(stats, 4, num_segments, 0.0, SEGMENTS) * factors
        total = tl.sum(sums)
        befores = tl.zeros([SEGMENTS], tl.float32)
        cut = tl.full([], 0, tl.int32)
        num_equals = tl.full([], 0.0, tl.float32)
        equals = tl.full([], 0.0, tl.float32)
        ranked = row < 0
        if restricted | (min_p > 0):
            sums = _field(stats, 6, num_segments, 0.0, SEGMENTS)
        if restricted:
            low, high = _bracket(
                stats, largest, factors, peak, inverse_t, top_k, top_p, by_count, num_segments,
                SEGMENTS, FIELDS, LEVELS,
            )  # fmt: skip
            stored = _field(stats, 7, num_segments, 0.0, SEGMENTS)
            most = tl.max(stored)
            above = tl.sum(_field(stats, 5, num_segments, 0.0, SEGMENTS))
            inside = tl.sum(_field(stats, 8, num_segments, 0.0, SEGMENTS))
            goal = top_p * total
            holds = tl.where(by_count, tl.sum(stored) >= top_k, (above < goal) & (above + inside >= goal))
            few = holds & (most <= ROOM)
            WIDTH: tl.constexpr = LANES // SEGMENTS
            lanes = tl.arange(0, LANES)
            column = lanes % WIDTH
            found = tl.load(stats + 7 * SEGMENTS + lanes // WIDTH, mask=lanes // WIDTH < num_segments, other=0.0)
            found = found.to(tl.int32)
            lane_exps = few_exps + row * (SEGMENTS * ROOM) + (lanes // WIDTH) * ROOM + column
            size = tl.where(few, most.to(tl.int32), vocab_size)
            step = tl.where(few, WIDTH, LANES)
            above = tl.where(few, above, 0.0)
            low_bits = tl.where(few, low, 0.0).to(tl.int32, bitcast=True)
            high_bits = tl.where(few, tl.minimum(high, 1.0), 1.0).to(tl.int32, bitcast=True)
            cut = low_bits
            for stage in range(2):
                counting = stage == 0
                if tl.where(counting, by_count, top_p < 1):
                    goal = tl.where(counting, top_k.to(tl.float32), top_p * total - above)
                    found_cut, found_num, found_equals, mass = _search(
                        logits, seen, penalty, peak, inverse_t, vocab_size, few, lane_exps, column, found, size, step,
                        low_bits, high_bits, goal, counting, HAS_PENALTY, LANES,
                    )  # fmt: skip
                    if (found_cut > cut) | (equals == 0):
                        cut = found_cut
                        num_equals = found_num
                        equals = found_equals
                    elif found_cut == cut:
                        num_equals = tl.minimum(num_equals, found_num)
                    if counting:
                        total = mass
            ranked = num_equals < equals

            if few:
                more = tl.zeros([LANES], tl.float32)
                equal = tl.zeros([LANES], tl.float32)
                for start in range(0, size, step):
                    exps, bits = _search_block(
                        logits, seen, penalty, peak, inverse_t, start, vocab_size, True, lane_exps, column, found,
                        HAS_PENALTY, LANES,
                    )  # fmt: skip
                    more += tl.where((bits > cut) & (exps >= min_p), exps, 0.0)
                    equal += tl.where(bits == cut, 1.0, 0.0)
                sums += tl.sum(tl.reshape(more, [SEGMENTS, WIDTH]), axis=1)
                counts = tl.sum(tl.reshape(equal, [SEGMENTS, WIDTH]), axis=1)
                befores = tl.cumsum(counts, axis=0) - counts
                value = cut.to(tl.float32, bitcast=True)
                kept = tl.where(ranked, tl.minimum(tl.maximum(num_equals - befores, 0.0), counts), counts)
                sums += tl.where(value >= min_p, kept * value, 0.0)
            else:
                before = tl.full([], 0.0, tl.float32)
                for segment in range(num_segments):
                    _, exps, count = _load_kept(
                        logits, seen, penalty, peak, inverse_t, segment * SEGMENT, vocab_size,
                        cut, num_equals, ranked, before, min_p, HAS_PENALTY, SEGMENT,
                    )  # fmt: skip
                    sums = tl.where(segments == segment, tl.sum(exps), sums)
                    befores = tl.where(segments == segment, before, befores)
                    before += count

        running = tl.cumsum(sums, axis=0)
        bits = _mix64(
            _mix64(tl.load(keys + row).to(tl.uint64, bitcast=True))
            + (tl.load(steps + row) + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
        )
        target = (bits >> 11).to(tl.float64) * 1.1102230246251565e-16 * tl.max(running).to(tl.float64)
        segment = tl.sum((running.to(tl.float64) <= target).to(tl.int32))
        base = tl.sum(tl.where(segments == segment - 1, running, 0.0)).to(tl.float64)
        before = tl.sum(tl.where(segments == segment, befores, 0.0))
        ids, exps, _ = _load_kept(
            logits, seen, penalty, peak, inverse_t, segment * SEGMENT, vocab_size,
            cut, num_equals, ranked, before, min_p, HAS_PENALTY, SEGMENT,
        )  # fmt: skip
        passed = (base + tl.cumsum(exps, axis=0).to(tl.float64) > target) & (exps > 0)
        first = tl.min(tl.where(passed, ids, vocab_size))
        # Rounding may let the segment's own running sum end short of the target: then its last kept token is drawn.
        last = tl.max(tl.where(exps > 0, ids, 0))
        chosen = tl.where(first < vocab_size, first, last)
    tl.store(token_ids + row, chosen.to(tl.int64))
    tl.store(logprobs + row, tl.load(logits + chosen).to(tl.float32) - raw_max - tl.log(raw_sum))


def _config(vocab_size: int) -> dict[str, int]:
    largest = 2048 if vocab_size <= 1 << 17 else 4096  # at most 64 segments: the last kernel holds one number of each
    segment = min(largest, max(32, triton.next_power_of_2(vocab_size)))
    return {"segment": segment, "num_warps": 8 if segment > 2048 else 4, "levels": 16, "lanes": 1024, "row_warps": 8}


def _bucket(vocab_size: int) -> str:
    return str(triton.next_power_of_2(vocab_size))


def _constants(vocab_size: int) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """What all three kernels are compiled for, and further the first two together and the last."""
    config = tuned_config("sample", _bucket(vocab_size), _config(vocab_size))
    segment = config["segment"]
    segments = triton.next_power_of_2(triton.cdiv(vocab_size, segment))
    constants = {"SEGMENT": segment, "SEGMENTS": segments, "FIELDS": _FIELDS, "LEVELS": config["levels"]}
    lanes = max(segments, config["lanes"])
    return constants, {"num_warps": config["num_warps"]}, {"LANES": lanes, "num_warps": config["row_warps"]}


def sample_triton(logits, keys, steps, temperature, top_k, top_p, min_p, repetition_penalty, seen):
    num_rows, vocab_size = logits.shape
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise bad_argument("sample", "logits", logits.dtype, "float32, float16 or bfloat16 with backend 'triton'")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    has_penalty = seen is not None
    marks = logits if seen is None else (seen if seen.stride(1) == 1 else seen.contiguous()).view(torch.uint8)
    temperature, top_k, top_p, min_p = temperature.float(), top_k.to(torch.int32), top_p.float(), min_p.float()
    penalties = repetition_penalty.float() if has_penalty else temperature
    constants, by_segment, by_row = _constants(vocab_size)
    constants["HAS_PENALTY"] = has_penalty
    segments, room = constants["SEGMENTS"], constants["SEGMENT"] // 2
    num_segments = triton.cdiv(vocab_size, constants["SEGMENT"])
    kind = {"dtype": torch.float32, "device": logits.device}
    stats = torch.empty((num_rows, _FIELDS + constants["LEVELS"], segments), **kind)
    few_exps = torch.empty((num_rows, segments, room), **kind)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, **kind)
    sizes = (vocab_size, num_segments, logits.stride(0), marks.stride(0))
    scan_kernel[(num_rows * num_segments,)](
        logits, marks, temperature, top_k, top_p, penalties, stats, *sizes, **constants, **by_segment
    )
    gather_kernel[(num_rows * num_segments,)](
        logits, marks, temperature, top_k, top_p, min_p, penalties, stats, few_exps, *sizes,
        ROOM=room, **constants, **by_segment,
    )  # fmt: skip
    draw_kernel[(num_rows,)](
        logits, marks, keys.to(torch.int64), steps.to(torch.int64), temperature, top_k, top_p, min_p, penalties,
        token_ids, logprobs, stats, few_exps, *sizes, ROOM=room, **constants, **by_row,
    )  # fmt: skip
    return token_ids, logprobs


_TYPES = {
    **dict.fromkeys(("logits", "temperatures", "top_ps", "min_ps", "penalties", "logprobs", "stats"), "*fp32"),
    **dict.fromkeys(("keys", "steps", "token_ids"), "*i64"),
    "few_exps": "*fp32",
    "seen": "*u8",
    "top_ks": "*i32",
    **dict.fromkeys(("vocab_size", "num_segments", "logits_stride", "seen_stride"), "i32"),
}


def compile_cases(target: int) -> list[CompileCase]:
    cases = []
    for vocab_size, has_penalty in ((50432, False), (50432, True), (151936, False)):
        constants, by_segment, by_row = _constants(vocab_size)
        known = {**constants, "HAS_PENALTY": has_penalty, "ROOM": constants["SEGMENT"] // 2, "LANES": by_row["LANES"]}
        for name, kernel in (("scan", scan_kernel), ("gather", gather_kernel), ("draw", draw_kernel)):
            cases.append(
                CompileCase(
                    f"{name} V={vocab_size}{' penalty' if has_penalty else ''}",
                    kernel,
                    {name: kind for name, kind in _TYPES.items() if name in kernel.arg_names},
                    {name: value for name, value in known.items() if name in kernel.arg_names},
                    num_warps=(by_row if kernel is draw_kernel else by_segment)["num_warps"],
                    attrs=dict.fromkeys(("vocab_size", "logits_stride", "seen_stride"), 16),
                )
            )
    return cases


def tuning(case: Case) -> tuple[str, list[dict[str, int]]]:
    return _bucket(case["V"]), [
        {"segment": segment, "num_warps": warps, "levels": levels, "lanes": lanes, "row_warps": row_warps}
        for segment, warps in ((2048, 2), (2048, 4), (4096, 4), (4096, 8), (8192, 8))
        for levels in (8, 16)
        for lanes, row_warps in ((512, 4), (1024, 4), (1024, 8), (2048, 8), (2048, 16))
    ]
