// Attention over a paged KV cache, and the scatter of new keys and values into it.
//
// One parallel region per call: first the prefixes that decodes share, then sequences (key/value head, block of queries or
// span of keys), then, where spans were separate items, their merge. All that is summed for one query and head is summed in
// an order that depends on its own position alone, so a row's result is the same bits whatever batch, chunk or page size it
// runs in (but a chunk of one query takes the path of decodes).
// dtype: 0 fp32, 1 bf16, 2 fp16, for queries and output; pages are of the same type, or 8-bit integers with a scale per head.

#include <atomic>
#include <memory>

#include "paged_chunk.h"

namespace {

// A number as a page holds it: in pages of the keys' own type, or divided by the head's scale and rounded to 8 bits.
template <class T>
inline void put(T* to, float x, float) {
    store(to, x);
}
template <class T>
inline void put(int8_t* to, float x, float scale) {
    *to = int8_t(std::nearbyint(std::min(std::max(rounded(x, static_cast<const T*>(nullptr)) / scale, -127.0f), 127.0f)));
}

template <class T, class C>
void write_rows(const T* k, const T* v, C* k_cache, C* v_cache, const float* k_scales, const float* v_scales,
                const int64_t* slots, const float* cos, const float* sin, const int64_t* positions, int64_t tokens, int64_t kv_heads, int64_t dim, int64_t k_stride, int64_t k_head_stride,
                int64_t v_stride, int64_t v_head_stride, int64_t page_size, int64_t page_stride, int64_t token_stride,
                int64_t head_stride, float clip, int threads) {
    const int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * kv_heads * dim > 32768)
    for (int64_t t = 0; t < tokens; t++) {
        if (slots[t] < 0) continue;
        const int64_t at = slots[t] / page_size * page_stride + slots[t] % page_size * token_stride;
        for (int64_t h = 0; h < kv_heads; h++) {
            const T* from = k + t * k_stride + h * k_head_stride;
            C* to = k_cache + at + h * head_stride;
            float scale = k_scales ? k_scales[h] : 1.0f;
            auto limit = [clip](float x) { return clip > 0.0f ? std::min(std::max(x, -clip), clip) : x; };
            if (cos) {
                const float *c = cos + positions[t] * half, *s = sin + positions[t] * half;
#pragma omp simd
                for (int64_t i = 0; i < half; i++) {
                    float a = limit(load(from + i)), b = limit(load(from + half + i));
                    put<T>(to + i, a * c[i] - b * s[i], scale);
                    put<T>(to + half + i, b * c[i] + a * s[i], scale);
                }
            } else {
#pragma omp simd
                for (int64_t i = 0; i < dim; i++) put<T>(to + i, limit(load(from + i)), scale);
            }
            from = v + t * v_stride + h * v_head_stride;
            to = v_cache + at + h * head_stride;
            scale = v_scales ? v_scales[h] : 1.0f;
#pragma omp simd
            for (int64_t i = 0; i < dim; i++) put<T>(to + i, limit(load(from + i)), scale);
        }
    }
}

// What is to be done for one call, and the memory that it needs.
struct Work {
    Item* items = nullptr;   // prefixes, then chunks and decodes
    int64_t prefixes = 0, count = 0;
    int64_t* shared = nullptr;  // [decodes]: keys that are read once for the whole group
    States states;
    bool split = false;      // spans are separate items
    bool matrix = false;     // on matrix tiles
    ~Work() {
        std::free(items);
        std::free(shared);
        std::free(states.data);
    }
};

// -1, or the first sequence or (from -2 down) the first group that makes no sense.
int64_t find_nonsense(const Call& c, int64_t max_context) {
    for (int64_t b = 0; b < c.sequences; b++) {
        const int64_t queries = c.query_starts[b + 1] - c.query_starts[b];
        const bool sane = c.query_starts[b] >= 0 && queries >= 0 && c.query_starts[b + 1] <= c.tokens &&
                          queries <= c.context_lens[b] && c.context_lens[b] <= max_context && (queries == 1 || b >= c.decodes);
        if (!sane) return b;
    }
    if (!c.prefix_lens) return -1;
    int64_t next = 0;
    for (int64_t g = 0; g < c.groups; g++) {
        const int64_t start = c.prefix_groups[g], stop = c.prefix_groups[g + 1];
        if (start != next || stop < start || stop > c.decodes) return -2 - g;
        next = stop;
        for (int64_t b = start; b < stop; b++) {
            const int64_t length = c.prefix_lens[b];
            if (length < 0 || length % c.page_size || length >= c.context_lens[b] || length != c.prefix_lens[start]) return -2 - g;
            if (std::memcmp(c.pages(b), c.pages(start), length / c.page_size * sizeof(int32_t))) return -2 - g;
        }
    }
    return next == c.decodes ? -1 : -2 - c.groups;
}

