// `elementwise.merge_chunk` in C++: the same operations in the same order, so the same bits, in one pass
// over memory. `native.py` compiles it, with contraction off; the loops are plain enough for the compiler to
// vectorize.

#include <algorithm>
#include <vector>

#include "job.h"

namespace {

constexpr int64_t PER_TASK = 16 * BLOCK;  // entries that a thread takes at a time
constexpr int64_t AHEAD = 4 * BLOCK;      // entries between those worked on and those asked for

template <typename T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) { return value; }
#ifdef __FLT16_MANT_DIG__
template <>
inline float16 narrow<float16>(float value) { return float16(value); }
#else
template <>
inline float16 narrow<float16>(float value) {  // to nearest, ties to even
    float rounded = (std::fabs(value) * 0x1.0p+112f) * 0x1.0p-110f;
    uint32_t wide = to_bits(value), doubled = wide + wide, bias = doubled & 0xFF000000u;
    if (bias < 0x71000000u) bias = 0x71000000u;
    uint32_t bits = to_bits(from_bits((bias >> 1) + 0x07800000u) + rounded);
    uint32_t magnitude = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
    return {uint16_t((wide >> 16 & 0x8000u) | (doubled > 0xFF000000u ? 0x7E00u : magnitude))};
}
#endif
template <>
inline bfloat16 narrow<bfloat16>(float value) {  // to nearest, ties to even
    uint32_t bits = to_bits(value);
    return {uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

struct Rule {  // what an expert's part needs beside its weights
    float lambda, low, high, step, factor, scale;
    int32_t limit;
    uint32_t key;
    const uint32_t* mixed;  // the block's counters after the first round of `hash32`
    const float* ranks;     // the block's
};

// The second round of `hash32`.
inline int32_t drawn(const Rule& rule, int i) {
    uint32_t value = rule.mixed[i] + rule.key;
    return int32_t((value ^ (value >> 15)) * 0x846CA68Bu);
}

// `elementwise._kept`
template <int KEEP>
inline float kept(float vector, const Rule& rule, int i) {
    if (KEEP == TRIM) return vector * (std::fabs(vector) * rule.scale >= rule.low ? 1.0f : 0.0f);
    if (KEEP == BAND) {
        float large = std::fabs(vector) >= rule.low ? 1.0f : 0.0f;
        return vector * (std::fabs(vector) < rule.high ? large : 0.0f);
    }
    if (KEEP == RANDOM) return vector * (drawn(rule, i) <= rule.limit ? 1.0f : 0.0f);
    if (KEEP == RANKED || KEEP == RESCALED) {
        float probability = rule.low + rule.step * rule.ranks[i];
        probability = probability > 1.0f ? 1.0f : probability;
        int32_t below = int32_t((probability < 1.0f ? probability : 0.0f) * 0x1p31f) - 1;
        int32_t limit = probability < 1.0f ? below : 0x7FFFFFFF;
        int32_t half = int32_t((uint32_t(drawn(rule, i)) ^ 0x80000000u) >> 1);
        float scaled = KEEP == RESCALED ? vector / probability : vector * rule.factor;
        return half <= limit ? scaled : 0.0f;
    }
    if (KEEP == CLIP) {
        float raised = vector < -rule.low ? -rule.low : vector;
        return raised > rule.low ? rule.low : raised;
    }
    return vector;
}

// Put lambda times what a rule keeps of a task vector into `part`, or add it.
template <int KEEP, bool IS_VECTOR, bool ADDS, typename T>
void fill(float* __restrict part, const T* __restrict source, const float* __restrict start, Rule rule, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) {
        float value = widen(source[i]);
        float weighted = kept<KEEP>(IS_VECTOR ? value : value - start[i], rule, i) * rule.lambda;
        part[i] = ADDS ? part[i] + weighted : weighted;
    }
}

// A block's entries, which lie in one row, and what its experts share.
struct Block {
    const Job& job;
    int64_t begin, row, at;  // in the result; of numbers by rows; in what is read
    int n;
    alignas(64) float start[BLOCK];  // the base
    alignas(64) uint32_t mixed[BLOCK];
    alignas(64) float ranks[BLOCK];
};

void read_ranks(Block& block, int e) {
    const void* ranks = block.job.ranks[e];
    if (block.job.rank_bytes == 2)
        for (int i = 0; i < block.n; i++) block.ranks[i] = static_cast<const uint16_t*>(ranks)[block.at + i];
    else
        for (int i = 0; i < block.n; i++)
            block.ranks[i] = float(static_cast<const uint32_t*>(ranks)[block.at + i]);
}

template <int KEEP, bool ADDS>
void fill(float* part, Block& block, int e) {
    const Job& job = block.job;
    const auto of = [&](const auto* numbers) { return numbers ? numbers[e] : 0; };
    const Rule rule = {job.combine == OVERLAP ? 1.0f : job.lambdas[e * job.n_rows + block.row],
                       of(job.low),
                       of(job.high),
                       of(job.steps),
                       of(job.factors),
                       job.scales ? job.scales[block.row] : 1.0f,
                       of(job.limits),
                       uint32_t(of(job.keys)),
                       block.mixed,
                       block.ranks};
    if (KEEP == RANKED || KEEP == RESCALED) read_ranks(block, e);
    with_type(job.sources[e], job.kinds[e], block.at, [&](auto* source) {
        if (job.kinds[e] == VECTOR)
            fill<KEEP, true, ADDS>(part, source, block.start, rule, block.n);
        else
            fill<KEEP, false, ADDS>(part, source, block.start, rule, block.n);
    });
}

template <bool ADDS>
void fill(float* part, Block& block, int e) {
    switch (block.job.keep) {
        case TRIM: return fill<TRIM, ADDS>(part, block, e);
        case BAND: return fill<BAND, ADDS>(part, block, e);
        case RANDOM: return fill<RANDOM, ADDS>(part, block, e);
        case RANKED: return fill<RANKED, ADDS>(part, block, e);
        case RESCALED: return fill<RESCALED, ADDS>(part, block, e);
        case CLIP: return fill<CLIP, ADDS>(part, block, e);
        default: return fill<ALL, ADDS>(part, block, e);
    }
}

// `TILE` entries side by side.
typedef float floats __attribute__((vector_size(TILE * sizeof(float))));

inline floats load(const float* from) {
    floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

// `elementwise.variance` of a tile across the parts.
inline floats variance(const float* parts, int n_parts) {
    floats found;
    read_variance(reinterpret_cast<float*>(&found), parts, n_parts);
    return found;
}

// `elementwise._consensus` and `_shared`: the first part becomes the sum of the parts that agree, divided. N: the
// number of experts, or 0 for any.
template <int N, int COMBINE>
void elect(float* parts, const Job& job, int n) {
    const int n_experts = N ? N : job.n_experts;
    const bool selects = COMBINE == SHARES && job.keep == SELECTED;
    for (int i = 0; i < n; i += TILE) {
        floats elected = load(parts + i), total = {}, divisor = {};
        for (int e = 1; e < n_experts; e++) elected += load(parts + e * BLOCK + i);
        const floats zeros = {}, ones = zeros + 1.0f;
        const floats direction = COMBINE == SHARES ? (elected >= zeros ? ones : -ones) : elected;
        for (int e = 0; e < n_experts; e++) {
            const floats part = load(parts + e * BLOCK + i);
            const floats weight = COMBINE == SHARES || COMBINE == WEIGHTS ? zeros + job.lambdas[e] : ones;
            total += part * direction > zeros ? (COMBINE == SHARES ? part * weight : part) : zeros;
            divisor += part * direction > zeros ? weight : zeros;
        }
        if (COMBINE == COUNT) total *= ones / (divisor > ones ? divisor : ones);
        if (COMBINE == WEIGHTS || COMBINE == SHARES) total /= divisor == zeros ? ones : divisor;
        if (selects) total = variance(parts + i, n_experts) >= job.low[0] ? total : zeros;
        std::memcpy(parts + i, &total, sizeof total);
    }
}

// `elementwise._overlapping`: the first part becomes the mean of the weighted parts, or the only one, scaled.
void overlap(float* parts, const Job& job, int n) {
    for (int i = 0; i < n; i += TILE) {
        const floats zeros = {}, ones = zeros + 1.0f;
        floats shared = {}, alone = {}, count = {};
        for (int e = 0; e < job.n_experts; e++) {
            const floats part = load(parts + e * BLOCK + i);
            shared += part * (zeros + job.lambdas[e]);
            alone += part * (zeros + job.factors[e]);
            count += part != zeros ? ones : zeros;
        }
        const floats found = count > ones ? shared / count : alone;
        std::memcpy(parts + i, &found, sizeof found);
    }
}

template <int COMBINE>
void elect(float* parts, const Job& job, int n) {
    switch (job.n_experts) {
        case 1: return elect<1, COMBINE>(parts, job, n);
        case 2: return elect<2, COMBINE>(parts, job, n);
        case 3: return elect<3, COMBINE>(parts, job, n);
        case 4: return elect<4, COMBINE>(parts, job, n);
        default: return elect<0, COMBINE>(parts, job, n);
    }
}

void elect(float* parts, const Job& job, int n) {
    switch (job.combine) {
        case COUNT: return elect<COUNT>(parts, job, n);
        case WEIGHTS: return elect<WEIGHTS>(parts, job, n);
        case SHARES: return elect<SHARES>(parts, job, n);
        case OVERLAP: return overlap(parts, job, n);
        default: return elect<NONE>(parts, job, n);
    }
}

template <typename T>
uint32_t finish(T* __restrict out, const float* __restrict start, const float* __restrict sum, float weight, int n) {
    uint32_t peak = 0;  // magnitudes are ordered as their bits are, and NaN is above them all
#pragma omp simd reduction(max : peak)
    for (int i = 0; i < n; i++) {
        float merged = weight * start[i] + (sum[i] + 0.0f);  // no negative zero
        out[i] = narrow<T>(merged);
        uint32_t magnitude = to_bits(merged) & 0x7FFFFFFFu;
        peak = magnitude > peak ? magnitude : peak;
    }
    return peak;
}

// Write past the caches: what is merged is not read again soon, and its lines need no fetching first.
void stream(void* to, const void* from, size_t n_bytes) {
#ifdef __SSE2__
    if (reinterpret_cast<uintptr_t>(to) % sizeof(__m128i) == 0 && n_bytes % sizeof(__m128i) == 0) {
        auto* target = static_cast<__m128i*>(to);
        const auto* source = static_cast<const __m128i*>(from);
        for (size_t i = 0; i < n_bytes / sizeof(__m128i); i++) _mm_stream_si128(target + i, source[i]);
        return;
    }
#endif
    std::memcpy(to, from, n_bytes);
}

// The first round of `hash32`, which all experts share.
void mix(uint32_t* __restrict mixed, uint32_t stream, uint32_t begin, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) {
        uint32_t value = (begin + i) * 0x9E3779B9u + stream;
        mixed[i] = (value ^ (value >> 16)) * 0x7FEB352Du;
    }
}

// Ask for what a later block reads: four streams at once are more than the processor foresees.
void prefetch(const void* from, int64_t entry_bytes, int64_t begin) {
    const char* at = static_cast<const char*>(from) + (begin + AHEAD) * entry_bytes;
    for (int64_t i = 0; i < BLOCK * entry_bytes; i += 64) __builtin_prefetch(at + i);
}

int64_t entry_bytes(int32_t kind) { return kind == FLOAT32 || kind == VECTOR ? 4 : 2; }

// Put what the experts add to a block into the first part.
void add_up(float* parts, Block& block) {
    const Job& job = block.job;
    const bool is_sum = job.combine == SUM;
    if (job.keep == RANDOM || job.keep == RANKED || job.keep == RESCALED)
        mix(block.mixed, job.stream, uint32_t(job.start) + uint32_t(block.at), block.n);
    for (int e = 0; e < job.n_experts; e++) {
        prefetch(job.sources[e], entry_bytes(job.kinds[e]), block.at);
        if (job.ranks) prefetch(job.ranks[e], job.rank_bytes, block.at);
        if (job.combine == SHARES)
            read_vector(parts + e * BLOCK, block.start, job, e, block.at, block.n);
        else if (is_sum && e > 0)
            fill<true>(parts, block, e);
        else
            fill<false>(is_sum ? parts : parts + e * BLOCK, block, e);
    }
    if (job.n_experts == 0)
        std::memset(parts, 0, block.n * sizeof(float));
    else if (!is_sum)
        elect(parts, job, block.n);
}

// Merge the entries from `begin` to `end`; returns the bits of the largest magnitude.
template <typename T>
uint32_t merge_entries(const Job& job, int64_t begin, int64_t end, float* parts) {
    uint32_t peak = 0;
    Block block = {job, begin, 0, 0, 0, {}, {}, {}};
    for (; block.begin < end; block.begin += block.n) {
        block.row = block.begin / job.row_length;
        const int64_t line = job.width < job.stride ? block.begin / job.width : 0;
        block.at = block.begin + line * (job.stride - job.width);
        block.n = int(std::min({end - block.begin, (block.row + 1) * job.row_length - block.begin,
                                (line + 1) * job.width - block.begin, int64_t(BLOCK)}));
        prefetch(job.base, sizeof(T), block.at);
        read(block.start, static_cast<const T*>(job.base) + block.at, block.n);
        add_up(parts, block);
        alignas(64) T merged[BLOCK];
        uint32_t own = finish(merged, block.start, parts, job.base_weights[block.row], block.n);
        peak = own > peak ? own : peak;
        stream(static_cast<T*>(job.out) + block.begin, merged, block.n * sizeof(T));
    }
    return peak;
}

template <typename T>
float merge(const Job& job) {
    const int64_t n_tasks = (job.size + PER_TASK - 1) / PER_TASK;
    uint32_t peak = 0;
#pragma omp parallel num_threads(job.n_threads) if (n_tasks > 1) reduction(max : peak)
    {
        std::vector<float> parts(BLOCK * std::max(job.n_experts, 1));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n_tasks; task++) {
            uint32_t own =
                merge_entries<T>(job, task * PER_TASK, std::min(job.size, (task + 1) * PER_TASK), parts.data());
            peak = own > peak ? own : peak;
        }
#ifdef __SSE2__
        _mm_sfence();  // what was streamed is seen by all
#endif
    }
    return from_bits(peak);
}

