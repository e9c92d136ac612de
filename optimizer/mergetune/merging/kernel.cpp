// `elementwise.merge_chunk` in C++: the same operations in the same order, so the same bits, in one pass
// over memory. `native.py` compiles it, with contraction off; a block's scratch stays in the first-level
// cache, and the loops are plain enough for the compiler to vectorize.

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum Keep { ALL, TRIM, BAND, RANDOM, CLIP };
enum Combine { SUM, COUNT, WEIGHTS, NONE };

constexpr int BLOCK = 256;                // entries
constexpr int64_t PER_TASK = 16 * BLOCK;  // entries that a thread takes at a time
constexpr int64_t AHEAD = 4 * BLOCK;      // entries between those worked on and those asked for

struct bfloat16 {
    uint16_t bits;
};

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float widen(float value) { return value; }
inline float widen(bfloat16 value) { return from_bits(uint32_t(value.bits) << 16); }

// Compilers know it as a type of its own from GCC 12 and clang 15 on (x86); else it is converted by hand, to the
// same bits: by scaling, so that subnormals need no case of their own (Dukhan, FP16, fp16_ieee_*, MIT licence).
#ifdef __FLT16_MANT_DIG__
using float16 = _Float16;
inline float widen(float16 value) { return value; }
#else
struct float16 {
    uint16_t bits;
};
inline float widen(float16 value) {
    uint32_t wide = uint32_t(value.bits) << 16, doubled = wide + wide;
    float normal = from_bits((doubled >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    float subnormal = from_bits((doubled >> 17) | (126u << 23)) - 0.5f;
    uint32_t magnitude = doubled < (1u << 27) ? to_bits(subnormal) : to_bits(normal);
    return from_bits((wide & 0x80000000u) | magnitude);
}
#endif

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

}  // namespace

// One tensor: the base, the result, the experts' weights or task vectors, and `elementwise.Numbers`.
struct Job {
    const void* base;
    void* out;
    const void* sources[MAX_EXPERTS];
    int32_t dtypes[MAX_EXPERTS], are_vectors[MAX_EXPERTS];  // of the sources
    float lambdas[MAX_EXPERTS], low[MAX_EXPERTS], high[MAX_EXPERTS];
    int32_t limits[MAX_EXPERTS], keys[MAX_EXPERTS];
    int64_t size;
    float base_weight;
    int32_t stream, dtype, n_experts, keep, combine, n_threads;
};

namespace {

struct Rule {  // what an expert's part needs beside its weights
    float lambda, low, high;
    int32_t limit;
    uint32_t key;
    const uint32_t* mixed;  // the block's counters after the first round of `hash32`
};

// `elementwise._kept`
template <int KEEP>
inline float kept(float vector, const Rule& rule, int i) {
    if (KEEP == TRIM) return std::fabs(vector) >= rule.low ? vector : 0.0f;
    if (KEEP == BAND) {
        float large = std::fabs(vector) >= rule.low ? vector : 0.0f;
        return std::fabs(vector) < rule.high ? large : 0.0f;
    }
    if (KEEP == RANDOM) {  // the second round
        uint32_t value = rule.mixed[i] + rule.key;
        value = (value ^ (value >> 15)) * 0x846CA68Bu;
        return int32_t(value) <= rule.limit ? vector : 0.0f;
    }
    if (KEEP == CLIP) {
        float raised = vector < -rule.low ? -rule.low : vector;
        return raised > rule.low ? rule.low : raised;
    }
    return vector;
}

template <int KEEP, typename T, bool IS_VECTOR>
void fill(float* __restrict part, const T* __restrict source, const float* __restrict start, Rule rule, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) {
        float value = widen(source[i]);
        part[i] = kept<KEEP>(IS_VECTOR ? value : value - start[i], rule, i) * rule.lambda;
    }
}

template <int KEEP>
void fill(float* part, const float* start, const uint32_t* mixed, const Job& job, int e, int64_t begin, int n) {
    const Rule rule = {job.lambdas[e], job.low[e], job.high[e], job.limits[e], uint32_t(job.keys[e]), mixed};
    const auto of = [&](auto type) { return static_cast<const decltype(type)*>(job.sources[e]) + begin; };
    if (job.are_vectors[e])
        fill<KEEP, float, true>(part, of(float()), start, rule, n);
    else if (job.dtypes[e] == BFLOAT16)
        fill<KEEP, bfloat16, false>(part, of(bfloat16()), start, rule, n);
    else if (job.dtypes[e] == FLOAT16)
        fill<KEEP, float16, false>(part, of(float16()), start, rule, n);
    else
        fill<KEEP, float, false>(part, of(float()), start, rule, n);
}

// Fill `part` with lambda times what expert e's rule keeps of its task vector.
void fill(float* part, const float* start, const uint32_t* mixed, const Job& job, int e, int64_t begin, int n) {
    switch (job.keep) {
        case ALL: return fill<ALL>(part, start, mixed, job, e, begin, n);
        case TRIM: return fill<TRIM>(part, start, mixed, job, e, begin, n);
        case BAND: return fill<BAND>(part, start, mixed, job, e, begin, n);
        case RANDOM: return fill<RANDOM>(part, start, mixed, job, e, begin, n);
        default: return fill<CLIP>(part, start, mixed, job, e, begin, n);
    }
}

void add(float* __restrict sum, const float* __restrict part, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) sum[i] += part[i];
}

