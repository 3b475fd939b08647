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
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "bfloat16.h"

namespace {

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

constexpr int64_t ahead = 12;  // rows fetched into cache before they are needed

inline void prefetch(const void* row, int64_t bytes) {
    for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(static_cast<const char*>(row) + j);
}

// total [rows, width] += grad [n, width], row i to row slots[i]. The look-ups of a row are brought together by counting, so that
// a row is summed in registers and written once; rows are dealt to threads by their look-ups.
template <typename T>
void add_rows(const T* grad, const int64_t* slots, int64_t n, int64_t width, float* total, int64_t rows) {
    if (n == 0) return;
    const int threads = static_cast<int>(std::min<int64_t>(omp_get_max_threads(), 1 + n / 4096));
    std::vector<int32_t> next(rows + 1, 0), order(n);
    for (int64_t i = 0; i < n; ++i) ++next[slots[i] + 1];
    for (int64_t row = 0; row < rows; ++row) next[row + 1] += next[row];
    std::vector<int64_t> first(threads + 1, rows);
    first[0] = 0;
    for (int t = 1; t < threads; ++t)
        first[t] = std::lower_bound(next.begin(), next.end(), static_cast<int32_t>(n * t / threads)) - next.begin();
    for (int t = 1; t < threads; ++t) first[t] = std::min(std::max(first[t], first[t - 1]), rows);
#pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num();
        const int64_t begin = first[t], end = first[t + 1];
        if (begin < end) {
            int32_t* own = next.data();
            const int32_t start = own[begin];
            for (int64_t i = 0; i < n; ++i) {
                const int64_t slot = slots[i];
                if (slot >= begin && slot < end) order[own[slot]++] = static_cast<int32_t>(i);
            }
            // own[row] is now the end of row's look-ups
            const int32_t stop = own[end - 1];
            int32_t place = start;
            for (int64_t row = begin; row < end; ++row) {
                float* __restrict sum = total + row * width;
                for (; place < own[row]; ++place) {
                    if (place + ahead < stop)
                        prefetch(grad + order[place + ahead] * width, width * static_cast<int64_t>(sizeof(T)));
                    const T* __restrict g = grad + order[place] * width;
                    for (int64_t j = 0; j < width; ++j) sum[j] += load(g[j]);
                }
            }
        }
    }
}

}  // namespace

