// Arrays of any length, a vector at a time.
#pragma once

#include <type_traits>

#include "simd.h"

namespace shoal {

using AllLanes = std::integral_constant<int, kLanes>;

// Calls body(i, count) for stretches of `count` elements from i on: AllLanes, and an int for what is left at the end.
template <class Body>
SHOAL_INLINE void for_vectors(int length, const Body& body) {
    int i = 0;
    for (; i + kLanes <= length; i += kLanes) body(i, AllLanes{});
    if (i < length) body(i, length - i);
}

// The first `count` elements; the other lanes are zero.
SHOAL_INLINE Vec load_first(const float* from, AllLanes) { return load(from); }
SHOAL_INLINE Vec load_first(const float* from, int count) {
    float lanes[kLanes] = {};
    std::memcpy(lanes, from, count * sizeof(float));
    return load(lanes);
}

// The first `count` lanes; the others are zero.
SHOAL_INLINE Vec keep_first(const Vec& values, AllLanes) { return values; }
SHOAL_INLINE Vec keep_first(const Vec& values, int count) {
    float lanes[kLanes];
    store(lanes, values);
    return load_first(lanes, count);
}

SHOAL_INLINE void store_first(float* to, const Vec& values, AllLanes) { store(to, values); }
SHOAL_INLINE void store_first(float* to, const Vec& values, int count) {
    float lanes[kLanes];
    store(lanes, values);
    std::memcpy(to, lanes, count * sizeof(float));
}

}  // namespace shoal
