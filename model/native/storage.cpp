#include "storage.h"

#include <algorithm>

namespace shoal {

namespace {

// Calls f(rows, panels) with both numbers as types, for those that occur together.
template <int kMax, class F>
void with_shape(int num_rows, int num_panels, const F& f) {
    with_constant<kMax>(num_rows, [&](auto rows) {
        constexpr int kUsual = panels_at_once(decltype(rows)::value);
        if (num_panels == 1) return f(rows, std::integral_constant<int, 1>{});
        if constexpr (kUsual >= 2) {
            if (num_panels == 2) return f(rows, std::integral_constant<int, 2>{});
        }
        if constexpr (kUsual >= 4) f(rows, std::integral_constant<int, 4>{});
    });
}

}  // namespace

template <class Format>
Tile<Format> find_tile(int num_rows, int num_panels) {
    Tile<Format> found = nullptr;
    with_shape<kMaxRows>(num_rows, num_panels, [&](auto rows, auto panels) { found = tile<Format, rows, panels>; });
    return found;
}
template Tile<FloatFormat> find_tile<FloatFormat>(int num_rows, int num_panels);
template Tile<FloatFormat> find_tile<HalfFormat>(int num_rows, int num_panels);
template Tile<FloatFormat> find_tile<Int8Format>(int num_rows, int num_panels);
template Tile<BFloatProductFormat> find_tile<BFloatProductFormat>(int num_rows, int num_panels);

namespace {

// Rows up to which the weights of blocks are widened in registers: for more of them it takes as long to unpack before.
#if defined(__AVX512F__)
constexpr int kMostRows = 2 * kMaxRows;
#else
constexpr int kMostRows = kMaxRows / 3;
#endif

// Plain numbers, as many depths beside each other as are loaded at once.
template <class Format>
struct Plain {
    using Weight = typename Format::Weight;
    static constexpr int kDepths = Format::kDepths;

    static size_t size(int depth) { return sizeof(Weight) * kLanes * ((depth + kDepths - 1) / kDepths * kDepths); }

    static void set_column(void* panel, int lane, const Source& source, int row, int depth) {
        const Weight* from = static_cast<const Weight*>(source.data) + static_cast<size_t>(row) * depth;
        Weight* to = static_cast<Weight*>(panel) + lane * kDepths;
        for (int k = 0; k < depth; ++k) to[k / kDepths * kDepths * kLanes + k % kDepths] = from[k];
    }

    static void unpack(const void* panel, const void*, int begin, int end, float* to) {
        const Weight* weights = static_cast<const Weight*>(panel);
        for (int k = begin; k < end; k += kDepths) {
            const auto loaded = Format::load_weights(weights + k * kLanes);
            for (int i = 0; i < kDepths; ++i) store(to + (k - begin + i) * kLanes, Format::weights(loaded, i));
        }
    }
};

template <class Format>
constexpr Storage plain() {
    return {INT32_MAX, Plain<Format>::size, Plain<Format>::set_column, Plain<Format>::unpack, find_tile<Format>,
            nullptr};
}

template <class Kind>
Tile<FloatFormat> find_block_tile(int num_rows, int num_panels) {
    Tile<FloatFormat> found = nullptr;
    with_shape<std::min(kMostRows, kMaxRows)>(num_rows, num_panels, [&](auto rows, auto panels) {
        found = BlockPanel<Kind>::template tile<rows, panels>;
    });
    return found;
}

template <class Kind>
Tile<ByteFormat> find_byte_tile(int num_rows, int num_panels) {
    Tile<ByteFormat> found = nullptr;
    with_shape<kMaxRows>(num_rows, num_panels, [&](auto rows, auto panels) {
        found = ByteProduct<Kind>::template tile<rows, panels>;
    });
    return found;
}

template <class Kind>
constexpr Storage blocks() {
    using Panel = BlockPanel<Kind>;
    Storage storage{kMostRows, Panel::size, Panel::set_column, Panel::unpack, find_block_tile<Kind>, nullptr};
    if constexpr (Kind::kBits == 4) storage.find_byte_tile = find_byte_tile<Kind>;
    return storage;
}

constexpr Storage kFloats = plain<FloatFormat>();
constexpr Storage kHalves = plain<HalfFormat>();
constexpr Storage kBFloats = plain<BFloatFormat>();
template <class Kind>
constexpr Storage kBlocks = blocks<Kind>();
constexpr Storage kTurnedBytes = {0,
                                  BlockPanel<TurnedBytes>::size,
                                  BlockPanel<TurnedBytes>::set_column,
                                  BlockPanel<TurnedBytes>::unpack,
                                  nullptr,
                                  find_byte_tile<TurnedBytes>};

}  // namespace

const Storage& Storage::of(Source::Type type, bool is_for_bytes) {
    if (is_for_bytes && type == Source::kQ8_0) return kTurnedBytes;
    const Storage* found = type == Source::kFloat16 ? &kHalves : type == Source::kBFloat16 ? &kBFloats : &kFloats;
    with_blocks(type, [&](auto kind) { found = &kBlocks<decltype(kind)>; });
    return *found;
}

}  // namespace shoal
