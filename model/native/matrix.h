// Linear layers: packed weights, and the rows of inputs that they are multiplied with.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "array.h"
#include "pool.h"
#include "shoal.h"
#include "storage.h"

namespace shoal {

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Rows that are the input of a linear layer.  Where that multiplies other numbers than float32, each row is rounded to
// them: to bfloat16, or, where the weights are int8, to integers with a scale of its own.  The integers are as large as
// possible without overflow of a sum over the depth in int32: 13 bits and a sign at a depth of 2048.
class Rows {
public:
    Rows(int width, ShoalArithmetic arithmetic)
        : width_(width), stride_(stride_for(width)), arithmetic_(arithmetic), limit_(limit_for(width)) {}

    // Makes room for rows; the former ones are lost.
    void reserve(int num_rows) {
        const size_t size = static_cast<size_t>(num_rows) * stride_;
        values_.reserve(size);
        if (arithmetic_ == kInFloat32) return;
        halves_.reserve(size);
        scales_.reserve(num_rows);
    }

    // The same with another width.
    void reserve(int num_rows, int width) {
        width_ = width;
        stride_ = stride_for(width);
        limit_ = limit_for(width);
        reserve(num_rows);
    }

    int width() const { return width_; }
    ptrdiff_t stride() const { return stride_; }
    float* operator[](int row) { return values_.data() + row * stride_; }
    const float* operator[](int row) const { return values_.data() + row * stride_; }
    const int16_t* integers(int row) const { return halves_.data() + row * stride_; }
    const uint16_t* bfloats(int row) const { return reinterpret_cast<const uint16_t*>(integers(row)); }
    float scale(int row) const { return scales_[row]; }

    bool is_rounded() const { return arithmetic_ != kInFloat32; }
    // Must be called after the values of a row were written.
    void finish(int row) {
        if (is_rounded()) round(row);
    }

    // Copies a finished row of `other` to row `to`.
    void copy(int to, const Rows& other, int from) {
        if (!is_rounded()) {
            std::memcpy((*this)[to], other[from], sizeof(float) * width_);
            return;
        }
        std::memcpy(halves_.data() + to * stride_, other.integers(from), sizeof(int16_t) * stride_);
        scales_[to] = other.scale(from);
    }

    // Rows are whole vectors apart, but not a multiple of 1 KiB: the rows of a tile would compete for the same places
    // of the cache.
    static int stride_for(int width) {
        const int stride = round_up(width, kLanes);
        return stride % 256 == 0 ? stride + kLanes : stride;
    }

private:
    static float limit_for(int width) { return static_cast<float>(std::min(32767, INT32_MAX / 127 / width)); }

    void round(int row);

    int width_;
    int stride_;
    ShoalArithmetic arithmetic_;
    float limit_;
    Array<float> values_;
    Array<int16_t> halves_;  // the rounded ones: integers, or the bits of bfloat16
    Array<float> scales_;
};

// Weights [width][depth] of a linear layer, packed in panels of 16 columns (outputs): in the type that the checkpoint has
// them in, rounded to bfloat16, or as int8 with a scale for each column.  The last panel is padded with zeroes.
class Matrix {
public:
    // The arena gives room for what is packed later, too.
    Matrix(int width, int depth, ShoalArithmetic arithmetic, Arena& arena);

    int width() const { return width_; }
    int num_panels() const { return num_panels_; }

    // Rows of the source become columns: row r becomes column first_column + r.  Where two sources share the panels in
    // turns (panel_step 2), a source fills every other panel, from panel_offset on.  A panel that has columns of two
    // sources is float32.
    void pack(Pool& pool, Source source, int num_rows, int first_column, int panel_step = 1, int panel_offset = 0);

    // Adds to the columns, placed as by `pack`, the numbers of a source; the other columns get zeroes.
    void add_bias(Source source, int num_rows, int first_column, int panel_step = 1, int panel_offset = 0);

    // The weights of one column, with the values that products use.
    void read_column(int column, float* to) const;

    // Multiplies num_rows rows of x, from row `first` on, with the panels from begin to end, and adds the bias.  Calls
    // take(row, panel, values of 16 outputs) for each, rows counted from 0; the panels of a row ascend.
    template <class Take>
    void multiply(const Rows& x, int first, int num_rows, int begin, int end, const Take& take) const {
        if (!bias_) return multiply_alone(x, first, num_rows, begin, end, take);
        multiply_alone(x, first, num_rows, begin, end, [&](int row, int panel, const Vec& values) {
            take(row, panel, values + load(bias_ + panel * kLanes));
        });
    }

