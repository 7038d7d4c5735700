// The matrix engine of decodes (AMX): bf16 queries, pages in bf16 or 8-bit integers.
//
// Scores are taken transposed, keys times queries: then a page's rows are the left operand as they lie, and only the queries,
// once, are brought into the order of a right operand. Weights are rounded to bf16 for the second product, whose right
// operand, the values, is interleaved by pairs of keys tile by tile.
#pragma once

#include "paged.h"

#ifdef HAVE_AMX

namespace {

constexpr int MATRIX_ROWS = 16;  // rows of one tile register

// Tile registers of the engine: 0 and 1 scores, 2 keys, 3 queries; 4 and 5 sums, 6 weights, 7 values. The second product
// has only as many rows as there are queries. Undone by TileScope, and by the configuration that chunks ask for.
inline void configure_rows(int64_t rows) {
    TileConfig config;
    for (int i = 0; i < 8; i++) {
        config.column_bytes[i] = 64;
        config.rows[i] = i >= 4 && i < 7 ? uint8_t(std::min<int64_t>(rows, MATRIX_ROWS)) : 16;
    }
    _tile_loadconfig(&config);
}

// scores[key][16 rows] of 16 keys as [row][TILE], for up to four rows.
inline void turn_few(const float* by_key, float* by_row) {
    __m512 part[4];
    for (int i = 0; i < 4; i++) {
        part[i] = _mm512_castps128_ps512(_mm_load_ps(by_key + i * MATRIX_ROWS));
        part[i] = _mm512_insertf32x4(part[i], _mm_load_ps(by_key + (4 + i) * MATRIX_ROWS), 1);
        part[i] = _mm512_insertf32x4(part[i], _mm_load_ps(by_key + (8 + i) * MATRIX_ROWS), 2);
        part[i] = _mm512_insertf32x4(part[i], _mm_load_ps(by_key + (12 + i) * MATRIX_ROWS), 3);
    }
    const __m512d a = (__m512d)_mm512_unpacklo_ps(part[0], part[1]), b = (__m512d)_mm512_unpackhi_ps(part[0], part[1]);
    const __m512d x = (__m512d)_mm512_unpacklo_ps(part[2], part[3]), y = (__m512d)_mm512_unpackhi_ps(part[2], part[3]);
    _mm512_store_ps(by_row, (__m512)_mm512_unpacklo_pd(a, x));
    _mm512_store_ps(by_row + TILE, (__m512)_mm512_unpackhi_pd(a, x));
    _mm512_store_ps(by_row + 2 * TILE, (__m512)_mm512_unpacklo_pd(b, y));
    _mm512_store_ps(by_row + 3 * TILE, (__m512)_mm512_unpackhi_pd(b, y));
}

inline void turn_many(const float* by_key, float* by_row) {
    vec block[16];
    for (int i = 0; i < 16; i++) block[i] = load16(by_key + i * MATRIX_ROWS);
    transpose16(block);
    for (int i = 0; i < 16; i++) store16(by_row + i * TILE, block[i]);
}

// C: pages. Needs a TileScope alive in the calling thread.
template <class C>
struct MatrixEngine {
    static constexpr float LOG_UNIT = LOG_2;  // peaks are binary logarithms
    const Call& c;
    int64_t kv_head, count, blocks, dims;  // dims: a multiple of 32
    const Row* rows;
    uint32_t *q, *values;        // [block][dims / 2][16 rows] and [TILE / 2][dims], words of two
    bf16 *keys, *weights;        // [TILE][dims] and [16 rows][TILE]
    float *out, *total, *peak;   // [row][dims], [row][16], [row]
    float *by_key, *by_row;      // scores

    MatrixEngine(const Call& call, int64_t head, const Row* first, int64_t number, Pieces& pieces)
        : c(call), kv_head(head), count(number), blocks((number + MATRIX_ROWS - 1) / MATRIX_ROWS), dims(round_up(call.dim, 32)), rows(first) {
        q = pieces.take<uint32_t>(blocks * dims / 2 * MATRIX_ROWS);
        out = pieces.take<float>(blocks * MATRIX_ROWS * dims);
        total = pieces.take<float>(count * 16);
        peak = pieces.take<float>(count);
        values = pieces.take<uint32_t>(TILE / 2 * dims);
        keys = pieces.take<bf16>(TILE * dims);
        weights = pieces.take<bf16>(MATRIX_ROWS * TILE);
        by_key = pieces.take<float>(TILE * MATRIX_ROWS);
        by_row = pieces.take<float>(MATRIX_ROWS * TILE);
    }

