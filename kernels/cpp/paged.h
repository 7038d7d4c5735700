// What all parts of paged attention share: the call's arguments, a thread's memory, and where tokens lie in the pages.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <type_traits>

#include "gemm_bf16.h"
#include "softmax_bf16.h"
#include "vectors.h"

namespace {

constexpr int TILE = 64;  // keys of one step of an online softmax, counted from position 0
constexpr int VECS = TILE / 16;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

struct Call {
    const void *q, *k_cache, *v_cache;
    void* out;
    const int32_t *page_table, *context_lens, *query_starts;
    const float *slopes, *k_scales, *v_scales;
    const int32_t *prefix_groups, *prefix_lens;  // of the first `decodes` sequences; null: nothing is shared
    int64_t q_stride, q_head_stride, page_stride, token_stride, head_stride, table_stride, table_pages;
    int64_t tokens, sequences, decodes, groups, heads, kv_heads, dim, page_size, window;  // window 0: none
    float scale;

    int64_t group() const { return heads / kv_heads; }
    const int32_t* pages(int64_t sequence) const { return page_table + sequence * table_stride; }
    // The first key that a query at this position sees.
    int64_t lowest(int64_t position) const { return window ? std::max<int64_t>(0, position - window + 1) : 0; }
    float key_scale(int64_t kv_head) const { return k_scales ? scale * k_scales[kv_head] : scale; }
    float value_scale(int64_t kv_head) const { return v_scales ? v_scales[kv_head] : 1.0f; }
};

// Memory of one thread, kept between calls.
struct Scratch {
    char* data = nullptr;
    size_t size = 0;
    char* get(size_t bytes) {
        if (bytes > size) {
            std::free(data);
            size = (bytes + 16383) / 16384 * 16384;
            data = static_cast<char*>(std::aligned_alloc(64, size));
        }
        return data;
    }
    ~Scratch() { std::free(data); }
};
thread_local Scratch scratch;

// Hands out aligned pieces of a thread's memory.
struct Pieces {
    char* at = nullptr;  // null: only counts
    size_t used = 0;
    template <class T>
    T* take(size_t count) {
        T* piece = at ? reinterpret_cast<T*>(at + used) : nullptr;
        used += (count * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
};

inline int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

// Where the tokens of a tile lie in the caches: elements from their start, for head 0.
inline void find_rows(const Call& c, const int32_t* pages, int64_t first, int64_t count, int64_t* rows) {
    int64_t page = first / c.page_size, slot = first % c.page_size;
    for (int64_t j = 0; j < count;) {
        const int64_t start = pages[page] * c.page_stride;
        for (; j < count && slot < c.page_size; slot++) rows[j++] = start + slot * c.token_stride;
        slot = 0;
        page++;
    }
}

// Asks for a row that will be needed soon.
template <class T>
inline void fetch_row(const T* row, int64_t count) {
    for (int64_t d = 0; d < count; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}

// Up to 32 bf16 numbers as 16 words as they lie in memory; what is beyond `left` elements is zero. 8-bit integers become
// bf16 numbers, which hold them exactly.
inline vec load_words(const bf16* from, int64_t left) {
    vec v;
    if (left >= 32) {
        std::memcpy(&v, from, sizeof v);
    } else {
        bf16 some[32] = {};
        std::memcpy(some, from, left * sizeof(bf16));
        std::memcpy(&v, some, sizeof v);
    }
    return v;
}
inline vec load_words(const int8_t* from, int64_t left) {
    int8_t some[32] = {};
    if (left < 32) from = static_cast<const int8_t*>(std::memcpy(some, from, left));
    vec v = load16(from), w = load16(from + 16);
#ifdef __AVX512BF16__
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)w, (__m512)v);
    std::memcpy(&v, &both, sizeof v);
#else
    uvec low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, &w, sizeof high);
    const halves h[2] = {__builtin_convertvector(low >> 16, halves), __builtin_convertvector(high >> 16, halves)};
    std::memcpy(&v, h, sizeof v);
#endif
    return v;
}

// Words of the numbers of two rows, the first row's in the low halves, as bf16; up to 16, zeros beyond `left`.
inline uvec pair_words(const bf16* low, const bf16* high, int64_t left) {
    halves a = {}, b = {};
    if (left >= 16) {  // a copy of unknown size is a call
        std::memcpy(&a, low, sizeof a);
        if (high) std::memcpy(&b, high, sizeof b);
    } else if (left > 0) {
        std::memcpy(&a, low, left * sizeof(bf16));
        if (high) std::memcpy(&b, high, left * sizeof(bf16));
    }
    return __builtin_convertvector(a, uvec) | __builtin_convertvector(b, uvec) << 16;
}
inline uvec pair_words(const int8_t* low, const int8_t* high, int64_t left) {
    vec a = left > 0 ? load_upto16(low, left) : splat(0.0f), b = high && left > 0 ? load_upto16(high, left) : splat(0.0f);
    uvec x, y;
    std::memcpy(&x, &a, sizeof x);
    std::memcpy(&y, &b, sizeof y);
    return x >> 16 | (y & 0xffff0000u);
}

// One query and head. low: the first key in sight.
struct Row {
    int64_t token, head, position, low;
    float slope;
};

// Scores of one row become softmax weights relative to the running maximum; returns by how much older sums shrink.
inline float weigh(float* scores, int64_t first, int64_t low, int64_t high, float slope, int64_t position, float& peak,
                   float& total) {
    const ivec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vec s[VECS], best = splat(NEVER);
    const bool masked = low > first || high < first + TILE;
    for (int v = 0; v < VECS; v++) {
        s[v] = load16(scores + 16 * v);
        ivec at = lanes + int32_t(16 * v);
        if (slope != 0.0f) s[v] -= slope * __builtin_convertvector(int32_t(position - first) - at, vec);
        if (masked) s[v] = (at >= int32_t(low - first)) & (at < int32_t(high - first)) ? s[v] : splat(NEVER);
        best = max16(best, s[v]);
    }
    float top = std::max(peak, max_lanes(best));
    float decay = peak == NEVER ? 0.0f : std::exp(peak - top);
    vec sum = splat(0.0f);
    for (int v = 0; v < VECS; v++) {
        vec p = exp16(s[v] - top);
        sum += p;
        store16(scores + 16 * v, p);
    }
    total = total * decay + sum_lanes(sum);
    peak = top;
    return decay;
}

}  // namespace
