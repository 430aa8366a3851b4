// Numbers as a checkpoint holds them.
#pragma once

#include "simd.h"

namespace shoal {

// An array [rows][columns].
struct Source {
    enum Type : int32_t { kFloat32, kFloat16, kBFloat16 };
    const void* data;
    Type type;

    float operator[](size_t i) const {
        if (type == kFloat32) return static_cast<const float*>(data)[i];
        const uint16_t bits = static_cast<const uint16_t*>(data)[i];
        return type == kFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
    }
    // The bytes of `count` numbers.
    static size_t size(Type type, size_t count) { return count * (type == kFloat32 ? 4 : 2); }
    // The numbers from the one at `first` on.
    Source from(size_t first) const { return {static_cast<const char*>(data) + size(type, first), type}; }
    // Writes `count` numbers from the one at `first` on.
    void read(size_t first, size_t count, float* to) const {
        for (size_t i = 0; i < count; ++i) to[i] = (*this)[first + i];
    }
};

}  // namespace shoal
