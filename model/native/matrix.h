// Linear layers: packed weights, and the rows of inputs that they are multiplied with.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "array.h"
#include "pool.h"
#include "rounding.h"
#include "shoal.h"
#include "storage.h"

namespace shoal {

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Rows that are the input of a linear layer.  Where that multiplies other numbers than float32, each row is rounded to
// them: to bfloat16, or to bytes with a scale for each group of depths.
class Rows {
public:
    Rows(int width, ShoalArithmetic arithmetic) : arithmetic_(arithmetic) { reserve(0, width); }

    // Makes room for rows; the former ones are lost.
    void reserve(int num_rows) {
        const size_t size = static_cast<size_t>(num_rows) * stride_;
        values_.reserve(size);
        if (arithmetic_ == kInBFloat16) bfloats_.reserve(size);
        if (is_bytes()) groups_.reserve(static_cast<size_t>(num_rows) * num_groups());
    }

    // The same with another width.
    void reserve(int num_rows, int width) {
        width_ = width;
        stride_ = stride_for(width);
        reserve(num_rows);
    }

    int width() const { return width_; }
    ptrdiff_t stride() const { return stride_; }
    ptrdiff_t num_groups() const { return (width_ + kByteGroup - 1) / kByteGroup; }
    float* operator[](int row) { return values_.data() + row * stride_; }
    const float* operator[](int row) const { return values_.data() + row * stride_; }
    const uint16_t* bfloats(int row) const { return bfloats_.data() + row * stride_; }
    const ByteGroup* groups(int row) const { return groups_.data() + row * num_groups(); }

    bool is_rounded() const { return arithmetic_ != kInFloat32; }
    // Must be called after the values of a row were written.
    void finish(int row) {
        if (arithmetic_ == kInBFloat16) {
            uint16_t* bfloats = bfloats_.data() + row * stride_;
            round_to_bfloats((*this)[row], width_, bfloats);
            if (width_ % 2 != 0) bfloats[width_] = 0;
        }
        if (is_bytes()) round_to_bytes((*this)[row], width_, groups_.data() + row * num_groups());
    }

    // Copies a finished row of `other` to row `to`.
    void copy(int to, const Rows& other, int from) {
        if (!is_rounded()) std::copy_n(other[from], width_, (*this)[to]);
        if (arithmetic_ == kInBFloat16) std::copy_n(other.bfloats(from), stride_, bfloats_.data() + to * stride_);
        if (is_bytes()) std::copy_n(other.groups(from), num_groups(), groups_.data() + to * num_groups());
    }

    // Rows are whole vectors apart, but not a multiple of 1 KiB: the rows of a tile would compete for the same places
    // of the cache.
    static int stride_for(int width) {
        const int stride = round_up(width, kLanes);
        return stride % 256 == 0 ? stride + kLanes : stride;
    }

private:
    bool is_bytes() const { return arithmetic_ == kInInt8 || arithmetic_ == kInInt4; }

    ShoalArithmetic arithmetic_;
    int width_;
    ptrdiff_t stride_;
    Array<float> values_;
    Array<uint16_t> bfloats_;
    Array<ByteGroup> groups_;
};

// Panels of a matrix that a thread multiplies, and the one with which it goes on, as far as that can be foreseen.
struct PanelRange {
    int begin;
    int end;
    int next;
};

// Weights [width][depth] of a linear layer, packed in panels of 16 columns (outputs): in the type that the checkpoint has
// them in, or rounded to one that the arithmetic has.  The last panel is padded with zeroes.
class Matrix {
public:
    // The arena gives room for what is packed later, too.
    Matrix(int width, int depth, ShoalArithmetic arithmetic, Arena& arena);

    int width() const { return width_; }
    int num_panels() const { return num_panels_; }

    // Rows of the source become columns: row r becomes column first_column + r.  Where two sources share the panels in
    // turns (panel_step 2), a source fills every other panel, from panel_offset on.  A panel that has columns of two
    // sources is float32, or rounded.
    void pack(Pool& pool, Source source, int num_rows, int first_column, int panel_step = 1, int panel_offset = 0);

    // Adds to the columns, placed as by `pack`, the numbers of a source; the other columns get zeroes.
    void add_bias(Source source, int num_rows, int first_column, int panel_step = 1, int panel_offset = 0);

    // The weights of one column, with the values that products use.
    void read_column(int column, float* to) const;

    // Multiplies num_rows rows of x, from row `first` on, with the panels of a range, and adds the bias.  Calls
    // take(row, panel, values of 16 outputs) for each, rows counted from 0; the panels of a row ascend.
    template <class Take>
    void multiply(const Rows& x, int first, int num_rows, const PanelRange& range, const Take& take) const {
        if (!bias_) return multiply_alone(x, first, num_rows, range, take);
        multiply_alone(x, first, num_rows, range, [&](int row, int panel, const Vec& values) {
            take(row, panel, values + load(bias_ + panel * kLanes));
        });
    }

