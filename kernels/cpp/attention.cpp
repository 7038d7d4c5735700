// Attention over a paged KV cache, and the scatter of new keys and values into it.
//
// One parallel region per call over (sequence, key/value head, block of queries). Keys are taken in tiles of 64 positions,
// counted from position 0, with an online softmax in fp32. All that is summed for one query and head is summed in an order
// that depends on its own position alone, so a row's result is the same bits whatever batch, chunk or page size it runs in
// (but a chunk of one query takes a path of its own). Longer chunks in bf16 run on matrix tiles where the CPU has them, and
// there the softmax weights are rounded to bf16.
// dtype: 0 fp32, 1 bf16, 2 fp16, for queries, caches and output alike.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "gemm_bf16.h"
#include "softmax_bf16.h"
#include "vectors.h"

namespace {

constexpr int TILE = 64;       // keys of one tile
constexpr int VECS = TILE / 16;
constexpr int ROWS = 6;        // query rows that a micro kernel keeps in registers
constexpr int DECODE_ROWS = 4; // heads of one query that a micro kernel takes at once
constexpr int BLOCK_ROWS = 96; // query rows (queries x heads of the group) of one prefill item
constexpr int TILED_ROWS = 192;     // the same on matrix tiles
constexpr int64_t KEY_CHUNK = 256;  // keys of one product on matrix tiles
#if defined(HAVE_AMX) || defined(__AVX512BF16__)
constexpr bool HAVE_TILES = true;
#else
constexpr bool HAVE_TILES = false;
#endif
constexpr float NEVER = -std::numeric_limits<float>::infinity();

struct Call {
    const void *q, *k_cache, *v_cache;
    void* out;
    const int32_t *page_table, *context_lens, *query_starts;
    const float* slopes;
    int64_t q_stride, q_head_stride, page_stride, token_stride, head_stride, table_stride;
    int64_t heads, kv_heads, dim, page_size, window;  // window 0: none
    float scale;
};

struct Item {
    int32_t sequence, kv_head, kv_head_end, query, query_end;
};

// Memory of one thread, kept between calls.
struct Scratch {
    float* data = nullptr;
    size_t size = 0;
    float* get(size_t floats) {
        if (floats > size) {
            std::free(data);
            size = (floats + 4095) / 4096 * 4096;
            data = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
        }
        return data;
    }
    ~Scratch() { std::free(data); }
};
thread_local Scratch scratch;

inline int64_t padded(int64_t dim) { return (dim + 15) / 16 * 16; }

template <class T>
inline vec load_some(const T* from, int64_t count) {
    float all[16] = {};
    for (int64_t i = 0; i < count; i++) all[i] = load(from + i);
    return load16(all);
}

// Where the tokens of a tile lie in the caches: elements from their start, for head 0.
inline void find_rows(const Call& c, const int32_t* pages, int64_t first, int count, int64_t* rows) {
    int64_t page = first / c.page_size, slot = first % c.page_size;
    for (int j = 0; j < count;) {
        const int64_t start = pages[page] * c.page_stride;
        for (; j < count && slot < c.page_size; slot++) rows[j++] = start + slot * c.token_stride;
        slot = 0;
        page++;
    }
}

// The tile's keys as keys[d][position] and its values as values[position][d], zeros where the context has ended.
template <class T>
void load_tile(const Call& c, const int64_t* rows, int64_t kv_head, int count, float* keys, float* values) {
    const int64_t dims = padded(c.dim), groups = dims / 16;
    vec block[16];
    const T* k_rows[16];
    for (int start = 0; start < TILE; start += 16) {
        if (start >= count) {
            for (int64_t d = 0; d < dims; d++) store16(keys + d * TILE + start, splat(0.0f));
            continue;
        }
        for (int i = 0; i < 16; i++) {
            const int64_t offset = rows[std::min(start + i, count - 1)] + kv_head * c.head_stride;  // repeats are masked
            k_rows[i] = static_cast<const T*>(c.k_cache) + offset;
            if (start + i < count) {
                const T* v_row = static_cast<const T*>(c.v_cache) + offset;
                float* to = values + (start + i) * dims;
                for (int64_t g = 0; g < c.dim / 16; g++) store16(to + 16 * g, load16(v_row + 16 * g));
                for (int64_t d = c.dim / 16 * 16; d < dims; d++) to[d] = d < c.dim ? load(v_row + d) : 0.0f;
            }
        }
        for (int64_t g = 0; g < groups; g++) {
            int64_t left = c.dim - 16 * g;
            for (int i = 0; i < 16; i++) {
                if (left >= 16) block[i] = load16(k_rows[i] + 16 * g);
                else block[i] = load_some(k_rows[i] + 16 * g, left);
            }
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

// Scores of one row become softmax weights relative to the running maximum; returns by how much older sums shrink.
inline float weigh(float* scores, int64_t first, int64_t low, int64_t high, float slope, int64_t position, float& peak, float& total) {
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

// Asks for a row that the next tile will need.
template <class T>
inline void fetch_row(const T* row, int64_t count) {
    for (int64_t d = 0; d < count; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}

// scores[r][position] for up to a tile of keys that are read where they lie. The last 16 may repeat a key; they are masked.
template <class T, int R>
void score_pages(const T* const* k_rows, const T* const* later, int count, const float* q, float* scores, int64_t dims) {
    for (int start = 0; start < count; start += 16) {
        vec part[R][16];
        for (int i = 0; i < 16; i++) {
            const T* k = k_rows[std::min(start + i, count - 1)];
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
void score_pages_bf16(const bf16* const* k_rows, const bf16* const* later, int count, const bf16* const* q, float scale, float* scores, int64_t dims) {
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

template <class T, int R, int W>
void mix_pages_columns(const T* const* v_rows, const T* const* later, int count, const float* weights, float* out, const float* decay, int64_t at,
                       int64_t dims) {
    vec sum[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) sum[r][w] = load16(out + r * dims + at + 16 * w) * decay[r];
    for (int j = 0; j < count; j++) {
        const T* v = v_rows[j] + at;
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

// Up to DECODE_ROWS heads of one query against one tile, keys and values read where they lie.
template <class T, int R>
void decode_tile(const Call& c, const T* const* k_rows, const T* const* v_rows, const T* const* later_k, const T* const* later_v,
                 int count, const float* q, const T* const* raw_q, const float* slopes, int64_t first, int64_t low,
                 int64_t position, float* scores, float* out, float* peak, float* total) {
    const int64_t dims = c.dim;
#ifdef __AVX512BF16__
    if constexpr (sizeof(T) == 2 && !std::is_same_v<T, fp16>) {
        if (dims % 32 == 0) score_pages_bf16<R>(k_rows, later_k, count, raw_q, c.scale, scores, dims);
        else score_pages<T, R>(k_rows, later_k, count, q, scores, dims);
    } else
#endif
        score_pages<T, R>(k_rows, later_k, count, q, scores, dims);
    float decay[R];
    for (int r = 0; r < R; r++)
        decay[r] = weigh(scores + r * TILE, first, low, first + count, slopes ? slopes[r] : 0.0f, position, peak[r], total[r]);
    int64_t d = 0;
    for (; d + 64 <= dims; d += 64) mix_pages_columns<T, R, 4>(v_rows, later_v, count, scores, out, decay, d, dims);
    for (; d < dims; d += 16) mix_pages_columns<T, R, 1>(v_rows, later_v, count, scores, out, decay, d, dims);
}

// A sequence with one query: nothing is shared between queries, so no tile is unpacked. Needs dim % 16 == 0.
template <class T>
void run_decode(const Call& c, const Item& item) {
    const int64_t dims = c.dim, group = c.heads / c.kv_heads;
    const int32_t token = c.query_starts[item.sequence], context = c.context_lens[item.sequence];
    const int32_t* pages = c.page_table + item.sequence * c.table_stride;
    const int64_t first_head = item.kv_head * group, heads = (item.kv_head_end - item.kv_head) * group;
    const int64_t position = context - 1;

    float* q = scratch.get(size_t(heads) * (2 * dims + 2) + DECODE_ROWS * TILE + 64);
    float* out = q + heads * dims;
    float* peak = out + heads * dims;
    float* total = peak + heads;
    float* scores = total + heads + (16 - 2 * heads % 16) % 16;
    const T* raw_q = static_cast<const T*>(c.q) + token * c.q_stride + first_head * c.q_head_stride;
    for (int64_t h = 0; h < heads; h++)
        for (int64_t d = 0; d < dims; d++) q[h * dims + d] = load(raw_q + h * c.q_head_stride + d) * c.scale;
    std::fill(out, out + heads * dims, 0.0f);
    std::fill(peak, peak + heads, NEVER);
    std::fill(total, total + heads, 0.0f);

    const int64_t lowest = c.window ? std::max<int64_t>(0, position - c.window + 1) : 0;
    int64_t both[2][TILE], *rows = both[0], *later = both[1];
    const T *k_rows[TILE], *v_rows[TILE], *later_k[TILE], *later_v[TILE];
    const int64_t start = lowest / TILE * TILE;
    find_rows(c, pages, start, int(std::min<int64_t>(TILE, context - start)), later);
    for (int64_t first = start; first < context; first += TILE) {
        const int count = int(std::min<int64_t>(TILE, context - first));
        const int more = int(std::min<int64_t>(TILE, context - first - count));
        const int64_t low = std::max(first, lowest);
        std::swap(rows, later);
        find_rows(c, pages, first + TILE, more, later);
        for (int64_t k = item.kv_head; k < item.kv_head_end; k++) {
            for (int j = 0; j < count; j++) {
                k_rows[j] = static_cast<const T*>(c.k_cache) + rows[j] + k * c.head_stride;
                v_rows[j] = static_cast<const T*>(c.v_cache) + rows[j] + k * c.head_stride;
            }
            for (int j = 0; j < TILE; j++) {
                const int64_t at = (j < more ? later[j] : rows[0]) + k * c.head_stride;
                later_k[j] = static_cast<const T*>(c.k_cache) + at;
                later_v[j] = static_cast<const T*>(c.v_cache) + at;
            }
            for (int64_t g = 0; g < group; g += DECODE_ROWS) {
                const int64_t h = (k - item.kv_head) * group + g;
                const T* some_q[DECODE_ROWS];
                const int n = int(std::min<int64_t>(DECODE_ROWS, group - g));
                for (int r = 0; r < n; r++) some_q[r] = raw_q + (h + r) * c.q_head_stride;
                const float* slopes = c.slopes ? c.slopes + first_head + h : nullptr;
                auto run = [&](auto rows_known) {
                    decode_tile<T, decltype(rows_known)::value>(c, k_rows, v_rows, later_k, later_v, count, q + h * dims, some_q, slopes, first, low,
                                                                position, scores, out + h * dims, peak + h, total + h);
                };
                if (n == 1) run(std::integral_constant<int, 1>());
                else if (n == 2) run(std::integral_constant<int, 2>());
                else if (n == 3) run(std::integral_constant<int, 3>());
                else run(std::integral_constant<int, 4>());
            }
        }
    }
    T* to = static_cast<T*>(c.out) + (token * c.heads + first_head) * dims;
    for (int64_t h = 0; h < heads; h++) {
        const float inverse = 1.0f / total[h];
        for (int64_t d = 0; d < dims; d++) store(to + h * dims + d, out[h * dims + d] * inverse);
    }
}

// Words of 16 bf16 pairs as they lie in memory; what is beyond `left` elements is zero.
inline vec load_words(const bf16* from, int64_t left) {
    bf16 some[32] = {};
    vec v;
    if (left >= 32) {
        std::memcpy(&v, from, sizeof v);
    } else {
        std::memcpy(some, from, left * sizeof(bf16));
        std::memcpy(&v, some, sizeof v);
    }
    return v;
}

inline uvec load_bits(const bf16* from, int64_t left) {
    halves h = {};
    std::memcpy(&h, from, std::min<int64_t>(left, 16) * sizeof(bf16));
    return __builtin_convertvector(h, uvec);
}

// A chunk's keys as words [dims / 2][KEY_CHUNK] and its values as words [width / 2][dims], zeros beyond `count` tokens.
void pack_chunk(const Call& c, const int64_t* rows, int64_t kv_head, int64_t count, int64_t width, int64_t dims, uint32_t* keys,
                uint32_t* values) {
    const bf16* k_cache = static_cast<const bf16*>(c.k_cache) + kv_head * c.head_stride;
    const bf16* v_cache = static_cast<const bf16*>(c.v_cache) + kv_head * c.head_stride;
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
            uvec low = {}, high = {};
            if (j < count && d < c.dim) low = load_bits(v_cache + rows[j] + d, c.dim - d);
            if (j + 1 < count && d < c.dim) high = load_bits(v_cache + rows[j + 1] + d, c.dim - d);
            low |= high << 16;
            std::memcpy(values + j / 2 * dims + d, &low, sizeof low);
        }
}

// A block of queries in bf16 on matrix tiles, for one key/value head.
void run_tiled(const Call& c, const Item& item) {
    const int64_t dims = round_up(c.dim, 32), group = c.heads / c.kv_heads;
    const int32_t first_token = c.query_starts[item.sequence], context = c.context_lens[item.sequence];
    const int32_t num_queries = c.query_starts[item.sequence + 1] - first_token;
    const int32_t* pages = c.page_table + item.sequence * c.table_stride;
    const int64_t queries = item.query_end - item.query, rows = queries * group, padded_rows = round_up(rows, 32);

    float* scores = scratch.get(size_t(padded_rows) * (KEY_CHUNK + KEY_CHUNK / 2 + dims + dims / 2 + 2) + KEY_CHUNK * dims + 64);
    float* sums = scores + padded_rows * KEY_CHUNK;
    bf16* weights = reinterpret_cast<bf16*>(sums + padded_rows * dims);
    bf16* q = weights + padded_rows * KEY_CHUNK;
    uint32_t* keys = reinterpret_cast<uint32_t*>(q + padded_rows * dims);
    uint32_t* values = keys + KEY_CHUNK * dims / 2;
    float* largest = reinterpret_cast<float*>(values + KEY_CHUNK * dims / 2);
    float* total = largest + padded_rows;

    std::memset(q, 0, padded_rows * dims * sizeof(bf16));
    for (int64_t row = 0; row < rows; row++) {
        const int64_t token = first_token + item.query + row / group, head = item.kv_head * group + row % group;
        const bf16* from = static_cast<const bf16*>(c.q) + token * c.q_stride + head * c.q_head_stride;
        std::memcpy(q + row * dims, from, c.dim * sizeof(bf16));
    }
    std::fill(sums, sums + padded_rows * dims, 0.0f);
    std::fill(largest, largest + padded_rows, NEVER);
    std::fill(total, total + padded_rows, 0.0f);

    TileScope tiles;
    int64_t token_rows[KEY_CHUNK];
    const int64_t position_0 = context - num_queries + item.query, end = position_0 + queries;
    const int64_t low_0 = c.window ? std::max<int64_t>(0, position_0 - c.window + 1) : 0;
    for (int64_t first = low_0 / KEY_CHUNK * KEY_CHUNK; first < end; first += KEY_CHUNK) {
        const int64_t count = std::min(KEY_CHUNK, end - first), width = round_up(count, 32);
        find_rows(c, pages, first, int(count), token_rows);
        pack_chunk(c, token_rows, item.kv_head, count, width, dims, keys, values);
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
            const float top = block_softmax(scores + row * KEY_CHUNK, weights + row * KEY_CHUNK, low, high, width, c.scale * LOG2_E,
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
        const float inverse = 1.0f / total[row];
        for (int64_t d = 0; d < c.dim; d += 16) store_upto16(to + d, load16(sums + row * dims + d) * inverse, c.dim - d);
    }
}

template <class T>
void run_item(const Call& c, const Item& item) {
    const int64_t dims = padded(c.dim), group = c.heads / c.kv_heads;
    const int32_t first_token = c.query_starts[item.sequence];
    const int32_t context = c.context_lens[item.sequence];
    const int32_t num_queries = c.query_starts[item.sequence + 1] - first_token;
    const int32_t* pages = c.page_table + item.sequence * c.table_stride;
    if (num_queries == 1 && c.dim % 16 == 0) return run_decode<T>(c, item);
    if constexpr (HAVE_TILES && std::is_same_v<T, bf16>) {
        for (int32_t k = item.kv_head; k < item.kv_head_end; k++) run_tiled(c, {item.sequence, k, k + 1, item.query, item.query_end});
        return;
    }
    const int queries = item.query_end - item.query, rows = queries * int(group);
    const int kv_heads = item.kv_head_end - item.kv_head;

    float* memory = scratch.get(size_t(kv_heads) * rows * (2 * dims + 2) + 2 * TILE * dims + ROWS * (TILE + 1) + 256);
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
            for (int64_t d = 0; d < dims; d++) to[d] = d < c.dim ? load(from + d) * c.scale : 0.0f;
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
            load_tile<T>(c, token_rows, item.kv_head + h, count, keys, values);
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
            const float inverse = 1.0f / total[h * rows + row];
            for (int64_t d = 0; d < c.dim; d++) store(to + d, from[d] * inverse);
        }
}

template <class T>
void write_rows(const T* k, const T* v, T* k_cache, T* v_cache, const int64_t* slots, const float* cos, const float* sin,
                const int64_t* positions, int64_t tokens, int64_t kv_heads, int64_t dim, int64_t k_stride, int64_t k_head_stride,
                int64_t v_stride, int64_t v_head_stride, int64_t page_size, int64_t page_stride, int64_t token_stride,
                int64_t head_stride, float clip, int threads) {
    const int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * kv_heads * dim > 32768)
    for (int64_t t = 0; t < tokens; t++) {
        if (slots[t] < 0) continue;
        const int64_t at = slots[t] / page_size * page_stride + slots[t] % page_size * token_stride;
        for (int64_t h = 0; h < kv_heads; h++) {
            const T* from = k + t * k_stride + h * k_head_stride;
            T* to = k_cache + at + h * head_stride;
            auto limit = [clip](float x) { return clip > 0.0f ? std::min(std::max(x, -clip), clip) : x; };
            if (cos) {
                const float *c = cos + positions[t] * half, *s = sin + positions[t] * half;
#pragma omp simd
                for (int64_t i = 0; i < half; i++) {
                    float a = limit(load(from + i)), b = limit(load(from + half + i));
                    store(to + i, a * c[i] - b * s[i]);
                    store(to + half + i, b * c[i] + a * s[i]);
                }
            } else {
#pragma omp simd
                for (int64_t i = 0; i < dim; i++) store(to + i, limit(load(from + i)));
            }
            from = v + t * v_stride + h * v_head_stride;
            to = v_cache + at + h * head_stride;
#pragma omp simd
            for (int64_t i = 0; i < dim; i++) store(to + i, limit(load(from + i)));
        }
    }
}

}  // namespace

extern "C" {

// Strides are in elements. Returns -1, or the first sequence whose lengths make no sense (nothing is computed then).
int64_t attention_paged(const void* q, const void* k_cache, const void* v_cache, void* out, const int32_t* page_table,
                     const int32_t* context_lens, const int32_t* query_starts, const float* slopes, int64_t q_stride,
                     int64_t q_head_stride, int64_t page_stride, int64_t token_stride, int64_t head_stride, int64_t table_stride,
                     int64_t table_pages, int64_t tokens, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_size, int64_t window, float scale,
                     int dtype, int threads) {
    const Call call{q,        k_cache,       v_cache,     out,          page_table,  context_lens, query_starts, slopes,
                    q_stride, q_head_stride, page_stride, token_stride, head_stride, table_stride, heads,        kv_heads,
                    dim,      page_size,     window,      scale};
    const int64_t group = heads / kv_heads, most = HAVE_TILES && dtype == 1 ? TILED_ROWS : BLOCK_ROWS;
    const int64_t block = std::max<int64_t>(1, most / group);
    // A decode takes all heads in one item, so that its pages are read in order, unless too few sequences share the work.
    const bool whole = sequences >= 4 * threads;
    int64_t count = 0;
    for (int64_t b = 0; b < sequences; b++) {
        const int64_t queries = query_starts[b + 1] - query_starts[b];
        const bool sane = query_starts[b] >= 0 && queries >= 0 && query_starts[b + 1] <= tokens && queries <= context_lens[b] &&
                          context_lens[b] <= table_pages * page_size;
        if (!sane) return b;
        count += queries == 1 && whole ? 1 : (queries + block - 1) / block * kv_heads;
    }
    Item* items = static_cast<Item*>(std::malloc(sizeof(Item) * std::max<int64_t>(count, 1)));
    int64_t filled = 0;
    for (int64_t b = 0; b < sequences; b++) {
        const int32_t queries = query_starts[b + 1] - query_starts[b];
        if (queries == 1 && whole) {
            items[filled++] = {int32_t(b), 0, int32_t(kv_heads), 0, 1};
            continue;
        }
        for (int32_t start = 0; start < queries; start += int32_t(block))
            for (int32_t h = 0; h < kv_heads; h++)
                items[filled++] = {int32_t(b), h, h + 1, start, std::min<int32_t>(start + int32_t(block), queries)};
    }
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (count > 1)
    for (int64_t i; (i = count - 1 - next.fetch_add(1)) >= 0;) {  // the longest, at the end of a chunk, come first
        if (dtype == 0) run_item<float>(call, items[i]);
        else if (dtype == 1) run_item<bf16>(call, items[i]);
        else run_item<fp16>(call, items[i]);
    }
    std::free(items);
    return -1;
}

void kv_write(const void* k, const void* v, void* k_cache, void* v_cache, const int64_t* slots, const float* cos, const float* sin,
              const int64_t* positions, int64_t tokens, int64_t kv_heads, int64_t dim, int64_t k_stride, int64_t k_head_stride,
              int64_t v_stride, int64_t v_head_stride, int64_t page_size, int64_t page_stride, int64_t token_stride,
              int64_t head_stride, float clip, int dtype, int threads) {
    auto run = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        write_rows(static_cast<const T*>(k), static_cast<const T*>(v), static_cast<T*>(k_cache), static_cast<T*>(v_cache), slots, cos,
                   sin, positions, tokens, kv_heads, dim, k_stride, k_head_stride, v_stride, v_head_stride, page_size, page_stride,
                   token_stride, head_stride, clip, threads);
    };
    if (dtype == 0) run(static_cast<float*>(nullptr));
    else if (dtype == 1) run(static_cast<bf16*>(nullptr));
    else run(static_cast<fp16*>(nullptr));
}
}
