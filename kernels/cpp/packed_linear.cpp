// y = x W^T + b in bf16 for few rows, where reading W is what costs: W lies in memory in the order in which AMX tiles take it.
//
// A panel (panels.h) is 32 outputs by K; of each 32 inputs it holds two tiles of 16 pairs by 16 outputs, one kilobyte each.
// Sums run over K in one order: a row's result does not depend on the other rows nor on the number of threads.

#include "gemm_bf16.h"
#include "panels.h"

namespace {

constexpr int64_t DEPTH = 32, TILE_BYTES = 1024;
constexpr int64_t AHEAD = 16384;  // bytes of W asked for before they are needed

}  // namespace

extern "C" {

int packed_linear_available() {
#ifdef HAVE_AMX
    return amx_permitted();
#else
    return 0;
#endif
}

int64_t packed_linear_bytes(int64_t num_out, int64_t num_in) {
    return round_up(num_out, 2 * PANEL) * round_up(num_in, DEPTH) * 2;
}

// weight [num_out, num_in], rows `stride` elements apart -> packed, which is aligned to 64 bytes.
void packed_linear_pack(const uint16_t* weight, int64_t stride, int64_t num_out, int64_t num_in, int gated, uint16_t* packed) {
    const int64_t depth = round_up(num_in, DEPTH), panels = num_panels(num_out, gated);
    for (int64_t p = 0; p < panels; p++)
        for (int64_t k = 0; k < depth; k++)
            for (int64_t j = 0; j < PANEL; j++) {
                int64_t out = output_of(p, j, num_out, gated);
                uint16_t value = out >= 0 && k < num_in ? weight[out * stride + k] : 0;
                int64_t tile = (p * (depth / DEPTH) + k / DEPTH) * 2 + j / 16;
                packed[tile * (TILE_BYTES / 2) + (k % DEPTH) / 2 * 32 + (j % 16) * 2 + k % 2] = value;
            }
}

void* packed_linear_allocate(int64_t bytes) { return allocate_weights(bytes); }
void packed_linear_free(void* memory) { std::free(memory); }

// x [rows, num_in] with rows `stride` apart; out [rows, num_out], or [rows, num_out / 2] of silu(gate) * up when gated.
void packed_linear(const bf16* x, int64_t stride, const uint16_t* packed, const bf16* bias, bf16* out, int64_t rows,
                   int64_t num_out, int64_t num_in, int gated, int threads) {
#ifdef HAVE_AMX
    const int64_t depth = round_up(num_in, DEPTH), padded_rows = round_up(rows, 16), chunks = depth / DEPTH;
    const int64_t units = gated ? num_out / 2 : num_out, step = gated ? 16 : PANEL, panels = num_panels(num_out, gated);
    bf16* copy = nullptr;
    if (rows % 16 || num_in % DEPTH) {
        static thread_local Scratch scratch;
        copy = reinterpret_cast<bf16*>(scratch.get(padded_rows * depth * 2));
        for (int64_t r = 0; r < padded_rows; r++) {
            bf16* row = copy + r * depth;
            int64_t count = r < rows ? num_in : 0;
            if (count) std::memcpy(row, x + r * stride, count * 2);
            std::memset(row + count, 0, (depth - count) * 2);
        }
        x = copy;
        stride = depth;
    }
#pragma omp parallel num_threads(threads)
    {
        TileScope scope;
        alignas(64) float sums[32 * PANEL];
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; p++) {
            const char* panel = reinterpret_cast<const char*>(packed) + p * chunks * 2 * TILE_BYTES;
            for (int64_t m = 0; m < padded_rows; m += 32) {
                const bool both = m + 16 < padded_rows;
                const bf16 *a = x + m * stride, *a2 = a + 16 * stride;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int64_t c = 0; c < chunks; c++) {
                    const char* b = panel + c * 2 * TILE_BYTES;
                    if (m == 0)
                        for (int64_t line = 0; line < 2 * TILE_BYTES; line += 64) __builtin_prefetch(b + AHEAD + line, 0, 2);
                    _tile_loadd(4, a + c * DEPTH, stride * 2);
                    _tile_loadd(6, b, 64);
                    _tile_loadd(7, b + TILE_BYTES, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    if (both) {
                        _tile_loadd(5, a2 + c * DEPTH, stride * 2);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                }
                _tile_stored(0, sums, PANEL * 4);
                _tile_stored(1, sums + 16, PANEL * 4);
                if (both) {
                    _tile_stored(2, sums + 16 * PANEL, PANEL * 4);
                    _tile_stored(3, sums + 16 * PANEL + 16, PANEL * 4);
                }
                const int64_t count = rows - m < 32 ? rows - m : 32;
                const int64_t first = p * step, width = units - first < step ? units - first : step;
                for (int64_t r = 0; r < count; r++) {
                    vec low = load16(sums + r * PANEL), high = load16(sums + r * PANEL + 16);
                    bf16* to = out + (m + r) * units + first;
                    if (bias) {
                        low += load_upto16(bias + first, gated || width < 16 ? width : 16);
                        if (gated)
                            high += load_upto16(bias + units + first, width);
                        else if (width > 16)
                            high += load_upto16(bias + first + 16, width - 16);
                    }
                    write_panel_row(to, low, high, width, gated);
                }
            }
        }
    }
#else
    (void)x, (void)stride, (void)packed, (void)bias, (void)out, (void)rows, (void)num_out, (void)num_in, (void)gated, (void)threads;
#endif
}
}
