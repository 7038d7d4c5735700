// y = x W^T + b in bf16 with W in int8, fp8 or NF4, by AMX tiles, and the same weights dequantised.
//
// int8: x becomes integers row by row, x = s (256 h + l) with h and l in 8 bits and s = max|x| / 32512 (or h alone with
// s = max|x| / 127), the integer tiles multiply, and sums are exact up to the final scaling. fp8 and NF4 are turned into
// bf16 tiles on the way, as dequantising would round them.
// Both operands lie in the order in which tiles take them: x is written anew as tiles of 16 rows, which costs little and spares
// the many rows' worth of scattered loads; W in panels of 32 outputs (panels.h). Per panel come 32 scales (NF4: one per
// block of 64 inputs) and 32 biases. Sums run over K in one order: a row's result does not depend on the other rows nor on the
// number of threads.

#include "gemm_bf16.h"
#include "panels.h"

namespace {

constexpr int64_t TILE_BYTES = 1024, NF4_BLOCK = 64;
constexpr int64_t AHEAD = 8192;            // bytes of W asked for before they are needed
constexpr int64_t SLAB_BYTES = 768 << 10;  // of x that stay in the cache while the panels pass

#ifdef HAVE_AMX

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

template <class T>
inline void store_sums(T* sums) {
    _tile_stored(0, sums, PANEL * 4);
    _tile_stored(1, sums + 16, PANEL * 4);
    _tile_stored(2, sums + 16 * PANEL, PANEL * 4);
    _tile_stored(3, sums + 16 * PANEL + 16, PANEL * 4);
}

// One row of x in 8-bit terms, 64 of each in every chunk of `step` bytes from `high` and `low` on. Magnitudes of bf16 are ordered
// as their bits are.
void quantize_row(const bf16* x, int64_t num_in, int64_t depth, int terms, int8_t* high, int8_t* low, int64_t step, float* scale) {
    __m512i largest = _mm512_setzero_si512();
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    for (int64_t k = 0; k < num_in; k += 32) {
        const __mmask32 inside = num_in - k >= 32 ? ~0u : (1u << (num_in - k)) - 1;
        largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_maskz_loadu_epi16(inside, x + k), magnitude));
    }
    alignas(64) uint16_t lanes[32];
    _mm512_store_si512(lanes, largest);
    uint16_t top_bits = 0;
    for (uint16_t lane : lanes) top_bits = lane > top_bits ? lane : top_bits;
    const float top = bits_to_float(uint32_t(top_bits) << 16), limit = terms == 2 ? 32512.0f : 127.0f;
    if (top < 1e-30f) {
        *scale = 0.0f;
        for (int64_t c = 0; c < depth / 64; c++) {
            std::memset(high + c * step, 0, 64);
            if (terms == 2) std::memset(low + c * step, 0, 64);
        }
        return;
    }
    *scale = top / limit;
    const __m512 inverse = _mm512_set1_ps(limit / top);
    for (int64_t k = 0; k < depth; k += 16) {
        const int64_t left = num_in - k;
        const __mmask16 inside = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
        __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, x + k)), 16);
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(bits), inverse));
        const int64_t at = k / 64 * step + k % 64;
        if (terms == 2) {
            _mm_storeu_si128((__m128i*)(low + at), _mm512_cvtepi32_epi8(q));
            q = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
        }
        _mm_storeu_si128((__m128i*)(high + at), _mm512_cvtepi32_epi8(q));
    }
}

inline vec as_floats(const int32_t* sums) {
    ivec v;
    std::memcpy(&v, sums, sizeof v);
    return __builtin_convertvector(v, vec);
}