// `elementwise._consensus`: `parts[0]` becomes the sum of the parts that agree, divided.
template <int N, int COMBINE>
void elect(float (*__restrict parts)[BLOCK], const float* lambdas, int n) {
    float units[N];
    for (int e = 0; e < N; e++) units[e] = COMBINE == WEIGHTS ? lambdas[e] : 1.0f;
#pragma omp simd
    for (int i = 0; i < n; i++) {
        float elected = parts[0][i];
        for (int e = 1; e < N; e++) elected += parts[e][i];
        float total = 0.0f, divisor = 0.0f;
        for (int e = 0; e < N; e++) {
            bool agrees = parts[e][i] * elected > 0.0f;
            total += agrees ? parts[e][i] : 0.0f;
            divisor += agrees ? units[e] : 0.0f;
        }
        if (COMBINE == COUNT)
            for (int k = 2; k <= N; k++) total *= divisor == float(k) ? float(1.0 / k) : 1.0f;
        if (COMBINE == WEIGHTS) total /= divisor == 0.0f ? 1.0f : divisor;
        parts[0][i] = total;
    }
}

template <int N>
void elect(float (*parts)[BLOCK], const Job& job, int n) {
    if (job.n_experts != N) return elect<N - 1>(parts, job, n);
    switch (job.combine) {
        case COUNT: return elect<N, COUNT>(parts, job.lambdas, n);
        case WEIGHTS: return elect<N, WEIGHTS>(parts, job.lambdas, n);
        default: return elect<N, NONE>(parts, job.lambdas, n);
    }
}
template <>
void elect<0>(float (*)[BLOCK], const Job&, int) {}

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
void prefetch(const void* from, int dtype, int64_t begin) {
    const int64_t n_bytes = dtype == FLOAT32 ? 4 : 2;
    const char* at = static_cast<const char*>(from) + (begin + AHEAD) * n_bytes;
    for (int64_t i = 0; i < BLOCK * n_bytes; i += 64) __builtin_prefetch(at + i);
}

// Merge n entries from `begin` on; returns the bits of the largest magnitude.
template <typename T>
uint32_t merge_block(const Job& job, int64_t begin, int n, float (*parts)[BLOCK]) {
    alignas(64) float start[BLOCK];
    alignas(64) uint32_t mixed[BLOCK];
    prefetch(job.base, job.dtype, begin);
    const T* __restrict base = static_cast<const T*>(job.base) + begin;
#pragma omp simd
    for (int i = 0; i < n; i++) start[i] = widen(base[i]);
    if (job.keep == RANDOM) mix(mixed, job.stream, uint32_t(begin), n);
    for (int e = 0; e < job.n_experts; e++) {
        prefetch(job.sources[e], job.dtypes[e], begin);
        fill(parts[e], start, mixed, job, e, begin, n);
    }
    if (job.n_experts == 0)
        std::memset(parts[0], 0, n * sizeof(float));
    else if (job.combine == SUM)
        for (int e = 1; e < job.n_experts; e++) add(parts[0], parts[e], n);
    else
        elect<MAX_EXPERTS>(parts, job, n);
    alignas(64) T merged[BLOCK];
    const uint32_t peak = finish(merged, start, parts[0], job.base_weight, n);
    stream(static_cast<T*>(job.out) + begin, merged, n * sizeof(T));
    return peak;
}

template <typename T>
float merge(const Job& job) {
    const int64_t n_tasks = (job.size + PER_TASK - 1) / PER_TASK;
    uint32_t peak = 0;
#pragma omp parallel for num_threads(job.n_threads) if (n_tasks > 1) schedule(static) reduction(max : peak)
    for (int64_t task = 0; task < n_tasks; task++) {
        alignas(64) float parts[MAX_EXPERTS][BLOCK];
        const int64_t end = job.size < (task + 1) * PER_TASK ? job.size : (task + 1) * PER_TASK;
        for (int64_t begin = task * PER_TASK; begin < end; begin += BLOCK) {
            uint32_t own = merge_block<T>(job, begin, int(end - begin < BLOCK ? end - begin : BLOCK), parts);
            peak = own > peak ? own : peak;
        }
#ifdef __SSE2__
        _mm_sfence();  // what was streamed is seen by all
#endif
    }
    return from_bits(peak);
}

}  // namespace

// Merge a tensor; returns the largest magnitude before rounding, NaN if there is one.
extern "C" float merge_tensor(const Job* job) {
    if (job->dtype == BFLOAT16) return merge<bfloat16>(*job);
    return job->dtype == FLOAT16 ? merge<float16>(*job) : merge<float>(*job);
}
