// What the packed linear layers share: weights in panels of 32 outputs, scratch memory, and how a row of sums is written.
//
// For SwiGLU the two tiles of a panel are 16 gates and the 16 matching ups, so that the product of both is written and nothing
// else.
#pragma once

#include <cstdlib>

#include "vectors.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifdef __linux__
#include <sys/mman.h>
#endif

constexpr int64_t PANEL = 32;

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Output that column j of a panel belongs to; -1 beyond the end.
static inline int64_t output_of(int64_t panel, int64_t j, int64_t num_out, bool gated) {
    if (!gated) return panel * PANEL + j < num_out ? panel * PANEL + j : -1;
    int64_t half = num_out / 2, unit = panel * 16 + j % 16;
    return unit < half ? unit + (j < 16 ? 0 : half) : -1;
}

static inline int64_t num_panels(int64_t num_out, bool gated) {
    return gated ? round_up(num_out / 2, 16) / 16 : round_up(num_out, PANEL) / PANEL;
}

// Memory of its own for a model's packed weights: on huge pages, a weight is read with few address translations.
static inline void* allocate_weights(int64_t bytes) {
    void* memory = std::aligned_alloc(1 << 21, round_up(bytes, 1 << 21));
#ifdef __linux__
    if (memory) madvise(memory, round_up(bytes, 1 << 21), MADV_HUGEPAGE);
#endif
    return memory;
}

// Memory that a thread keeps from call to call.
struct Scratch {
    void* memory = nullptr;
    int64_t size = 0;
    ~Scratch() { std::free(memory); }
    char* get(int64_t bytes) {
        bytes = round_up(bytes, 64);
        if (bytes > size) {
            std::free(memory);
            memory = std::aligned_alloc(64, bytes);
            size = bytes;
        }
        return static_cast<char*>(memory);
    }
};

// x / d for d >= 1: by the reciprocal's first 14 bits and one Newton step, which leaves far more than bf16 keeps.
static inline vec quotient(vec x, vec d) {
#ifdef __AVX512F__
    const vec guess = (vec)_mm512_rcp14_ps((__m512)d);
    return x * (guess * (2.0f - d * guess));
#else
    return x / d;
#endif
}

// Both halves of a panel's row, rounded to nearest even (subnormal sums become zero where the CPU rounds by itself).
static inline void round32(bf16* to, vec low, vec high) {
#ifdef __AVX512BF16__
    __m512bh rounded_sums = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    std::memcpy(to, &rounded_sums, 64);
#else
    store16(to, low), store16(to + 16, high);
#endif
}

// Columns `first` .. `first + width` of one row of the result: `low` and `high` are the sums of a panel's two halves.
static inline void write_panel_row(bf16* to, vec low, vec high, int64_t width, bool gated) {
    if (gated) {
        alignas(64) bf16 sums[32];
        round32(sums, low, high);
        low = load16(sums), high = load16(sums + 16);
        const vec gate = quotient(low, 1.0f + exp16(max16(low, splat(-87.0f)) * -1.0f)) * high;
#ifdef __AVX512BF16__
        if (width == 16) {
            __m256bh halves_of = _mm512_cvtneps_pbh((__m512)gate);
            std::memcpy(to, &halves_of, 32);
            return;
        }
#endif
        store_upto16(to, gate, width);
    } else if (width == PANEL) {
        round32(to, low, high);
    } else {
        store_upto16(to, low, width);
        if (width > 16) store_upto16(to + 16, high, width - 16);
    }
}
