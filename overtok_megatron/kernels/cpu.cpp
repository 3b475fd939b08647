// The passes over activations that torch makes one operator at a time on CPU, each as one loop over rows.
//
// Matrix products stay with torch. T is float or bfloat16; arithmetic is float32 throughout. Rows are independent and
// reductions run in a fixed order, so results do not depend on the number of threads. Plain C interface: no torch
// headers, two seconds to compile. The pointers' shapes are in cpu.py, the only caller.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "bfloat16.h"

namespace {

inline void store(float& place, float value) { place = value; }
inline void store(bfloat16& place, float value) { place = nearest(value); }

// e^x to about 2e-7 relative (Cephes' polynomial), written so that the compiler vectorises loops over it; NaN stays NaN.
inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = std::nearbyint(x * 1.44269504088896341f);
    float r = x - n * 0.693147180559945309f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// Lane by lane, because the compiler does not vectorise a maximum that must mind NaN. NaN is skipped here; it shows in
// the sum of exponentials that follows every call.
template <typename T>
inline float largest_of(const T* values, int64_t size) {
    constexpr int64_t lanes = 32;
    float tops[lanes];
    for (int64_t l = 0; l < lanes; ++l) tops[l] = -INFINITY;
    int64_t j = 0;
    for (; j + lanes <= size; j += lanes)
        for (int64_t l = 0; l < lanes; ++l) {
            float value = load(values[j + l]);
            tops[l] = value > tops[l] ? value : tops[l];
        }
    float top = -INFINITY;
    for (int64_t l = 0; l < lanes; ++l) top = tops[l] > top ? tops[l] : top;
    for (; j < size; ++j) top = load(values[j]) > top ? load(values[j]) : top;
    return top;
}

struct Statistics {
    float largest, exp_sum;
};

template <typename T>
inline Statistics row_statistics(const T* row, int64_t size) {
    const float top = largest_of(row, size);
    float total = 0.0f;
    for (int64_t j = 0; j < size; ++j) total += fast_exp(load(row[j]) - top);
    return {top, total};
}

template <typename T>
inline void row_gradient(T* row, int64_t size, float log_sum, float scale, int64_t target) {
    const bool here = target >= 0 && target < size;
    const float logit = here ? load(row[target]) : 0.0f;
    for (int64_t j = 0; j < size; ++j) store(row[j], fast_exp(load(row[j]) - log_sum) * scale);
    if (here) store(row[target], fast_exp(logit - log_sum) * scale - 1.0f);
}

template <typename T>
void softmax_statistics(const T* logits, int64_t rows, int64_t size, float* largest, float* exp_sum) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const Statistics found = row_statistics(logits + r * size, size);
        largest[r] = found.largest;
        exp_sum[r] = found.exp_sum;
    }
}

template <typename T>
void softmax_gradient(T* logits, int64_t rows, int64_t size, const float* log_sum, const float* scale, const int64_t* target) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) row_gradient(logits + r * size, size, log_sum[r], scale[r], target[r]);
}

// Both for one row after the other, so that the second finds the row in the cache.
template <typename T>
void softmax_loss_and_gradient(T* logits, int64_t rows, int64_t size, const int64_t* target, const uint8_t* scored,
                               float z_loss_weight, float* log_sum, float* target_logit) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        T* row = logits + r * size;
        const Statistics found = row_statistics(row, size);
        const int64_t place = target[r];
        log_sum[r] = std::log(found.exp_sum) + found.largest;
        target_logit[r] = place >= 0 && place < size ? load(row[place]) : -INFINITY;
        row_gradient(row, size, log_sum[r], scored[r] ? 1.0f + 2.0f * z_loss_weight * log_sum[r] : 0.0f, place);
    }
}

template <typename T>
void rms_norm(const T* x, int64_t stride, const T* weight, int64_t rows, int64_t size, float eps, T* y, float* scale) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const T* __restrict row = x + r * stride;
        float squares = 0.0f;
        for (int64_t j = 0; j < size; ++j) {
            float value = load(row[j]);
            squares += value * value;
        }
        const float s = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
        scale[r] = s;
        T* __restrict out = y + r * size;
        for (int64_t j = 0; j < size; ++j) store(out[j], load(row[j]) * s * load(weight[j]));
    }
}

