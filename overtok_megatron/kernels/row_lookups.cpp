// Look-ups on CPU: distinct row ids by a radix sort, and rows copied to where they are looked up.
//
// Same conventions as cpu.cpp. Results do not depend on the number of threads. The shapes of what pointers point to are in
// rows.py, whose meaning these loops have; cpu_rows.py is the only caller.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "rows.h"

namespace {

constexpr int digit_bits = 12;
constexpr int64_t digits = 1 << digit_bits;

// One stable pass of a radix sort by the `width` bits at `shift`.
void sort_pass(const uint64_t* from, uint64_t* to, int64_t n, int shift, int width, int threads, std::vector<int64_t>& counts) {
    const uint64_t mask = (uint64_t{1} << width) - 1;
    counts.assign(static_cast<size_t>(threads) * digits, 0);
#pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num();
        int64_t* own = counts.data() + t * digits;
        const int64_t begin = n * t / threads, end = n * (t + 1) / threads;
        for (int64_t i = begin; i < end; ++i) ++own[(from[i] >> shift) & mask];
#pragma omp barrier
#pragma omp single
        {
            int64_t total = 0;
            for (uint64_t d = 0; d <= mask; ++d)
                for (int u = 0; u < threads; ++u) {
                    const int64_t count = counts[u * digits + d];
                    counts[u * digits + d] = total;
                    total += count;
                }
        }
        for (int64_t i = begin; i < end; ++i) to[own[(from[i] >> shift) & mask]++] = from[i];
    }
}

// out [n] = values[i] << shift | i, ascending; values below 2^bits, n at most 2^shift.
void sort_with_indices(const int64_t* values, int64_t n, int64_t bits, int shift, uint64_t* out) {
    const int threads = threads_for(n);
    const int passes = std::max<int>(1, static_cast<int>((bits + digit_bits - 1) / digit_bits));
    const int width = std::max<int>(1, static_cast<int>((bits + passes - 1) / passes));
    const std::unique_ptr<uint64_t[]> scratch(new uint64_t[n]);
    std::vector<int64_t> counts;
    uint64_t *from = passes % 2 == 0 ? out : scratch.get(), *to = passes % 2 == 0 ? scratch.get() : out;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; ++i) from[i] = static_cast<uint64_t>(values[i]) << shift | static_cast<uint64_t>(i);
    for (int pass = 0; pass < passes; ++pass) {
        sort_pass(from, to, n, shift + pass * width, width, threads, counts);
        std::swap(from, to);
    }
}

inline void write(void* to, const void* from, int64_t bytes, bool around_cache) {
#ifdef __AVX512F__
    if (around_cache) {
        for (int64_t j = 0; j < bytes; j += 64)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(to) + j),
                                _mm512_loadu_si512(static_cast<const char*>(from) + j));
        return;
    }
#endif
    std::memcpy(to, from, bytes);
}

}  // namespace

// ids [n], all in [0, 2^bits), bits + shift < 64, n at most 2^shift -> unique [up to n] ascending, slots [n]: the index of each
// id there, sorted_lookups [n] = slots[i] * 2^32 + i ascending. Returns how many are distinct.
extern "C" int64_t unique_ids(const int64_t* ids, int64_t n, int64_t bits, int64_t shift, int64_t* unique, int64_t* slots,
                              uint64_t* sorted_lookups) {
    if (n == 0) return 0;
    const std::unique_ptr<uint64_t[]> sorted(new uint64_t[n]);
    const uint64_t* entries = sorted.get();
    sort_with_indices(ids, n, bits, static_cast<int>(shift), sorted.get());
    const int threads = threads_for(n);
    const uint64_t mask = (uint64_t{1} << shift) - 1;
    const auto is_first = [=](int64_t i) { return i == 0 || entries[i] >> shift != entries[i - 1] >> shift; };
    std::vector<int64_t> firsts(threads + 1, 0);
#pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num();
        const int64_t begin = n * t / threads, end = n * (t + 1) / threads;
        int64_t count = 0;
        for (int64_t i = begin; i < end; ++i) count += is_first(i);
        firsts[t + 1] = count;
#pragma omp barrier
#pragma omp single
        for (int u = 0; u < threads; ++u) firsts[u + 1] += firsts[u];
        int64_t slot = firsts[t] - 1;
        for (int64_t i = begin; i < end; ++i) {
            if (is_first(i)) unique[++slot] = static_cast<int64_t>(entries[i] >> shift);
            const uint64_t lookup = entries[i] & mask;
            slots[lookup] = slot;
            sorted_lookups[i] = static_cast<uint64_t>(slot) << 32 | lookup;
        }
    }
    return firsts[threads];
}

// sorted_lookups [n] = slots[i] * 2^32 + i, ascending; slots below 2^bits.
extern "C" void sort_lookups(const int64_t* slots, int64_t n, int64_t bits, uint64_t* sorted_lookups) {
    if (n > 0) sort_with_indices(slots, n, bits, 32, sorted_lookups);
}

// out [n, width] float32 or bfloat16: out[i] is row index[slots[i]] of weight, slots[i] without index, index[i] without slots.
// sorted_lookups, where given, are those of sort_lookups for these slots: each row is then read once.
extern "C" void gather_rows(const void* weight, int64_t format, const float* scale, const int64_t* index, const int64_t* slots,
                            const uint64_t* sorted_lookups, int64_t n, int64_t width, void* out, int64_t narrow) {
    const int kind = static_cast<int>(format);
    const int64_t bytes = row_bytes(kind, width), out_bytes = width * (narrow ? 2 : 4);
    const bool is_copy = (kind == float32_rows && !narrow) || (kind == bfloat16_rows && narrow);
    const bool around_cache = goes_around_cache(out, out_bytes, n);
    const auto row_of = [=](int64_t i) {
        const int64_t slot = sorted_lookups != nullptr ? static_cast<int64_t>(sorted_lookups[i] >> 32)
                             : slots != nullptr        ? slots[i]
                                                       : i;
        return index == nullptr ? slot : index[slot];
    };
#pragma omp parallel
    {
        std::vector<float> buffer(2 * width);
        float* values = buffer.data();
        bfloat16* __restrict rounded = reinterpret_cast<bfloat16*>(buffer.data() + width);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
            if (i + rows_ahead < n) prefetch(row_address(weight, kind, width, row_of(i + rows_ahead)), bytes);
            const int64_t row = row_of(i);
            const int64_t lookup = sorted_lookups == nullptr ? i : static_cast<int64_t>(sorted_lookups[i] & lookup_mask);
            char* to = static_cast<char*>(out) + lookup * out_bytes;
            if (is_copy) {
                write(to, row_address(weight, kind, width, row), out_bytes, around_cache);
                continue;
            }
            load_row(weight, kind, scale, row, width, values);
            if (narrow)
                for (int64_t j = 0; j < width; ++j) rounded[j] = nearest(values[j]);
            write(to, narrow ? static_cast<const void*>(rounded) : values, out_bytes, around_cache);
        }
        finish_writes(around_cache);
    }
}
