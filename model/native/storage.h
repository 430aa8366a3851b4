// How the weights of linear layers lie in memory.
#pragma once

#include "bytes.h"

namespace shoal {

// The form of a panel, one for each type of numbers that checkpoints hold.  A product has the bits that the float32
// numbers give for which the weights stand.
struct Storage {
    // Rows of inputs up to which weights are widened in registers; for more, they are unpacked before.
    int most_rows;
    // The bytes of a panel.
    size_t (*size)(int depth);
    // Makes row `row` of a source, which has the same type, a column of the panel.
    void (*set_column)(void* panel, int lane, const Source& source, int row, int depth);
    // Writes the weights of the depths from begin to end, [depth][16], and fetches blocks of the panel `ahead`.  `begin`
    // is a multiple of kSlice, and `to` has room for kSlice depths.
    void (*unpack)(const void* panel, const void* ahead, int begin, int end, float* to);
    // The product for up to most_rows rows, and a number of panels as panels_at_once says, or 2, or 1.
    Tile<FloatFormat> (*find_tile)(int num_rows, int num_panels);
    // The product with rows of bytes, of any number; null where weights are not codes with a scale for 32 depths.
    Tile<ByteFormat> (*find_byte_tile)(int num_rows, int num_panels);

    // The form for products with float32, or that for products with bytes.
    static const Storage& of(Source::Type type, bool is_for_bytes = false);
};

// The product of as many rows and panels.
template <class Format>
Tile<Format> find_tile(int num_rows, int num_panels);
extern template Tile<FloatFormat> find_tile<FloatFormat>(int num_rows, int num_panels);
extern template Tile<FloatFormat> find_tile<HalfFormat>(int num_rows, int num_panels);
extern template Tile<FloatFormat> find_tile<Int8Format>(int num_rows, int num_panels);
extern template Tile<BFloatProductFormat> find_tile<BFloatProductFormat>(int num_rows, int num_panels);

}  // namespace shoal
