// The tables of `tables.py` in C++, with the same bits. Each call runs on one thread; `plan.py` makes many at a
// time, and no sum is split between them.

#include <algorithm>
#include <vector>

#include "job.h"

namespace {

// Bits 31…20, 19…10 and 9…0 of a key, the most significant first.
constexpr int SHIFTS[3] = {20, 10, 0};
constexpr int COUNTERS[3] = {4096, 1024, 1024};
constexpr int COPIES = 4;  // of the first counters: equal neighbours need not wait for each other
constexpr int64_t MAX_SORTED = 8192;  // entries: fewer are sorted faster than counted

// |τ| of the first expert, times the scale of its row: that may be a little below zero, so that keys of negative
// values are turned round.
struct Magnitudes {
    const Job& job;
    alignas(64) float start[BLOCK], vector[BLOCK];

    void read(uint32_t* __restrict keys, int64_t begin, int n) {
        read_base(start, job, begin, n);
        read_vector(vector, start, job, 0, begin, n);
        for (int i = 0; i < n; i++) keys[i] = magnitude_bits(vector[i]);
        if (!job.scales) return;
        for (int i = 0; i < n; i++) {
            const uint32_t bits = to_bits(from_bits(keys[i]) * job.scales[(begin + i) / job.row_length]);
            keys[i] = bits >> 31 ? ~bits : bits | 0x80000000u;
        }
    }

    float value(uint32_t key) const {
        if (!job.scales) return from_bits(key);
        return from_bits(key >> 31 ? key & 0x7FFFFFFFu : ~key);
    }
};

// The variance across all experts.
struct Variances {
    const Job& job;
    std::vector<float> parts;
    alignas(64) float start[BLOCK], variance[BLOCK];

    explicit Variances(const Job& of) : job(of), parts(BLOCK * of.n_experts) {}

    void read(uint32_t* __restrict keys, int64_t begin, int n) {
        read_base(start, job, begin, n);
        for (int e = 0; e < job.n_experts; e++) read_vector(&parts[e * BLOCK], start, job, e, begin, n);
        for (int i = 0; i < n; i += TILE) read_variance(variance + i, &parts[i], job.n_experts);
        for (int i = 0; i < n; i++) keys[i] = magnitude_bits(variance[i]);
    }