    // The same in float32, without a bias, and rows that are `stride` apart.
    template <class Take>
    void multiply_floats(const float* x, ptrdiff_t stride, int num_rows, int begin, int end, const Take& take) const {
        multiply_with<FloatFormat>(x, stride, num_rows, begin, end, take);
    }

    // How many of `num_panels` panels make a good piece of work.
    static int panels_per_tile(int num_panels) { return std::max(2, num_panels / 32 / 2 * 2); }

private:
    struct Panel {
        const Storage* storage;  // null for int8
        void* data;
    };
    // Rows for which weights are unpacked once.
    static constexpr int kRowsAtOnce = 8 * kMaxRows;

    template <class Take>
    void multiply_alone(const Rows& x, int first, int num_rows, int begin, int end, const Take& take) const {
        const ptrdiff_t stride = x.stride();
        if (arithmetic_ == kInFloat32) return multiply_with<FloatFormat>(x[first], stride, num_rows, begin, end, take);
        if (arithmetic_ == kInBFloat16) {
            return multiply_with<BFloatProductFormat>(x.bfloats(first), stride, num_rows, begin, end, take);
        }
        auto scale = [&](int row, int panel, const Ints& sums) {
            take(row, panel, to_floats(sums) * broadcast(x.scale(first + row)) * load(scales_ + panel * kLanes));
        };
        multiply_with<Int8Format>(x.integers(first), stride, num_rows, begin, end, scale);
    }
    template <class Format, class Take>
    void multiply_with(const typename Format::Input* x, ptrdiff_t stride, int num_rows, int begin, int end,
                       const Take& take) const {
        typename Format::Sum sums[std::max(kMaxRows * kMaxPanels, kRowsAtOnce * 2)];
        int count;
        // The outer loop is over panels, so that a panel is read from memory once for all rows.
        for (int panel = begin; panel < end; panel += count) {
            count = panels_together(panel, end, num_rows);
            for (int row = 0; row < num_rows; row += kRowsAtOnce) {
                const int rows = std::min(kRowsAtOnce, num_rows - row);
                multiply_panels(x + row * stride, stride, rows, panel, count, sums);
                for (int r = 0; r < rows; ++r) {
                    for (int p = 0; p < count; ++p) take(row + r, panel + p, sums[r * count + p]);
                }
            }
        }
    }

    // How many panels from `first` on are multiplied at once: they have one storage.
    int panels_together(int first, int end, int num_rows) const;
    // sums[row][panel] = rows of x times `count` panels, for at most kRowsAtOnce rows.
    void multiply_panels(const float* x, ptrdiff_t stride, int num_rows, int first, int count, Vec* sums) const;
    void multiply_panels(const uint16_t* x, ptrdiff_t stride, int num_rows, int first, int count, Vec* sums) const;
    void multiply_panels(const int16_t* x, ptrdiff_t stride, int num_rows, int first, int count, Ints* sums) const;

    // The same for numbers of 16 bits, which need no unpacking.
    template <class Format>
    void multiply_plain(const typename Format::Input* x, ptrdiff_t stride, int num_rows, int first, int count,
                        typename Format::Sum* sums) const;

    void set_column(int column, const float* weights);

    int width_;
    int depth_;
    int num_panels_;
    ShoalArithmetic arithmetic_;
    Arena& arena_;
    std::vector<Panel> panels_;
    float* scales_ = nullptr;  // [panel][16], of int8
    float* bias_ = nullptr;    // [panel][16]; null for none
};

// Matrix::multiply for all panels, divided among the threads of the pool.
template <class Take>
void multiply_all(Pool& pool, const Matrix& matrix, const Rows& x, int first, int num_rows, const Take& take) {
    const int step = Matrix::panels_per_tile(matrix.num_panels());
    pool.run((matrix.num_panels() + step - 1) / step, [&](int tile, int) {
        const int begin = tile * step;
        matrix.multiply(x, first, num_rows, begin, std::min(begin + step, matrix.num_panels()), take);
    });
}

}  // namespace shoal
