// Packed attention in bf16, forward and backward, for sequences without a cache.
//
// Forward: a block of queries against chunks of keys with an online softmax. Backward: scores are recomputed transposed,
// keys by queries, so that P^T and dS^T come out as the row-major operands of dV = P^T dO and dK = dS^T Q; dQ^T = K^T dS^T
// takes dS^T packed in pairs of rows, which is how its rows are written anyway. Products run on gemm_bf16 over padded copies.
// Every output element is computed by one thread in one order: results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "gemm_bf16.h"
#include "softmax_bf16.h"

namespace {

constexpr int64_t QUERY_BLOCK = 64;
constexpr int64_t KEY_CHUNK = 512;
// A block of memory that only grows; one per thread and purpose.
struct Buffer {
    void* memory = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(memory); }
    template <class T>
    T* take(size_t count) {
        size_t bytes = round_up(count * sizeof(T), 64);
        if (bytes > size) {
            std::free(memory);
            memory = std::aligned_alloc(64, bytes);
            size = bytes;
        }
        return static_cast<T*>(memory);
    }
};

// Rows [T, N, D] of bf16 with strides in elements.
struct View {
    const bf16* data;
    int64_t stride_t, stride_n;
    const bf16* row(int64_t t, int64_t n) const { return data + t * stride_t + n * stride_n; }
};

struct Problem {
    int64_t heads, kv_heads, dim, padded_dim;
    int64_t num_sequences;
    const int32_t* starts;
    float scale;
    const float* slopes;  // null: no ALiBi
    int64_t window;       // 0: none
    bool causal;

    // Keys [first, last) that query i of a sequence of `length` tokens sees.
    int64_t first_key(int64_t i) const { return window > 0 ? std::max<int64_t>(0, i - window + 1) : 0; }
    int64_t last_key(int64_t i, int64_t length) const {
        int64_t last = causal ? i + 1 : length;
        return window > 0 ? std::min(last, i + window) : last;
    }
    // Queries [first, last) that see key j.
    int64_t first_query(int64_t j) const { return std::max<int64_t>(causal ? j : 0, window > 0 ? j - window + 1 : 0); }
    int64_t last_query(int64_t j, int64_t length) const { return window > 0 ? std::min(length, j + window) : length; }
};

// Copies rows into [rows, padded_dim], zeros beyond the data.
void copy_padded(const View& x, int64_t start, int64_t count, int64_t n, int64_t dim, bf16* out, int64_t rows, int64_t padded) {
    for (int64_t r = 0; r < rows; r++) {
        bf16* into = out + r * padded;
        if (r < count) {
            std::memcpy(into, x.row(start + r, n), dim * 2);
            if (padded > dim) std::memset(into + dim, 0, (padded - dim) * 2);
        } else {
            std::memset(into, 0, padded * 2);
        }
    }
}

// [rows, padded] row-major -> words [padded / 2][rows]: the packed form of the transpose.
void pack_transposed(const bf16* x, int64_t rows, int64_t padded, uint32_t* out, int64_t ld) {
    constexpr int64_t TILE = 16;
    for (int64_t r0 = 0; r0 < rows; r0 += TILE)
        for (int64_t d0 = 0; d0 < padded / 2; d0 += TILE)
            for (int64_t d = d0; d < d0 + TILE; d++) {
                uint32_t* into = out + d * ld + r0;
                for (int64_t r = 0; r < TILE; r++) into[r] = load_pair(x + (r0 + r) * padded + 2 * d);
            }
}

// [rows, padded] row-major -> words [rows / 2][padded]: the packed form of the matrix itself.
void pack_rows(const bf16* x, int64_t rows, int64_t padded, uint32_t* out) {
    for (int64_t r = 0; r < rows; r += 2) {
        const bf16 *low = x + r * padded, *high = low + padded;
        uint32_t* into = out + r / 2 * padded;
#pragma omp simd
        for (int64_t d = 0; d < padded; d++) into[d] = uint32_t(low[d].bits) | (uint32_t(high[d].bits) << 16);
    }
}

// [rows, padded] row-major -> [padded, rows] row-major.
void transpose(const bf16* x, int64_t rows, int64_t padded, bf16* out, int64_t ld) {
    constexpr int64_t TILE = 32;
    for (int64_t r0 = 0; r0 < rows; r0 += TILE)
        for (int64_t d0 = 0; d0 < padded; d0 += TILE)
            for (int64_t d = d0; d < d0 + TILE; d++)
                for (int64_t r = r0; r < r0 + TILE; r++) out[d * ld + r] = x[r * padded + d];
}