void plan(const Call& c, Work& work, bool has_decode, int64_t block, int threads) {
    const int64_t group = c.group();
    int64_t decodes = 0, longest_shared = 0, longest = 0, prefixes = 0, count = 0;
    for (int64_t b = 0; b < c.sequences; b++)
        if (c.query_starts[b + 1] - c.query_starts[b] == 1) decodes++, longest = std::max<int64_t>(longest, c.context_lens[b]);
    const int64_t members = std::max<int64_t>(1, PREFIX_ROWS / group);
    if (c.prefix_lens && has_decode) {
        work.shared = static_cast<int64_t*>(std::calloc(c.decodes + 1, sizeof(int64_t)));
        for (int64_t g = 0; g < c.groups; g++) {
            const int64_t start = c.prefix_groups[g], stop = c.prefix_groups[g + 1];
            if (stop - start < 2) continue;
            const int64_t keys = c.prefix_lens[start] / TILE * TILE;
            std::fill(work.shared + start, work.shared + stop, keys);
            longest_shared = std::max(longest_shared, keys);
            prefixes += (stop - start + members - 1) / members * c.kv_heads * ((keys + SPAN - 1) / SPAN);
        }
    }
    // A decode takes all heads in one item, so that its pages are read in order, unless too few sequences share the work;
    // a span of its keys is an item where the heads are too few as well.
    const bool whole = decodes >= 4 * threads;
    work.split = has_decode && threads > 1 && decodes * c.kv_heads < 4 * threads && longest > SPAN;
    for (int64_t b = 0; b < c.sequences; b++) {
        const int64_t queries = c.query_starts[b + 1] - c.query_starts[b];
        if (queries == 1 && has_decode) count += (whole ? 1 : c.kv_heads) * (work.split ? (c.context_lens[b] + SPAN - 1) / SPAN : 1);
        else count += (queries + block - 1) / block * c.kv_heads;
    }
    work.states.spans = ((work.split ? longest : longest_shared) + SPAN - 1) / SPAN;
    if (work.states.spans)
        work.states.data = static_cast<float*>(
            std::aligned_alloc(64, round_up(c.sequences * c.heads * work.states.spans * state_floats(c) * sizeof(float), 64)));
    work.items = static_cast<Item*>(std::malloc(sizeof(Item) * std::max<int64_t>(prefixes + count, 1)));
    Item* next = work.items;
    for (int64_t g = 0; work.shared && g < c.groups; g++) {
        const int32_t stop = c.prefix_groups[g + 1];
        for (int32_t b = c.prefix_groups[g]; b < stop; b += int32_t(members))
            for (int64_t begin = 0; begin < work.shared[b]; begin += SPAN)
                for (int32_t h = 0; h < c.kv_heads; h++)
                    *next++ = {Item::PREFIX, b, std::min<int32_t>(b + int32_t(members), stop), h, h + 1, 0, 1, begin,
                               std::min(work.shared[b], begin + SPAN)};
    }
    work.prefixes = next - work.items;
    work.count = prefixes + count;
    for (int32_t b = 0; b < c.sequences; b++) {
        const int32_t queries = c.query_starts[b + 1] - c.query_starts[b], heads = int32_t(c.kv_heads);
        const int64_t context = c.context_lens[b];
        if (queries == 1 && has_decode) {
            for (int64_t begin = 0; begin < context; begin += work.split ? SPAN : context)
                for (int32_t h = 0; h < heads; h += whole ? heads : 1)
                    *next++ = {Item::DECODE, b, b + 1, h, whole ? heads : h + 1, 0, 1, begin,
                               work.split ? std::min(context, begin + SPAN) : context};
            continue;
        }
        for (int32_t start = 0; start < queries; start += int32_t(block))
            for (int32_t h = 0; h < heads; h++)
                *next++ = {Item::CHUNK, b, b + 1, h, h + 1, start, std::min<int32_t>(start + int32_t(block), queries), 0, context};
    }
}

template <class T, class C, class Engine>
void run(const Call& c, Work& work, int threads) {
    std::atomic<int64_t> next_prefix{0}, next_item{0}, next_merge{0};
    auto claim = [&]() -> const Item* {  // the longest, at the end of a chunk, come first
        const int64_t i = work.count - 1 - next_item.fetch_add(1);
        return i >= work.prefixes ? work.items + i : nullptr;
    };
#pragma omp parallel num_threads(threads) if (work.count > 1)
    {
        std::unique_ptr<TileScope> tiles;
        if (work.matrix || std::is_same_v<T, bf16>) tiles.reset(new TileScope);
        for (int64_t i; (i = next_prefix.fetch_add(1)) < work.prefixes;) run_prefix<T, Engine>(c, work.items[i], work.states);
        if (work.prefixes) {
#pragma omp barrier
        }
        for (const Item* item = claim(); item;) {
            if (item->kind == Item::CHUNK) {
                if constexpr (HAVE_TILES && std::is_same_v<T, bf16>) run_tiled<C>(c, *item);
                else run_plain<T, C>(c, *item);
                item = claim();
                continue;
            }
            const Item* upcoming = claim();  // so that its first keys are asked for in time
            const int64_t shared = work.shared && item->sequence < c.decodes ? work.shared[item->sequence] : 0;
            run_decode<T, Engine>(c, *item, work.states, shared, upcoming && upcoming->kind == Item::DECODE ? upcoming : nullptr);
            item = upcoming;
        }
        if (work.split) {
#pragma omp barrier
            for (int64_t b; (b = next_merge.fetch_add(1)) < c.sequences;)
                if (c.query_starts[b + 1] - c.query_starts[b] == 1 && c.context_lens[b] > SPAN) merge_spans<T, Engine>(c, b, work.states);
        }
    }
}

