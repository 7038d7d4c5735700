// Row-wise ops on 16 lanes, forward and backward: RMS norm and layer norm (optionally of a sum), rotary embedding, SwiGLU.
//
// Rows may lie two levels deep: row r of an [T, N, D] view starts at (r / N) * stride_t + (r % N) * stride_n. Results are
// contiguous. Each row is computed by one thread in one order, so results do not depend on the number of threads.
// dtype: 0 fp32, 1 bf16, 2 fp16.

#include <cmath>

#include "vectors.h"

namespace {

constexpr int64_t MIN_PARALLEL = 16384;  // elements; below this one thread is faster

struct Rows {
    int64_t count, inner, stride_outer, stride_inner;
    int64_t offset(int64_t row) const { return (row / inner) * stride_outer + (row % inner) * stride_inner; }
};

template <class Body>
inline void each_row(int64_t rows, int64_t cols, int threads, Body body) {
    if (threads <= 1 || rows * cols < MIN_PARALLEL) {
        for (int64_t r = 0; r < rows; r++) body(r);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) body(r);
}

template <class T>
void norm_forward(const T* x, Rows at, const T* residual, const T* weight, const T* bias, T* y, T* sum, int64_t cols, float eps,
                  bool centre, int threads) {
    each_row(at.count, cols, threads, [&](int64_t r) {
        const T* h = x + at.offset(r);
        T* out = y + r * cols;
        vec total = splat(0.0f), square = splat(0.0f);
        if (residual) {
            const T* other = residual + r * cols;
            T* into = sum + r * cols;
            for (int64_t i = 0; i < cols; i += 16) {
                const int64_t n = cols - i;
                store_upto16(into + i, load_upto16(h + i, n) + load_upto16(other + i, n), n);
            }
            h = into;
        }
        float mean = 0.0f;
        if (centre) {
            for (int64_t i = 0; i < cols; i += 16) total += load_upto16(h + i, cols - i);
            mean = sum_lanes(total) / float(cols);
        }
        for (int64_t i = 0; i < cols; i += 16) {
            vec d = load_upto16(h + i, cols - i) - mean;
            square += d * d;
        }
        const float padding = float((16 - cols % 16) % 16) * mean * mean;  // what the lanes beyond the row added
        const float scale = 1.0f / std::sqrt((sum_lanes(square) - padding) / float(cols) + eps);
        for (int64_t i = 0; i < cols; i += 16) {
            const int64_t n = cols - i;
            vec v = (load_upto16(h + i, n) - mean) * scale * load_upto16(weight + i, n);
            if (bias) v += load_upto16(bias + i, n);
            store_upto16(out + i, v, n);
        }
    });
}

// dx = scale * (g - mean(g) - xhat * mean(g * xhat)) + dsum with g = dy * weight; mean(g) only where the norm centres.
template <class T>
void norm_backward(const T* h, Rows at, const T* weight, const T* dy, const T* dsum, T* dx, int64_t cols, float eps, bool centre,
                   int threads) {
    each_row(at.count, cols, threads, [&](int64_t r) {
        const T* x = h + at.offset(r);
        const T* g = dy + r * cols;
        T* out = dx + r * cols;
        vec total = splat(0.0f), square = splat(0.0f), sum_g = splat(0.0f), dot = splat(0.0f);
        float mean = 0.0f;
        if (centre) {
            for (int64_t i = 0; i < cols; i += 16) total += load_upto16(x + i, cols - i);
            mean = sum_lanes(total) / float(cols);
        }
        for (int64_t i = 0; i < cols; i += 16) {
            const int64_t n = cols - i;
            vec d = load_upto16(x + i, n) - mean, w = load_upto16(g + i, n) * load_upto16(weight + i, n);
            square += d * d;
            sum_g += w;
            dot += w * d;
        }
        const float padding = float((16 - cols % 16) % 16) * mean * mean;
        const float scale = 1.0f / std::sqrt((sum_lanes(square) - padding) / float(cols) + eps);
        const float slope = sum_lanes(dot) * scale * scale / float(cols);
        const float shift = centre ? sum_lanes(sum_g) / float(cols) : 0.0f;
        const T* more = dsum ? dsum + r * cols : nullptr;
        for (int64_t i = 0; i < cols; i += 16) {
            const int64_t n = cols - i;
            vec w = load_upto16(g + i, n) * load_upto16(weight + i, n);
            vec v = (w - shift - (load_upto16(x + i, n) - mean) * slope) * scale;
            if (more) v += load_upto16(more + i, n);
            store_upto16(out + i, v, n);
        }
    });
}

template <class T>
void rope_rotate(const T* x, Rows at, const float* cos, const float* sin, const int64_t* positions, T* y, int64_t half, float sign,
                 int threads) {
    each_row(at.count, 2 * half, threads, [&](int64_t r) {
        const T* in = x + at.offset(r);
        T* out = y + r * 2 * half;
        const float* c = cos + positions[r / at.inner] * half;
        const float* s = sin + positions[r / at.inner] * half;
        for (int64_t i = 0; i < half; i += 16) {
            const int64_t n = half - i;
            vec a = load_upto16(in + i, n), b = load_upto16(in + half + i, n);
            vec co = load_upto16(c + i, n), si = load_upto16(s + i, n) * sign;
            store_upto16(out + i, a * co - b * si, n);
            store_upto16(out + half + i, b * co + a * si, n);
        }
    });
}

inline vec sigmoid16(vec x) { return 1.0f / (1.0f + exp16(-x)); }

template <class T>
void swiglu_forward(const T* x, int64_t stride, T* y, int64_t rows, int64_t half, int threads) {
    each_row(rows, 2 * half, threads, [&](int64_t r) {
        const T* in = x + r * stride;
        T* out = y + r * half;
        for (int64_t i = 0; i < half; i += 16) {
            const int64_t n = half - i;
            vec g = load_upto16(in + i, n);
            store_upto16(out + i, g * sigmoid16(g) * load_upto16(in + half + i, n), n);
        }
    });
}

template <class T>
void swiglu_backward(const T* x, int64_t stride, const T* dy, T* dx, int64_t rows, int64_t half, int threads) {
    each_row(rows, 2 * half, threads, [&](int64_t r) {
        const T* in = x + r * stride;
        const T* d = dy + r * half;
        T* out = dx + r * 2 * half;
        for (int64_t i = 0; i < half; i += 16) {
            const int64_t n = half - i;
            vec g = load_upto16(in + i, n), u = load_upto16(in + half + i, n), dd = load_upto16(d + i, n), s = sigmoid16(g);
            store_upto16(out + i, dd * u * s * (1.0f + g * (1.0f - s)), n);
            store_upto16(out + half + i, dd * g * s, n);
        }
    });
}

}  // namespace

