// Gradients of look-ups summed by row on CPU, with each sum's square; and the sum of a tensor in a fixed order.
//
// Results do not depend on the number of threads: a row's gradients are added by one thread, in the order of the look-ups.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "rows.h"

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

inline void write_block(float* to, block value, bool around_cache) {
#ifdef __AVX512F__
    if (around_cache) {
        _mm512_stream_ps(to, reinterpret_cast<__m512>(value));
        return;
    }
#endif
    std::memcpy(to, &value, sizeof(value));
}

inline int64_t slot_of(const uint64_t* sorted_lookups, int64_t i) { return static_cast<int64_t>(sorted_lookups[i] >> 32); }

// Zeros for rows [from, to) of total and squares.
inline void clear_rows(float* total, float* squares, int64_t width, int64_t from, int64_t to) {
    std::memset(total + from * width, 0, (to - from) * width * sizeof(float));
    std::memset(squares + from, 0, (to - from) * sizeof(float));
}

// sum_at [width] += the gradients of the look-ups from i on, below stop, that are of one row; square_at = the square of the sum.
// Returns the first look-up of the next row.
template <typename T>
int64_t add_row_of_any_width(const T* grad, const uint64_t* sorted_lookups, int64_t i, int64_t stop, int64_t width, float* sum_at,
                             float* square_at, bool fresh) {
    const int64_t row = slot_of(sorted_lookups, i);
    const auto gradient = [=](int64_t i) { return grad + static_cast<int64_t>(sorted_lookups[i] & lookup_mask) * width; };
    float* __restrict sum = sum_at;
    if (fresh) std::memset(sum, 0, width * sizeof(float));
    do {
        if (i + rows_ahead < stop) prefetch(gradient(i + rows_ahead), width * static_cast<int64_t>(sizeof(T)));
        const T* __restrict g = gradient(i);
        for (int64_t j = 0; j < width; ++j) sum[j] += load(g[j]);
        ++i;
    } while (i < stop && slot_of(sorted_lookups, i) == row);
    float square = 0.0f;
    for (int64_t j = 0; j < width; ++j) square += sum[j] * sum[j];
    *square_at = square;
    return i;
}

// See add_rows_f32. The last bit of a square depends on how the compiler orders the sum over blocks (-fassociative-math), and
// that changes where the lines of a row in registers are moved to a function of their own: they stay here.
//
// blocks: of block_size values, a row's width, which is held in registers; 0: any width. One thread adds all
// look-ups of a row. Where total is fresh, each thread also clears the rows without a look-up before its own rows, and the
// last thread those behind.
template <int blocks, typename T>
void add_rows(const T* grad, const uint64_t* sorted_lookups, int64_t n, int64_t width, float* total, float* squares, int64_t rows,
              bool fresh) {
    const int threads = threads_for(n);
    const auto row_of = [=](int64_t i) { return static_cast<int64_t>(sorted_lookups[i] >> 32); };
    const auto gradient = [=](int64_t i) { return grad + static_cast<int64_t>(sorted_lookups[i] & lookup_mask) * width; };
    const bool around_cache = fresh && goes_around_cache(total, width * static_cast<int64_t>(sizeof(float)), rows);
    const auto first_of = [=](int t) {  // even shares of the look-ups, moved on to where a row begins
        int64_t i = n * t / threads;
        while (i > 0 && i < n && row_of(i) == row_of(i - 1)) ++i;
        return i;
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
            if (fresh && unwritten < row) clear_rows(total, squares, width, unwritten, row);
            unwritten = row + 1;
            if constexpr (blocks == 0) {
                i = add_row_of_any_width(grad, sorted_lookups, i, stop, width, sum, squares + row, fresh);
            } else {
                block held[blocks];
                for (int b = 0; b < blocks; ++b) held[b] = fresh ? block{} : load_block(sum + b * block_size);
                do {
                    if (i + rows_ahead < stop) prefetch(gradient(i + rows_ahead), width * static_cast<int64_t>(sizeof(T)));
                    const T* __restrict g = gradient(i);
                    for (int b = 0; b < blocks; ++b) held[b] += load_block(g + b * block_size);
                    ++i;
                } while (i < stop && row_of(i) == row);
                block products{};
                for (int b = 0; b < blocks; ++b) {
                    write_block(sum + b * block_size, held[b], around_cache);
                    products += held[b] * held[b];
                }
                float square = 0.0f;
                for (int64_t j = 0; j < block_size; ++j) square += products[j];
                squares[row] = square;
            }
        }
        finish_writes(around_cache);
        if (fresh && t + 1 == threads) clear_rows(total, squares, width, n == 0 ? 0 : row_of(n - 1) + 1, rows);
    }
}

template <typename T>
void add_rows_of_width(const T* grad, const uint64_t* sorted_lookups, int64_t n, int64_t width, float* total, float* squares,
                       int64_t rows, bool fresh) {
    auto* function = width == 16    ? add_rows<1, T>
                     : width == 32  ? add_rows<2, T>
                     : width == 64  ? add_rows<4, T>
                     : width == 128 ? add_rows<8, T>
                     : width == 256 ? add_rows<16, T>
                                    : add_rows<0, T>;
    function(grad, sorted_lookups, n, width, total, squares, rows, fresh);
}

}  // namespace

// total [rows, width] += grad [n, width], row by row to the slots of sorted_lookups [n], and squares [rows] = the sums of squares
// of the rows that this changes. fresh: total and squares hold nothing, and rows without a look-up become zero.
extern "C" void add_rows_f32(const float* grad, const uint64_t* sorted_lookups, int64_t n, int64_t width, float* total,
                             float* squares, int64_t rows, int64_t fresh) {
    add_rows_of_width(grad, sorted_lookups, n, width, total, squares, rows, fresh != 0);
}
extern "C" void add_rows_bf16(const bfloat16* grad, const uint64_t* sorted_lookups, int64_t n, int64_t width, float* total,
                              float* squares, int64_t rows, int64_t fresh) {
    add_rows_of_width(grad, sorted_lookups, n, width, total, squares, rows, fresh != 0);
}

// Sum of values [n] in float64, by blocks of a fixed size whose sums are added in order.
extern "C" double sum_f32(const float* values, int64_t n) {
    constexpr int64_t part = 1 << 14;
    const int64_t parts = (n + part - 1) / part;
    std::vector<double> sums(parts);
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < parts; ++p) {
        const int64_t end = std::min(n, (p + 1) * part);
        double sum = 0.0;
        for (int64_t i = p * part; i < end; ++i) sum += values[i];
        sums[p] = sum;
    }
    double total = 0.0;
    for (double sum : sums) total += sum;
    return total;
}