struct Item {
    int64_t sequence, head, block, cost;
};

struct ForwardScratch {
    Buffer copy, scores, probabilities, sums;
};

void forward_block(const Problem& p, const View& q, int64_t start, int64_t length, int64_t head, int64_t block,
                   const uint32_t* packed_keys, int64_t key_ld, const uint32_t* packed_values, bf16* out, float* lse,
                   ForwardScratch& scratch) {
    const int64_t D = p.padded_dim, first = block * QUERY_BLOCK, count = std::min(QUERY_BLOCK, length - first);
    bf16* queries = scratch.copy.take<bf16>(QUERY_BLOCK * D);
    float* scores = scratch.scores.take<float>(QUERY_BLOCK * KEY_CHUNK);
    bf16* probabilities = scratch.probabilities.take<bf16>(QUERY_BLOCK * KEY_CHUNK);
    float* sums = scratch.sums.take<float>(QUERY_BLOCK * D);
    float largest[QUERY_BLOCK], total[QUERY_BLOCK];
    std::fill(largest, largest + QUERY_BLOCK, -std::numeric_limits<float>::infinity());
    std::fill(total, total + QUERY_BLOCK, 0.0f);
    copy_padded(q, start + first, count, head, p.dim, queries, QUERY_BLOCK, D);
    const float slope = p.slopes ? p.slopes[head] * LOG2_E : 0.0f, scale = p.scale * LOG2_E;
    const int64_t begin = p.first_key(first) / 32 * 32, end = p.last_key(first + count - 1, length);
    const int64_t rows = round_up(count, 32);
    for (int64_t chunk = begin; chunk < end; chunk += KEY_CHUNK) {
        const int64_t width = round_up(std::min(KEY_CHUNK, end - chunk), 32);
        gemm_bf16(rows, width, D, queries, D, packed_keys + chunk, key_ld, scores, KEY_CHUNK, false);
        for (int64_t i = 0; i < rows; i++) {
            float* s = scores + i * KEY_CHUNK;
            bf16* into = probabilities + i * KEY_CHUNK;
            const int64_t position = first + std::min(i, count - 1);
            const int64_t from = std::min(std::max<int64_t>(p.first_key(position) - chunk, 0), width);
            const int64_t to = std::max(from, std::min(p.last_key(position, length) - chunk, width));
            float sum = 0.0f;
            const float top = block_softmax(s, into, from, to, width, scale, slope, float(position - chunk), largest[i], sum);
            if (chunk > begin) {
                float factor = total[i] > 0.0f ? std::exp2(largest[i] - top) : 0.0f;
                total[i] *= factor;
#pragma omp simd
                for (int64_t d = 0; d < D; d++) sums[i * D + d] *= factor;
            }
            total[i] += sum;
            largest[i] = top;
        }
        gemm_bf16(rows, D, width, probabilities, KEY_CHUNK, packed_values + chunk / 2 * D, D, sums, D, chunk > begin);
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t t = start + first + i;
        bf16* into = out + (t * p.heads + head) * p.dim;
        const float inverse = total[i] > 0.0f ? 1.0f / total[i] : 0.0f;
        for (int64_t d = 0; d < p.dim; d += 16) store_upto16(into + d, load16(sums + i * D + d) * inverse, p.dim - d);
        if (lse) lse[t * p.heads + head] = largest[i] * LOG_2 + std::log(total[i]);
    }
}

struct BackwardScratch {
    Buffer keys, values, keys_transposed, queries, grads, queries_transposed, grads_transposed, queries_packed, grads_packed;
    Buffer scores, dots, probabilities, slopes, slopes_packed, dq, dk, dv, delta, lse;
};