void linear_int8(const bf16* x, int64_t stride, const char* packed, const float* scales, const float* bias, bf16* out,
                 int64_t rows, int64_t num_out, int64_t num_in, bool gated, int terms, int threads) {
    const int64_t depth = round_up(num_in, 64), chunks = depth / 64, padded_rows = round_up(rows, 32);
    const int64_t units = gated ? num_out / 2 : num_out, step = gated ? 16 : PANEL, panels = num_panels(num_out, gated);
    const int64_t block_rows = terms == 2 ? 16 : 32, chunk_step = terms * TILE_BYTES, tile_row = chunks * chunk_step;
    static thread_local Scratch scratch;
    int8_t* values = reinterpret_cast<int8_t*>(scratch.get(terms * padded_rows * depth + padded_rows * 4));
    float* row_scales = reinterpret_cast<float*>(values + terms * padded_rows * depth);
    const int64_t slab = round_up(SLAB_BYTES / (depth * terms) + 1, 32);
#pragma omp parallel num_threads(threads)
    {
        TileScope scope;
        alignas(64) int32_t sums[32 * PANEL];
#pragma omp for schedule(static)
        for (int64_t r = 0; r < padded_rows; r++) {
            // Rows beyond the last repeat it; their sums are not written.
            int8_t* to = values + r / 16 * tile_row + r % 16 * 64;
            quantize_row(x + (r < rows ? r : rows - 1) * stride, num_in, depth, terms, to, to + TILE_BYTES, chunk_step, row_scales + r);
        }
        for (int64_t begin = 0; begin < rows; begin += slab) {
            const int64_t end = begin + slab < rows ? begin + slab : rows;
#pragma omp for schedule(static) nowait
            for (int64_t p = 0; p < panels; p++) {
                const char* panel = packed + p * chunks * 2 * TILE_BYTES;
                const int64_t first = p * step, width = units - first < step ? units - first : step;
                const vec scale_low = load16(scales + p * PANEL), scale_high = load16(scales + p * PANEL + 16);
                const vec bias_low = load16(bias + p * PANEL), bias_high = load16(bias + p * PANEL + 16);
                for (int64_t m = begin; m < end; m += block_rows) {
                    const int8_t* a = values + m / 16 * tile_row;
                    const int8_t* a2 = a + (terms == 2 ? TILE_BYTES : tile_row);
                    const bool both = terms == 2 || m + 16 < rows;
                    zero_sums();
                    for (int64_t c = 0; c < chunks; c++) {
                        const char* b = panel + c * 2 * TILE_BYTES;
                        if (m == begin)
                            for (int64_t line = 0; line < 2 * TILE_BYTES; line += 64) __builtin_prefetch(b + AHEAD + line, 0, 2);
                        _tile_loadd(4, a + c * chunk_step, 64);
                        _tile_loadd(6, b, 64);
                        _tile_loadd(7, b + TILE_BYTES, 64);
                        _tile_dpbssd(0, 4, 6);
                        _tile_dpbssd(1, 4, 7);
                        if (both) {
                            _tile_loadd(5, a2 + c * chunk_step, 64);
                            _tile_dpbssd(2, 5, 6);
                            _tile_dpbssd(3, 5, 7);
                        }
                    }
                    store_sums(sums);
                    const int64_t count = end - m < block_rows ? end - m : block_rows;
                    for (int64_t r = 0; r < count; r++) {
                        const int32_t* row = sums + r * PANEL;
                        vec low = as_floats(row), high = as_floats(row + 16);
                        if (terms == 2) {
                            low = low * 256.0f + as_floats(row + 16 * PANEL);
                            high = high * 256.0f + as_floats(row + 16 * PANEL + 16);
                        }
                        const float scale = row_scales[m + r];
                        write_panel_row(out + (m + r) * units + first, low * (scale_low * scale) + bias_low,
                                        high * (scale_high * scale) + bias_high, width, gated);
                    }
                }
            }
        }
    }
}

