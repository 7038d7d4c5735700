// Sequences with more than one query against the pages: prompt chunks.
//
// A row's sums are taken in an order that depends on its own position alone, so its bits do not depend on the chunk it came
// in or on the batch. bf16 queries run on matrix tiles where the CPU has them, and there the softmax weights are rounded to
// bf16.
#pragma once

#include "paged_decode.h"

namespace {

constexpr int ROWS = 6;             // query rows that a kernel keeps in registers
constexpr int BLOCK_ROWS = 96;      // query rows (queries x heads of the group) of one item
constexpr int TILED_ROWS = 192;     // the same on matrix tiles
constexpr int64_t KEY_CHUNK = 256;  // keys of one product on matrix tiles
#if defined(HAVE_AMX) || defined(__AVX512BF16__)
constexpr bool HAVE_TILES = true;
#else
constexpr bool HAVE_TILES = false;
#endif

// The tile's keys as keys[d][position] and its values as values[position][d], zeros where the context has ended.
template <class C>
void load_tile(const Call& c, const int64_t* rows, int64_t kv_head, int count, float* keys, float* values) {
    const int64_t dims = padded(c.dim), groups = dims / 16;
    vec block[16];
    const C* k_rows[16];
    for (int start = 0; start < TILE; start += 16) {
        if (start >= count) {
            for (int64_t d = 0; d < dims; d++) store16(keys + d * TILE + start, splat(0.0f));
            continue;
        }
        for (int i = 0; i < 16; i++) {
            const int64_t offset = rows[std::min(start + i, count - 1)] + kv_head * c.head_stride;  // repeats are masked
            k_rows[i] = static_cast<const C*>(c.k_cache) + offset;
            if (start + i < count) {
                const C* v_row = static_cast<const C*>(c.v_cache) + offset;
                float* to = values + (start + i) * dims;
                for (int64_t g = 0; g < c.dim / 16; g++) store16(to + 16 * g, load16(v_row + 16 * g));
                for (int64_t d = c.dim / 16 * 16; d < dims; d++) to[d] = d < c.dim ? load(v_row + d) : 0.0f;
            }
        }
        for (int64_t g = 0; g < groups; g++) {
            for (int i = 0; i < 16; i++) block[i] = load_upto16(k_rows[i] + 16 * g, c.dim - 16 * g);
            transpose16(block);
            for (int i = 0; i < 16; i++) store16(keys + (16 * g + i) * TILE + start, block[i]);
        }
    }
}

// scores[r][position] = q[r] . keys[:, position]
template <int R>
void score_rows(const float* q, const float* keys, float* scores, int64_t dims) {
    vec sum[R][VECS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECS; v++) sum[r][v] = splat(0.0f);
    for (int64_t d = 0; d < dims; d++) {
        vec k[VECS];
        for (int v = 0; v < VECS; v++) k[v] = load16(keys + d * TILE + 16 * v);
        for (int r = 0; r < R; r++) {
            vec x = splat(q[r * dims + d]);
            for (int v = 0; v < VECS; v++) sum[r][v] += x * k[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < VECS; v++) store16(scores + r * TILE + 16 * v, sum[r][v]);
}

// out[r] = out[r] * decay[r] + sum over positions of weights[r][position] * values[position], W vectors wide
template <int R, int W>
void mix_columns(const float* weights, const float* values, float* out, const float* decay, int count, int64_t dims) {
    vec sum[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) sum[r][w] = load16(out + r * dims + 16 * w) * decay[r];
    for (int j = 0; j < count; j++) {
        vec v[W];
        for (int w = 0; w < W; w++) v[w] = load16(values + j * dims + 16 * w);
        for (int r = 0; r < R; r++) {
            vec x = splat(weights[r * TILE + j]);
            for (int w = 0; w < W; w++) sum[r][w] += x * v[w];
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) store16(out + r * dims + 16 * w, sum[r][w]);
}

template <int R>
void mix_rows(const float* weights, const float* values, float* out, const float* decay, int count, int64_t dims) {
    int64_t d = 0;
    for (; d + 64 <= dims; d += 64) mix_columns<R, 4>(weights, values + d, out + d, decay, count, dims);
    for (; d < dims; d += 16) mix_columns<R, 1>(weights, values + d, out + d, decay, count, dims);
}

template <template <int> class F, class... A>
inline void by_rows(int rows, A... arguments) {
    switch (rows) {
        case 1: F<1>::run(arguments...); break;
        case 2: F<2>::run(arguments...); break;
        case 3: F<3>::run(arguments...); break;
        case 4: F<4>::run(arguments...); break;
        case 5: F<5>::run(arguments...); break;
        default: F<6>::run(arguments...); break;
    }
}
template <int R>
struct Score {
    static void run(const float* q, const float* keys, float* scores, int64_t dims) { score_rows<R>(q, keys, scores, dims); }
};
template <int R>
struct Mix {
    static void run(const float* weights, const float* values, float* out, const float* decay, int count, int64_t dims) {
        mix_rows<R>(weights, values, out, decay, count, dims);
    }
};

// A chunk's keys as words [dims / 2][KEY_CHUNK] and its values as words [width / 2][dims], zeros beyond `count` tokens.
template <class C>
void pack_chunk(const Call& c, const int64_t* rows, int64_t kv_head, int64_t count, int64_t width, int64_t dims, uint32_t* keys,
                uint32_t* values) {
    const C* k_cache = static_cast<const C*>(c.k_cache) + kv_head * c.head_stride;
    const C* v_cache = static_cast<const C*>(c.v_cache) + kv_head * c.head_stride;
    for (int64_t j = 0; j < width; j += 16)
        for (int64_t d = 0; d < dims; d += 32) {
            vec block[16];
            for (int64_t i = 0; i < 16; i++)
                block[i] = j + i < count && d < c.dim ? load_words(k_cache + rows[j + i] + d, c.dim - d) : splat(0.0f);
            transpose16(block);
            for (int64_t i = 0; i < 16; i++) std::memcpy(keys + (d / 2 + i) * KEY_CHUNK + j, &block[i], sizeof block[i]);
        }
    for (int64_t j = 0; j < width; j += 2)
        for (int64_t d = 0; d < dims; d += 16) {
            uvec words = {};
            if (j < count) words = pair_words(v_cache + rows[j] + d, j + 1 < count ? v_cache + rows[j + 1] + d : nullptr, c.dim - d);
            std::memcpy(values + j / 2 * dims + d, &words, sizeof words);
        }
}

// A block of queries in bf16 on matrix tiles, for one key/value head. C: pages. Needs a TileScope.
template <class C>
void run_tiled(const Call& c, const Item& item) {
    const int64_t dims = round_up(c.dim, 32), group = c.heads / c.kv_heads;
    const int32_t first_token = c.query_starts[item.sequence], context = c.context_lens[item.sequence];
    const int32_t num_queries = c.query_starts[item.sequence + 1] - first_token;
    const int32_t* pages = c.page_table + item.sequence * c.table_stride;
    const int64_t queries = item.query_end - item.query, rows = queries * group, padded_rows = round_up(rows, 32);

    const size_t floats = size_t(padded_rows) * (KEY_CHUNK + KEY_CHUNK / 2 + dims + dims / 2 + 2) + KEY_CHUNK * dims + 64;
    float* scores = reinterpret_cast<float*>(scratch.get(floats * sizeof(float)));
    float* sums = scores + padded_rows * KEY_CHUNK;
    bf16* weights = reinterpret_cast<bf16*>(sums + padded_rows * dims);
    bf16* q = weights + padded_rows * KEY_CHUNK;
    uint32_t* keys = reinterpret_cast<uint32_t*>(q + padded_rows * dims);
    uint32_t* values = keys + KEY_CHUNK * dims / 2;
    float* largest = reinterpret_cast<float*>(values + KEY_CHUNK * dims / 2);
    float* total = largest + padded_rows;

    const float scale = c.key_scale(item.kv_head) * LOG2_E;
#ifdef HAVE_AMX
    if (amx_permitted()) configure_rows(MATRIX_ROWS);
#endif
    std::memset(q, 0, padded_rows * dims * sizeof(bf16));
    for (int64_t row = 0; row < rows; row++) {
        const int64_t token = first_token + item.query + row / group, head = item.kv_head * group + row % group;
        const bf16* from = static_cast<const bf16*>(c.q) + token * c.q_stride + head * c.q_head_stride;
        std::memcpy(q + row * dims, from, c.dim * sizeof(bf16));
    }
    std::fill(sums, sums + padded_rows * dims, 0.0f);
    std::fill(largest, largest + padded_rows, NEVER);
    std::fill(total, total + padded_rows, 0.0f);

    int64_t token_rows[KEY_CHUNK];
    const int64_t position_0 = context - num_queries + item.query, end = position_0 + queries;
    const int64_t low_0 = c.window ? std::max<int64_t>(0, position_0 - c.window + 1) : 0;
    for (int64_t first = low_0 / KEY_CHUNK * KEY_CHUNK; first < end; first += KEY_CHUNK) {
        const int64_t count = std::min(KEY_CHUNK, end - first), width = round_up(count, 32);
        find_rows(c, pages, first, int(count), token_rows);
        pack_chunk<C>(c, token_rows, item.kv_head, count, width, dims, keys, values);
        // Queries before this chunk see nothing of it.
        const int64_t start = std::max<int64_t>(0, first - position_0) * group / 32 * 32;
        gemm_bf16(padded_rows - start, width, dims, q + start * dims, dims, keys, KEY_CHUNK, scores + start * KEY_CHUNK, KEY_CHUNK,
                  false);
        for (int64_t row = start; row < padded_rows; row++) {
            const int64_t position = position_0 + row / group;
            const int64_t low = c.window ? std::max<int64_t>(0, position - c.window + 1 - first) : 0;
            const int64_t high = std::min(position + 1 - first, count);
            if (row >= rows || low >= high) {
                std::memset(weights + row * KEY_CHUNK, 0, width * sizeof(bf16));
                continue;
            }
            const float slope = c.slopes ? c.slopes[item.kv_head * group + row % group] * LOG2_E : 0.0f;
            float sum = 0.0f;
            const float top = block_softmax(scores + row * KEY_CHUNK, weights + row * KEY_CHUNK, low, high, width, scale,
                                            slope, float(position - first), largest[row], sum);
            if (total[row] > 0.0f) {
                const float decay = std::exp2(largest[row] - top);
                total[row] *= decay;
                for (int64_t d = 0; d < dims; d += 16) store16(sums + row * dims + d, load16(sums + row * dims + d) * decay);
            }
            total[row] += sum;
            largest[row] = top;
        }
        gemm_bf16(padded_rows - start, dims, width, weights + start * KEY_CHUNK, KEY_CHUNK, values, dims, sums + start * dims, dims,
                  true);
    }
    for (int64_t row = 0; row < rows; row++) {
        const int64_t token = first_token + item.query + row / group, head = item.kv_head * group + row % group;
        bf16* to = static_cast<bf16*>(c.out) + (token * c.heads + head) * c.dim;
        const float inverse = c.value_scale(item.kv_head) / total[row];
        for (int64_t d = 0; d < c.dim; d += 16) store_upto16(to + d, load16(sums + row * dims + d) * inverse, c.dim - d);
    }
}

// Any types: T of queries, C of pages.
template <class T, class C>
void run_plain(const Call& c, const Item& item) {
    const int64_t dims = padded(c.dim), group = c.heads / c.kv_heads;
    const int32_t first_token = c.query_starts[item.sequence];
    const int32_t context = c.context_lens[item.sequence];
    const int32_t num_queries = c.query_starts[item.sequence + 1] - first_token;
    const int32_t* pages = c.page_table + item.sequence * c.table_stride;
    const int queries = item.query_end - item.query, rows = queries * int(group);
    const int kv_heads = item.kv_head_end - item.kv_head;

    const size_t floats = size_t(kv_heads) * rows * (2 * dims + 2) + 2 * TILE * dims + ROWS * (TILE + 1) + 256;
    float* memory = reinterpret_cast<float*>(scratch.get(floats * sizeof(float)));
    float* keys = memory;
    float* values = keys + TILE * dims;
    float* scores = values + TILE * dims;
    float* decay = scores + ROWS * TILE;
    float* q = decay + 16;
    float* out = q + size_t(kv_heads) * rows * dims;
    float* peak = out + size_t(kv_heads) * rows * dims;
    float* total = peak + kv_heads * rows;

    // Rows in order of queries, then heads: row = query * group + head.
    for (int h = 0; h < kv_heads; h++)
        for (int row = 0; row < rows; row++) {
            const int64_t token = first_token + item.query + row / group, head = (item.kv_head + h) * group + row % group;
            const T* from = static_cast<const T*>(c.q) + token * c.q_stride + head * c.q_head_stride;
            float* to = q + (h * rows + row) * dims;
            const float scale = c.key_scale(item.kv_head + h);
            for (int64_t d = 0; d < dims; d++) to[d] = d < c.dim ? load(from + d) * scale : 0.0f;
        }
    std::fill(out, out + size_t(kv_heads) * rows * dims, 0.0f);
    std::fill(peak, peak + kv_heads * rows, NEVER);
    std::fill(total, total + kv_heads * rows, 0.0f);

    const int64_t position_0 = context - num_queries + item.query;  // of the item's first query
    const int64_t end = position_0 + queries;
    int64_t token_rows[TILE];
    const int64_t low_0 = c.window ? std::max<int64_t>(0, position_0 - c.window + 1) : 0;
    for (int64_t first = low_0 / TILE * TILE; first < end; first += TILE) {
        const int count = int(std::min<int64_t>(TILE, end - first));
        find_rows(c, pages, first, count, token_rows);
        for (int h = 0; h < kv_heads; h++) {
            load_tile<C>(c, token_rows, item.kv_head + h, count, keys, values);
            // Queries before this tile see nothing of it.
            int row = int(std::max<int64_t>(0, first - position_0) * group);
            for (; row < rows; row += ROWS) {
                const int n = std::min(ROWS, rows - row), at = h * rows + row;
                by_rows<Score>(n, (const float*)(q + at * dims), (const float*)keys, scores, dims);
                for (int r = 0; r < n; r++) {
                    const int64_t position = position_0 + (row + r) / group;
                    const int64_t low = c.window ? std::max<int64_t>(first, position - c.window + 1) : first;
                    const int64_t high = std::min<int64_t>(position + 1, first + count);
                    if (low >= high) {  // nothing visible
                        std::fill(scores + r * TILE, scores + (r + 1) * TILE, 0.0f);
                        decay[r] = 1.0f;
                        continue;
                    }
                    const float slope = c.slopes ? c.slopes[(item.kv_head + h) * group + (row + r) % group] : 0.0f;
                    decay[r] = weigh(scores + r * TILE, first, low, high, slope, position, peak[at + r], total[at + r]);
                }
                by_rows<Mix>(n, (const float*)scores, (const float*)values, out + at * dims, (const float*)decay, count, dims);
            }
        }
    }
    for (int h = 0; h < kv_heads; h++)
        for (int row = 0; row < rows; row++) {
            const int64_t token = first_token + item.query + row / group, head = (item.kv_head + h) * group + row % group;
            T* to = static_cast<T*>(c.out) + (token * c.heads + head) * c.dim;
            const float* from = out + (h * rows + row) * dims;
            const float inverse = c.value_scale(item.kv_head + h) / total[h * rows + row];
            for (int64_t d = 0; d < c.dim; d++) store(to + d, from[d] * inverse);
        }
}

}  // namespace