lanes magnitudes(const float* values, int n) {  // of up to LANES values
    lanes found = {};
    for (int i = 0; i < n; i++) found[i] = std::fabs(values[i]);
    return found;
}

}  // namespace

// Merge a tensor; returns the largest magnitude before rounding, NaN if there is one.
extern "C" float merge_tensor(const Job* job) {
    if (job->dtype == BFLOAT16) return merge<bfloat16>(*job);
    return job->dtype == FLOAT16 ? merge<float16>(*job) : merge<float>(*job);
}

// `elementwise.magnitude_sums`: Σ|τ| of expert e, and of what its rule keeps; lambdas are 1.
extern "C" void sum_magnitudes(const Job* job, int32_t e, double* before, double* after) {
    const int64_t n_spans = (job->size + SPAN - 1) / SPAN;
    std::vector<double> sums(2 * n_spans);
#pragma omp parallel for num_threads(job->n_threads) if (n_spans > 1) schedule(static)
    for (int64_t span = 0; span < n_spans; span++) {
        alignas(64) float vector[BLOCK], part[BLOCK];
        lanes all = {}, left = {};
        const int64_t end = std::min(job->size, (span + 1) * SPAN);
        Block block = {*job, span * SPAN, 0, 0, 0, {}, {}, {}};
        for (; block.begin < end; block.begin += block.n) {
            block.at = block.begin;
            block.n = int(std::min(end - block.begin, int64_t(BLOCK)));
            read_base(block.start, *job, block.begin, block.n);
            read_vector(vector, block.start, *job, e, block.begin, block.n);
            mix(block.mixed, job->stream, uint32_t(job->start) + uint32_t(block.begin), block.n);
            fill<false>(part, block, e);
            for (int i = 0; i < block.n; i += LANES) {
                all += magnitudes(vector + i, std::min(LANES, block.n - i));
                left += magnitudes(part + i, std::min(LANES, block.n - i));
            }
        }
        sums[2 * span] = total(all);
        sums[2 * span + 1] = total(left);
    }
    *before = *after = 0.0;
    for (int64_t span = 0; span < n_spans; span++) *before += sums[2 * span], *after += sums[2 * span + 1];
}