    void load_queries() {
        configure_rows(count);
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t d = 0; d < dims; d += 32) {
                vec block[16];
                for (int64_t i = 0; i < MATRIX_ROWS; i++) {
                    const int64_t r = b * MATRIX_ROWS + i;
                    block[i] = splat(0.0f);
                    if (r >= count) continue;
                    const bf16* from = static_cast<const bf16*>(c.q) + rows[r].token * c.q_stride + rows[r].head * c.q_head_stride;
                    block[i] = load_words(from + d, c.dim - d);
                }
                transpose16(block);
                for (int64_t i = 0; i < 16; i++) std::memcpy(q + ((b * dims + d) / 2 + i) * MATRIX_ROWS, &block[i], 64);
            }
        // Rows of a block that there is no query for: never read, but a sum over what they hold should be a number.
        std::fill(out, out + blocks * MATRIX_ROWS * dims, 0.0f);
        std::memset(weights, 0, MATRIX_ROWS * TILE * sizeof(bf16));
    }

    void start(int64_t r) {
        std::fill(out + r * dims, out + (r + 1) * dims, 0.0f);
        std::fill(total + r * 16, total + (r + 1) * 16, 0.0f);
        peak[r] = NEVER;
    }
    void resume(int64_t r, const float* state) {
        const int64_t width = padded(c.dim);
        std::memcpy(out + r * dims, state, width * sizeof(float));
        std::memcpy(total + r * 16, state + width, 16 * sizeof(float));
        peak[r] = state[width + 16];
    }
    void leave(int64_t r, float* state) const {
        const int64_t width = padded(c.dim);
        std::memcpy(state, out + r * dims, width * sizeof(float));
        std::memcpy(state + width, total + r * 16, 16 * sizeof(float));
        state[width + 16] = peak[r];
    }

    void tile(int64_t first, int number, const int64_t* places, const int64_t* later) {
        const C *k_cache = static_cast<const C*>(c.k_cache) + kv_head * c.head_stride;
        const C *v_cache = static_cast<const C*>(c.v_cache) + kv_head * c.head_stride;
        const bf16* left[TILE / 16];
        int64_t stride = dims;
        const int used = (number + 15) / 16;
        // Sixteen keys of one page are used where they lie; the last of them may be beyond the context, and are masked.
        const bool in_place = std::is_same_v<C, bf16> && c.dim == dims && c.page_size % 16 == 0;
        if constexpr (std::is_same_v<C, bf16>) {
            if (in_place) {
                stride = c.token_stride;
                for (int i = 0; i < used; i++) left[i] = k_cache + places[16 * i];
            }
        }
        if (!in_place) {
            for (int j = 0; j < 16 * used; j++)
                for (int64_t d = 0; d < dims; d += 32) {
                    const vec words = j < number ? load_words(k_cache + places[j] + d, std::max<int64_t>(0, c.dim - d)) : splat(0.0f);
                    std::memcpy(keys + j * dims + d, &words, sizeof words);
                }
            for (int i = 0; i < used; i++) left[i] = keys + 16 * i * dims;
        }
        pack_values(v_cache, number, places, later);
        for (int64_t b = 0; b < blocks; b++) {
            const int in_block = int(std::min<int64_t>(MATRIX_ROWS, count - b * MATRIX_ROWS));
            score(b, left, stride, used, b == 0 ? k_cache : nullptr, later);
            for (int i = 0; i < used; i++) {
                if (in_block <= 4) turn_few(by_key + 16 * i * MATRIX_ROWS, by_row + 16 * i);
                else turn_many(by_key + 16 * i * MATRIX_ROWS, by_row + 16 * i);
            }
            for (int r = 0; r < in_block; r++) weigh_row(b * MATRIX_ROWS + r, r, first, number);
            mix(b, number);
        }
    }

