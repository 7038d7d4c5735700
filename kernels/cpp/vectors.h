// Vectors of 16 floats in the compiler's portable vector extension: one AVX-512 register, or several of a narrower machine's.
#pragma once

#include <cstdint>
#include <cstring>

#include "numeric.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef _Float16 fp16_halves __attribute__((vector_size(32)));
typedef int8_t bytes __attribute__((vector_size(16)));

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

static inline vec load16(const int8_t* p) {
#ifdef __AVX512F__  // GCC 12 takes the lanes one by one
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    bytes b;
    std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, vec);
#endif
}

static inline void store16(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
static inline void store16(bf16* p, vec v) {
    uvec u;
    std::memcpy(&u, &v, sizeof u);
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    u = v == v ? u : uvec{} + 0x7fc0;
    halves h = __builtin_convertvector(u, halves);
    std::memcpy(p, &h, sizeof h);
}
static inline void store16(fp16* p, vec v) {
    fp16_halves h = __builtin_convertvector(v, fp16_halves);
    std::memcpy(p, &h, sizeof h);
}

// The first `count` lanes, at most 16; lanes beyond read as 0 and are not written.
template <class T>
static inline vec load_upto16(const T* p, int64_t count) {
    if (count >= 16) return load16(p);
    T row[16] = {};
    std::memcpy(row, p, count * sizeof(T));
    return load16(row);
}
template <class T>
static inline void store_upto16(T* p, vec v, int64_t count) {
    if (count >= 16) return store16(p, v);
    T row[16];
    store16(row, v);
    std::memcpy(p, row, count * sizeof(T));
}

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

// Two vectors merged in runs of H lanes: the first and the second runs of each pair of runs, of a and then of b.
template <int H>
static inline void merge_runs(vec a, vec b, vec& first, vec& second) {
#ifdef __clang__
    for (int lane = 0; lane < 16; lane++) {
        first[lane] = lane & H ? b[lane - H] : a[lane];
        second[lane] = lane & H ? b[lane] : a[lane + H];
    }
#else
    constexpr auto from = [](int lane, bool later) { return (lane & H ? 16 + lane - H : lane) + (later ? H : 0); };
#define LANES(l)                                                                                                             \
    ivec{from(0, l), from(1, l), from(2, l),  from(3, l),  from(4, l),  from(5, l),  from(6, l),  from(7, l),                \
         from(8, l), from(9, l), from(10, l), from(11, l), from(12, l), from(13, l), from(14, l), from(15, l)}
    first = __builtin_shuffle(a, b, LANES(false));
    second = __builtin_shuffle(a, b, LANES(true));
#undef LANES
#endif
}

template <int H>
static inline void transpose_stage(vec m[16]) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (!(i & H)) merge_runs<H>(m[i], m[i + H], m[i], m[i + H]);
}

// In place: lane j of vector i becomes lane i of vector j.
static inline void transpose16(vec m[16]) {
    transpose_stage<8>(m);
    transpose_stage<4>(m);
    transpose_stage<2>(m);
    transpose_stage<1>(m);
}

// Lane i of the result is the sum of the lanes of m[i], added in a fixed order.
static inline vec sums16(const vec m[16]) {
    vec a[8], b[4], c[2], x, y;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) merge_runs<8>(m[i], m[i + 8], x, y), a[i] = x + y;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) merge_runs<4>(a[i], a[i + 4], x, y), b[i] = x + y;
    for (int i = 0; i < 2; i++) merge_runs<2>(b[i], b[i + 2], x, y), c[i] = x + y;
    merge_runs<1>(c[0], c[1], x, y);
    return x + y;
}
