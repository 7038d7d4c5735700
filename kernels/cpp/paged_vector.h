// The vector engine of decodes: keys and values are read where they lie, for up to four rows at once.
#pragma once

#include "paged.h"

namespace {

constexpr int VECTOR_ROWS = 4;  // rows that a kernel keeps in registers

// scores[r][position] for up to a tile of keys that are read where they lie. The last 16 may repeat a key; they are masked.
template <class C, int R>
void score_pages(const C* const* k_rows, const C* const* later, int count, const float* q, float* scores, int64_t dims) {
    for (int start = 0; start < count; start += 16) {
        vec part[R][16];
        for (int i = 0; i < 16; i++) {
            const C* k = k_rows[std::min(start + i, count - 1)];
            fetch_row(later[start + i], dims);
            vec sum[R];
            vec x = load16(k);
            for (int r = 0; r < R; r++) sum[r] = load16(q + r * dims) * x;
            for (int64_t d = 16; d < dims; d += 16) {
                x = load16(k + d);
                for (int r = 0; r < R; r++) sum[r] += load16(q + r * dims + d) * x;
            }
            for (int r = 0; r < R; r++) part[r][i] = sum[r];
        }
        for (int r = 0; r < R; r++) store16(scores + r * TILE + start, sums16(part[r]));
    }
    for (int start = (count + 15) / 16 * 16; start < TILE; start += 16)
        for (int r = 0; r < R; r++) store16(scores + r * TILE + start, splat(0.0f));
}

#ifdef __AVX512BF16__
// The queries' scale is applied afterwards: products of bf16 numbers are exact in fp32, and the queries must stay bf16.
template <int R>
void score_pages_bf16(const bf16* const* k_rows, const bf16* const* later, int count, const bf16* const* q, float scale,
                      float* scores, int64_t dims) {
    for (int start = 0; start < count; start += 16) {
        vec part[R][16];
        for (int i = 0; i < 16; i++) {
            const bf16* k = k_rows[std::min(start + i, count - 1)];
            fetch_row(later[start + i], dims);
            __m512 sum[R];
            for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_ps();
            for (int64_t d = 0; d < dims; d += 32) {
                const __m512bh x = (__m512bh)_mm512_loadu_si512(k + d);
                for (int r = 0; r < R; r++) sum[r] = _mm512_dpbf16_ps(sum[r], x, (__m512bh)_mm512_loadu_si512(q[r] + d));
            }
            for (int r = 0; r < R; r++) part[r][i] = (vec)sum[r];
        }
        for (int r = 0; r < R; r++) store16(scores + r * TILE + start, sums16(part[r]) * scale);
    }
    for (int start = (count + 15) / 16 * 16; start < TILE; start += 16)
        for (int r = 0; r < R; r++) store16(scores + r * TILE + start, splat(0.0f));
}
#endif

template <class C, int R, int W>
void mix_pages_columns(const C* const* v_rows, const C* const* later, int count, const float* weights, float* out,
                       const float* decay, int64_t at, int64_t dims) {
    vec sum[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) sum[r][w] = load16(out + r * dims + at + 16 * w) * decay[r];
    for (int j = 0; j < count; j++) {
        const C* v = v_rows[j] + at;
        fetch_row(later[j] + at, 16 * W);
        vec x[W];
        for (int w = 0; w < W; w++) x[w] = load16(v + 16 * w);
        for (int r = 0; r < R; r++) {
            vec p = splat(weights[r * TILE + j]);
            for (int w = 0; w < W; w++) sum[r][w] += p * x[w];
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) store16(out + r * dims + at + 16 * w, sum[r][w]);
}

// T: queries, C: pages. Needs dim % 16 == 0.
template <class T, class C>
struct VectorEngine {
    static constexpr float LOG_UNIT = 1.0f;  // peaks are natural logarithms
    const Call& c;
    int64_t kv_head, count;
    const Row* rows;
    float *q, *out, *total, *peak, *scores;

    VectorEngine(const Call& call, int64_t head, const Row* first, int64_t number, Pieces& pieces)
        : c(call), kv_head(head), count(number), rows(first) {
        q = pieces.take<float>(count * c.dim);
        out = pieces.take<float>(count * c.dim);
        total = pieces.take<float>(count);
        peak = pieces.take<float>(count);
        scores = pieces.take<float>(VECTOR_ROWS * TILE);
    }

    const T* query(int64_t r) const {
        return static_cast<const T*>(c.q) + rows[r].token * c.q_stride + rows[r].head * c.q_head_stride;
    }

    void load_queries() {
        const float scale = c.key_scale(kv_head);
        for (int64_t r = 0; r < count; r++)
            for (int64_t d = 0; d < c.dim; d += 16) store16(q + r * c.dim + d, load16(query(r) + d) * scale);
    }

    void start(int64_t r) {
        std::fill(out + r * c.dim, out + (r + 1) * c.dim, 0.0f);
        total[r] = 0.0f;
        peak[r] = NEVER;
    }
    void resume(int64_t r, const float* state) {
        std::memcpy(out + r * c.dim, state, c.dim * sizeof(float));
        total[r] = state[c.dim];
        peak[r] = state[c.dim + 16];
    }
    void leave(int64_t r, float* state) const {
        std::memcpy(state, out + r * c.dim, c.dim * sizeof(float));
        std::fill(state + c.dim, state + c.dim + 16, 0.0f);
        state[c.dim] = total[r];
        state[c.dim + 16] = peak[r];
    }

    // Keys first ... first + number at `places`; `later` are 64 places that will be needed next.
    void tile(int64_t first, int number, const int64_t* places, const int64_t* later) {
        const C *keys = static_cast<const C*>(c.k_cache) + kv_head * c.head_stride;
        const C *values = static_cast<const C*>(c.v_cache) + kv_head * c.head_stride;
        const C *k_rows[TILE], *v_rows[TILE], *later_k[TILE], *later_v[TILE];
        for (int j = 0; j < number; j++) k_rows[j] = keys + places[j], v_rows[j] = values + places[j];
        for (int j = 0; j < TILE; j++) later_k[j] = keys + later[j], later_v[j] = values + later[j];
        for (int64_t r = 0; r < count; r += VECTOR_ROWS) {
            switch (std::min<int64_t>(VECTOR_ROWS, count - r)) {
                case 1: some_rows<1>(r, first, number, k_rows, v_rows, later_k, later_v); break;
                case 2: some_rows<2>(r, first, number, k_rows, v_rows, later_k, later_v); break;
                case 3: some_rows<3>(r, first, number, k_rows, v_rows, later_k, later_v); break;
                default: some_rows<4>(r, first, number, k_rows, v_rows, later_k, later_v); break;
            }
        }
    }

    template <int R>
    void some_rows(int64_t at, int64_t first, int number, const C* const* k_rows, const C* const* v_rows, const C* const* later_k,
                   const C* const* later_v) {
        const int64_t dims = c.dim;
        bool scored = false;
#ifdef __AVX512BF16__
        if constexpr (std::is_same_v<T, bf16> && std::is_same_v<C, bf16>) {
            if (dims % 32 == 0) {
                const bf16* raw[R];
                for (int r = 0; r < R; r++) raw[r] = query(at + r);
                score_pages_bf16<R>(k_rows, later_k, number, raw, c.key_scale(kv_head), scores, dims);
                scored = true;
            }
        }
#endif
        if (!scored) score_pages<C, R>(k_rows, later_k, number, q + at * dims, scores, dims);
        float decay[R];
        for (int r = 0; r < R; r++) {
            const Row& row = rows[at + r];
            const int64_t low = std::max(first, row.low), high = std::min(row.position + 1, first + number);
            if (low < high) {
                decay[r] = weigh(scores + r * TILE, first, low, high, row.slope, row.position, peak[at + r], total[at + r]);
            } else {
                std::fill(scores + r * TILE, scores + (r + 1) * TILE, 0.0f);
                decay[r] = 1.0f;
            }
        }
        int64_t d = 0;
        float* sums = out + at * dims;
        for (; d + 64 <= dims; d += 64) mix_pages_columns<C, R, 4>(v_rows, later_v, number, scores, sums, decay, d, dims);
        for (; d < dims; d += 16) mix_pages_columns<C, R, 1>(v_rows, later_v, number, scores, sums, decay, d, dims);
    }
};

}  // namespace
