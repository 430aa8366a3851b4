// How numbers become integers.
#pragma once

#include "simd.h"

namespace shoal {

// The greatest absolute value; NaN if any value is not finite, so that products with the row are not finite either.
inline float greatest_magnitude(const float* values, int count) {
    constexpr int32_t kInfinity = 0x7f800000;
    int32_t greatest = 0;  // the bits of magnitudes have their order
    for (int i = 0; i < count; ++i) {
        int32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        bits &= 0x7fffffff;
        greatest = bits > greatest ? bits : greatest;
    }
    if (greatest >= kInfinity) greatest = kInfinity + 1;
    float magnitude;
    std::memcpy(&magnitude, &greatest, sizeof magnitude);
    return magnitude;
}

// The integer nearest to a value of at most 16 bits, ties to even; an unspecified integer for NaN.
SHOAL_INLINE int32_t round_to_int(float value) {
    constexpr float kRound = 12582912.0F;  // 1.5 * 2**23: adding it leaves the nearest integer in the low bits
    const float shifted = value + kRound;
    int32_t bits, zero;
    std::memcpy(&bits, &shifted, sizeof bits);
    std::memcpy(&zero, &kRound, sizeof zero);
    return bits - zero;
}

// Rounds values to codes from -127 to 127, ties to even, and returns the scale that gives a value back: scale * code.
// If a value is not finite, the scale is NaN.  If none is as large as 2**-119, all codes are zero.
inline float round_to_codes(const float* values, int count, int8_t* codes) {
    const float greatest = greatest_magnitude(values, count);
    const float inverse = greatest >= 0x1p-119F ? 127 / greatest : 0;
    for (int i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(round_to_int(values[i] * inverse));
    return greatest / 127;
}

inline void round_to_bfloats(const float* values, int count, uint16_t* to) {
    for (int i = 0; i < count; ++i) to[i] = float_to_bfloat(values[i]);
}

}  // namespace shoal