// From transposed scores and dP of keys [chunk, chunk + rows) by a block of queries: P^T and dS^T in bf16, the latter packed, too.
// `lse` is in units of log 2.
void backward_scores(const Problem& p, float slope, int64_t first, int64_t chunk, int64_t rows, int64_t length,
                     const float* scores, const float* dots, const float* lse, const float* delta, bf16* probabilities,
                     bf16* slopes, uint32_t* slopes_packed) {
    const float scale = p.scale * LOG2_E, slope2 = slope * LOG2_E;
    for (int64_t pair = 0; pair < rows; pair += 2) {
        int32_t from[2], to[2];
        for (int64_t half = 0; half < 2; half++) {
            const int64_t key = chunk + pair + half;
            from[half] = to[half] = 0;
            if (key >= length) continue;
            from[half] = int32_t(std::min(std::max<int64_t>(p.first_query(key) - first, 0), QUERY_BLOCK));
            to[half] = int32_t(std::max<int64_t>(from[half], std::min(p.last_query(key, length) - first, QUERY_BLOCK)));
        }
        for (int32_t i = 0; i < QUERY_BLOCK; i += 16) {
            const vec l = load16(lse + i), d = load16(delta + i);
            uvec words[2];
            for (int64_t half = 0; half < 2; half++) {
                const int64_t at = (pair + half) * QUERY_BLOCK + i;
                vec v = load16(scores + at) * scale - l;
                if (slope2 != 0.0f) {
                    const float distance = float(first + i - chunk - pair - half);
                    v -= absolute(splat(distance) + __builtin_convertvector(LANES, vec)) * slope2;
                }
                vec e = exp2_16(v);
                if (i < from[half] || i + 16 > to[half]) {
                    const ivec lane = LANES + i;
                    e = (lane >= from[half]) & (lane < to[half]) ? e : splat(0.0f);
                }
                store_words(probabilities + at, round16(e));
                words[half] = round16(e * (load16(dots + at) - d));
                store_words(slopes + at, words[half]);
            }
            const uvec packed = (words[0] >> 16) | (words[1] & 0xffff0000u);
            std::memcpy(slopes_packed + pair / 2 * QUERY_BLOCK + i, &packed, sizeof packed);
        }
    }
}

// x [dim, QUERY_BLOCK] fp32 -> its first `count` columns as bf16 rows of `out`, times a scale.
void store_transposed(const float* x, float scale, int64_t count, bf16* out, int64_t stride, int64_t dim) {
    for (int64_t i = 0; i < count; i += 16) {
        for (int64_t d = 0; d < dim; d += 16) {
            vec tile[16];
            for (int r = 0; r < 16; r++) tile[r] = load16(x + (d + r) * QUERY_BLOCK + i) * scale;
            transpose16(tile);
            for (int64_t r = 0; r < std::min<int64_t>(16, count - i); r++) {
                store_upto16(out + (i + r) * stride + d, tile[r], dim - d);
            }
        }
    }
}