#define DISPATCH(dtype, call)          \
    if (dtype == 0) {                  \
        using T = float;               \
        call;                          \
    } else if (dtype == 1) {           \
        using T = bf16;                \
        call;                          \
    } else {                           \
        using T = fp16;                \
        call;                          \
    }

extern "C" {

void norm_forward_rows(const void* x, const void* residual, const void* weight, const void* bias, void* y, void* sum,
                       int64_t rows, int64_t inner, int64_t stride_outer, int64_t stride_inner, int64_t cols, float eps,
                       int centre, int dtype, int threads) {
    Rows at{rows, inner, stride_outer, stride_inner};
    DISPATCH(dtype, (norm_forward<T>((const T*)x, at, (const T*)residual, (const T*)weight, (const T*)bias, (T*)y, (T*)sum,
                                     cols, eps, centre != 0, threads)))
}

void norm_backward_rows(const void* h, const void* weight, const void* dy, const void* dsum, void* dx, int64_t rows,
                        int64_t inner, int64_t stride_outer, int64_t stride_inner, int64_t cols, float eps, int centre,
                        int dtype, int threads) {
    Rows at{rows, inner, stride_outer, stride_inner};
    DISPATCH(dtype, (norm_backward<T>((const T*)h, at, (const T*)weight, (const T*)dy, (const T*)dsum, (T*)dx, cols, eps,
                                      centre != 0, threads)))
}

void rope_rows(const void* x, const float* cos, const float* sin, const int64_t* positions, void* y, int64_t rows,
               int64_t inner, int64_t stride_outer, int64_t stride_inner, int64_t half, float sign, int dtype, int threads) {
    Rows at{rows, inner, stride_outer, stride_inner};
    DISPATCH(dtype, (rope_rotate<T>((const T*)x, at, cos, sin, positions, (T*)y, half, sign, threads)))
}

void swiglu_forward_rows(const void* x, int64_t stride, void* y, int64_t rows, int64_t half, int dtype, int threads) {
    DISPATCH(dtype, (swiglu_forward<T>((const T*)x, stride, (T*)y, rows, half, threads)))
}

void swiglu_backward_rows(const void* x, int64_t stride, const void* dy, void* dx, int64_t rows, int64_t half, int dtype,
                          int threads) {
    DISPATCH(dtype, (swiglu_backward<T>((const T*)x, stride, (const T*)dy, (T*)dx, rows, half, threads)))
}

}  // extern "C"
