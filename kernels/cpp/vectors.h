// Vectors of 16 floats in the compiler's portable vector extension: one AVX-512 register, or several of a narrower machine's.
#pragma once

#include <cstdint>
#include <cstring>

#include "numeric.h"

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef _Float16 fp16_halves __attribute__((vector_size(32)));

static inline vec splat(float f) { return vec{f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f}; }

static inline vec load16(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline vec load16(const bf16* p) {
    halves h;
    std::memcpy(&h, p, sizeof h);
    uvec wide = __builtin_convertvector(h, uvec) << 16;
    vec v;
    std::memcpy(&v, &wide, sizeof v);
    return v;
}
static inline vec load16(const fp16* p) {
    fp16_halves h;
    std::memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, vec);
}

static inline void store16(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

static inline vec max16(vec a, vec b) { return a > b ? a : b; }

static inline float sum_lanes(vec v) {
    float s[16];
    store16(s, v);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) s[i] += s[i + width];
    return s[0];
}
static inline float max_lanes(vec v) {
    float s[16];
    store16(s, v);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) s[i] = s[i] > s[i + width] ? s[i] : s[i + width];
    return s[0];
}

// e^x per lane, exactly 0 below -87; the same polynomial as fast_exp.
static inline vec exp16(vec x) {
    vec low = splat(-87.0f);
    ivec tiny = x < low;
    x = tiny ? low : x;
    const vec magic = splat(12582912.0f);
    vec shifted = x * 1.44269504088896341f + magic;
    vec n = shifted - magic;
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + (127 << 23);  // the low bits of shifted hold n
    vec power;
    std::memcpy(&power, &bits, sizeof power);
    return tiny ? splat(0.0f) : p * power;
}

// In place: lane j of vector i becomes lane i of vector j.
static inline void transpose16(vec m[16]) {
#ifdef __clang__
    vec turned[16];
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) turned[i][j] = m[j][i];
    std::memcpy(m, turned, sizeof turned);
#else
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < 16; i++) {
            if (i & half) continue;
            ivec keep, other;
            for (int lane = 0; lane < 16; lane++) {
                keep[lane] = lane & half ? lane - half + 16 : lane;
                other[lane] = lane & half ? lane + 16 : lane + half;
            }
            vec a = m[i], b = m[i + half];
            m[i] = __builtin_shuffle(a, b, keep);
            m[i + half] = __builtin_shuffle(a, b, other);
        }
#endif
}