// weight_parts: [parts, size] float, zeroed; part p sums a fixed share of the rows.
template <typename T>
void rms_norm_backward(const T* x, int64_t stride, const T* weight, const float* scale, const T* grad, int64_t rows,
                       int64_t size, T* grad_x, float* weight_parts, int64_t parts) {
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < parts; ++p) {
        float* sum = weight_parts + p * size;
        for (int64_t r = rows * p / parts; r < rows * (p + 1) / parts; ++r) {
            const T* __restrict row = x + r * stride;
            const T* __restrict g = grad + r * size;
            T* __restrict out = grad_x + r * size;
            const float s = scale[r];
            float dot = 0.0f;
            for (int64_t j = 0; j < size; ++j) {
                const float product = load(g[j]) * load(row[j]) * s;
                sum[j] += product;
                dot += product * load(weight[j]);
            }
            dot /= static_cast<float>(size);
            for (int64_t j = 0; j < size; ++j)
                store(out[j], s * (load(g[j]) * load(weight[j]) - load(row[j]) * s * dot));
        }
    }
}

// gate_up: [rows, 2 size], the gate first.
template <typename T>
void swiglu(const T* gate_up, int64_t rows, int64_t size, T* y) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const T* __restrict gate = gate_up + r * 2 * size;
        const T* __restrict up = gate + size;
        T* __restrict out = y + r * size;
        for (int64_t j = 0; j < size; ++j) {
            const float g = load(gate[j]);
            store(out[j], g * sigmoid(g) * load(up[j]));
        }
    }
}

template <typename T>
inline void swiglu_backward_row(const T* __restrict gate, const T* __restrict up, const T* __restrict grad, int64_t size,
                                T* __restrict grad_gate, T* __restrict grad_up) {
    for (int64_t j = 0; j < size; ++j) {
        const float value = load(gate[j]), s = sigmoid(value), incoming = load(grad[j]);
        store(grad_gate[j], incoming * load(up[j]) * s * (1.0f + value * (1.0f - s)));
        store(grad_up[j], incoming * value * s);
    }
}

template <typename T>
void swiglu_backward(const T* gate_up, const T* grad, int64_t rows, int64_t size, T* grad_gate_up) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const T* gate = gate_up + r * 2 * size;
        T* out = grad_gate_up + r * 2 * size;
        swiglu_backward_row(gate, gate + size, grad + r * size, size, out, out + size);
    }
}

// x: [rows, heads, 2 half] contiguous; cos, sin: [period, half], row r has angle r % period. sign -1 rotates back.
template <typename T>
void rotate(const T* x, const float* cosine, const float* sine, float sign, int64_t rows, int64_t heads, int64_t half,
            int64_t period, T* y) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const float* c = cosine + (r % period) * half;
        const float* s = sine + (r % period) * half;
        for (int64_t h = 0; h < heads; ++h) {
            const T* in = x + (r * heads + h) * 2 * half;
            T* out = y + (r * heads + h) * 2 * half;
            for (int64_t j = 0; j < half; ++j) {
                const float first = load(in[j]), second = load(in[j + half]), turn = sign * s[j];
                store(out[j], first * c[j] - second * turn);
                store(out[j + half], second * c[j] + first * turn);
            }
        }
    }
}

// scores: [heads, rows, seen], replaced by probabilities; row r is a query at position begin + r / shared, which sees the keys up
// to its position. The rest becomes zero. shared: query heads per key/value head; those of one position are consecutive rows.
template <typename T>
void causal_softmax(T* scores, int64_t heads, int64_t rows, int64_t seen, int64_t begin, int64_t shared) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < heads * rows; ++r) {
        T* __restrict row = scores + r * seen;
        const int64_t visible = begin + r % rows / shared + 1;
        const float top = largest_of(row, visible);
        float total = 0.0f;
        for (int64_t j = 0; j < visible; ++j) total += fast_exp(load(row[j]) - top);
        const float share = 1.0f / total;
        for (int64_t j = 0; j < visible; ++j) store(row[j], fast_exp(load(row[j]) - top) * share);
        for (int64_t j = visible; j < seen; ++j) store(row[j], 0.0f);
    }
}

