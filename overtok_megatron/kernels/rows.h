// What the loops over rows of the n-gram tables share: how rows are stored, and how memory is read ahead and written.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "bfloat16.h"

constexpr int64_t rows_ahead = 16;  // rows are fetched into the cache this many iterations before they are needed
constexpr uint64_t lookup_mask = 0xFFFFFFFFu;  // the part of a sorted look-up that is not its slot

enum Format { float32_rows, bfloat16_rows, int8_rows };

inline int threads_for(int64_t n) { return static_cast<int>(std::min<int64_t>(omp_get_max_threads(), 1 + n / 4096)); }

inline void prefetch(const void* row, int64_t bytes) {
    for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(static_cast<const char*>(row) + j);
}

// Whether n rows of `bytes` each are written around the cache: they do not fit there, and are read much later by others.
inline bool goes_around_cache(const void* to, int64_t bytes, int64_t n) {
    return bytes % 64 == 0 && n * bytes > (int64_t{1} << 25) && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

inline void finish_writes(bool around_cache) {
#ifdef __AVX512F__
    if (around_cache) _mm_sfence();
#endif
}

inline int64_t row_bytes(int format, int64_t width) {
    return width * (format == float32_rows ? 4 : format == bfloat16_rows ? 2 : 1);
}

inline const char* row_address(const void* weight, int format, int64_t width, int64_t row) {
    return static_cast<const char*>(weight) + row * row_bytes(format, width);
}

// values [width] = a row as float32.
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
