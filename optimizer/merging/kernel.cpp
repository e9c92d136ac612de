// `elementwise.merge_chunk` in C++: the same operations in the same order, so the same bits, in one pass
// over memory. `native.py` compiles it, with contraction off; a block's scratch stays in the first-level
// cache, and the loops are plain enough for the compiler to vectorize.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum Keep { ALL, TRIM, BAND, RANDOM, CLIP };
enum Combine { SUM, COUNT, WEIGHTS, NONE };

constexpr int BLOCK = 256;                // entries
constexpr int64_t PER_TASK = 64 * BLOCK;  // entries that a thread takes at a time

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
inline float widen(_Float16 value) { return value; }

template <typename T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) { return value; }
template <>
inline _Float16 narrow<_Float16>(float value) { return _Float16(value); }
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
    const void* const* sources;
    const int32_t* dtypes;  // of the sources
    const int32_t* are_vectors;
    const float* lambdas;
    const float* low;
    const float* high;
    const int32_t* limits;
    const int32_t* keys;
    int64_t size;
    float base_weight;
    int32_t stream, dtype, n_experts, keep, combine, n_threads;
};

namespace {

struct Rule {  // what an expert's part needs beside its weights
    float lambda, low, high;
    int32_t limit;
    uint32_t key, stream, index;  // index: of the block's first entry
};

// `elementwise._kept`
template <int KEEP>
inline float kept(float vector, const Rule& rule, int i) {
    if (KEEP == TRIM) return std::fabs(vector) >= rule.low ? vector : 0.0f;
    if (KEEP == BAND) {
        float large = std::fabs(vector) >= rule.low ? vector : 0.0f;
        return std::fabs(vector) < rule.high ? large : 0.0f;
    }
    if (KEEP == RANDOM) {  // `hash32`
        uint32_t value = (rule.index + i) * 0x9E3779B9u + rule.stream;
        value = (value ^ (value >> 16)) * 0x7FEB352Du + rule.key;
        value = (value ^ (value >> 15)) * 0x846CA68Bu;
        return int32_t(value ^ (value >> 16)) <= rule.limit ? vector : 0.0f;
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
void fill(float* part, const float* start, const Job& job, int e, int64_t begin, int n) {
    Rule rule = {job.lambdas[e], 0, 0, 0, 0, uint32_t(job.stream), uint32_t(begin)};
    if (KEEP == TRIM || KEEP == BAND || KEEP == CLIP) rule.low = job.low[e];
    if (KEEP == BAND) rule.high = job.high[e];
    if (KEEP == RANDOM) rule.limit = job.limits[e], rule.key = job.keys[e];
    const auto of = [&](auto type) { return static_cast<const decltype(type)*>(job.sources[e]) + begin; };
    if (job.are_vectors[e])
        fill<KEEP, float, true>(part, of(float()), start, rule, n);
    else if (job.dtypes[e] == BFLOAT16)
        fill<KEEP, bfloat16, false>(part, of(bfloat16()), start, rule, n);
    else if (job.dtypes[e] == FLOAT16)
        fill<KEEP, _Float16, false>(part, of(_Float16()), start, rule, n);
    else
        fill<KEEP, float, false>(part, of(float()), start, rule, n);
}

// Fill `part` with lambda times what expert e's rule keeps of its task vector.
void fill(float* part, const float* start, const Job& job, int e, int64_t begin, int n) {
    switch (job.keep) {
        case ALL: return fill<ALL>(part, start, job, e, begin, n);
        case TRIM: return fill<TRIM>(part, start, job, e, begin, n);
        case BAND: return fill<BAND>(part, start, job, e, begin, n);
        case RANDOM: return fill<RANDOM>(part, start, job, e, begin, n);
        default: return fill<CLIP>(part, start, job, e, begin, n);
    }
}

void add(float* __restrict sum, const float* __restrict part, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) sum[i] += part[i];
}

// `elementwise._consensus`: `parts[0]` becomes the sum of the parts that agree, divided.
void elect(float (*parts)[BLOCK], const Job& job, int n) {
    alignas(64) float elected[BLOCK], divisor[BLOCK];
    std::memcpy(elected, parts[0], n * sizeof(float));
    for (int e = 1; e < job.n_experts; e++) add(elected, parts[e], n);
    float* __restrict total = parts[0];
    for (int e = 0; e < job.n_experts; e++) {
        const float unit = job.combine == WEIGHTS ? job.lambdas[e] : 1.0f;
        const float* part = parts[e];
        if (e == 0) {
#pragma omp simd
            for (int i = 0; i < n; i++) {
                bool agrees = total[i] * elected[i] > 0.0f;
                total[i] = agrees ? total[i] : 0.0f;
                divisor[i] = agrees ? unit : 0.0f;
            }
        } else {
#pragma omp simd
            for (int i = 0; i < n; i++) {
                bool agrees = part[i] * elected[i] > 0.0f;
                total[i] += agrees ? part[i] : 0.0f;
                divisor[i] += agrees ? unit : 0.0f;
            }
        }
    }
    if (job.combine == COUNT) {
        for (int k = 2; k <= job.n_experts; k++) {
            const float count = float(k), share = float(1.0 / k);
#pragma omp simd
            for (int i = 0; i < n; i++) total[i] *= divisor[i] == count ? share : 1.0f;
        }
    } else if (job.combine == WEIGHTS) {
#pragma omp simd
        for (int i = 0; i < n; i++) total[i] /= divisor[i] == 0.0f ? 1.0f : divisor[i];
    }
}

template <typename T>
uint32_t finish(T* __restrict out, const float* __restrict start, const float* __restrict sum, float weight, int n) {
    uint32_t peak = 0;  // magnitudes are ordered as their bits are, and NaN is above them all
#pragma omp simd reduction(max : peak)
    for (int i = 0; i < n; i++) {
        float merged = weight * start[i] + sum[i];
        out[i] = narrow<T>(merged);
        uint32_t magnitude = to_bits(merged) & 0x7FFFFFFFu;
        peak = magnitude > peak ? magnitude : peak;
    }
    return peak;
}

// Merge n entries from `begin` on; returns the bits of the largest magnitude.
template <typename T>
uint32_t merge_block(const Job& job, int64_t begin, int n, float (*parts)[BLOCK]) {
    alignas(64) float start[BLOCK];
    const T* __restrict base = static_cast<const T*>(job.base) + begin;
#pragma omp simd
    for (int i = 0; i < n; i++) start[i] = widen(base[i]);
    for (int e = 0; e < job.n_experts; e++) fill(parts[e], start, job, e, begin, n);
    if (job.n_experts == 0)
        std::memset(parts[0], 0, n * sizeof(float));
    else if (job.combine == SUM)
        for (int e = 1; e < job.n_experts; e++) add(parts[0], parts[e], n);
    else
        elect(parts, job, n);
    return finish(static_cast<T*>(job.out) + begin, start, parts[0], job.base_weight, n);
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
    }
    return from_bits(peak);
}

}  // namespace

// Merge a tensor; returns the largest magnitude before rounding, NaN if there is one.
extern "C" float merge_tensor(const Job* job) {
    if (job->dtype == BFLOAT16) return merge<bfloat16>(*job);
    return job->dtype == FLOAT16 ? merge<_Float16>(*job) : merge<float>(*job);
}