// grad: [heads, rows, seen], the gradient of the probabilities, replaced by that of the scores.
template <typename T>
void causal_softmax_backward(const T* probabilities, T* grad, int64_t heads, int64_t rows, int64_t seen, int64_t begin,
                             int64_t shared) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < heads * rows; ++r) {
        const T* __restrict p = probabilities + r * seen;
        T* __restrict g = grad + r * seen;
        const int64_t visible = begin + r % rows / shared + 1;
        float dot = 0.0f;
        for (int64_t j = 0; j < visible; ++j) dot += load(p[j]) * load(g[j]);
        for (int64_t j = 0; j < visible; ++j) store(g[j], load(p[j]) * (load(g[j]) - dot));
        for (int64_t j = visible; j < seen; ++j) store(g[j], 0.0f);
    }
}

}  // namespace

#define INSTANTIATE(T, SUFFIX)                                                                                          \
    extern "C" void softmax_statistics_##SUFFIX(const void* a, int64_t r, int64_t n, float* m, float* s) {              \
        softmax_statistics(static_cast<const T*>(a), r, n, m, s);                                                       \
    }                                                                                                                   \
    extern "C" void softmax_gradient_##SUFFIX(void* a, int64_t r, int64_t n, const float* l, const float* f,            \
                                              const int64_t* t) {                                                       \
        softmax_gradient(static_cast<T*>(a), r, n, l, f, t);                                                            \
    }                                                                                                                   \
    extern "C" void softmax_loss_and_gradient_##SUFFIX(void* a, int64_t r, int64_t n, const int64_t* t,                 \
                                                       const uint8_t* y, float z, float* l, float* g) {                 \
        softmax_loss_and_gradient(static_cast<T*>(a), r, n, t, y, z, l, g);                                             \
    }                                                                                                                   \
    extern "C" void rms_norm_##SUFFIX(const void* x, int64_t st, const void* w, int64_t r, int64_t n, float e, void* y, \
                                      float* s) {                                                                       \
        rms_norm(static_cast<const T*>(x), st, static_cast<const T*>(w), r, n, e, static_cast<T*>(y), s);               \
    }                                                                                                                   \
    extern "C" void rms_norm_backward_##SUFFIX(const void* x, int64_t st, const void* w, const float* s, const void* g, \
                                               int64_t r, int64_t n, void* gx, float* gw, int64_t parts) {              \
        rms_norm_backward(static_cast<const T*>(x), st, static_cast<const T*>(w), s, static_cast<const T*>(g), r, n,    \
                          static_cast<T*>(gx), gw, parts);                                                              \
    }                                                                                                                   \
    extern "C" void swiglu_##SUFFIX(const void* x, int64_t r, int64_t n, void* y) {                                     \
        swiglu(static_cast<const T*>(x), r, n, static_cast<T*>(y));                                                     \
    }                                                                                                                   \
    extern "C" void swiglu_backward_##SUFFIX(const void* x, const void* g, int64_t r, int64_t n, void* y) {             \
        swiglu_backward(static_cast<const T*>(x), static_cast<const T*>(g), r, n, static_cast<T*>(y));                  \
    }                                                                                                                   \
    extern "C" void causal_softmax_##SUFFIX(void* x, int64_t h, int64_t q, int64_t n, int64_t begin, int64_t shared) {  \
        causal_softmax(static_cast<T*>(x), h, q, n, begin, shared);                                                     \
    }                                                                                                                   \
    extern "C" void causal_softmax_backward_##SUFFIX(const void* p, void* g, int64_t h, int64_t q, int64_t n,           \
                                                     int64_t begin, int64_t shared) {                                   \
        causal_softmax_backward(static_cast<const T*>(p), static_cast<T*>(g), h, q, n, begin, shared);                  \
    }                                                                                                                   \
    extern "C" void rotate_##SUFFIX(const void* x, const float* c, const float* s, float sign, int64_t r, int64_t h,    \
                                    int64_t half, int64_t period, void* y) {                                            \
        rotate(static_cast<const T*>(x), c, s, sign, r, h, half, period, static_cast<T*>(y));                           \
    }

INSTANTIATE(float, f32)
INSTANTIATE(bfloat16, bf16)
