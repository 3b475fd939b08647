// What a step does with rows of the n-gram tables on CPU: ids made unique, gradients of one row added up, rows updated.
//
// Same conventions as cpu.cpp. Results do not depend on the number of threads: every sum runs in the order of the
// look-ups, whoever adds it. Pointers' shapes are in rows.py, the only caller.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "bfloat16.h"

namespace {

constexpr int digit_bits = 12;
constexpr int64_t digits = 1 << digit_bits;
constexpr int64_t ahead = 16;  // rows fetched into cache before they are needed
constexpr uint64_t look_up_mask = 0xFFFFFFFFu;

inline int threads_for(int64_t n) { return static_cast<int>(std::min<int64_t>(omp_get_max_threads(), 1 + n / 4096)); }

inline void prefetch(const void* row, int64_t bytes) {
    for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(static_cast<const char*>(row) + j);
}

// What is read by somebody else, later, is written around the cache where it does not fit there anyway.
inline bool goes_around(const void* to, int64_t bytes, int64_t n) {
    return bytes % 64 == 0 && n * bytes > (int64_t{1} << 25) && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

inline void write(void* to, const void* from, int64_t bytes, bool around) {
#ifdef __AVX512F__
    if (around) {
        for (int64_t j = 0; j < bytes; j += 64)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(to) + j),
                                _mm512_loadu_si512(static_cast<const char*>(from) + j));
        return;
    }
#endif
    std::memcpy(to, from, bytes);
}

inline void fence(bool around) {
#ifdef __AVX512F__
    if (around) _mm_sfence();
#endif
}

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
void sort_with_places(const int64_t* values, int64_t n, int64_t bits, int shift, uint64_t* out) {
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

}  // namespace

// ids [n], all in [0, 2^bits), bits + shift < 64, n at most 2^shift -> unique [up to n] ascending, slots [n]: the place of each
// id there, order [n] = slots[i] * 2^32 + i ascending. Returns how many.
extern "C" int64_t unique_rows(const int64_t* ids, int64_t n, int64_t bits, int64_t shift, int64_t* unique, int64_t* slots,
                               uint64_t* order) {
    if (n == 0) return 0;
    const std::unique_ptr<uint64_t[]> sorted(new uint64_t[n]);
    const uint64_t* entries = sorted.get();
    sort_with_places(ids, n, bits, static_cast<int>(shift), sorted.get());
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
            const uint64_t place = entries[i] & mask;
            slots[place] = slot;
            order[i] = static_cast<uint64_t>(slot) << 32 | place;
        }
    }
    return firsts[threads];
}

// order [n] = slots[i] * 2^32 + i, ascending; slots below 2^bits.
extern "C" void order_rows(const int64_t* slots, int64_t n, int64_t bits, uint64_t* order) {
    if (n > 0) sort_with_places(slots, n, bits, 32, order);
}

namespace {

constexpr int64_t block_size = 16;
typedef float block __attribute__((vector_size(4 * block_size)));
typedef uint16_t half_block __attribute__((vector_size(2 * block_size)));
typedef uint32_t bit_block __attribute__((vector_size(4 * block_size)));

inline block load_block(const float* from) {
    block values;
    std::memcpy(&values, from, sizeof(values));
    return values;
}

inline block load_block(const bfloat16* from) {
    half_block half;
    std::memcpy(&half, from, sizeof(half));
    const bit_block bits = __builtin_convertvector(half, bit_block) << 16;
    block values;
    std::memcpy(&values, &bits, sizeof(values));
    return values;
}

inline void write_block(float* to, block value, bool around) {
#ifdef __AVX512F__
    if (around) {
        _mm512_stream_ps(to, reinterpret_cast<__m512>(value));
        return;
    }
#endif
    std::memcpy(to, &value, sizeof(value));
}

// total [rows, width] += grad [n, width] as order says, and squares [rows] the sums of squares of the rows that this changes;
// fresh: they hold nothing, and rows without a look-up become zero. blocks: of block_size values, a row's width, held in
// registers; 0: any width.
template <int blocks, typename T>
void add_rows(const T* grad, const uint64_t* order, int64_t n, int64_t width, float* total, float* squares, int64_t rows,
              bool fresh) {
    const int threads = threads_for(n);
    const auto row_of = [=](int64_t i) { return static_cast<int64_t>(order[i] >> 32); };
    const auto gradient = [=](int64_t i) { return grad + static_cast<int64_t>(order[i] & look_up_mask) * width; };
    const int64_t line = width * static_cast<int64_t>(sizeof(float));
    const bool around = fresh && goes_around(total, line, rows);
    const auto first_of = [=](int t) {  // whole rows to one thread, dealt by their look-ups
        int64_t i = n * t / threads;
        while (i > 0 && i < n && row_of(i) == row_of(i - 1)) ++i;
        return i;
    };
    const auto clear = [=](int64_t from, int64_t to) {
        std::memset(total + from * width, 0, (to - from) * line);
        std::memset(squares + from, 0, (to - from) * sizeof(float));
    };
#pragma omp parallel num_threads(threads)
    {
        const int t = omp_get_thread_num();
        const int64_t stop = first_of(t + 1);
        int64_t i = first_of(t);
        int64_t unwritten = i == 0 ? 0 : row_of(i - 1) + 1;
        while (i < stop) {
            const int64_t row = row_of(i);
            float* __restrict sum = total + row * width;
            if (fresh && unwritten < row) clear(unwritten, row);
            unwritten = row + 1;
            block held[blocks + 1];
            for (int b = 0; b < blocks; ++b) held[b] = fresh ? block{} : load_block(sum + b * block_size);
            if (blocks == 0 && fresh) std::memset(sum, 0, line);
            do {
                if (i + ahead < stop) prefetch(gradient(i + ahead), width * static_cast<int64_t>(sizeof(T)));
                const T* __restrict g = gradient(i);
                for (int b = 0; b < blocks; ++b) held[b] += load_block(g + b * block_size);
                if (blocks == 0)
                    for (int64_t j = 0; j < width; ++j) sum[j] += load(g[j]);
                ++i;
            } while (i < stop && row_of(i) == row);
            block products{};
            for (int b = 0; b < blocks; ++b) {
                write_block(sum + b * block_size, held[b], around);
                products += held[b] * held[b];
            }
            float square = 0.0f;
            for (int64_t j = 0; j < block_size; ++j) square += products[j];
            if (blocks == 0)
                for (int64_t j = 0; j < width; ++j) square += sum[j] * sum[j];
            squares[row] = square;
        }
        fence(around);
        if (fresh && t + 1 == threads) clear(n == 0 ? 0 : row_of(n - 1) + 1, rows);
    }
}

template <typename T>
void add_rows(const T* grad, const uint64_t* order, int64_t n, int64_t width, float* total, float* squares, int64_t rows,
              bool fresh) {
    auto* function = width == 16    ? add_rows<1, T>
                     : width == 32  ? add_rows<2, T>
                     : width == 64  ? add_rows<4, T>
                     : width == 128 ? add_rows<8, T>
                     : width == 256 ? add_rows<16, T>
                                    : add_rows<0, T>;
    function(grad, order, n, width, total, squares, rows, fresh);
}

}  // namespace