    // The same in float32, without a bias, and rows that are `stride` apart.
    template <class Take>
    void multiply_floats(const float* x, ptrdiff_t stride, int num_rows, const PanelRange& range,
                         const Take& take) const {
        multiply_with<FloatFormat>(x, stride, num_rows, range, take);
    }

private:
    struct Panel {
        const Storage* storage;
        void* data;
    };
    // Panels that are multiplied at once, and those after them.
    struct Group {
        const Storage* storage;
        int count;
        const void* panels[kMaxPanels];
        const void* ahead[kMaxPanels];
    };
    // Rows for which weights are unpacked once.
    static constexpr int kRowsAtOnce = 8 * kMaxRows;

    template <class Take>
    void multiply_alone(const Rows& x, int first, int num_rows, const PanelRange& range, const Take& take) const {
        const ptrdiff_t stride = x.stride();
        if (arithmetic_ == kInFloat32) return multiply_with<FloatFormat>(x[first], stride, num_rows, range, take);
        if (arithmetic_ == kInBFloat16) {
            return multiply_with<BFloatProductFormat>(x.bfloats(first), stride, num_rows, range, take);
        }
        multiply_with<ByteFormat>(x.groups(first), x.num_groups(), num_rows, range, take);
    }
    template <class Format, class Take>
    void multiply_with(const typename Format::Input* x, ptrdiff_t stride, int num_rows, const PanelRange& range,
                       const Take& take) const {
        Vec sums[std::max(kMaxRows * kMaxPanels, kRowsAtOnce * 2)];
        Group group;
        // The outer loop is over panels, so that a panel is read from memory once for all rows.
        for (int panel = range.begin; panel < range.end; panel += group.count) {
            group = find_group(panel, range, num_rows);
            for (int row = 0; row < num_rows; row += kRowsAtOnce) {
                const int rows = std::min(kRowsAtOnce, num_rows - row);
                multiply_group(x + row * stride, stride, rows, group, sums);
                for (int r = 0; r < rows; ++r) {
                    for (int p = 0; p < group.count; ++p) take(row + r, panel + p, sums[r * group.count + p]);
                }
            }
        }
    }

    // As many panels from `first` on as are multiplied at once: they have one storage.
    Group find_group(int first, const PanelRange& range, int num_rows) const;
    // sums[row][panel] = rows of x times the panels, for at most kRowsAtOnce rows.
    void multiply_group(const float* x, ptrdiff_t stride, int num_rows, const Group& group, Vec* sums) const;
    void multiply_group(const uint16_t* x, ptrdiff_t stride, int num_rows, const Group& group, Vec* sums) const;
    void multiply_group(const ByteGroup* x, ptrdiff_t stride, int num_rows, const Group& group, Vec* sums) const;

    // The same for weights that are multiplied as they lie in memory, whatever the number of rows.
    template <class Input, class FindTile>
    void multiply_alike(const Input* x, ptrdiff_t stride, int num_rows, const Group& group, Vec* sums,
                        const FindTile& find) const;
    bool is_bytes() const { return arithmetic_ == kInInt8 || arithmetic_ == kInInt4; }
    // With the zeroes that end a group of bytes.
    int padded_depth() const { return is_bytes() ? round_up(depth_, kByteGroup) : depth_; }

    Source::Type rounded_type() const;
    bool keeps(Source::Type type) const;
    void set_column(int column, const float* weights);

    int width_;
    int depth_;
    int num_panels_;
    ShoalArithmetic arithmetic_;
    Arena& arena_;
    std::vector<Panel> panels_;
    float* bias_ = nullptr;  // [panel][16]; null for none
};

// Divides matrices of as many panels each among the threads of the pool: calls body(matrix, range of panels).
template <class Body>
void for_panels(Pool& pool, int num_matrices, int num_panels, const Body& body) {
    const int step = std::max(2, num_matrices * num_panels / 32 / 2 * 2), tiles = (num_panels + step - 1) / step;
    pool.run(num_matrices * tiles, [&](int tile, int) {
        const int begin = tile % tiles * step;
        // The other threads take the tiles between this one and the next.
        body(tile / tiles, PanelRange{begin, std::min(begin + step, num_panels), begin + step * pool.num_threads()});
    });
}

// Matrix::multiply for all panels.
template <class Take>
void multiply_all(Pool& pool, const Matrix& matrix, const Rows& x, int first, int num_rows, const Take& take) {
    for_panels(pool, 1, matrix.num_panels(),
               [&](int, const PanelRange& range) { matrix.multiply(x, first, num_rows, range, take); });
}

}  // namespace shoal
