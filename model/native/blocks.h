// Panels of weights in blocks: few bits for each weight, and a scale, or a scale and a min, for some of them.
#pragma once

#include "matmul.h"
#include "source.h"

namespace shoal {

// Blocks of Q8_0 whose codes lie as products of bytes read them.
struct TurnedBytes : Blocks<8, false> {};

// The codes of 16 columns for kDepths depths.  Each column has four bits of each in a word, and the other bits in a byte
// or two; codes of eight bits are bytes, depth by depth.  Where these are turned, each column has a word for the even
// depths and one for the others.
template <class Kind>
struct Codes {
    static constexpr int kDepths = 8;
    static constexpr int kBytes = kDepths * kLanes * Kind::kBits / 8;
    static constexpr int kWords = kLanes * 4;
    static constexpr bool kTurned = std::is_same_v<Kind, TurnedBytes>;
    // Codes of less than eight bits are kept as numbers from 0 on.
    static constexpr int kOffset = Kind::kHasMin || Kind::kBits == 8 ? 0 : 1 << (Kind::kBits - 1);

    const uint8_t* from;
    Ints low;
    Ints high;

    explicit SHOAL_INLINE Codes(const uint8_t* at) : from(at) {
        if constexpr (Kind::kBits < 8 || kTurned) low = load_words(at);
        if constexpr (kTurned) high = load_words(at + kWords);
        if constexpr (Kind::kHigh == 1) high = load_ints(at + kWords);
        if constexpr (Kind::kHigh == 2) high = load_ints(reinterpret_cast<const uint16_t*>(at + kWords));
    }

    // The codes of a depth.
    SHOAL_INLINE Vec operator[](int depth) const {
        if constexpr (kTurned) {
            const Ints& words = depth % 2 == 0 ? low : high;
            return to_floats(each_part<Ints>([&](int p) { return words.part[p] << (24 - depth / 2 * 8) >> 24; }));
        }
        if constexpr (Kind::kBits == 8) {
            return to_floats(load_ints(reinterpret_cast<const int8_t*>(from) + depth * kLanes));
        }
        if constexpr (Kind::kBits == 4) {
            return each_part<Vec>([&](int p) { return nibbles_to_floats(low.part[p] >> 4 * depth); });
        }
        const int shift = 4 - Kind::kHigh * depth;
        return to_floats(each_part<Ints>([&](int p) {
            const IntPart code = low.part[p] >> 4 * depth & splat(int32_t{15});
            const IntPart shifted = shift < 0 ? high.part[p] >> -shift : high.part[p] << shift;
            return merge(shifted, ((1 << Kind::kHigh) - 1) << 4, code);
        }));
    }

    static void set(uint8_t* to, int lane, const int8_t* codes) {
        uint32_t lows = 0, highs = 0;
        for (int k = 0; k < kDepths; ++k) {
            const int code = codes[k] + kOffset;
            const int place = kTurned ? k % 2 * kWords + lane * 4 + k / 2 : k * kLanes + lane;
            if (Kind::kBits == 8) to[place] = static_cast<uint8_t>(code);
            lows |= static_cast<uint32_t>(code & 15) << 4 * k;
            highs |= static_cast<uint32_t>(code >> 4 & ((1 << Kind::kHigh) - 1)) << Kind::kHigh * k;
        }
        if (Kind::kBits < 8) std::memcpy(to + lane * 4, &lows, 4);
        std::memcpy(to + kWords + lane * Kind::kHigh, &highs, Kind::kHigh);  // the lowest bytes come first
    }
};

// Blocks of 16 columns.  First come the scales and mins, then the factors, then the codes.
template <class Kind>
struct BlockPanel {
    // Depths that share a scale, and those of which the factors stand together.
    static constexpr int kGroup = Kind::kHasFactors ? Kind::kFactorDepths : Kind::kDepths;
    static constexpr int kGroups = Kind::kDepths / kGroup;
    static constexpr int kHalves = 2 * kLanes;
    static constexpr int kFactorsAt = kHalves * (1 + Kind::kHasMin);
    static constexpr int kGroupFactors = Kind::kHasFactors ? kLanes * (1 + Kind::kHasMin) : 0;
    static constexpr int kCodesAt = kFactorsAt + kGroups * kGroupFactors;
    static constexpr int kBytes = kCodesAt + Kind::kDepths / Codes<Kind>::kDepths * Codes<Kind>::kBytes;

    struct Scale {
        Vec scale;
        Vec min;

        // Products of scales and codes are exact, so that there is one rounding in any case.
        SHOAL_INLINE Vec weights(const Vec& codes) const {
            if constexpr (Kind::kBits == 8) return scale * codes;
            return fma(scale, codes, min);
        }
    };

    static size_t size(int depth) { return static_cast<size_t>(depth) / Kind::kDepths * kBytes; }

    static SHOAL_INLINE Scale load_scale(const uint8_t* block, int group) {
        const auto* halves = reinterpret_cast<const uint16_t*>(block);
        const auto* factors = reinterpret_cast<const int8_t*>(block + kFactorsAt + group * kGroupFactors);
        Vec scale = load(halves);
        if constexpr (Kind::kHasFactors) scale = scale * to_floats(load_ints(factors));
        if constexpr (!Kind::kHasMin) return {scale, scale * broadcast(-1.0F * Codes<Kind>::kOffset)};
        Vec min = load(halves + kLanes);
        if constexpr (Kind::kHasFactors) min = min * to_floats(load_ints(factors + kLanes));
        return {scale, min};
    }