// Both tiles of 32 inputs: words of eight codes, lane l of word w holding rows 4 w .. 4 w + 3 of output l / 2 (low four bits of each
// byte) and of output 8 + l / 2 (high four bits).
struct NF4 {
    static constexpr int64_t CHUNK_BYTES = 512;
    __m512 table;
    __m512i twice, twice_above;
    explicit NF4(const float* codebook) : table(_mm512_loadu_ps(codebook)) {
        alignas(64) int32_t lanes[16];
        for (int i = 0; i < 16; i++) lanes[i] = i / 2;
        twice = _mm512_load_si512(lanes);
        twice_above = _mm512_add_epi32(twice, _mm512_set1_epi32(8));
    }
    void decode(const char* chunk, const float* absmax, uint16_t* tiles) const {
        for (int tile = 0; tile < 2; tile++) {
            const __m512 scale = _mm512_loadu_ps(absmax + 16 * tile);
            const __m512 below = _mm512_permutexvar_ps(twice, scale), above = _mm512_permutexvar_ps(twice_above, scale);
            for (int word = 0; word < 4; word++) {
                __m512i codes = _mm512_loadu_si512(chunk + tile * 256 + word * 64);
#pragma GCC unroll 4
                for (int n = 0; n < 4; n++) {
                    __m512 low = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * n), table), below);
                    __m512 high = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * n + 4), table), above);
                    _mm512_store_si512(tiles + tile * 512 + (4 * word + n) * 32, (__m512i)_mm512_cvtne2ps_pbh(high, low));
                }
            }
        }
    }
};

// Both tiles of 32 inputs, a byte an element. Normal numbers keep their bits and change the exponent's bias; the eight
// subnormal magnitudes come from a table.
struct FP8 {
    static constexpr int64_t CHUNK_BYTES = 1024;
    __m512i subnormals;
    explicit FP8(const float*) {
        alignas(64) uint16_t lanes[32] = {};
        for (int i = 0; i < 8; i++) lanes[i] = to_bf16_bits(float(i) / 512.0f);
        subnormals = _mm512_load_si512(lanes);
    }
    void decode(const char* chunk, const float*, uint16_t* tiles) const {
        const __m512i sign = _mm512_set1_epi16(0x80), rest = _mm512_set1_epi16(0x7f), exponent = _mm512_set1_epi16(0x78);
        for (int row = 0; row < 32; row++) {
            __m512i e = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(chunk + row * 32)));
            __m512i v = _mm512_add_epi16(_mm512_slli_epi16(_mm512_and_si512(e, rest), 4), _mm512_set1_epi16(120 << 7));
            v = _mm512_mask_permutexvar_epi16(v, _mm512_testn_epi16_mask(e, exponent), _mm512_and_si512(e, _mm512_set1_epi16(7)), subnormals);
            v = _mm512_or_si512(v, _mm512_slli_epi16(_mm512_and_si512(e, sign), 8));
            _mm512_store_si512(tiles + row * 32, v);
        }
    }
};

