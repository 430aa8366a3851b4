// Numbers as a checkpoint holds them: one by one, or in the blocks of GGUF.
#pragma once

#include <type_traits>

#include "simd.h"

namespace shoal {

// The numbers of a block are scale * code, or scale * code + min.  Where blocks have 256 of them, a scale or min is that
// of the block times a small factor, which some of the numbers share.
//   kBits: of a code, which is signed unless there is a min; kFactorDepths: numbers that share a factor, 0 without.
template <int kBits_, bool kHasMin_, int kFactorDepths_ = 0>
struct Blocks {
    static constexpr int kBits = kBits_, kHigh = kBits < 8 ? kBits - 4 : 0, kFactorDepths = kFactorDepths_;
    static constexpr bool kHasMin = kHasMin_, kHasFactors = kFactorDepths > 0;
    static constexpr int kDepths = kHasFactors ? 256 : 32;
    static constexpr int kFactors = kHasFactors ? kDepths / kFactorDepths : 1;
    // The bytes of a block in the file; those of its 6-bit factors, if it has a min; and where its parts begin.
    static constexpr int kFactorBytes = !kHasFactors ? 0 : kHasMin ? 12 : kFactors;
    static constexpr int kBytes = 2 + 2 * kHasMin + kFactorBytes + kDepths * kBits / 8;
    static constexpr bool kScaleLast = kHasFactors && !kHasMin;
    static constexpr int kScaleAt = kScaleLast ? kBytes - 2 : 0, kMinAt = 2;
    static constexpr int kFactorsAt = kScaleLast ? kScaleAt - kFactorBytes : kMinAt + 2;
    static constexpr int kHighAt = kScaleLast ? kDepths / 2 : 2 + 2 * kHasMin + kFactorBytes;
    static constexpr int kLowAt = kScaleLast ? 0 : kHighAt + kDepths * kHigh / 8;
    // How far apart the numbers are whose low four bits share a byte, or whose high bits do.
    static constexpr int kLowRun = kHasMin || !kHasFactors ? (kHasFactors ? 32 : 16) : 64;

    // The parts of a block; scale and min are float16, and the min is added.
    struct Parts {
        uint16_t scale;
        uint16_t min;
        int8_t factors[kFactors];
        int8_t min_factors[kFactors];
        int8_t codes[kDepths];
    };

    static Parts read(const uint8_t* block) {
        Parts parts{};
        std::memcpy(&parts.scale, block + kScaleAt, 2);
        if (kHasMin) std::memcpy(&parts.min, block + kMinAt, 2);
        if (kHasMin && kHasFactors) parts.min ^= 0x8000;  // these blocks subtract it
        for (int i = 0; kHasFactors && i < kFactors; ++i) read_factor(block + kFactorsAt, i, parts);
        for (int k = 0; k < kDepths; ++k) parts.codes[k] = code(block, k);
        return parts;
    }

private:
    static void read_factor(const uint8_t* from, int i, Parts& parts) {
        if (!kHasMin) {
            parts.factors[i] = static_cast<int8_t>(from[i]);
        } else if (i < 4) {
            parts.factors[i] = from[i] & 63;
            parts.min_factors[i] = from[4 + i] & 63;
        } else {
            parts.factors[i] = static_cast<int8_t>((from[4 + i] & 15) | (from[i - 4] >> 2 & 48));
            parts.min_factors[i] = static_cast<int8_t>((from[4 + i] >> 4) | (from[i] >> 2 & 48));
        }
    }

    static int8_t code(const uint8_t* block, int k) {
        if (kBits == 8) return static_cast<int8_t>(block[kLowAt + k]);
        const int run = k / (2 * kLowRun), low = block[kLowAt + run * kLowRun + k % kLowRun] >> k / kLowRun % 2 * 4 & 15;
        const int unsigned_code = low | high(block + kHighAt, k) << 4;
        return static_cast<int8_t>(kHasMin ? unsigned_code : unsigned_code - (1 << (kBits - 1)));
    }

    static int high(const uint8_t* from, int k) {
        if (kHigh == 0) return 0;
        if (kHigh == 2) return from[k / 128 * 32 + k % 32] >> k % 128 / 32 * 2 & 3;
        return kHasFactors ? from[k % 32] >> k / 32 & 1 : from[k / 8] >> k % 8 & 1;
    }
};

// An array [rows][columns].
struct Source {
    enum Type : int32_t { kFloat32, kFloat16, kBFloat16, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K };
    const void* data;
    Type type;

    // The bytes of `count` numbers; whole blocks if the type has blocks.
    static size_t size(Type type, size_t count);
    // The numbers from the one at `first` on, which begins a block.
    Source from(size_t first) const { return {static_cast<const char*>(data) + size(type, first), type}; }
    // Writes `count` numbers, whole blocks if there are any.
    void read(size_t count, float* to) const;
};

// Calls f with Blocks<...>{} for a type that has blocks, and does nothing for others.
template <class F>
SHOAL_INLINE void with_blocks(Source::Type type, const F& f) {
    switch (type) {
        case Source::kQ4_0: return f(Blocks<4, false>{});
        case Source::kQ4_1: return f(Blocks<4, true>{});
        case Source::kQ5_0: return f(Blocks<5, false>{});
        case Source::kQ5_1: return f(Blocks<5, true>{});
        case Source::kQ8_0: return f(Blocks<8, false>{});
        case Source::kQ4_K: return f(Blocks<4, true, 32>{});
        case Source::kQ5_K: return f(Blocks<5, true, 32>{});
        case Source::kQ6_K: return f(Blocks<6, false, 16>{});
        default: return;
    }
}

}  // namespace shoal
