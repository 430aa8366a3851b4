// Rotary position embedding (RoPE, Su et al. 2021).
#pragma once

#include "array.h"
#include "shoal.h"

namespace shoal {

// cos and sin of the angle of each position and pair, [num_positions][half] each.
struct RotaryTables {
    int half;
    Array<float> cos;
    Array<float> sin;

    RotaryTables(const ShoalRope& rope, int num_positions) : half(rope.dim / 2) {
        const size_t size = static_cast<size_t>(num_positions) * half;
        cos = Array<float>(size);
        sin = Array<float>(size);
        std::copy(rope.cos, rope.cos + size, cos.data());
        std::copy(rope.sin, rope.sin + size, sin.data());
    }

    // Turns element i of the head with element half + i, and scales the whole head; the elements from 2 * half on do not
    // turn.
    void rotate(const float* head, int head_dim, int position, float scale, float* to) const {
        const float* c = cos.data() + static_cast<size_t>(position) * half;
        const float* s = sin.data() + static_cast<size_t>(position) * half;
        for (int i = 0; i < half; ++i) {
            const float first = head[i], second = head[half + i];
            to[i] = (first * c[i] - second * s[i]) * scale;
            to[half + i] = (second * c[i] + first * s[i]) * scale;
        }
        for (int i = 2 * half; i < head_dim; ++i) to[i] = head[i] * scale;
    }
};

// Scales a head, and turns it if there are tables.
inline void place_head(const RotaryTables* rotary, const float* head, int head_dim, int position, float scale, float* to) {
    if (rotary) return rotary->rotate(head, head_dim, position, scale, to);
    for (int i = 0; i < head_dim; ++i) to[i] = head[i] * scale;
}

}  // namespace shoal
