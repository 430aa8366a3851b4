// The innermost loop: a few rows of inputs times a few panels of weights.
//
// A panel is 16 columns, stored depth by depth, so that a vector holds one depth of 16 outputs.  In every shape of tile
// an output is one chain of additions over the depth, from first to last: its bits depend only on its row and column.
#pragma once

#include <type_traits>

#include "simd.h"

namespace shoal {

// How the numbers of a product are stored and multiplied.
//   Weight, Input: elements; Sum: 16 running sums.
//   kDepths: depths that are loaded at once; kUnit: depths per multiplication.
struct FloatFormat {
    using Weight = float;
    using Input = float;
    using Sum = Vec;
    static constexpr int kDepths = 1, kUnit = 1;
    static SHOAL_INLINE Sum zero() { return broadcast(0.0F); }
    static SHOAL_INLINE Vec load_weights(const Weight* panel) { return load(panel); }
    static SHOAL_INLINE Vec weights(const Vec& loaded, int) { return loaded; }
    static SHOAL_INLINE Vec input(const Input* x) { return broadcast(*x); }
    static SHOAL_INLINE Sum add(const Vec& x, const Vec& w, const Sum& sum) { return fma(x, w, sum); }
};

// Weights in float16, computed in float32.
struct HalfFormat : FloatFormat {
    using Weight = uint16_t;
    static SHOAL_INLINE Vec load_weights(const Weight* panel) { return load(panel); }
};

// Weights in 8 bits, computed in float32 without their scales.
struct Int8Format : FloatFormat {
    using Weight = int8_t;
    static SHOAL_INLINE Vec load_weights(const Weight* panel) { return to_floats(load_ints(panel)); }
};

// Weights in bfloat16, computed in float32.  Depths go in pairs; the last one may be half empty.
struct BFloatFormat : HalfFormat {
    static constexpr int kDepths = 2;
    static SHOAL_INLINE Ints load_weights(const Weight* panel) { return load_words(panel); }
    static SHOAL_INLINE Vec weights(const Ints& loaded, int depth) {
        return depth == 0 ? first_bfloats(loaded) : second_bfloats(loaded);
    }
};

// Weights and inputs in bfloat16, multiplied as such in pairs of depths; sums in float32.
struct BFloatProductFormat {
    using Weight = uint16_t;
    using Input = uint16_t;
    using Sum = Vec;
    static constexpr int kDepths = 2, kUnit = 2;
    static SHOAL_INLINE Ints load_weights(const Weight* panel) { return load_words(panel); }
    static SHOAL_INLINE Ints weights(const Ints& loaded, int) { return loaded; }
    static SHOAL_INLINE Ints input(const Input* x) { return broadcast_word(x); }
    static SHOAL_INLINE Sum add(const Ints& x, const Ints& w, const Sum& sum) { return add_products(x, w, sum); }
};

#if defined(__AVX512F__)
constexpr int kMaxRows = 12;
constexpr int panels_at_once(int rows) { return rows <= 6 ? 4 : 2; }
#elif defined(__AVX2__)
constexpr int kMaxRows = 6;
constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#else
constexpr int kMaxRows = 4;
constexpr int panels_at_once(int) { return 1; }
#endif
constexpr int kMaxPanels = 4;
// Depths that are unpacked at once: two panels of them are half of a first-level cache.
constexpr int kSlice = 128;

// Fetches a cache line that is needed soon into the second-level cache.
SHOAL_INLINE void fetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// sums[row][panel] += rows of x times panels.
//   x: kRows rows of `depth` inputs, row_stride apart; where depths go in pairs, a zero follows an odd last one.
//   ahead: the panels that are multiplied next.  They are fetched meanwhile, because the hardware does not know where
//   they are, and stops at the end of each page.
template <class Format, int kRows, int kPanels>
SHOAL_INLINE void multiply(const typename Format::Input* x, ptrdiff_t row_stride,
                           const typename Format::Weight* const (&panels)[kPanels],
                           const typename Format::Weight* const (&ahead)[kPanels], int depth,
                           typename Format::Sum (&sums)[kRows][kPanels]) {
    const typename Format::Input* inputs[kRows];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) inputs[r] = x + r * row_stride;
    const auto step = [&](ptrdiff_t k, int end) __attribute__((always_inline)) {
        decltype(Format::load_weights(panels[0])) loaded[kPanels];
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
            loaded[p] = Format::load_weights(panels[p] + k * kLanes);
            fetch(ahead[p] + k * kLanes);
        }
#pragma GCC unroll 2
        for (int i = 0; i < end; i += Format::kUnit) {
            decltype(Format::weights(loaded[0], 0)) weights[kPanels];
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p) weights[p] = Format::weights(loaded[p], i);
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) {
                const auto input = Format::input(inputs[r] + k + i);
#pragma GCC unroll 4
                for (int p = 0; p < kPanels; ++p) sums[r][p] = Format::add(input, weights[p], sums[r][p]);
            }
        }
    };
    ptrdiff_t k = 0;
    for (; k + Format::kDepths <= depth; k += Format::kDepths) step(k, Format::kDepths);
    if (k < depth) step(k, 1);
}

// A product whose shape is known to the compiler, which is added to sums [kRows][kPanels] in memory.
template <class Format>
using Tile = void (*)(const typename Format::Input* x, ptrdiff_t row_stride, const void* const* panels,
                      const void* const* ahead, int depth, typename Format::Sum* sums);

template <class Format, int kRows, int kPanels>
__attribute__((noinline)) void tile(const typename Format::Input* x, ptrdiff_t row_stride, const void* const* panels,
                                    const void* const* ahead, int depth, typename Format::Sum* to) {
    const typename Format::Weight* own_panels[kPanels];
    const typename Format::Weight* own_ahead[kPanels];
    typename Format::Sum sums[kRows][kPanels];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
        own_panels[p] = static_cast<const typename Format::Weight*>(panels[p]);
        own_ahead[p] = static_cast<const typename Format::Weight*>(ahead[p]);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) sums[r][p] = to[r * kPanels + p];
    }
    multiply<Format, kRows, kPanels>(x, row_stride, own_panels, own_ahead, depth, sums);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) to[r * kPanels + p] = sums[r][p];
    }
}

// Calls f with the number as a type: f(std::integral_constant<int, number>), for 1 <= number <= kMax.
template <int kMax, class F>
SHOAL_INLINE void with_constant(int number, const F& f) {
    if constexpr (kMax > 1) {
        if (number < kMax) return with_constant<kMax - 1>(number, f);
    }
    f(std::integral_constant<int, kMax>{});
}

}  // namespace shoal