    float value(uint32_t key) const { return from_bits(key); }
};

template <typename Source, typename Use>
void for_each_block(Source& source, const Use& use) {
    alignas(64) uint32_t keys[BLOCK];
    for (int64_t begin = 0; begin < source.job.size; begin += BLOCK) {
        const int n = int(std::min(source.job.size - begin, int64_t(BLOCK)));
        source.read(keys, begin, n);
        use(keys, n);
    }
}

template <typename Source>
std::vector<uint32_t> sorted_keys(Source& source) {
    std::vector<uint32_t> all;
    for_each_block(source, [&](const uint32_t* keys, int n) { all.insert(all.end(), keys, keys + n); });
    std::sort(all.begin(), all.end());
    return all;
}

using Slots = std::vector<uint16_t>;

// Count the keys of a pass by their next bits, (n_slots, COUNTERS[pass]). Which counters a key has follows from its
// bits before; those of no wanted value share the last ones, as a branch would be foreseen wrongly too often.
template <int PASS, typename Source>
std::vector<uint32_t> counted(Source& source, const Slots* slots, int n_slots) {
    constexpr int WIDTH = COUNTERS[PASS], N = PASS == 0 ? COPIES : 1;
    const uint32_t n_counts = uint32_t(n_slots) * WIDTH, unwanted = n_counts - WIDTH;
    std::vector<uint32_t> counts(size_t(n_counts) * N);
    uint32_t* const own = counts.data();
    const uint16_t *first = slots[0].data(), *second = slots[1].data();
    for_each_block(source, [=](const uint32_t* keys, int n) {
        for (int i = 0; i < n; i++) {
            uint32_t place = keys[i] >> SHIFTS[PASS] & (WIDTH - 1);
            if (PASS == 1) place += first[keys[i] >> SHIFTS[0]] * WIDTH;
            if (PASS == 2) {
                const uint32_t slot = first[keys[i] >> SHIFTS[0]];
                place += second[slot * COUNTERS[1] + (keys[i] >> SHIFTS[1] & 1023)] * WIDTH;
            }
            if (PASS > 0) place = place >= unwanted ? unwanted + i : place;
            own[i % N * n_counts + place]++;
        }
    });
    for (int copy = 1; copy < N; copy++)
        for (uint32_t i = 0; i < n_counts; i++) counts[i] += counts[copy * n_counts + i];
    return counts;
}

// The value at each position, 0 being the largest. Three passes, each counting some bits, the later ones only
// where the bits before are those of a wanted value.
template <typename Source>
void select(Source& source, const int64_t* positions, int n_positions, float* values) {
    if (source.job.size <= MAX_SORTED) {
        const std::vector<uint32_t> keys = sorted_keys(source);
        for (int p = 0; p < n_positions; p++) values[p] = source.value(keys[keys.size() - 1 - positions[p]]);
        return;
    }
    constexpr uint16_t NONE_WANTED = 0xFFFF;
    Slots slots[3];
    std::vector<int64_t> left(positions, positions + n_positions);
    std::vector<int32_t> slot_of(n_positions, 0);
    std::vector<uint32_t> found(n_positions, 0);
    for (int pass = 0, n_slots = 1; pass < 3; pass++) {
        const int width = COUNTERS[pass];
        const std::vector<uint32_t> counts = pass == 0   ? counted<0>(source, slots, n_slots)
                                             : pass == 1 ? counted<1>(source, slots, n_slots)
                                                         : counted<2>(source, slots, n_slots);
        slots[pass].assign(size_t(n_slots) * width, NONE_WANTED);
        n_slots = 0;
        for (int p = 0; p < n_positions; p++) {
            int bin = width - 1;
            const size_t first = size_t(slot_of[p]) * width;
            while (left[p] >= counts[first + bin]) left[p] -= counts[first + bin--];
            found[p] |= uint32_t(bin) << SHIFTS[pass];
            uint16_t& slot = slots[pass][first + bin];
            if (slot == NONE_WANTED) slot = uint16_t(n_slots++);
            slot_of[p] = slot;
        }
        for (uint16_t& slot : slots[pass]) slot = slot == NONE_WANTED ? uint16_t(n_slots) : slot;
        n_slots++;
    }
    for (int p = 0; p < n_positions; p++) values[p] = source.value(found[p]);
}

// Add the products of vectors a and b … b + N - 1 over n entries, (n_vectors, BLOCK).
template <int N>
void add_products(lanes* sums, const double* a, const double* b, int n) {
    lanes own[N];
    for (int k = 0; k < N; k++) own[k] = sums[k];
    for (int i = 0; i < n; i += LANES) {
        lanes left, right;
        std::memcpy(&left, a + i, sizeof left);
        for (int k = 0; k < N; k++) {
            std::memcpy(&right, b + k * BLOCK + i, sizeof right);
            own[k] += left * right;
        }
    }
    for (int k = 0; k < N; k++) sums[k] = own[k];
}

// Sort one row's positions by their keys, equal ones by position, and write each one's place.
template <typename Rank>
struct RowSorter {
    std::vector<uint32_t> keys;
    std::vector<uint32_t> order, next;

    explicit RowSorter(int64_t length) : keys(length), order(length), next(length) {}

    void write(Rank* ranks, int64_t length) {
        static const int shifts[3] = {0, 10, 20};
        uint32_t counts[3][2048] = {};
        for (int64_t i = 0; i < length; i++) {
            const uint32_t key = keys[i];
            counts[0][key & 1023]++;
            counts[1][key >> 10 & 1023]++;
            counts[2][key >> 20]++;
        }
        bool is_identity = true;
        for (int pass = 0; pass < 3; pass++) {
            const uint32_t mask = pass < 2 ? 1023 : 2047;
            uint32_t* places = counts[pass];
            if (places[keys[0] >> shifts[pass] & mask] == uint32_t(length)) continue;  // all have the same digit
            uint32_t sum = 0;
            for (uint32_t bin = 0; bin <= mask; bin++) {
                const uint32_t own = places[bin];
                places[bin] = sum;
                sum += own;
            }
            if (is_identity)
                for (int64_t i = 0; i < length; i++) next[places[keys[i] >> shifts[pass] & mask]++] = uint32_t(i);
            else
                for (int64_t i = 0; i < length; i++)
                    next[places[keys[order[i]] >> shifts[pass] & mask]++] = order[i];
            is_identity = false;
            order.swap(next);
        }
        for (int64_t i = 0; i < length; i++) ranks[is_identity ? i : order[i]] = Rank(i);
    }
};

template <typename Rank>
void rank_rows(const Job& job, Rank* ranks) {
    RowSorter<Rank> sorter(job.row_length);
    alignas(64) float start[BLOCK], vector[BLOCK];
    for (int64_t row = 0; row < job.size; row += job.row_length) {
        for (int64_t begin = 0; begin < job.row_length; begin += BLOCK) {
            const int n = int(std::min(job.row_length - begin, int64_t(BLOCK)));
            read_base(start, job, row + begin, n);
            read_vector(vector, start, job, 0, row + begin, n);
            for (int i = 0; i < n; i++) sorter.keys[begin + i] = magnitude_bits(vector[i]);
        }
        sorter.write(ranks + row, job.row_length);
    }
}

}  // namespace