// All query heads of one key/value head of one sequence.
void backward_group(const Problem& p, const View& q, const View& k, const View& v, const View& out, const View& grad,
                    const float* lse, int64_t start, int64_t length, int64_t kv_head, bf16* dq, bf16* dk, bf16* dv,
                    BackwardScratch& scratch) {
    const int64_t D = p.padded_dim, L = round_up(length, QUERY_BLOCK), group = p.heads / p.kv_heads;
    bf16* keys = scratch.keys.take<bf16>(L * D);
    bf16* values = scratch.values.take<bf16>(L * D);
    bf16* keys_transposed = scratch.keys_transposed.take<bf16>(L * D);
    bf16* queries = scratch.queries.take<bf16>(L * D);
    bf16* grads = scratch.grads.take<bf16>(L * D);
    uint32_t* queries_transposed = scratch.queries_transposed.take<uint32_t>(L * D / 2);
    uint32_t* grads_transposed = scratch.grads_transposed.take<uint32_t>(L * D / 2);
    uint32_t* queries_packed = scratch.queries_packed.take<uint32_t>(L * D / 2);
    uint32_t* grads_packed = scratch.grads_packed.take<uint32_t>(L * D / 2);
    float* scores = scratch.scores.take<float>(KEY_CHUNK * QUERY_BLOCK);
    float* dots = scratch.dots.take<float>(KEY_CHUNK * QUERY_BLOCK);
    bf16* probabilities = scratch.probabilities.take<bf16>(KEY_CHUNK * QUERY_BLOCK);
    bf16* slopes = scratch.slopes.take<bf16>(KEY_CHUNK * QUERY_BLOCK);
    uint32_t* slopes_packed = scratch.slopes_packed.take<uint32_t>(KEY_CHUNK * QUERY_BLOCK / 2);
    float* dq_block = scratch.dq.take<float>(D * QUERY_BLOCK);
    float* dk_sum = scratch.dk.take<float>(L * D);
    float* dv_sum = scratch.dv.take<float>(L * D);
    float* delta = scratch.delta.take<float>(L);
    float* row_lse = scratch.lse.take<float>(L);
    copy_padded(k, start, length, kv_head, p.dim, keys, L, D);
    copy_padded(v, start, length, kv_head, p.dim, values, L, D);
    transpose(keys, L, D, keys_transposed, L);
    std::memset(dk_sum, 0, L * D * 4);
    std::memset(dv_sum, 0, L * D * 4);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        copy_padded(q, start, length, head, p.dim, queries, L, D);
        copy_padded(grad, start, length, head, p.dim, grads, L, D);
        pack_transposed(queries, L, D, queries_transposed, L);
        pack_transposed(grads, L, D, grads_transposed, L);
        pack_rows(queries, L, D, queries_packed);
        pack_rows(grads, L, D, grads_packed);
        for (int64_t i = 0; i < L; i++) {
            float sum = 0.0f;
            if (i < length) {
                const bf16 *o = out.row(start + i, head), *g = grads + i * D;
                vec products = splat(0.0f);
                for (int64_t d = 0; d < p.dim; d += 16) products += load_upto16(o + d, p.dim - d) * load16(g + d);
                sum = sum_lanes(products);
            }
            delta[i] = sum;
            row_lse[i] = i < length ? lse[(start + i) * p.heads + head] * LOG2_E : 0.0f;
        }
        const float slope = p.slopes ? p.slopes[head] : 0.0f;
        for (int64_t first = 0; first < length; first += QUERY_BLOCK) {
            const int64_t count = std::min(QUERY_BLOCK, length - first);
            const int64_t begin = p.first_key(first) / 32 * 32, end = p.last_key(first + count - 1, length);
            for (int64_t chunk = begin; chunk < end; chunk += KEY_CHUNK) {
                const int64_t rows = round_up(std::min(KEY_CHUNK, end - chunk), 32);
                gemm_bf16(rows, QUERY_BLOCK, D, keys + chunk * D, D, queries_transposed + first, L, scores, QUERY_BLOCK, false);
                gemm_bf16(rows, QUERY_BLOCK, D, values + chunk * D, D, grads_transposed + first, L, dots, QUERY_BLOCK, false);
                backward_scores(p, slope, first, chunk, rows, length, scores, dots, row_lse + first, delta + first, probabilities,
                                slopes, slopes_packed);
                gemm_bf16(rows, D, QUERY_BLOCK, probabilities, QUERY_BLOCK, grads_packed + first / 2 * D, D,
                          dv_sum + chunk * D, D, true);
                gemm_bf16(rows, D, QUERY_BLOCK, slopes, QUERY_BLOCK, queries_packed + first / 2 * D, D, dk_sum + chunk * D, D,
                          true);
                gemm_bf16(D, QUERY_BLOCK, rows, keys_transposed + chunk, L, slopes_packed, QUERY_BLOCK, dq_block, QUERY_BLOCK,
                          chunk > begin);
            }
            store_transposed(dq_block, p.scale, count, dq + ((start + first) * p.heads + head) * p.dim, p.heads * p.dim, p.dim);
        }
    }
    for (int64_t i = 0; i < length; i++) {
        bf16* dk_into = dk + ((start + i) * p.kv_heads + kv_head) * p.dim;
        bf16* dv_into = dv + ((start + i) * p.kv_heads + kv_head) * p.dim;
        for (int64_t d = 0; d < p.dim; d += 16) {
            store_upto16(dk_into + d, load16(dk_sum + i * D + d) * p.scale, p.dim - d);
            store_upto16(dv_into + d, load16(dv_sum + i * D + d), p.dim - d);
        }
    }
}

void by_cost(std::vector<Item>& items) {
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
}

}  // namespace