template <class Format>
void linear_decoded(const bf16* x, int64_t stride, const char* packed, const float* codebook, const float* absmax, const float* scales,
                    const float* bias, bf16* out, int64_t rows, int64_t num_out, int64_t num_in, bool gated, int threads) {
    constexpr int64_t DEPTH = 32, RING = 4;
    const int64_t depth = round_up(num_in, DEPTH), chunks = depth / DEPTH, padded_rows = round_up(rows, 32);
    const int64_t units = gated ? num_out / 2 : num_out, step = gated ? 16 : PANEL, panels = num_panels(num_out, gated);
    const int64_t absmax_step = round_up(num_in, NF4_BLOCK) / NF4_BLOCK * PANEL;
    static thread_local Scratch input_scratch;
    uint16_t* values = reinterpret_cast<uint16_t*>(input_scratch.get(padded_rows * depth * 2));
#pragma omp parallel num_threads(threads)
    {
        TileScope scope;
        const Format format(codebook);
        alignas(64) float sums[32 * PANEL];
        alignas(64) uint16_t ring[RING * TILE_BYTES];
        static thread_local Scratch scratch;
        // Few rows: a chunk is decoded just before its use. Many: the whole panel once, for all blocks of rows.
        const bool whole = rows > 32;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < padded_rows; r++)
            for (int64_t c = 0; c < chunks; c++) {
                // Rows beyond the last repeat it; their sums are not written.
                const int64_t left = num_in - c * DEPTH;
                const __mmask32 inside = left >= DEPTH ? ~0u : (1u << left) - 1;
                const bf16* from = x + (r < rows ? r : rows - 1) * stride + c * DEPTH;
                _mm512_store_si512(values + (r / 16 * chunks + c) * 512 + r % 16 * 32, _mm512_maskz_loadu_epi16(inside, from));
            }
        uint16_t* tiles = whole ? reinterpret_cast<uint16_t*>(scratch.get(chunks * 2 * TILE_BYTES)) : ring;
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; p++) {
            const char* panel = packed + p * chunks * Format::CHUNK_BYTES;
            const float* panel_absmax = absmax ? absmax + p * absmax_step : nullptr;
            const int64_t first = p * step, width = units - first < step ? units - first : step;
            const vec scale_low = load16(scales + p * PANEL), scale_high = load16(scales + p * PANEL + 16);
            const vec bias_low = load16(bias + p * PANEL), bias_high = load16(bias + p * PANEL + 16);
            auto decode = [&](int64_t c) {
                const char* chunk = panel + c * Format::CHUNK_BYTES;
                for (int64_t line = 0; line < Format::CHUNK_BYTES; line += 64) __builtin_prefetch(chunk + AHEAD + line, 0, 2);
                format.decode(chunk, panel_absmax ? panel_absmax + c / 2 * PANEL : nullptr, tiles + (whole ? c : c % RING) * TILE_BYTES);
            };
            if (whole)
                for (int64_t c = 0; c < chunks; c++) decode(c);
            for (int64_t m = 0; m < rows; m += 32) {
                const bool both = m + 16 < rows;
                const uint16_t *a = values + m / 16 * chunks * 512, *a2 = a + chunks * 512;
                zero_sums();
                if (!whole)
                    for (int64_t c = 0; c < RING - 1 && c < chunks; c++) decode(c);
                for (int64_t c = 0; c < chunks; c++) {
                    if (!whole && c + RING - 1 < chunks) decode(c + RING - 1);
                    const uint16_t* b = tiles + (whole ? c : c % RING) * TILE_BYTES;
                    _tile_loadd(4, a + c * 512, 64);
                    _tile_loadd(6, b, 64);
                    _tile_loadd(7, b + TILE_BYTES / 2, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    if (both) {
                        _tile_loadd(5, a2 + c * 512, 64);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                }
                store_sums(sums);
                const int64_t count = rows - m < 32 ? rows - m : 32;
                for (int64_t r = 0; r < count; r++) {
                    const float* row = sums + r * PANEL;
                    write_panel_row(out + (m + r) * units + first, load16(row) * scale_low + bias_low,
                                    load16(row + 16) * scale_high + bias_high, width, gated);
                }
            }
        }
    }
}

#endif

enum Kind { INT8, FP8_E4M3, NF4_BLOCKS };

// Byte of a panel that holds column j at input k, for elements of one byte that tiles take in groups of `group` inputs.
inline int64_t value_place(int64_t j, int64_t k, int64_t group) {
    const int64_t chunk = k / (16 * group), row = k % (16 * group) / group;
    return (chunk * 2 + j / 16) * 256 * group + row * 16 * group + j % 16 * group + k % group;
}
// The same for NF4: columns j and j + 8 share a byte.
inline int64_t nf4_place(int64_t j, int64_t k) {
    const int64_t row = k % 32 / 2, lane = j % 8 * 2 + k % 2;
    return k / 32 * 512 + j / 16 * 256 + row / 4 * 64 + lane * 4 + row % 4;
}