    // As Storage has them.
    static void set_column(void* panel, int lane, const Source& source, int row, int depth) {
        const int num_blocks = depth / Kind::kDepths;
        const auto* from = static_cast<const uint8_t*>(source.data) + static_cast<size_t>(row) * num_blocks * Kind::kBytes;
        auto* block = static_cast<uint8_t*>(panel);
        for (int b = 0; b < num_blocks; ++b, from += Kind::kBytes, block += kBytes) {
            const auto parts = Kind::read(from);
            std::memcpy(block + lane * 2, &parts.scale, 2);
            if (Kind::kHasMin) std::memcpy(block + kHalves + lane * 2, &parts.min, 2);
            for (int g = 0; Kind::kHasFactors && g < kGroups; ++g) {
                uint8_t* factors = block + kFactorsAt + g * kGroupFactors + lane;
                factors[0] = static_cast<uint8_t>(parts.factors[g]);
                if (Kind::kHasMin) factors[kLanes] = static_cast<uint8_t>(parts.min_factors[g]);
            }
            for (int k = 0; k < Kind::kDepths; k += Codes<Kind>::kDepths) {
                Codes<Kind>::set(block + kCodesAt + k / Codes<Kind>::kDepths * Codes<Kind>::kBytes, lane, parts.codes + k);
            }
        }
    }

    // Calls body(k, weights[panel]) for each depth from begin to end, which both begin a group, and fetches these depths
    // of the panels that come next.
    template <int kPanels, class Body>
    static SHOAL_INLINE void for_depths(const void* const* panels, const void* const* ahead, int begin, int end,
                                        const Body& body) {
        const uint8_t* blocks[kPanels];
        ptrdiff_t distances[kPanels];
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
            const auto* panel = static_cast<const uint8_t*>(panels[p]);
            blocks[p] = panel + begin / Kind::kDepths * ptrdiff_t{kBytes};
            distances[p] = static_cast<const uint8_t*>(ahead[p]) - panel;
        }
        int group = begin % Kind::kDepths / kGroup;
        for (int first = begin; first < end; first += kGroup) {
            Scale scales[kPanels];
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p) {
                scales[p] = load_scale(blocks[p], group);
                if (group == 0) fetch(blocks[p] + distances[p]);
            }
            ptrdiff_t at = kCodesAt + ptrdiff_t{group} * (kGroup / Codes<Kind>::kDepths * Codes<Kind>::kBytes);
            for (int k = first; k < first + kGroup; k += Codes<Kind>::kDepths, at += Codes<Kind>::kBytes) {
                const auto step = [&](const auto&... codes) __attribute__((always_inline)) {
#pragma GCC unroll 8
                    for (int i = 0; i < Codes<Kind>::kDepths; ++i) {
                        int p = 0;
                        const Vec weights[] = {scales[p++].weights(codes[i])...};
                        body(k + i, weights);
                    }
                };
                const auto load_codes = [&](int p) {
#pragma GCC unroll 2
                    for (int i = 0; i < Codes<Kind>::kBytes; i += 64) fetch(blocks[p] + at + i + distances[p]);
                    return Codes<Kind>(blocks[p] + at);
                };
                if constexpr (kPanels == 1) step(load_codes(0));
                if constexpr (kPanels == 2) step(load_codes(0), load_codes(1));
                if constexpr (kPanels == 4) step(load_codes(0), load_codes(1), load_codes(2), load_codes(3));
            }
            if (++group < kGroups) continue;
            group = 0;
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p) blocks[p] += kBytes;
        }
    }

    static void unpack(const void* panel, const void* ahead, int begin, int end, float* to) {
        for_depths<1>(&panel, &ahead, begin, end, [&](int k, const Vec (&weights)[1]) {
            store(to + (k - begin) * kLanes, weights[0]);
        });
    }

    // As Tile has it.  Where sums want the registers, panels come one after the other.
    template <int kRows, int kPanels>
    static void tile(const float* x, ptrdiff_t row_stride, const void* const* panels, const void* const* ahead,
                     int depth, Vec* to) {
        constexpr int kTogether = kRows <= kMaxRows / 3 ? kPanels : 1;
        for (int p = 0; p < kPanels; p += kTogether) {
            add_panels<kRows, kTogether>(x, row_stride, panels + p, ahead + p, depth, to + p, kPanels);
        }
    }

private:
    template <int kRows, int kPanels>
    __attribute__((noinline)) static void add_panels(const float* x, ptrdiff_t row_stride, const void* const* panels,
                                                     const void* const* ahead, int depth, Vec* to,
                                                     ptrdiff_t to_stride) {
        Vec sums[kRows][kPanels];
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p) sums[r][p] = to[r * to_stride + p];
        }
        const auto add = [&](int k, const Vec (&weights)[kPanels]) __attribute__((always_inline)) {
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) {
                const Vec input = broadcast(x[r * row_stride + k]);
#pragma GCC unroll 4
                for (int p = 0; p < kPanels; ++p) sums[r][p] = fma(input, weights[p], sums[r][p]);
            }
        };
        for_depths<kPanels>(panels, ahead, 0, depth, add);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p) to[r * to_stride + p] = sums[r][p];
        }
    }
};

}  // namespace shoal
