// What a step does with rows of the n-gram tables on CPU: ids made unique, gradients of one row added up, rows updated.
//
// Same conventions as cpu.cpp. Results do not depend on the number of threads: every sum runs in the order of the
// look-ups, whoever adds it. Pointers' shapes are in rows.py, the only caller.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float load(float value) { return value; }
inline float load(bfloat16 value) {
    uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &wide, 4);
    return result;
}

constexpr int digit_bits = 11;
constexpr int64_t digits = 1 << digit_bits;

struct Entry {
    int64_t id;
    int64_t place;
};

// One stable pass of a radix sort by the digit at `shift`.
void sort_pass(const Entry* from, Entry* to, int64_t n, int shift, int threads, std::vector<int64_t>& counts) {
    counts.assign(static_cast<size_t>(threads) * digits, 0);
#pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num();
        int64_t* own = counts.data() + t * digits;
        const int64_t begin = n * t / threads, end = n * (t + 1) / threads;
        for (int64_t i = begin; i < end; ++i) ++own[(from[i].id >> shift) & (digits - 1)];
#pragma omp barrier
#pragma omp single
        {
            int64_t total = 0;
            for (int64_t d = 0; d < digits; ++d)
                for (int u = 0; u < threads; ++u) {
                    const int64_t count = counts[u * digits + d];
                    counts[u * digits + d] = total;
                    total += count;
                }
        }
        for (int64_t i = begin; i < end; ++i) to[own[(from[i].id >> shift) & (digits - 1)]++] = from[i];
    }
}

}  // namespace

// ids [n], all in [0, 2^bits) -> unique [up to n] ascending, slots [n]: the place of each id there. Returns how many.
extern "C" int64_t unique_rows(const int64_t* ids, int64_t n, int64_t bits, int64_t* unique, int64_t* slots) {
    if (n == 0) return 0;
    const int threads = static_cast<int>(std::min<int64_t>(omp_get_max_threads(), 1 + n / 4096));
    std::vector<Entry> first(n), second(n);
    std::vector<int64_t> counts;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; ++i) first[i] = {ids[i], i};
    Entry *from = first.data(), *to = second.data();
    for (int shift = 0; shift < bits; shift += digit_bits) {
        sort_pass(from, to, n, shift, threads, counts);
        std::swap(from, to);
    }
    int64_t count = -1;
    int64_t last = -1;
    for (int64_t i = 0; i < n; ++i) {
        if (from[i].id != last) {
            last = from[i].id;
            unique[++count] = last;
        }
        slots[from[i].place] = count;
    }
    return count + 1;
}

namespace {

// total [slots' range, width] += grad [n, width], row i to row slots[i]. A thread owns the slots of its residue class.
template <typename T>
void add_rows(const T* grad, const int64_t* slots, int64_t n, int64_t width, float* total) {
    const int threads = static_cast<int>(std::min<int64_t>(omp_get_max_threads(), 1 + n / 1024));
#pragma omp parallel num_threads(threads)
    {
        const int64_t own = omp_get_thread_num();
        for (int64_t i = 0; i < n; ++i) {
            const int64_t slot = slots[i];
            if (slot % threads != own) continue;
            const T* __restrict row = grad + i * width;
            float* __restrict sum = total + slot * width;
            for (int64_t j = 0; j < width; ++j) sum[j] += load(row[j]);
        }
    }
}

}  // namespace

extern "C" void add_rows_f32(const void* grad, const int64_t* slots, int64_t n, int64_t width, float* total) {
    add_rows(static_cast<const float*>(grad), slots, n, width, total);
}
extern "C" void add_rows_bf16(const void* grad, const int64_t* slots, int64_t n, int64_t width, float* total) {
    add_rows(static_cast<const bfloat16*>(grad), slots, n, width, total);
}

// Sum of squares of values [n] in float64, by blocks of a fixed size whose sums are added in order.
extern "C" double square_sum_f32(const float* values, int64_t n) {
    constexpr int64_t block = 1 << 14;
    const int64_t blocks = (n + block - 1) / block;
    std::vector<double> sums(blocks);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t end = std::min(n, (b + 1) * block);
        double sum = 0.0;
        for (int64_t i = b * block; i < end; ++i) sum += static_cast<double>(values[i]) * values[i];
        sums[b] = sum;
    }
    double total = 0.0;
    for (double sum : sums) total += sum;
    return total;
}

// Row-wise Adagrad of rows [n], distinct: square_sum[row] += mean(g^2), then the row moves. decay multiplies it first.
extern "C" void adagrad_rows_f32(float* weight, float* square_sum, const int64_t* rows, const float* grad, int64_t n,
                                 int64_t width, float rate, float eps, float decay) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        if (i + 16 < n) {
            for (int64_t j = 0; j < width; j += 16) __builtin_prefetch(weight + rows[i + 16] * width + j, 1);
            __builtin_prefetch(square_sum + rows[i + 16], 1);
        }
        const float* __restrict g = grad + i * width;
        float* __restrict row = weight + rows[i] * width;
        float squares = 0.0f;
        for (int64_t j = 0; j < width; ++j) squares += g[j] * g[j];
        const float sum = square_sum[rows[i]] + squares / static_cast<float>(width);
        square_sum[rows[i]] = sum;
        const float step = rate / (std::sqrt(sum) + eps);
        for (int64_t j = 0; j < width; ++j) row[j] = row[j] * decay - step * g[j];
    }
}