    // by_key[key][row] = keys times queries, 32 keys at a time
    void score(int64_t b, const bf16* const* left, int64_t stride, int used, const C* k_cache, const int64_t* later) {
        const uint32_t* right = q + b * dims / 2 * MATRIX_ROWS;
        for (int i = 0; i < used; i += 2) {
            const bf16 *one = left[i], *two = left[std::min(i + 1, used - 1)];
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t d = 0; d < dims; d += 32) {
                _tile_loadd(3, right + d / 2 * MATRIX_ROWS, MATRIX_ROWS * 4);
                _tile_loadd(2, one + d, stride * 2);
                _tile_dpbf16ps(0, 2, 3);
                _tile_loadd(2, two + d, stride * 2);
                _tile_dpbf16ps(1, 2, 3);
            }
            _tile_stored(0, by_key + 16 * i * MATRIX_ROWS, MATRIX_ROWS * 4);
            _tile_stored(1, by_key + 16 * (i + 1) * MATRIX_ROWS, MATRIX_ROWS * 4);
            if (k_cache)
                for (int j = 16 * i; j < (i + 2 < used ? 16 * i + 32 : TILE); j++) fetch_row(k_cache + later[j], dims);
        }
    }

    void pack_values(const C* v_cache, int number, const int64_t* places, const int64_t* later) {
        const int width = number > 32 ? 64 : 32;
        const __m512i even = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i first_half = _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(32)), 16));
        const __m512i second_half = _mm512_add_epi16(first_half, _mm512_set1_epi16(16));
        for (int j = 0; j < width; j += 2) {
            uint32_t* to = values + j / 2 * dims;
            fetch_row(v_cache + later[j], c.dim);
            fetch_row(v_cache + later[j + 1], c.dim);
            if (width == 32) {
                fetch_row(v_cache + later[j + 32], c.dim);
                fetch_row(v_cache + later[j + 33], c.dim);
            }
            if (j >= number) {
                std::memset(to, 0, dims * sizeof(uint32_t));
                continue;
            }
            const C *a = v_cache + places[j], *b = j + 1 < number ? v_cache + places[j + 1] : nullptr;
            int64_t d = 0;
            if constexpr (std::is_same_v<C, bf16>) {
                for (; b && d + 32 <= c.dim; d += 32) {
                    const __m512i x = _mm512_loadu_si512(a + d), y = _mm512_loadu_si512(b + d);
                    _mm512_store_si512(to + d, _mm512_permutex2var_epi16(x, first_half, y));
                    _mm512_store_si512(to + d + 16, _mm512_permutex2var_epi16(x, second_half, y));
                }
            }
            for (; d < dims; d += 16) {
                const uvec words = pair_words(a + d, b ? b + d : nullptr, c.dim - d);
                std::memcpy(to + d, &words, sizeof words);
            }
        }
    }

    // Scores of row r, local row `local` of its block, become weights; what was summed before shrinks accordingly.
    void weigh_row(int64_t r, int local, int64_t first, int number) {
        const Row& row = rows[r];
        float* s = by_row + local * TILE;
        bf16* into = weights + local * TILE;
        const int64_t low = std::max<int64_t>(0, row.low - first), high = std::min<int64_t>(row.position + 1 - first, number);
        if (low >= high) {
            std::memset(into, 0, TILE * sizeof(bf16));
            return;
        }
        const float scale = c.key_scale(kv_head) * LOG2_E, slope = row.slope * LOG2_E;
        const bool masked = low > 0 || high < TILE;
        vec x[VECS], best = splat(NEVER);
        for (int v = 0; v < VECS; v++) {
            const ivec at = LANES + int32_t(16 * v);
            x[v] = load16(s + 16 * v) * scale;
            if (slope != 0.0f) x[v] -= slope * __builtin_convertvector(int32_t(row.position - first) - at, vec);
            if (masked) x[v] = (at >= int32_t(low)) & (at < int32_t(high)) ? x[v] : splat(NEVER);
            best = max16(best, x[v]);
        }
        const float top = std::max(peak[r], _mm512_reduce_max_ps((__m512)best));
        vec sum = splat(0.0f), decay = exp2_16(splat(peak[r] - top));
        for (int v = 0; v < VECS; v++) {
            x[v] = exp2_16(x[v] - top);
            sum += x[v];
        }
        for (int v = 0; v < VECS; v += 2) {
            const __m512bh both = _mm512_cvtne2ps_pbh((__m512)x[v + 1], (__m512)x[v]);
            std::memcpy(into + 16 * v, &both, sizeof both);
        }
        store16(total + r * 16, load16(total + r * 16) * decay + sum);
        if (peak[r] != top)
            for (int64_t d = 0; d < dims; d += 16) store16(out + r * dims + d, load16(out + r * dims + d) * decay);
        peak[r] = top;
    }

    // out[row] += weights[row] times values
    void mix(int64_t b, int number) {
        for (int64_t d = 0; d < dims; d += 32) {
            float* sums = out + b * MATRIX_ROWS * dims + d;
            _tile_loadd(4, sums, dims * 4);
            _tile_loadd(5, sums + 16, dims * 4);
            for (int j = 0; j < number; j += 32) {
                _tile_loadd(6, weights + j, TILE * 2);
                _tile_loadd(7, values + j / 2 * dims + d, dims * 4);
                _tile_dpbf16ps(4, 6, 7);
                _tile_loadd(7, values + j / 2 * dims + d + 16, dims * 4);
                _tile_dpbf16ps(5, 6, 7);
            }
            _tile_stored(4, sums, dims * 4);
            _tile_stored(5, sums + 16, dims * 4);
        }
    }
};

}  // namespace

#endif
