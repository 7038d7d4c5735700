// Sampling twin for CPUs: one row a thread at a time, no sort of the vocabulary.
//
// With e = exp(l / temperature - max), the ranks that top-k and top-p ask for are found from a histogram over the leading
// bits of e (positive floats order as their bits do): mass and count of whole bins from the top, then a sort of the one bin
// in which the limit falls. Sums run in a fixed order in fp64, so a row's result depends on nothing but the row.

#include <algorithm>
#include <cmath>
#include <vector>

#include "numeric.h"

namespace {

constexpr int BIN_SHIFT = 18;                            // five mantissa bits a bin: 3 % wide
constexpr int NUM_BINS = (0x3f800000 >> BIN_SHIFT) + 1;  // e is in [0, 1]
constexpr int64_t BLOCK = 1024;                          // summed in fp32 lanes, blocks in fp64

struct Ranked {
    float value;
    int64_t id;
    bool operator<(const Ranked& other) const { return value != other.value ? value > other.value : id < other.id; }
};

struct Scratch {
    std::vector<float> exps;
    std::vector<double> block_sums, mass;
    std::vector<int64_t> count, candidates;
    int64_t num_candidates = 0;
    std::vector<Ranked> members;
};

uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

double uniform(int64_t key, int64_t step) {
    uint64_t bits = mix64(mix64(uint64_t(key)) + (uint64_t(step) + 1) * 0x9e3779b97f4a7c15ull);
    return double(bits >> 11) * 0x1p-53;
}

float maximum(const float* x, int64_t n) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
    return most;
}

// out[i] = exp(scale * (x[i] - most)); returns the sum.
double exponentials(const float* x, int64_t n, float most, float scale, float* out) {
    double total = 0.0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t stop = std::min(start + BLOCK, n);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < stop; i++) {
            float shifted = scale * (x[i] - most);
            float e = shifted >= -87.0f ? fast_exp(shifted) : 0.0f;  // 0 for a NaN, too
            out[i] = e;
            sum += e;
        }
        total += double(sum);
    }
    return total;
}

// Mass and count by bin of the tokens with e ≥ floor, the candidates; returns how many those are.
int64_t fill_bins(Scratch& s, int64_t n, float floor) {
    const float* e = s.exps.data();
    int64_t* candidates = s.candidates.data();
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {  // no branch to mispredict
        candidates[found] = i;
        found += e[i] >= floor;
    }
    s.num_candidates = found;
    std::fill(s.mass.begin(), s.mass.end(), 0.0);
    std::fill(s.count.begin(), s.count.end(), 0);
    for (int64_t j = 0; j < found; j++) {
        float value = e[candidates[j]];
        int bin = int(float_to_bits(value) >> BIN_SHIFT);
        s.mass[bin] += double(value);
        s.count[bin] += 1;
    }
    return found;
}

void rank_bin(Scratch& s, int bin) {
    s.members.clear();
    for (int64_t j = 0; j < s.num_candidates; j++) {
        int64_t i = s.candidates[j];
        if (int(float_to_bits(s.exps[i]) >> BIN_SHIFT) == bin) s.members.push_back({s.exps[i], i});
    }
    std::sort(s.members.begin(), s.members.end());
}

// The last token kept, in rank order. Tokens ranked after it go.
Ranked last_kept(Scratch& s, int64_t n, double total, int64_t top_k, double top_p) {
    const Ranked everything{-1.0f, n};
    Ranked last = everything;
    // A floor keeps most of the vocabulary out of the bins. All tokens under the second one together weigh less than what
    // top-p leaves out; under the first there may be some of the top k, and then it is lowered to 0.
    bool by_count = top_k > 0 && top_k < n;
    float floor = by_count ? 1e-4f : float(0.5 * (1.0 - top_p) * total / double(n));
    if (fill_bins(s, n, floor) < (by_count ? top_k : 0)) fill_bins(s, n, 0.0f);
    if (by_count) {
        int bin = NUM_BINS - 1;
        int64_t above = 0;
        double mass_above = 0.0;
        while (above + s.count[bin] < top_k) {
            above += s.count[bin];
            mass_above += s.mass[bin--];
        }
        rank_bin(s, bin);
        for (int64_t i = 0; i < top_k - above; i++) mass_above += double(s.members[i].value);
        last = s.members[top_k - above - 1];
        total = mass_above;
    }
    if (top_p < 1.0) {
        double limit = top_p * total, running = 0.0;
        int bin = NUM_BINS - 1;
        while (bin >= 0 && running + s.mass[bin] < limit) running += s.mass[bin--];
        if (bin >= 0) {
            rank_bin(s, bin);
            size_t place = 0;
            while (place < s.members.size() && running < limit) running += double(s.members[place++].value);
            // No member needed: the bin above ended the nucleus, and its mass was only rounded below the limit.
            if (place > 0 && s.members[place - 1] < last) last = s.members[place - 1];
        }
    }
    return last;
}

int64_t draw(Scratch& s, int64_t n, Ranked last, float least, double u) {
    int64_t num_blocks = (n + BLOCK - 1) / BLOCK;
    s.block_sums.assign(size_t(num_blocks), 0.0);
    double total = 0.0;
    for (int64_t b = 0; b < num_blocks; b++) {
        int64_t start = b * BLOCK, stop = std::min(start + BLOCK, n);
        float* e = s.exps.data();
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < stop; i++) {
            bool kept = e[i] >= least && (e[i] > last.value || (e[i] == last.value && i <= last.id));
            e[i] = kept ? e[i] : 0.0f;
            sum += e[i];
        }
        s.block_sums[b] = double(sum);
        total += double(sum);
    }
    double target = u * total, running = 0.0;
    int64_t chosen = 0;
    for (int64_t b = 0; b < num_blocks; b++) {
        if (s.block_sums[b] == 0.0) continue;
        if (running + s.block_sums[b] <= target && running + s.block_sums[b] < total) {
            running += s.block_sums[b];
            continue;
        }
        // Rounding may let the block's own running sum end short of the target: then its last kept token is drawn.
        for (int64_t i = b * BLOCK; i < std::min((b + 1) * BLOCK, n); i++) {
            if (s.exps[i] == 0.0f) continue;
            chosen = i;
            running += double(s.exps[i]);
            if (running > target) break;
        }
        break;
    }
    return chosen;
}

template <class T>
void sample_row(const T* logits, int64_t n, const uint8_t* seen, float penalty, float temperature, int64_t top_k, float top_p,
                float min_p, double u, Scratch& s, float* wide, int64_t* token_id, float* logprob) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) wide[i] = load(logits + i);
    float most = maximum(wide, n);
    float* exps = s.exps.data();
    double raw_total = exponentials(wide, n, most, 1.0f, exps), total = raw_total;
    float raw_most = most;
    bool changed = seen != nullptr && penalty != 1.0f;
    if (changed) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float l = wide[i];
            wide[i] = seen[i] ? (l > 0.0f ? l / penalty : l * penalty) : l;
        }
        most = maximum(wide, n);
    }
    int64_t chosen = 0;
    if (temperature == 0.0f || !std::isfinite(most)) {
        while (chosen + 1 < n && wide[chosen] != most) chosen++;
    } else {
        if (changed || temperature != 1.0f) total = exponentials(wide, n, most, 1.0f / temperature, exps);
        bool ranked = (top_k > 0 && top_k < n) || top_p < 1.0f;
        Ranked last = ranked ? last_kept(s, n, total, top_k, double(top_p)) : Ranked{-1.0f, n};
        chosen = draw(s, n, last, min_p, u);
    }
    *token_id = chosen;
    *logprob = float(double(load(logits + chosen)) - double(raw_most) - std::log(raw_total));
}

template <class T>
void sample_all(const T* logits, int64_t stride, int64_t rows, int64_t n, const int64_t* keys, const int64_t* steps,
                const float* temperature, const int32_t* top_k, const float* top_p, const float* min_p, const float* penalty,
                const uint8_t* seen, int64_t seen_stride, int64_t* token_ids, float* logprobs, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
    {
        Scratch s;
        s.exps.resize(size_t(n));
        s.mass.resize(NUM_BINS);
        s.count.resize(NUM_BINS);
        s.candidates.resize(size_t(n) + 1);
        std::vector<float> wide(static_cast<size_t>(n));
#pragma omp for schedule(dynamic)
        for (int64_t r = 0; r < rows; r++)
            sample_row(logits + r * stride, n, seen ? seen + r * seen_stride : nullptr, penalty ? penalty[r] : 1.0f,
                       temperature[r], top_k[r], top_p[r], min_p[r], uniform(keys[r], steps[r]), s, wide.data(),
                       token_ids + r, logprobs + r);
    }
}

}  // namespace

// dtype: 0 fp32, 1 bf16, 2 fp16.
extern "C" void sample_rows(const void* logits, int64_t stride, int64_t rows, int64_t n, const int64_t* keys,
                            const int64_t* steps, const float* temperature, const int32_t* top_k, const float* top_p,
                            const float* min_p, const float* penalty, const uint8_t* seen, int64_t seen_stride,
                            int64_t* token_ids, float* logprobs, int dtype, int threads) {
#define SAMPLE(T)                                                                                                       \
    sample_all((const T*)logits, stride, rows, n, keys, steps, temperature, top_k, top_p, min_p, penalty, seen, seen_stride, \
               token_ids, logprobs, threads)
    if (dtype == 0)
        SAMPLE(float);
    else if (dtype == 1)
        SAMPLE(bf16);
    else
        SAMPLE(fp16);
}