// Magnitudes of the first expert's entries, times their rows' scales where there are any.
extern "C" void select_magnitudes(const Job* job, const int64_t* positions, int32_t n, float* values) {
    Magnitudes source = {*job, {}, {}};
    select(source, positions, n, values);
}

extern "C" void select_variances(const Job* job, const int64_t* positions, int32_t n, float* values) {
    Variances source(*job);
    select(source, positions, n, values);
}

extern "C" int64_t count_varying(const Job* job) {
    Variances source(*job);
    int64_t count = 0;
    for_each_block(source, [&](const uint32_t* keys, int n) {
        for (int i = 0; i < n; i++) count += keys[i] != 0;
    });
    return count;
}

// Of each expert Σ τ² by variance, (n + 1, n_experts): row b holds the entries whose variance reaches b of the n
// thresholds, which ascend.
extern "C" void sum_energies(const Job* job, const float* thresholds, int32_t n, double* energies) {
    Variances source(*job);
    std::vector<uint32_t> bounds(n + 1, ~0u);
    for (int i = 0; i < n; i++) bounds[i] = to_bits(thresholds[i]);
    std::vector<int32_t> from(1 << 16);  // the thresholds that all of these upper bits reach
    for (uint32_t upper = 0, bin = 0; upper < from.size(); upper++) {
        while (bounds[bin] <= upper << 15) bin++;
        from[upper] = int32_t(bin);
    }
    for_each_block(source, [&](const uint32_t* keys, int length) {
        for (int i = 0; i < length; i++) {
            int32_t bin = from[keys[i] >> 15];
            while (bounds[bin] <= keys[i]) bin++;
            double* own = energies + int64_t(bin) * job->n_experts;
            for (int e = 0; e < job->n_experts; e++) {
                const double entry = source.parts[e * BLOCK + i];
                own[e] += entry * entry;
            }
        }
    });
}

// The inner products of base and task vectors by rows, (n_rows, n_experts + 1, n_experts + 1).
extern "C" void sum_products(const Job* job, double* grams) {
    const int n = job->n_experts + 1;
    std::vector<double> vectors(size_t(n) * BLOCK);
    std::vector<lanes> sums(size_t(n) * n);
    alignas(64) float start[BLOCK], vector[BLOCK];
    for (int64_t row = 0; row < job->n_rows; row++) {
        double* gram = grams + row * n * n;
        for (int64_t span = 0; span < job->row_length; span += SPAN) {
            std::fill(sums.begin(), sums.end(), lanes{});
            const int64_t end = std::min(job->row_length, span + SPAN);
            for (int64_t begin = span; begin < end; begin += BLOCK) {
                const int length = int(std::min(end - begin, int64_t(BLOCK)));
                const int padded = (length + LANES - 1) / LANES * LANES;
                for (int e = 0; e < n; e++) {
                    double* own = &vectors[size_t(e) * BLOCK];
                    const int64_t place = row * job->row_length + begin;
                    if (e == 0)
                        read_base(start, *job, place, length);
                    else
                        read_vector(vector, start, *job, e - 1, place, length);
                    const float* from = e == 0 ? start : vector;
                    for (int i = 0; i < length; i++) own[i] = from[i];
                    for (int i = length; i < padded; i++) own[i] = 0.0;
                }
                for (int a = 0; a < n; a++) {
                    const double* left = &vectors[size_t(a) * BLOCK];
                    int b = a;
                    for (; b + 4 <= n; b += 4)
                        add_products<4>(&sums[a * n + b], left, &vectors[size_t(b) * BLOCK], padded);
                    for (; b < n; b++) add_products<1>(&sums[a * n + b], left, &vectors[size_t(b) * BLOCK], padded);
                }
            }
            for (int a = 0; a < n; a++)
                for (int b = a; b < n; b++) gram[a * n + b] += total(sums[a * n + b]);
        }
        for (int a = 0; a < n; a++)
            for (int b = 0; b < a; b++) gram[a * n + b] = gram[b * n + a];
    }
}

// The rank of each magnitude of the first expert in its row, equal ones by position.
extern "C" void rank_magnitudes(const Job* job, void* ranks) {
    if (job->rank_bytes == 2)
        rank_rows(*job, static_cast<uint16_t*>(ranks));
    else
        rank_rows(*job, static_cast<uint32_t*>(ranks));
}