template <class T, class C>
void run_typed(const Call& c, int threads) {
    Work work;
#ifdef HAVE_AMX
    work.matrix = std::is_same_v<T, bf16> && amx_permitted();
#endif
    const int64_t most = HAVE_TILES && std::is_same_v<T, bf16> ? TILED_ROWS : BLOCK_ROWS;
    plan(c, work, work.matrix || c.dim % 16 == 0, std::max<int64_t>(1, most / c.group()), threads);
#ifdef HAVE_AMX
    if constexpr (std::is_same_v<T, bf16>) {
        if (work.matrix) return run<T, C, MatrixEngine<C>>(c, work, threads);
    }
#endif
    run<T, C, VectorEngine<T, C>>(c, work, threads);
}

}  // namespace

extern "C" {

// Strides are in elements. Returns -1, or the first sequence or (-2 for the first, and so on down) the first prefix group
// that makes no sense; nothing is computed then. `scales` are null, or pages are 8-bit integers.
int64_t attention_paged(const void* q, const void* k_cache, const void* v_cache, void* out, const int32_t* page_table,
                        const int32_t* context_lens, const int32_t* query_starts, const float* slopes, const float* k_scales,
                        const float* v_scales, const int32_t* prefix_groups, const int32_t* prefix_lens, int64_t q_stride,
                        int64_t q_head_stride, int64_t page_stride, int64_t token_stride, int64_t head_stride,
                        int64_t table_stride, int64_t table_pages, int64_t tokens, int64_t sequences, int64_t decodes,
                        int64_t groups, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_size, int64_t window,
                        int64_t max_context, float scale, int dtype, int quantised, int threads) {
    const Call call{q,           k_cache,       v_cache,     out,          page_table,  context_lens, query_starts, slopes,
                    k_scales,    v_scales,      prefix_groups, prefix_lens, q_stride,   q_head_stride, page_stride, token_stride,
                    head_stride, table_stride,  table_pages, tokens,       sequences,   decodes,      groups,       heads,
                    kv_heads,    dim,           page_size,   window,       scale};
    const int64_t wrong = find_nonsense(call, std::min(max_context, table_pages * page_size));
    if (wrong != -1) return wrong;
    if (dtype == 0) quantised ? run_typed<float, int8_t>(call, threads) : run_typed<float, float>(call, threads);
    else if (dtype == 1) quantised ? run_typed<bf16, int8_t>(call, threads) : run_typed<bf16, bf16>(call, threads);
    else quantised ? run_typed<fp16, int8_t>(call, threads) : run_typed<fp16, fp16>(call, threads);
    return -1;
}

void kv_write(const void* k, const void* v, void* k_cache, void* v_cache, const float* k_scales, const float* v_scales,
              const int64_t* slots, const float* cos, const float* sin, const int64_t* positions, int64_t tokens, int64_t kv_heads,
              int64_t dim, int64_t k_stride, int64_t k_head_stride, int64_t v_stride, int64_t v_head_stride, int64_t page_size,
              int64_t page_stride, int64_t token_stride, int64_t head_stride, float clip, int dtype, int quantised, int threads) {
    auto run = [&](auto* type, auto* page_type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using C = std::remove_pointer_t<decltype(page_type)>;
        write_rows(static_cast<const T*>(k), static_cast<const T*>(v), static_cast<C*>(k_cache), static_cast<C*>(v_cache), k_scales,
                   v_scales, slots, cos, sin, positions, tokens, kv_heads, dim, k_stride, k_head_stride, v_stride, v_head_stride,
                   page_size, page_stride, token_stride, head_stride, clip, threads);
    };
    auto typed = [&](auto* type) { quantised ? run(type, static_cast<int8_t*>(nullptr)) : run(type, type); };
    if (dtype == 0) typed(static_cast<float*>(nullptr));
    else if (dtype == 1) typed(static_cast<bf16*>(nullptr));
    else typed(static_cast<fp16*>(nullptr));
}
}