extern "C" void add_rows_f32(const void* grad, const uint64_t* order, int64_t n, int64_t width, float* total, float* squares,
                             int64_t rows, int64_t fresh) {
    add_rows(static_cast<const float*>(grad), order, n, width, total, squares, rows, fresh != 0);
}
extern "C" void add_rows_bf16(const void* grad, const uint64_t* order, int64_t n, int64_t width, float* total, float* squares,
                              int64_t rows, int64_t fresh) {
    add_rows(static_cast<const bfloat16*>(grad), order, n, width, total, squares, rows, fresh != 0);
}

// Sum of values [n] in float64, by blocks of a fixed size whose sums are added in order.
extern "C" double sum_f32(const float* values, int64_t n) {
    constexpr int64_t block = 1 << 14;
    const int64_t blocks = (n + block - 1) / block;
    std::vector<double> sums(blocks);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t end = std::min(n, (b + 1) * block);
        double sum = 0.0;
        for (int64_t i = b * block; i < end; ++i) sum += values[i];
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

// bfloat16 or int8 rows; float32 rows are updated in place.
inline void store_row(void* weight, int format, float* scale, int64_t row, int64_t width, const float* values,
                      uint32_t noise) {
    if (format == bfloat16_rows) {
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

}  // namespace

// out [n, width] float32 or bfloat16: out[i] is row index[slots[i]] of weight, slots[i] without index, index[i] without slots.
// order, where given, is that of order_rows for these slots: each row is then read once.
extern "C" void gather_rows(const void* weight, int64_t format, const float* scale, const int64_t* index,
                            const int64_t* slots, const uint64_t* order, int64_t n, int64_t width, void* out, int64_t narrow) {
    const int kind = static_cast<int>(format);
    const int64_t bytes = row_bytes(kind, width), line = width * (narrow ? 2 : 4);
    const bool plain = (kind == float32_rows && !narrow) || (kind == bfloat16_rows && narrow);
    const bool around = goes_around(out, line, n);
    const auto row_of = [=](int64_t i) {
        const int64_t slot = order != nullptr ? static_cast<int64_t>(order[i] >> 32) : slots != nullptr ? slots[i] : i;
        return index == nullptr ? slot : index[slot];
    };
#pragma omp parallel
    {
        std::vector<float> buffer(2 * width);
        float* values = buffer.data();
        bfloat16* __restrict rounded = reinterpret_cast<bfloat16*>(buffer.data() + width);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
            if (i + ahead < n) prefetch(row_address(weight, kind, width, row_of(i + ahead)), bytes);
            const int64_t row = row_of(i), at = order == nullptr ? i : static_cast<int64_t>(order[i] & look_up_mask);
            char* to = static_cast<char*>(out) + at * line;
            if (plain) {
                write(to, row_address(weight, kind, width, row), line, around);
                continue;
            }
            load_row(weight, kind, scale, row, width, values);
            if (narrow)
                for (int64_t j = 0; j < width; ++j) rounded[j] = nearest(values[j]);
            write(to, narrow ? static_cast<const void*>(rounded) : values, line, around);
        }
        fence(around);
    }
}

struct RowUpdate {
    int32_t rule, format, narrow_state;
    float rate, decay, beta1, beta2, eps, factor;
    uint32_t noise, flag;
    int64_t first;
};

namespace {

// One step on one row; values and g are scratch [width].
template <int rule, bool narrow>
inline void step_row(const RowUpdate& u, void* first_state, void* second_state, int64_t row, int64_t width, uint32_t noise,
                     const float* __restrict own, float* __restrict values) {
    const int64_t at = row * width;
    const float factor = u.factor, decay = u.decay;
    const auto bits = [=](int64_t column) { return narrow ? mix(noise + static_cast<uint32_t>(column) * golden) : 0u; };
    float squares = 0.0f;
    if (rule == rowwise_adagrad || rule == rowwise_adam) {
        for (int64_t j = 0; j < width; ++j) squares += own[j] * own[j];
        squares *= factor * factor / static_cast<float>(width);
    }
    if (rule == sgd) {
        const float size = u.rate * factor;
        for (int64_t j = 0; j < width; ++j) values[j] = values[j] * decay - size * own[j];
    } else if (rule == rowwise_adagrad) {
        const float sum = load_state(first_state, narrow, row) + squares;
        store_state(first_state, narrow, row, sum, bits(width));
        const float size = u.rate / (std::sqrt(sum) + u.eps) * factor;
        for (int64_t j = 0; j < width; ++j) values[j] = values[j] * decay - size * own[j];
    } else {
        float size = 0.0f;
        if (rule == rowwise_adam) {
            const float square = u.beta2 * load_state(second_state, narrow, row) + (1.0f - u.beta2) * squares;
            store_state(second_state, narrow, row, square, bits(2 * width));
            size = u.rate / (std::sqrt(square) + u.eps);
        }
        for (int64_t j = 0; j < width; ++j) {
            const float g = own[j] * factor;
            const float mean = u.beta1 * load_state(first_state, narrow, at + j) + (1.0f - u.beta1) * g;
            store_state(first_state, narrow, at + j, mean, bits(width + j));
            float own_size = size;
            if (rule == adam) {
                const float square = u.beta2 * load_state(second_state, narrow, at + j) + (1.0f - u.beta2) * g * g;
                store_state(second_state, narrow, at + j, square, bits(2 * width + j));
                own_size = u.rate / (std::sqrt(square) + u.eps);
            }
            values[j] = values[j] * decay - own_size * mean;
        }
    }
}

template <int rule, bool narrow>
void update(void* weight, float* scale, uint8_t* flags, void* first_state, void* second_state, const int64_t* index, const float* grad,
            int64_t n, int64_t width, const RowUpdate& u) {
    const int64_t bytes = row_bytes(u.format, width);
#pragma omp parallel
    {
        std::vector<float> buffer(width);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
            if (i + ahead < n) {
                const int64_t later = index[i + ahead];
                prefetch(row_address(weight, u.format, width, later), bytes);
                if (flags != nullptr) __builtin_prefetch(flags + later, 1);
                if (rule == rowwise_adagrad) __builtin_prefetch(static_cast<char*>(first_state) + later * (narrow ? 2 : 4), 1);
            }
            const int64_t row = index[i];
            const uint64_t place = static_cast<uint64_t>(row + u.first);
            const uint32_t noise = mix(mix(static_cast<uint32_t>(place) ^ u.noise) ^ static_cast<uint32_t>(place >> 32));
            const bool in_place = u.format == float32_rows;
            float* values = in_place ? static_cast<float*>(weight) + row * width : buffer.data();
            if (!in_place) load_row(weight, u.format, scale, row, width, values);
            step_row<rule, narrow>(u, first_state, second_state, row, width, noise, grad + i * width, values);
            if (!in_place) store_row(weight, u.format, scale, row, width, values, noise);
            if (flags != nullptr) flags[row] = static_cast<uint8_t>(u.flag);
        }
    }
}

template <int rule>
void update(bool narrow, void* weight, float* scale, uint8_t* flags, void* first_state, void* second_state, const int64_t* index,
            const float* grad, int64_t n, int64_t width, const RowUpdate& u) {
    auto* function = narrow ? update<rule, true> : update<rule, false>;
    function(weight, scale, flags, first_state, second_state, index, grad, n, width, u);
}

}  // namespace

// One optimizer step on rows index [n], distinct, with gradients grad [n, width]; first_state and second_state as rows.py says.
extern "C" void update_rows(void* weight, float* scale, uint8_t* flags, void* first_state, void* second_state, const int64_t* index,
                            const float* grad, int64_t n, int64_t width, const RowUpdate* u) {
    auto* function = u->rule == rowwise_adagrad ? update<rowwise_adagrad>
                     : u->rule == rowwise_adam  ? update<rowwise_adam>
                     : u->rule == adam          ? update<adam>
                                                : update<sgd>;
    function(u->narrow_state != 0, weight, scale, flags, first_state, second_state, index, grad, n, width, *u);
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
