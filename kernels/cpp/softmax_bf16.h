// Softmax over rows of scores between two bf16 products: fp32 scores in, bf16 weights out.
#pragma once

#include <algorithm>
#include <limits>

#include "vectors.h"

namespace {

constexpr float LOG2_E = 1.44269504088896341f, LOG_2 = 0.693147180559945309f;

// 2^x per lane to about 3e-6 relative, which bf16 does not see; exactly 0 below -126. NaNs stay.
inline vec exp2_16(vec x) {
    const vec magic = splat(12582912.0f), low = splat(-126.0f);
    ivec tiny = x < low;
    vec shifted = x + magic;
    vec f = x - (shifted - magic);
    vec p = f * 1.3333558e-3f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    ivec bits, power;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&power, &shifted, sizeof power);
    bits += power << 23;
    std::memcpy(&p, &bits, sizeof p);
    return tiny ? splat(0.0f) : p;
}

// bf16 of each lane in the upper half of its word, the lower half left over.
inline uvec round16(vec v) {
    uvec u;
    std::memcpy(&u, &v, sizeof u);
    return u + 0x7fff + ((u >> 16) & 1);
}
inline void store_words(bf16* p, uvec rounded_words) {
    halves h = __builtin_convertvector(rounded_words >> 16, halves);
    std::memcpy(p, &h, sizeof h);
}

const ivec LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline vec absolute(vec v) {
    ivec bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits &= 0x7fffffff;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// One row of scores: scale, bias, P = 2^(s - max) in bf16 with zeros outside [from, to). Returns the new maximum.
inline float block_softmax(float* s, bf16* into, int64_t from, int64_t to, int64_t width, float scale, float slope, float base,
                           float largest, float& sum) {
    const int64_t begin = from / 16 * 16, end = std::max(begin, round_up(to, 16));
    const vec masked = splat(-std::numeric_limits<float>::max());
    vec top = splat(largest);
    for (int64_t j = begin; j < end; j += 16) {
        vec v = load16(s + j) * scale;
        if (slope != 0.0f) v -= absolute(splat(base - float(j)) - __builtin_convertvector(LANES, vec)) * slope;
        if (j < from || j + 16 > to) {
            ivec lane = LANES + int32_t(j);
            v = (lane >= int32_t(from)) & (lane < int32_t(to)) ? v : masked;
        }
        store16(s + j, v);
        top = max16(top, v);
    }
    const float highest = max_lanes(top);
    vec sums = splat(0.0f);
    if (begin > 0) std::memset(into, 0, begin * sizeof(bf16));
    for (int64_t j = begin; j < end; j += 16) {
        vec e = exp2_16(load16(s + j) - highest);
        sums += e;
        store_words(into + j, round16(e));
    }
    if (end < width) std::memset(into + end, 0, (width - end) * sizeof(bf16));
    sum = sum_lanes(sums);
    return highest;
}

}  // namespace