extern "C" void add_rows_f32(const void* grad, const int64_t* slots, int64_t n, int64_t width, float* total,
                             int64_t rows) {
    add_rows(static_cast<const float*>(grad), slots, n, width, total, rows);
}
extern "C" void add_rows_bf16(const void* grad, const int64_t* slots, int64_t n, int64_t width, float* total,
                              int64_t rows) {
    add_rows(static_cast<const bfloat16*>(grad), slots, n, width, total, rows);
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

namespace {

enum Format { float32_rows, bfloat16_rows, int8_rows };
enum Rule { rowwise_adagrad, rowwise_adam, adam, sgd };
constexpr uint32_t golden = 0x9E3779B9u;

inline uint32_t mix(uint32_t value) {
    value = (value ^ (value >> 16)) * 0x7FEB352Du;
    value = (value ^ (value >> 15)) * 0x846CA68Bu;
    return value ^ (value >> 16);
}

inline bfloat16 round_bfloat16(float value, uint32_t bits) {
    uint32_t raw;
    std::memcpy(&raw, &value, 4);
    const uint32_t raised = (raw + (bits >> 16)) >> 16;
    return {static_cast<uint16_t>((raw & 0x7f800000u) == 0x7f800000u ? raw >> 16 : raised)};
}

inline void load_row(const void* weight, int format, const float* scale, int64_t row, int64_t width, float* values) {
    if (format == float32_rows) {
        std::memcpy(values, static_cast<const float*>(weight) + row * width, width * sizeof(float));
    } else if (format == bfloat16_rows) {
        const bfloat16* __restrict from = static_cast<const bfloat16*>(weight) + row * width;
        for (int64_t j = 0; j < width; ++j) values[j] = load(from[j]);
    } else {
        const int8_t* __restrict from = static_cast<const int8_t*>(weight) + row * width;
        const float factor = scale[row];
        for (int64_t j = 0; j < width; ++j) values[j] = factor * static_cast<float>(from[j]);
    }
}

inline void store_row(void* weight, int format, float* scale, int64_t row, int64_t width, const float* values,
                      uint32_t noise) {
    if (format == float32_rows) {
        std::memcpy(static_cast<float*>(weight) + row * width, values, width * sizeof(float));
    } else if (format == bfloat16_rows) {
        bfloat16* __restrict to = static_cast<bfloat16*>(weight) + row * width;
        for (int64_t j = 0; j < width; ++j)
            to[j] = round_bfloat16(values[j], mix(noise + static_cast<uint32_t>(j) * golden));
    } else {
        int8_t* __restrict to = static_cast<int8_t*>(weight) + row * width;
        float largest = 0.0f;
        for (int64_t j = 0; j < width; ++j) largest = std::max(largest, std::fabs(values[j]));
        const float own = largest * (1.0f / 127.0f);
        const float inverse = own > 0.0f ? 1.0f / own : 0.0f;
        for (int64_t j = 0; j < width; ++j) {
            const uint32_t bits = mix(noise + static_cast<uint32_t>(j) * golden) >> 8;
            const float lifted = std::floor(values[j] * inverse + static_cast<float>(bits) * 0x1p-24f);
            to[j] = static_cast<int8_t>(std::min(std::max(lifted, -127.0f), 127.0f));
        }
        scale[row] = own;
    }
}

inline float load_state(const void* state, bool narrow, int64_t at) {
    return narrow ? load(static_cast<const bfloat16*>(state)[at]) : static_cast<const float*>(state)[at];
}

inline void store_state(void* state, bool narrow, int64_t at, float value, uint32_t bits) {
    if (narrow)
        static_cast<bfloat16*>(state)[at] = round_bfloat16(value, bits);
    else
        static_cast<float*>(state)[at] = value;
}

inline int64_t row_bytes(int format, int64_t width) { return width * (format == float32_rows ? 4 : format == bfloat16_rows ? 2 : 1); }

inline const char* row_address(const void* weight, int format, int64_t width, int64_t row) {
    return static_cast<const char*>(weight) + row * row_bytes(format, width);
}

// Result rows are read once, by somebody else, later: where they do not fit the cache anyway they are written around it.
inline void write_around(float* to, const float* from, int64_t width) {
#ifdef __AVX512F__
    for (int64_t j = 0; j < width; j += 16) _mm512_stream_ps(to + j, _mm512_loadu_ps(from + j));
#else
    std::memcpy(to, from, width * sizeof(float));
#endif
}

}  // namespace

// out [n, width] float32 or bfloat16 = rows index[slots[i]] of weight; without slots rows index[i], without index slots[i].
extern "C" void gather_rows(const void* weight, int64_t format, const float* scale, const int64_t* index,
                            const int64_t* slots, int64_t n, int64_t width, void* out, int64_t narrow) {
    const auto row_of = [=](int64_t i) { return index == nullptr ? slots[i] : index[slots == nullptr ? i : slots[i]]; };
    const int kind = static_cast<int>(format);
    const int64_t bytes = row_bytes(kind, width);
    const bool plain = (kind == float32_rows && !narrow) || (kind == bfloat16_rows && narrow);
    const bool around = plain && !narrow && width % 16 == 0 && n * bytes > (int64_t{1} << 25) &&
                        reinterpret_cast<uintptr_t>(out) % 64 == 0;
#pragma omp parallel
    {
        std::vector<float> buffer(width);
        float* values = buffer.data();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
            if (i + ahead < n) prefetch(row_address(weight, kind, width, row_of(i + ahead)), bytes);
            const int64_t row = row_of(i);
            if (around) {
                write_around(static_cast<float*>(out) + i * width, static_cast<const float*>(weight) + row * width, width);
            } else if (plain) {
                std::memcpy(static_cast<char*>(out) + i * bytes, row_address(weight, kind, width, row), bytes);
            } else if (narrow) {
                load_row(weight, kind, scale, row, width, values);
                bfloat16* __restrict to = static_cast<bfloat16*>(out) + i * width;
                for (int64_t j = 0; j < width; ++j) to[j] = nearest(values[j]);
            } else {
                load_row(weight, kind, scale, row, width, static_cast<float*>(out) + i * width);
            }
        }
#ifdef __AVX512F__
        if (around) _mm_sfence();
#endif
    }
}

struct RowUpdate {
    int32_t rule, format, narrow_state;
    float rate, decay, beta1, beta2, eps, factor;
    uint32_t noise;
    int64_t first;
};

