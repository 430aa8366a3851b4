// Products of weights in four or eight bits with inputs in eight: integers within groups of 32 depths, float32 between
// them.
#pragma once

#include "blocks.h"

namespace shoal {

// Depths that share a scale.
constexpr int kByteGroup = 32;

// Inputs: scale * code each.  Of eight codes those of even depths come first, as Codes has four bits of weights.
struct ByteGroup {
    float scale;
    float sum;  // of the inputs
    int32_t sum_of_codes;
    int8_t codes[kByteGroup];
};

struct ByteFormat {
    using Input = ByteGroup;
    using Sum = Vec;
};

// Writes `count` inputs, and zeroes up to the end of the last group.  Inputs that are not finite give NaN.
void round_to_bytes(const float* values, int count, ByteGroup* to);

// Writes `count` weights as blocks of Q4_1 or of Q8_0, and zeroes up to the end of the last one.
void round_to_q4_1(const float* weights, int count, uint8_t* blocks);
void round_to_q8_0(const float* weights, int count, uint8_t* blocks);

template <class Kind>
struct ByteProduct {
    using Panel = BlockPanel<Kind>;
    static constexpr bool kSigned = Kind::kBits == 8;
    static_assert((Kind::kBits == 4 || Codes<Kind>::kTurned) && Panel::kGroup == kByteGroup);
    static constexpr int kEights = kByteGroup / 8;

    // As Tile has it; `depth` is a multiple of kByteGroup.  Panels come one after the other, so that sums have the
    // registers.
    template <int kRows, int kPanels>
    static void tile(const ByteGroup* x, ptrdiff_t row_stride, const void* const* panels, const void* const* ahead,
                     int depth, Vec* to) {
        for (int p = 0; p < kPanels; ++p) {
            const void* const next = p + 1 < kPanels ? panels[p + 1] : ahead[0];
            add_panel<kRows>(x, row_stride, panels[p], next, depth, to + p, kPanels);
        }
    }

private:
    template <int kRows>
    __attribute__((noinline)) static void add_panel(const ByteGroup* x, ptrdiff_t row_stride, const void* panel,
                                                    const void* next, int depth, Vec* to, ptrdiff_t to_stride) {
        const auto* block = static_cast<const uint8_t*>(panel);
        const ptrdiff_t distance = static_cast<const uint8_t*>(next) - block;
        Vec sums[kRows];
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) sums[r] = to[r * to_stride];
        for (int group = 0; group < depth / kByteGroup; ++group) {
            const int within = group % Panel::kGroups;
            add_group<kRows>(x + group, row_stride, block, distance, within, sums);
            if (within == Panel::kGroups - 1) block += Panel::kBytes;
        }
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) to[r * to_stride] = sums[r];
    }

    template <int kRows>
    static SHOAL_INLINE void add_group(const ByteGroup* x, ptrdiff_t row_stride, const uint8_t* block,
                                       ptrdiff_t distance, int group, Vec (&sums)[kRows]) {
        const auto scale = Panel::load_scale(block, group);
        if (group == 0) fetch(block + distance);
        const uint8_t* codes = block + Panel::kCodesAt + group * ptrdiff_t{kEights * Codes<Kind>::kBytes};
        Ints weights[2 * kEights];
#pragma GCC unroll 4
        for (int e = 0; e < kEights; ++e, codes += Codes<Kind>::kBytes) {
#pragma GCC unroll 2
            for (int i = 0; i < Codes<Kind>::kBytes; i += 64) fetch(codes + i + distance);
            const Codes<Kind> loaded(codes);
            weights[2 * e] = kSigned ? loaded.low : low_halves(loaded.low);
            weights[2 * e + 1] = kSigned ? loaded.high : high_halves(loaded.low);
        }
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            const ByteGroup& inputs = x[r * row_stride];
            Ints sum = begin_products<kSigned>(inputs.sum_of_codes);
#pragma GCC unroll 8
            for (int w = 0; w < 2 * kEights; ++w) {
                sum = add_products_of_bytes<kSigned>(weights[w], broadcast_word(inputs.codes + 4 * w), sum);
            }
            if (!kSigned) sums[r] = fma(scale.min, broadcast(inputs.sum), sums[r]);
            sums[r] = fma(to_floats(sum), scale.scale * broadcast(inputs.scale), sums[r]);
        }
    }
};

}  // namespace shoal
