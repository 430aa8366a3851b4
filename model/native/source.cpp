#include "source.h"

namespace shoal {

size_t Source::size(Type type, size_t count) {
    size_t bytes = count * (type == kFloat32 ? sizeof(float) : sizeof(uint16_t));
    with_blocks(type, [&](auto blocks) { bytes = count / blocks.kDepths * blocks.kBytes; });
    return bytes;
}

void Source::read(size_t count, float* to) const {
    const auto* floats = static_cast<const float*>(data);
    const auto* halves = static_cast<const uint16_t*>(data);
    switch (type) {
        case kFloat32: std::memcpy(to, floats, count * sizeof(float)); break;
        case kFloat16: for (size_t i = 0; i < count; ++i) to[i] = half_to_float(halves[i]); break;
        case kBFloat16: for (size_t i = 0; i < count; ++i) to[i] = bfloat_to_float(halves[i]); break;
        default: break;
    }
    with_blocks(type, [&](auto blocks) {
        const auto* from = static_cast<const uint8_t*>(data);
        for (size_t first = 0; first < count; first += blocks.kDepths, from += blocks.kBytes) {
            const auto parts = blocks.read(from);
            for (int k = 0; k < blocks.kDepths; ++k) {
                const int i = blocks.kHasFactors ? k / blocks.kFactorDepths : 0;
                const float factor = blocks.kHasFactors ? parts.factors[i] : 1;
                const float min_factor = blocks.kHasFactors ? parts.min_factors[i] : 1;
                const float product = half_to_float(parts.scale) * factor * parts.codes[k];
                to[first + k] = blocks.kHasMin ? product + half_to_float(parts.min) * min_factor : product;
            }
        }
    });
}

}  // namespace shoal