// Byte of element (o, k) in NF4's storage order; odd elements are in the high four bits.
inline int64_t nf4_byte(int64_t num_out, int64_t o, int64_t k) {
    const int64_t e = k % NF4_BLOCK;
    return ((k / NF4_BLOCK) * num_out + o) * 32 + e % 16 / 2 * 4 + e / 16;
}
inline uint32_t nf4_code(const uint8_t* codes, int64_t num_out, int64_t o, int64_t k) {
    return codes[nf4_byte(num_out, o, k)] >> (k % 2 * 4) & 15;
}
inline void put_nf4_code(uint8_t* codes, int64_t num_out, int64_t o, int64_t k, uint32_t code) {
    uint8_t& byte = codes[nf4_byte(num_out, o, k)];
    byte = k % 2 ? (byte & 15) | code << 4 : (byte & 0xf0) | code;
}

template <class T>
void dequantize_nf4_rows(const uint8_t* codes, const float* absmax, const float* codebook, T* out, int64_t num_out, int64_t num_in,
                         int threads) {
    const int64_t blocks = num_in / NF4_BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t o = 0; o < num_out; o++)
        for (int64_t block = 0; block < blocks; block++) {
            const uint8_t* bytes = codes + (block * num_out + o) * 32;
            const vec scale = splat(absmax[o * blocks + block]);
            T* to = out + o * num_in + block * NF4_BLOCK;
#ifdef __AVX512F__
            const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
            const __m512i shifts = _mm512_set_epi32(4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0);
            const __m512 table = _mm512_loadu_ps(codebook);
            __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)bytes));
            words = _mm512_srlv_epi32(_mm512_permutexvar_epi32(twice, words), shifts);
            for (int step = 0; step < 4; step++) {
                store16(to + 16 * step, (vec)_mm512_permutexvar_ps(words, table) * scale);
                words = _mm512_srli_epi32(words, 8);
            }
#else
            for (int step = 0; step < 4; step++) {
                float values[16];
                for (int i = 0; i < 16; i++) values[i] = codebook[bytes[i / 2 * 4 + step] >> (i % 2 * 4) & 15];
                store16(to + 16 * step, load16(values) * scale);
            }
#endif
        }
}

template <class T>
void dequantize_channel_rows(const uint8_t* values, int64_t stride, const float* scales, const float* table, T* out, int64_t num_out,
                             int64_t num_in, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t o = 0; o < num_out; o++) {
        const uint8_t* from = values + o * stride;
        const float scale = scales[o];
        T* to = out + o * num_in;
        for (int64_t k = 0; k < num_in; k++) store(to + k, (table ? table[from[k]] : float(int8_t(from[k]))) * scale);
    }
}

}  // namespace

extern "C" {

int quantized_linear_available() {
#ifdef HAVE_AMX
    return amx_permitted();
#else
    return 0;
#endif
}

int64_t quantized_linear_bytes(int kind, int64_t num_out, int64_t num_in, int gated) {
    const int64_t outputs = num_panels(num_out, gated) * PANEL;
    return kind == NF4_BLOCKS ? outputs * num_in / 2 : outputs * round_up(num_in, kind == INT8 ? 64 : 32);
}

void* quantized_linear_allocate(int64_t bytes) { return allocate_weights(bytes); }
void quantized_linear_free(void* memory) { std::free(memory); }

// values: int8 or fp8 [num_out, num_in] with rows `stride` apart, or NF4's codes -> packed, aligned to 64 bytes.
void quantized_linear_pack(int kind, const uint8_t* values, int64_t stride, int64_t num_out, int64_t num_in, int gated, uint8_t* packed,
                           int threads) {
    const int64_t panels = num_panels(num_out, gated), group = kind == INT8 ? 4 : 2;
    const int64_t depth = round_up(num_in, 16 * group), panel_bytes = PANEL * (kind == NF4_BLOCKS ? num_in / 2 : depth);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < panels; p++) {
        uint8_t* panel = packed + p * panel_bytes;
        if (kind == NF4_BLOCKS) std::memset(panel, 0, panel_bytes);
        for (int64_t j = 0; j < PANEL; j++) {
            const int64_t o = output_of(p, j, num_out, gated);
            for (int64_t k = 0; k < depth; k++) {
                if (kind != NF4_BLOCKS)
                    panel[value_place(j, k, group)] = o >= 0 && k < num_in ? values[o * stride + k] : 0;
                else if (o >= 0)
                    panel[nf4_place(j, k)] |= nf4_code(values, num_out, o, k) << (j % 16 / 8 * 4);
            }
        }
    }
}

