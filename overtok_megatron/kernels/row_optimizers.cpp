// Row optimizers on CPU: one step on the rows that a training step looked up, rounded stochastically where they are stored in fewer
// bits than float32. The rules are those of rows.py (RowStep), and so are the random bits (`noise`).

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "rows.h"

struct RowUpdate {
    int32_t rule, format, narrow_state;
    float rate, decay, beta1, beta2, eps, factor;
    uint32_t noise, flag;
    int64_t first_row_id;
};

namespace {

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
        const float new_scale = largest * (1.0f / 127.0f);
        const float inverse = new_scale > 0.0f ? 1.0f / new_scale : 0.0f;
        for (int64_t j = 0; j < width; ++j) {
            const uint32_t bits = mix(noise + static_cast<uint32_t>(j) * golden) >> 8;
            const float lifted = std::floor(values[j] * inverse + static_cast<float>(bits) * 0x1p-24f);
            to[j] = static_cast<int8_t>(std::min(std::max(lifted, -127.0f), 127.0f));
        }
        scale[row] = new_scale;
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

// One step on one row: values [width], float32, changes in place; grad [width] is not yet multiplied by the factor.
template <int rule, bool narrow>
inline void step_row(const RowUpdate& u, void* first_state, void* second_state, int64_t row, int64_t width, uint32_t noise,
                     const float* __restrict grad, float* __restrict values) {
    static_assert(rule == rowwise_adagrad || rule == rowwise_adam || rule == adam || rule == sgd);
    const int64_t at = row * width;
    const float factor = u.factor, decay = u.decay;
    const auto bits = [=](int64_t column) { return narrow ? mix(noise + static_cast<uint32_t>(column) * golden) : 0u; };
    float squares = 0.0f;
    if (rule == rowwise_adagrad || rule == rowwise_adam) {
        for (int64_t j = 0; j < width; ++j) squares += grad[j] * grad[j];
        squares *= factor * factor / static_cast<float>(width);
    }
    if (rule == sgd) {
        const float size = u.rate * factor;
        for (int64_t j = 0; j < width; ++j) values[j] = values[j] * decay - size * grad[j];
    } else if (rule == rowwise_adagrad) {
        const float sum = load_state(first_state, narrow, row) + squares;
        store_state(first_state, narrow, row, sum, bits(width));
        const float size = u.rate / (std::sqrt(sum) + u.eps) * factor;
        for (int64_t j = 0; j < width; ++j) values[j] = values[j] * decay - size * grad[j];
    } else {
        float size = 0.0f;
        if (rule == rowwise_adam) {
            const float square = u.beta2 * load_state(second_state, narrow, row) + (1.0f - u.beta2) * squares;
            store_state(second_state, narrow, row, square, bits(2 * width));
            size = u.rate / (std::sqrt(square) + u.eps);
        }
        for (int64_t j = 0; j < width; ++j) {
            const float g = grad[j] * factor;
            const float mean = u.beta1 * load_state(first_state, narrow, at + j) + (1.0f - u.beta1) * g;
            store_state(first_state, narrow, at + j, mean, bits(width + j));
            float size_here = size;
            if (rule == adam) {
                const float square = u.beta2 * load_state(second_state, narrow, at + j) + (1.0f - u.beta2) * g * g;
                store_state(second_state, narrow, at + j, square, bits(2 * width + j));
                size_here = u.rate / (std::sqrt(square) + u.eps);
            }
            values[j] = values[j] * decay - size_here * mean;
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
            if (i + rows_ahead < n) {
                const int64_t later = index[i + rows_ahead];
                prefetch(row_address(weight, u.format, width, later), bytes);
                if (flags != nullptr) __builtin_prefetch(flags + later, 1);
                if (rule == rowwise_adagrad) __builtin_prefetch(static_cast<char*>(first_state) + later * (narrow ? 2 : 4), 1);
            }
            const int64_t row = index[i];
            const uint64_t row_id = static_cast<uint64_t>(row + u.first_row_id);
            const uint32_t noise = mix(mix(static_cast<uint32_t>(row_id) ^ u.noise) ^ static_cast<uint32_t>(row_id >> 32));
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
                     : u->rule == sgd           ? update<sgd>
                                                : nullptr;
    if (function == nullptr) std::abort();  // cpu_rows.py passes the numbers of Rule alone
    function(u->narrow_state != 0, weight, scale, flags, first_state, second_state, index, grad, n, width, *u);
}
