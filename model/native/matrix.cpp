#include "matrix.h"

#include <utility>

namespace shoal {

Matrix::Matrix(int width, int depth, ShoalArithmetic arithmetic, Arena& arena)
    : width_(width),
      depth_(depth),
      num_panels_(round_up(width, kLanes) / kLanes),
      arithmetic_(arithmetic),
      arena_(arena),
      panels_(num_panels_) {}

void Matrix::pack(Pool& pool, Source source, int num_rows, int first_column, int panel_step, int panel_offset) {
    // Of panels that have columns of this source alone, and of others.
    const Source::Type own = keeps(source.type) ? source.type : rounded_type(), shared = rounded_type();
    const int first = first_column / kLanes, count = (first_column + num_rows - 1) / kLanes - first + 1;
    const auto place = [&](int tile) { return (first + tile) * panel_step + panel_offset; };
    const auto columns_of = [&](int tile) {
        const int begin = (first + tile) * kLanes;
        return std::pair(std::max(begin, first_column), std::min(begin + kLanes, first_column + num_rows));
    };
    for (int tile = 0; tile < count; ++tile) {
        Panel& panel = panels_[place(tile)];
        if (panel.data) continue;
        const auto [begin, end] = columns_of(tile);
        const bool is_alone = begin % kLanes == 0 && (end % kLanes == 0 || place(tile) + panel_step >= num_panels_);
        panel.storage = &Storage::of(is_alone ? own : shared, is_bytes());
        panel.data = arena_.take<char>(panel.storage->size(padded_depth()));
    }
    // A tile is one panel, so that no two threads write to the same cache line.
    pool.run(count, [&](int tile, int) {
        const auto [begin, end] = columns_of(tile);
        Panel& panel = panels_[place(tile)];
        if (panel.storage == &Storage::of(source.type, is_bytes())) {
            for (int column = begin; column < end; ++column) {
                panel.storage->set_column(panel.data, column % kLanes, source, column - first_column, depth_);
            }
            return;
        }
        Array<float> weights(depth_);
        for (int column = begin; column < end; ++column) {
            source.from(static_cast<size_t>(column - first_column) * depth_).read(depth_, weights.data());
            set_column(place(tile) * kLanes + column % kLanes, weights.data());
        }
    });
}

void Matrix::add_bias(Source source, int num_rows, int first_column, int panel_step, int panel_offset) {
    if (!bias_) bias_ = arena_.take<float>(static_cast<size_t>(num_panels_) * kLanes);
    Array<float> bias(num_rows);
    source.read(num_rows, bias.data());
    for (int row = 0; row < num_rows; ++row) {
        const int column = first_column + row, panel = column / kLanes * panel_step + panel_offset;
        bias_[panel * kLanes + column % kLanes] = bias[row];
    }
}

// What weights are rounded to that are not kept as they are; float32 holds all of them.
Source::Type Matrix::rounded_type() const {
    switch (arithmetic_) {
        case kInBFloat16: return Source::kBFloat16;
        case kInInt8: return Source::kQ8_0;
        case kInInt4: return Source::kQ4_1;
        default: return Source::kFloat32;
    }
}

bool Matrix::keeps(Source::Type type) const {
    if (arithmetic_ == kInFloat32) return true;
    return is_bytes() && Storage::of(type, true).find_byte_tile && (arithmetic_ == kInInt8 || type != Source::kQ8_0);
}

void Matrix::set_column(int column, const float* weights) {
    const Source::Type type = rounded_type();
    Array<char> rounded(Source::size(type, padded_depth()));
    void* to = rounded.data();
    switch (type) {
        case Source::kBFloat16: round_to_bfloats(weights, depth_, static_cast<uint16_t*>(to)); break;
        case Source::kQ8_0: round_to_q8_0(weights, depth_, static_cast<uint8_t*>(to)); break;
        case Source::kQ4_1: round_to_q4_1(weights, depth_, static_cast<uint8_t*>(to)); break;
        default: std::memcpy(to, weights, depth_ * sizeof(float));
    }
    const Panel& panel = panels_[column / kLanes];
    panel.storage->set_column(panel.data, column % kLanes, {to, type}, 0, padded_depth());
}

void Matrix::read_column(int column, float* to) const {
    const Panel& panel = panels_[column / kLanes];
    float weights[kSlice * kLanes];
    for (int begin = 0; begin < depth_; begin += kSlice) {
        panel.storage->unpack(panel.data, panel.data, begin, std::min(begin + kSlice, padded_depth()), weights);
        for (int k = begin; k < std::min(begin + kSlice, depth_); ++k) {
            to[k] = weights[(k - begin) * kLanes + column % kLanes];
        }
    }
}

Matrix::Group Matrix::find_group(int first, const PanelRange& range, int num_rows) const {
    int count = panels_at_once(std::min(num_rows, kMaxRows));
    const auto fits = [&] {
        for (int p = 1; p < count; ++p) {
            if (first + p >= range.end || panels_[first + p].storage != panels_[first].storage) return false;
        }
        return true;
    };
    while (!fits()) count /= 2;
    Group group{panels_[first].storage, count, {}, {}};
    const int next = first + count < range.end ? first + count : range.next;
    for (int p = 0; p < count; ++p) {
        group.panels[p] = panels_[first + p].data;
        group.ahead[p] = panels_[std::min(next + p, num_panels_ - 1)].data;
    }
    return group;
}

void Matrix::multiply_group(const float* x, ptrdiff_t stride, int num_rows, const Group& group, Vec* sums) const {
    if (num_rows <= group.storage->most_rows) {
        return multiply_alike(x, stride, num_rows, group, sums, group.storage->find_tile);
    }
    for (int i = 0; i < num_rows * group.count; ++i) sums[i] = FloatFormat::zero();
    float unpacked[kMaxPanels][kSlice * kLanes];
    const void* slices[kMaxPanels] = {unpacked[0], unpacked[1], unpacked[2], unpacked[3]};
    for (int begin = 0; begin < depth_; begin += kSlice) {
        const int end = std::min(begin + kSlice, depth_);
        for (int p = 0; p < group.count; ++p) {
            group.storage->unpack(group.panels[p], group.ahead[p], begin, end, unpacked[p]);
        }
        for (int row = 0; row < num_rows; row += kMaxRows) {
            const auto tile = find_tile<FloatFormat>(std::min(kMaxRows, num_rows - row), group.count);
            tile(x + row * stride + begin, stride, slices, slices, end - begin, sums + row * group.count);
        }
    }
}

void Matrix::multiply_group(const uint16_t* x, ptrdiff_t stride, int num_rows, const Group& group, Vec* sums) const {
    multiply_alike(x, stride, num_rows, group, sums, find_tile<BFloatProductFormat>);
}

void Matrix::multiply_group(const ByteGroup* x, ptrdiff_t stride, int num_rows, const Group& group, Vec* sums) const {
    multiply_alike(x, stride, num_rows, group, sums, group.storage->find_byte_tile);
}

template <class Input, class FindTile>
void Matrix::multiply_alike(const Input* x, ptrdiff_t stride, int num_rows, const Group& group, Vec* sums,
                            const FindTile& find) const {
    for (int i = 0; i < num_rows * group.count; ++i) sums[i] = FloatFormat::zero();
    for (int row = 0; row < num_rows; row += kMaxRows) {
        const auto tile = find(std::min(kMaxRows, num_rows - row), group.count);
        tile(x + row * stride, stride, group.panels, group.ahead, padded_depth(), sums + row * group.count);
    }
}

}  // namespace shoal
