// Number formats and elementary functions shared by the C++ twins. Everything is written as plain loops over rows that the
// compiler vectorises for the machine at hand; arithmetic is fp32, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    _Float16 value;
};

static inline float bits_to_float(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
static inline uint32_t float_to_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}

static inline float load(const float* p) { return *p; }
static inline float load(const bf16* p) { return bits_to_float(uint32_t(p->bits) << 16); }
static inline float load(const fp16* p) { return float(p->value); }
static inline float load(const int8_t* p) { return float(*p); }

static inline uint16_t to_bf16_bits(float f) {
    uint32_t u = float_to_bits(f);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return uint16_t(f != f ? 0x7fc0u : rounded);
}

static inline void store(float* p, float f) { *p = f; }
static inline void store(bf16* p, float f) { p->bits = to_bf16_bits(f); }
static inline void store(fp16* p, float f) { p->value = _Float16(f); }

// What a value becomes when it is stored and read back.
static inline float rounded(float f, const float*) { return f; }
static inline float rounded(float f, const bf16*) { return bits_to_float(uint32_t(to_bf16_bits(f)) << 16); }
static inline float rounded(float f, const fp16*) { return float(_Float16(f)); }

// e^x to about 2 ulp for x in [-87, 88]; below it returns a number under 1e-37, above it the value at 88.
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    float shifted = x * 1.44269504088896341f + magic;
    float n = shifted - magic;
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t exponent = int32_t(n) + 127;
    return p * bits_to_float(uint32_t(exponent) << 23);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }
