// Sequences with one query, and the prefixes that several of them share.
//
// Keys are taken in tiles of 64, counted from position 0, with an online softmax in fp32; every SPAN keys begin a state of
// their own, and a row's states are merged in order. So a row's bits depend on its own position alone: not on the batch, the
// threads, the page size, nor on whether a prefix was read for this row or for many.
//
// An engine (paged_vector.h, paged_matrix.h) does a tile for any number of rows that look at the same key/value head. Its
// state of a row is the sums over values, 16 partial totals of the weights, and the peak that they are relative to.
#pragma once

#include <atomic>
#include <new>

#include "paged_matrix.h"
#include "paged_vector.h"

namespace {

constexpr int64_t SPAN = 512;        // keys of one state
constexpr int64_t PREFIX_ROWS = 64;  // rows of one item over a shared prefix

inline int64_t state_floats(const Call& c) { return padded(c.dim) + 32; }

// States [decode][head][span] that outlive an item: of shared prefixes, and of sequences whose spans are separate items.
struct States {
    float* data = nullptr;
    int64_t spans = 0;
    float* at(const Call& c, int64_t sequence, int64_t head, int64_t span) const {
        return data + ((sequence * c.heads + head) * spans + span) * state_floats(c);
    }
};

// Heads kv_head ... kv_head_end of one sequence or of the members ... members_end, keys begin ... end.
struct Item {
    enum Kind : int32_t { CHUNK, DECODE, PREFIX } kind;
    int32_t sequence, sequence_end, kv_head, kv_head_end, query, query_end;
    int64_t begin, end;
};

inline Row make_row(const Call& c, int64_t sequence, int64_t head) {
    const int64_t position = c.context_lens[sequence] - 1;
    return {c.query_starts[sequence], head, position, c.lowest(position), c.slopes ? c.slopes[head] : 0.0f};
}

// Adds a state to the merged one (the same layout).
inline void merge_state(const Call& c, float* merged, const float* state, float log_unit) {
    const int64_t width = padded(c.dim);
    const float peak = state[width + 16], before = merged[width + 16];
    if (peak == NEVER) return;
    if (before == NEVER) {
        std::memcpy(merged, state, state_floats(c) * sizeof(float));
        return;
    }
    const float top = std::max(peak, before);
    const float keep = std::exp((before - top) * log_unit), add = std::exp((peak - top) * log_unit);
    for (int64_t d = 0; d < width + 16; d += 16) store16(merged + d, load16(merged + d) * keep + load16(state + d) * add);
    merged[width + 16] = top;
}

template <class T>
void write_row(const Call& c, const Row& row, int64_t kv_head, const float* merged) {
    T* to = static_cast<T*>(c.out) + (row.token * c.heads + row.head) * c.dim;
    const float factor = c.value_scale(kv_head) / sum_lanes(load16(merged + padded(c.dim)));
    for (int64_t d = 0; d < c.dim; d += 16) store_upto16(to + d, load16(merged + d) * factor, c.dim - d);
}

inline void clear_state(const Call& c, float* state) {
    std::fill(state, state + state_floats(c), 0.0f);
    state[padded(c.dim) + 16] = NEVER;
}

// Runs the tiles of keys begin ... end for all engines. `upcoming` are the pages of what the thread does next, if known.
template <class Engine>
void run_tiles(const Call& c, Engine* engines, int64_t count, const int32_t* pages, int64_t begin, int64_t end, int64_t stop,
               const int32_t* upcoming, int64_t upcoming_begin, int64_t upcoming_end, int64_t* places, int64_t* later) {
    for (int64_t first = begin; first < end; first += TILE) {
        const int64_t number = std::min<int64_t>(TILE, end - first);
        std::swap_ranges(places, places + TILE, later);
        int64_t more = std::min<int64_t>(TILE, stop - first - number);
        if (more > 0) find_rows(c, pages, first + number, more, later);
        else if (upcoming) find_rows(c, upcoming, upcoming_begin, more = std::min<int64_t>(TILE, upcoming_end - upcoming_begin), later);
        for (int64_t j = std::max<int64_t>(more, 0); j < TILE; j++) later[j] = places[0];
        for (int64_t k = 0; k < count; k++) engines[k].tile(first, int(number), places, later);
    }
}

// The span of keys begin ... end of a prefix, for all members of a group; its states are kept.
template <class T, class Engine>
void run_prefix(const Call& c, const Item& item, const States& states) {
    const int64_t group = c.group(), count = (item.sequence_end - item.sequence) * group;
    Pieces pieces;
    pieces.take<Row>(count);
    Engine(c, item.kv_head, nullptr, count, pieces);
    pieces = {scratch.get(pieces.used), 0};
    Row* rows = pieces.take<Row>(count);
    for (int64_t r = 0; r < count; r++) rows[r] = make_row(c, item.sequence + r / group, item.kv_head * group + r % group);
    Engine engine(c, item.kv_head, rows, count, pieces);
    engine.load_queries();
    const int32_t* pages = c.pages(item.sequence);
    int64_t places[TILE], later[TILE];
    find_rows(c, pages, item.begin, std::min<int64_t>(TILE, item.end - item.begin), later);
    for (int64_t r = 0; r < count; r++) engine.start(r);
    run_tiles(c, &engine, 1, pages, item.begin, item.end, item.end, nullptr, 0, 0, places, later);
    for (int64_t r = 0; r < count; r++) engine.leave(r, states.at(c, item.sequence + r / group, rows[r].head, item.begin / SPAN));
}

// A sequence with one query, keys from `shared` on; what was read for its group is in `states`. An item that is not all
// of the sequence leaves its span's states there, too.
template <class T, class Engine>
void run_decode(const Call& c, const Item& item, const States& states, int64_t shared, const Item* next) {
    const int64_t group = c.group(), kv_heads = item.kv_head_end - item.kv_head, context = c.context_lens[item.sequence];
    const bool whole = item.begin == 0 && item.end == context;
    Pieces pieces;
    pieces.take<Row>(kv_heads * group);
    pieces.take<Engine>(kv_heads);
    pieces.take<float>((kv_heads * group + 1) * state_floats(c));
    for (int64_t k = 0; k < kv_heads; k++) Engine(c, item.kv_head + k, nullptr, group, pieces);
    pieces = {scratch.get(pieces.used), 0};
    Row* rows = pieces.take<Row>(kv_heads * group);
    Engine* engines = pieces.take<Engine>(kv_heads);
    float* merged = pieces.take<float>((kv_heads * group + 1) * state_floats(c));
    float* some = merged + kv_heads * group * state_floats(c);
    for (int64_t k = 0; k < kv_heads; k++) {
        for (int64_t g = 0; g < group; g++) {
            rows[k * group + g] = make_row(c, item.sequence, (item.kv_head + k) * group + g);
            clear_state(c, merged + (k * group + g) * state_floats(c));
        }
        new (engines + k) Engine(c, item.kv_head + k, rows + k * group, group, pieces);
        engines[k].load_queries();
    }
    const int32_t* pages = c.pages(item.sequence);
    const int64_t lowest = rows[0].low / TILE * TILE, start = std::max({item.begin, shared, lowest});
    int64_t places[TILE], later[TILE];
    if (start < item.end) find_rows(c, pages, start, std::min<int64_t>(TILE, item.end - start), later);
    for (int64_t span = item.begin / SPAN; span * SPAN < item.end; span++) {
        const int64_t end = std::min(item.end, (span + 1) * SPAN), begin = std::max(span * SPAN, start);
        const bool resumed = shared > span * SPAN;
        if (begin < end) {
            for (int64_t k = 0; k < kv_heads; k++)
                for (int64_t g = 0; g < group; g++) {
                    if (resumed) engines[k].resume(g, states.at(c, item.sequence, rows[k * group + g].head, span));
                    else engines[k].start(g);
                }
            run_tiles(c, engines, kv_heads, pages, begin, end, item.end, next ? c.pages(next->sequence) : nullptr,
                      next ? next->begin : 0, next ? next->end : 0, places, later);
        }
        for (int64_t k = 0; k < kv_heads; k++)
            for (int64_t g = 0; g < group; g++) {
                const int64_t r = k * group + g;
                float* kept = states.data ? states.at(c, item.sequence, rows[r].head, span) : nullptr;
                if (begin < end) engines[k].leave(g, whole ? some : kept);
                else if (!resumed && !whole) clear_state(c, kept);
                if (!whole) continue;
                if (begin < end) merge_state(c, merged + r * state_floats(c), some, Engine::LOG_UNIT);
                else if (resumed) merge_state(c, merged + r * state_floats(c), kept, Engine::LOG_UNIT);
            }
    }
    if (!whole) return;
    for (int64_t r = 0; r < kv_heads * group; r++) write_row<T>(c, rows[r], item.kv_head + r / group, merged + r * state_floats(c));
}

// The rows of a sequence whose spans were separate items.
template <class T, class Engine>
void merge_spans(const Call& c, int64_t sequence, const States& states) {
    const int64_t spans = (c.context_lens[sequence] + SPAN - 1) / SPAN;
    float* merged = reinterpret_cast<float*>(scratch.get(state_floats(c) * sizeof(float)));
    for (int64_t head = 0; head < c.heads; head++) {
        clear_state(c, merged);
        for (int64_t span = 0; span < spans; span++) merge_state(c, merged, states.at(c, sequence, head, span), Engine::LOG_UNIT);
        write_row<T>(c, make_row(c, sequence, head), head / c.group(), merged);
    }
}

}  // namespace