// One optimizer step on rows index [n], distinct, with gradients grad [n, width]; first_state and second_state as rows.py says.
extern "C" void update_rows(void* weight, float* scale, void* first_state, void* second_state, const int64_t* index,
                            const float* grad, int64_t n, int64_t width, const RowUpdate* update) {
    const RowUpdate u = *update;
    const bool narrow = u.narrow_state != 0;
    const float inverse_width = 1.0f / static_cast<float>(width);
    const int64_t bytes = row_bytes(u.format, width);
#pragma omp parallel
    {
        std::vector<float> buffer(2 * width);
        float* __restrict values = buffer.data();
        float* __restrict g = buffer.data() + width;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
            if (i + ahead < n) {
                const int64_t later = index[i + ahead];
                prefetch(row_address(weight, u.format, width, later), bytes);
                if (u.rule == rowwise_adagrad) __builtin_prefetch(static_cast<char*>(first_state) + later * (narrow ? 2 : 4));
            }
            const int64_t row = index[i], at = row * width;
            const uint64_t place = static_cast<uint64_t>(row + u.first);
            const uint32_t noise = mix(mix(static_cast<uint32_t>(place) ^ u.noise) ^ static_cast<uint32_t>(place >> 32));
            const auto bits = [=](int64_t column) { return mix(noise + static_cast<uint32_t>(column) * golden); };
            load_row(weight, u.format, scale, row, width, values);
            const float* __restrict own = grad + i * width;
            float squares = 0.0f;
            for (int64_t j = 0; j < width; ++j) {
                g[j] = own[j] * u.factor;
                squares += g[j] * g[j];
            }
            if (u.rule == sgd) {
                for (int64_t j = 0; j < width; ++j) values[j] = values[j] * u.decay - u.rate * g[j];
            } else if (u.rule == rowwise_adagrad) {
                const float sum = load_state(first_state, narrow, row) + squares * inverse_width;
                store_state(first_state, narrow, row, sum, bits(width));
                const float size = u.rate / (std::sqrt(sum) + u.eps);
                for (int64_t j = 0; j < width; ++j) values[j] = values[j] * u.decay - size * g[j];
            } else {
                float size = 0.0f;
                if (u.rule == rowwise_adam) {
                    const float square = u.beta2 * load_state(second_state, narrow, row) + (1.0f - u.beta2) * squares * inverse_width;
                    store_state(second_state, narrow, row, square, bits(2 * width));
                    size = u.rate / (std::sqrt(square) + u.eps);
                }
                for (int64_t j = 0; j < width; ++j) {
                    const float mean = u.beta1 * load_state(first_state, narrow, at + j) + (1.0f - u.beta1) * g[j];
                    store_state(first_state, narrow, at + j, mean, narrow ? bits(width + j) : 0);
                    float own_size = size;
                    if (u.rule == adam) {
                        const float square =
                            u.beta2 * load_state(second_state, narrow, at + j) + (1.0f - u.beta2) * g[j] * g[j];
                        store_state(second_state, narrow, at + j, square, narrow ? bits(2 * width + j) : 0);
                        own_size = u.rate / (std::sqrt(square) + u.eps);
                    }
                    values[j] = values[j] * u.decay - own_size * mean;
                }
            }
            store_row(weight, u.format, scale, row, width, values, noise);
        }
    }
}

constexpr int64_t scatter = 2533;  // as in rows.py

struct HashTables {
    int64_t tables, longest, base, pad_id, reset, eod_id, stripes, total, smallest;
    const int64_t *orders, *sizes, *beyond;
};

// out [lines, length, tables] = places in the row space of the n-grams of extended [lines, longest - 1 + length].
extern "C" void ngram_rows(const int64_t* extended, int64_t lines, int64_t length, const HashTables* hash, int64_t* out) {
    const HashTables h = *hash;
    const int64_t reach = h.longest - 1, heap_size = h.total / h.stripes;
#pragma omp parallel
    {
        std::vector<int64_t> window(h.longest);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < lines * length; ++at) {
            const int64_t* token = extended + at / length * (length + reach) + at % length + reach;
            bool visible = true;
            for (int64_t back = 0; back <= reach; ++back) {
                const int64_t value = token[-back];
                bool present = value >= 0;
                if (back > 0 && h.reset) present = visible = visible && present && value != h.eod_id;
                window[back] = present ? value : h.pad_id;
            }
            for (int64_t t = 0; t < h.tables; ++t) {
                const uint64_t size = h.sizes[t], base = h.base % h.sizes[t];
                uint64_t row = window[h.orders[t] - 1] % size;
                for (int64_t back = h.orders[t] - 2; back >= 0; --back) row = (row * base + window[back]) % size;
                const int64_t own = static_cast<int64_t>(row);
                const int64_t count = own < h.smallest ? own * h.tables + t : own + h.beyond[t];
                const int64_t heap = count % h.stripes * scatter % h.stripes;
                out[at * h.tables + t] =
                    count < heap_size * h.stripes ? heap * heap_size + count / h.stripes : count;
            }
        }
    }
}
