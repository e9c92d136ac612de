// One tensor, or a slice of one, as `native.py` hands it over, and how its entries are read.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <immintrin.h>
#endif

constexpr int BLOCK = 256;  // entries that are worked on at a time: their scratch stays in the first-level cache

// As in `native.py`.
enum Kind : int32_t { FLOAT32, BFLOAT16, FLOAT16, VECTOR };  // weights by their dtype, or a task vector in float32
enum Keep : int32_t { ALL, TRIM, BAND, RANDOM, CLIP, RANKED, RESCALED, SELECTED };
enum Combine : int32_t { SUM, COUNT, WEIGHTS, NONE, SHARES, OVERLAP };

// The base, the result, the experts' sources and `elementwise.Numbers`. Where rows have numbers of their own,
// lambdas are (n_experts, n_rows), base_weights and scales (n_rows); else there is one row, of all entries.
// What is read lies in lines of `width` entries, `stride` apart; the result is in one block.
struct Job {
    const void* base;
    void* out;
    const void* const* sources;
    const int32_t* kinds;  // of the sources
    const void* const* ranks;
    const float *lambdas, *base_weights, *scales, *low, *high, *steps, *factors;
    const int32_t *limits, *keys;
    int64_t size, row_length, n_rows, width, stride;
    int32_t dtype, n_experts, rank_bytes, keep, combine, stream, start, n_threads;
};

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

inline uint32_t magnitude_bits(float value) { return to_bits(value) & 0x7FFFFFFFu; }  // ordered as magnitudes are

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
inline void read(float* __restrict into, const T* __restrict from, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) into[i] = widen(from[i]);
}

// Call a function with n entries from `begin` on, as a pointer of their own type.
template <typename Function>
inline void with_type(const void* data, int32_t kind, int64_t begin, const Function& function) {
    if (kind == BFLOAT16)
        function(static_cast<const bfloat16*>(data) + begin);
    else if (kind == FLOAT16)
        function(static_cast<const float16*>(data) + begin);
    else
        function(static_cast<const float*>(data) + begin);
}

// Read n entries of the base.
inline void read_base(float* start, const Job& job, int64_t begin, int n) {
    with_type(job.base, job.dtype, begin, [&](auto* from) { read(start, from, n); });
}

// Read n entries of expert e's task vector.
inline void read_vector(float* __restrict vector, const float* __restrict start, const Job& job, int e, int64_t begin,
                        int n) {
    with_type(job.sources[e], job.kinds[e], begin, [&](auto* from) {
        if (job.kinds[e] == VECTOR) return read(vector, from, n);
#pragma omp simd
        for (int i = 0; i < n; i++) vector[i] = widen(from[i]) - start[i];
    });
}

// `double lanes[8]`, added up side by side: the order of a sum is the same on every processor.
constexpr int LANES = 8;
typedef double lanes __attribute__((vector_size(LANES * sizeof(double))));

inline double total(const lanes& sums) {
    double sum = sums[0];
    for (int i = 1; i < LANES; i++) sum += sums[i];
    return sum;
}

// `elementwise.variance` of `TILE` entries across the parts, (n_parts, BLOCK).
constexpr int TILE = 16;
inline void read_variance(float* variance, const float* parts, int n_parts) {
    typedef float halves __attribute__((vector_size(LANES * sizeof(float))));
    const double share = 1.0 / n_parts;
    for (int i = 0; i < TILE; i += LANES) {
        halves part;
        std::memcpy(&part, parts + i, sizeof part);
        const lanes first = __builtin_convertvector(part, lanes);
        lanes sums = {}, squares = {};
        for (int e = 1; e < n_parts; e++) {
            std::memcpy(&part, parts + e * BLOCK + i, sizeof part);
            const lanes shifted = __builtin_convertvector(part, lanes) - first;
            sums += shifted;
            squares += shifted * shifted;
        }
        part = __builtin_convertvector((squares - sums * sums * share) * share, halves);
        std::memcpy(variance + i, &part, sizeof part);
    }
}

constexpr int64_t SPAN = 1 << 16;  // entries whose lanes are added up before the next ones'
