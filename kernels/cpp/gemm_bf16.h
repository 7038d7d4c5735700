// C[M,N] (+)= A[M,K] B[K,N] in bf16 with fp32 accumulation, for operands that lie in the cache: by AMX tiles where the CPU
// has them, else by AVX-512 BF16 dot products, else by plain loops.
//
// A is row-major. B is packed in pairs of rows: word [k / 2][n] holds B[k][n] in its low and B[k + 1][n] in its high half.
// M and N are multiples of 32, K of 32.
#pragma once

#include "numeric.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAVE_AMX 1
#elif defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#ifdef HAVE_AMX
// The kernel hands out tile state to processes that ask for it.
static inline bool amx_permitted() {
    static const bool permitted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return permitted;
}

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Holds the tile registers of a thread configured as eight tiles of 16 rows by 64 bytes.
struct TileScope {
    bool active;
    TileScope() : active(amx_permitted()) {
        if (!active) return;
        TileConfig config;
        for (int i = 0; i < 8; i++) {
            config.column_bytes[i] = 64;
            config.rows[i] = 16;
        }
        _tile_loadconfig(&config);
    }
    ~TileScope() {
        if (active) _tile_release();
    }
};

static void gemm_amx(int64_t M, int64_t N, int64_t K, const bf16* A, int64_t lda, const uint32_t* B, int64_t ldb, float* C,
                            int64_t ldc, bool accumulate) {
    for (int64_t n = 0; n < N; n += 32) {
        for (int64_t m = 0; m < M; m += 32) {
            float* c = C + m * ldc + n;
            if (accumulate) {
                _tile_loadd(0, c, ldc * 4);
                _tile_loadd(1, c + 16, ldc * 4);
                _tile_loadd(2, c + 16 * ldc, ldc * 4);
                _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t k = 0; k < K; k += 32) {
                const bf16* a = A + m * lda + k;
                const uint32_t* b = B + (k / 2) * ldb + n;
                _tile_loadd(4, a, lda * 2);
                _tile_loadd(6, b, ldb * 4);
                _tile_loadd(7, b + 16, ldb * 4);
                _tile_loadd(5, a + 16 * lda, lda * 2);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, c, ldc * 4);
            _tile_stored(1, c + 16, ldc * 4);
            _tile_stored(2, c + 16 * ldc, ldc * 4);
            _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
        }
    }
}
#else
struct TileScope {
    TileScope() {}
};
#endif

static inline uint32_t load_pair(const bf16* a) {
    uint32_t word;
    std::memcpy(&word, a, 4);
    return word;
}

static inline void gemm_plain(int64_t M, int64_t N, int64_t K, const bf16* A, int64_t lda, const uint32_t* B, int64_t ldb,
                              float* C, int64_t ldc, bool accumulate) {
#ifdef __AVX512BF16__
    for (int64_t n = 0; n < N; n += 32) {
        for (int64_t m = 0; m < M; m += 8) {
            __m512 sums[8][2];
            for (int i = 0; i < 8; i++)
                for (int j = 0; j < 2; j++)
                    sums[i][j] = accumulate ? _mm512_loadu_ps(C + (m + i) * ldc + n + 16 * j) : _mm512_setzero_ps();
            for (int64_t k = 0; k < K; k += 2) {
                __m512bh b0 = (__m512bh)_mm512_loadu_si512(B + (k / 2) * ldb + n);
                __m512bh b1 = (__m512bh)_mm512_loadu_si512(B + (k / 2) * ldb + n + 16);
                for (int i = 0; i < 8; i++) {
                    __m512bh a = (__m512bh)_mm512_set1_epi32(int(load_pair(A + (m + i) * lda + k)));
                    sums[i][0] = _mm512_dpbf16_ps(sums[i][0], a, b0);
                    sums[i][1] = _mm512_dpbf16_ps(sums[i][1], a, b1);
                }
            }
            for (int i = 0; i < 8; i++)
                for (int j = 0; j < 2; j++) _mm512_storeu_ps(C + (m + i) * ldc + n + 16 * j, sums[i][j]);
        }
    }
#else
    for (int64_t m = 0; m < M; m++) {
        float* c = C + m * ldc;
        if (!accumulate)
            for (int64_t n = 0; n < N; n++) c[n] = 0.0f;
        for (int64_t k = 0; k < K; k += 2) {
            const float a0 = load(A + m * lda + k), a1 = load(A + m * lda + k + 1);
            const uint32_t* b = B + (k / 2) * ldb;
#pragma omp simd
            for (int64_t n = 0; n < N; n++) c[n] += a0 * bits_to_float(b[n] << 16) + a1 * bits_to_float(b[n] & 0xffff0000u);
        }
    }
#endif
}

// Needs a TileScope alive in the calling thread.
static inline void gemm_bf16(int64_t M, int64_t N, int64_t K, const bf16* A, int64_t lda, const uint32_t* B, int64_t ldb, float* C,
                             int64_t ldc, bool accumulate) {
#ifdef HAVE_AMX
    if (amx_permitted()) {
        gemm_amx(M, N, K, A, lda, B, ldb, C, ldc, accumulate);
        return;
    }
#endif
    gemm_plain(M, N, K, A, lda, B, ldb, C, ldc, accumulate);
}
