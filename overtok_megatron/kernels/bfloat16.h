// float32 and bfloat16 values read alike.

#pragma once

#include <cstdint>
#include <cstring>

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

inline bfloat16 nearest(float value) {  // ties to even
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(value != value ? 0x7fc0 : rounded)};
}