// The way back: values [num_out, num_in] in whole rows, or NF4's codes.
void quantized_linear_unpack(int kind, const uint8_t* packed, int64_t num_out, int64_t num_in, int gated, uint8_t* values, int threads) {
    const int64_t panels = num_panels(num_out, gated), group = kind == INT8 ? 4 : 2;
    const int64_t panel_bytes = PANEL * (kind == NF4_BLOCKS ? num_in / 2 : round_up(num_in, 16 * group));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t j = 0; j < PANEL; j++) {
            const int64_t o = output_of(p, j, num_out, gated);
            for (int64_t k = 0; o >= 0 && k < num_in; k++) {
                const uint8_t* from = packed + p * panel_bytes;
                if (kind != NF4_BLOCKS)
                    values[o * num_in + k] = from[value_place(j, k, group)];
                else
                    put_nf4_code(values, num_out, o, k, from[nf4_place(j, k)] >> (j % 16 / 8 * 4) & 15);
            }
        }
}

// x [rows, num_in] with rows `stride` apart; out [rows, num_out], or [rows, num_out / 2] of silu(gate) * up when gated. absmax and
// codebook belong to NF4, terms (1 or 2) to int8.
void quantized_linear(int kind, const bf16* x, int64_t stride, const char* packed, const float* codebook, const float* absmax,
                      const float* scales, const float* bias, bf16* out, int64_t rows, int64_t num_out, int64_t num_in, int gated, int terms,
                      int threads) {
#ifdef HAVE_AMX
    if (kind == INT8) linear_int8(x, stride, packed, scales, bias, out, rows, num_out, num_in, gated, terms, threads);
    if (kind == FP8_E4M3)
        linear_decoded<FP8>(x, stride, packed, codebook, nullptr, scales, bias, out, rows, num_out, num_in, gated, threads);
    if (kind == NF4_BLOCKS)
        linear_decoded<NF4>(x, stride, packed, codebook, absmax, scales, bias, out, rows, num_out, num_in, gated, threads);
#else
    (void)kind, (void)x, (void)stride, (void)packed, (void)codebook, (void)absmax, (void)scales, (void)bias, (void)out, (void)rows;
    (void)num_out, (void)num_in, (void)gated, (void)terms, (void)threads;
#endif
}

// absmax [num_out, num_in / 64]; out [num_out, num_in] in the dtype of `code` (0: f32, 1: bf16, 2: fp16).
void dequantize_nf4(const uint8_t* codes, const float* absmax, const float* codebook, void* out, int code, int64_t num_out, int64_t num_in,
                    int threads) {
    if (code == 0) dequantize_nf4_rows(codes, absmax, codebook, static_cast<float*>(out), num_out, num_in, threads);
    if (code == 1) dequantize_nf4_rows(codes, absmax, codebook, static_cast<bf16*>(out), num_out, num_in, threads);
    if (code == 2) dequantize_nf4_rows(codes, absmax, codebook, static_cast<fp16*>(out), num_out, num_in, threads);
}

// values: int8, or with a table of 256 whatever its bytes mean.
void dequantize_channelwise(const uint8_t* values, int64_t stride, const float* scales, const float* table, void* out, int code,
                            int64_t num_out, int64_t num_in, int threads) {
    if (code == 0) dequantize_channel_rows(values, stride, scales, table, static_cast<float*>(out), num_out, num_in, threads);
    if (code == 1) dequantize_channel_rows(values, stride, scales, table, static_cast<bf16*>(out), num_out, num_in, threads);
    if (code == 2) dequantize_channel_rows(values, stride, scales, table, static_cast<fp16*>(out), num_out, num_in, threads);
}
}