extern "C" {

// Strides in elements; out bf16 [T, heads, dim] contiguous, lse f32 [T, heads] or null.
void attention_prefill_forward(const void* q, int64_t q_t, int64_t q_n, const void* k, int64_t k_t, int64_t k_n, const void* v,
                               int64_t v_t, int64_t v_n, const int32_t* starts, int64_t num_sequences, int64_t heads,
                               int64_t kv_heads, int64_t dim, float scale, const float* slopes, int64_t window, int causal,
                               void* out, float* lse, int threads) {
    Problem p{heads, kv_heads, dim, round_up(dim, 32), num_sequences, starts, scale, slopes, window, causal != 0};
    View qv{(const bf16*)q, q_t, q_n}, kv{(const bf16*)k, k_t, k_n}, vv{(const bf16*)v, v_t, v_n};
    const int64_t D = p.padded_dim, group = heads / kv_heads;
    std::vector<int64_t> offsets(num_sequences + 1, 0);
    std::vector<Item> packs, blocks;
    for (int64_t b = 0; b < num_sequences; b++) {
        const int64_t length = starts[b + 1] - starts[b];
        offsets[b + 1] = offsets[b] + round_up(length, 32);
        for (int64_t n = 0; n < kv_heads && length > 0; n++) packs.push_back({b, n, 0, length});
        for (int64_t h = 0; h < heads; h++)
            for (int64_t block = 0; block * QUERY_BLOCK < length; block++)
                blocks.push_back({b, h, block, causal ? block : 0});
    }
    by_cost(packs);
    by_cost(blocks);
    static thread_local Buffer key_buffer, value_buffer;
    const int64_t padded_tokens = offsets[num_sequences];
    uint32_t* packed_keys = key_buffer.take<uint32_t>(kv_heads * padded_tokens * D / 2 + 64);
    uint32_t* packed_values = value_buffer.take<uint32_t>(kv_heads * padded_tokens * D / 2 + 64);
#pragma omp parallel num_threads(threads)
    {
        static thread_local Buffer copy;
        static thread_local ForwardScratch scratch;
        TileScope tiles;
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < packs.size(); i++) {
            const int64_t b = packs[i].sequence, n = packs[i].head, start = starts[b], length = starts[b + 1] - start;
            const int64_t L = offsets[b + 1] - offsets[b], at = (offsets[b] * kv_heads + n * L) * D / 2;
            bf16* rows = copy.take<bf16>(L * D);
            copy_padded(kv, start, length, n, dim, rows, L, D);
            pack_transposed(rows, L, D, packed_keys + at, L);
            copy_padded(vv, start, length, n, dim, rows, L, D);
            pack_rows(rows, L, D, packed_values + at);
        }
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < blocks.size(); i++) {
            const int64_t b = blocks[i].sequence, start = starts[b], length = starts[b + 1] - start;
            const int64_t L = offsets[b + 1] - offsets[b];
            const int64_t at = (offsets[b] * kv_heads + blocks[i].head / group * L) * D / 2;
            forward_block(p, qv, start, length, blocks[i].head, blocks[i].block, packed_keys + at, L, packed_values + at,
                          (bf16*)out, lse, scratch);
        }
    }
}

// dq [T, heads, dim], dk and dv [T, kv_heads, dim], all contiguous.
void attention_prefill_backward(const void* q, int64_t q_t, int64_t q_n, const void* k, int64_t k_t, int64_t k_n, const void* v,
                                int64_t v_t, int64_t v_n, const void* out, const void* grad, int64_t grad_t, int64_t grad_n,
                                const float* lse, const int32_t* starts, int64_t num_sequences, int64_t heads, int64_t kv_heads,
                                int64_t dim, float scale, const float* slopes, int64_t window, int causal, void* dq, void* dk,
                                void* dv, int threads) {
    Problem p{heads, kv_heads, dim, round_up(dim, 32), num_sequences, starts, scale, slopes, window, causal != 0};
    View qv{(const bf16*)q, q_t, q_n}, kv{(const bf16*)k, k_t, k_n}, vv{(const bf16*)v, v_t, v_n};
    View ov{(const bf16*)out, heads * dim, dim}, gv{(const bf16*)grad, grad_t, grad_n};
    std::vector<Item> items;
    for (int64_t b = 0; b < num_sequences; b++) {
        const int64_t length = starts[b + 1] - starts[b];
        for (int64_t n = 0; n < kv_heads && length > 0; n++) items.push_back({b, n, 0, length});
    }
    by_cost(items);
#pragma omp parallel num_threads(threads)
    {
        static thread_local BackwardScratch scratch;
        TileScope tiles;
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < items.size(); i++) {
            const int64_t b = items[i].sequence, start = starts[b], length = starts[b + 1] - start;
            backward_group(p, qv, kv, vv, ov, gv, lse, start, length, items[i].head, (bf16*)dq, (bf16*)dk, (bf16*)dv, scratch);
        }
    }
}

}  // extern "C"
