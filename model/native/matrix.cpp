#include "matrix.h"

#include <utility>

namespace shoal {

namespace {

// The greatest absolute value; NaN if any value is not finite, so that products with the row are not finite either.
float greatest_magnitude(const float* values, int count) {
    float greatest = 0;
    float nothing = 0;  // zero times a number that is not finite is NaN
    for (int i = 0; i < count; ++i) {
        const float magnitude = std::fabs(values[i]);
        greatest = magnitude > greatest ? magnitude : greatest;
        nothing += magnitude * 0;
    }
    return greatest + nothing;
}

// The integer nearest to a value of at most 16 bits, ties to even; an unspecified integer for NaN.
int32_t round_to_int(float value) {
    constexpr float kRound = 12582912.0F;  // 1.5 * 2**23: adding it leaves the nearest integer in the low bits
    const float shifted = value + kRound;
    int32_t bits, zero;
    std::memcpy(&bits, &shifted, sizeof bits);
    std::memcpy(&zero, &kRound, sizeof zero);
    return bits - zero;
}

void round_to_bfloats(const float* values, int count, uint16_t* to) {
    for (int i = 0; i < count; ++i) to[i] = float_to_bfloat(values[i]);
}

}  // namespace

void Rows::round(int row) {
    const float* values = (*this)[row];
    int16_t* rounded = halves_.data() + row * stride_;
    for (int i = width_; i < round_up(width_, 2); ++i) rounded[i] = 0;
    if (arithmetic_ == kInBFloat16) return round_to_bfloats(values, width_, reinterpret_cast<uint16_t*>(rounded));
    const float greatest = greatest_magnitude(values, width_);
    const float inverse = greatest > 0 ? limit_ / greatest : 0;
    scales_[row] = greatest / limit_;
    for (int i = 0; i < width_; ++i) rounded[i] = static_cast<int16_t>(round_to_int(values[i] * inverse));
}

Matrix::Matrix(int width, int depth, ShoalArithmetic arithmetic, Arena& arena)
    : width_(width),
      depth_(depth),
      num_panels_(round_up(width, kLanes) / kLanes),
      arithmetic_(arithmetic),
      arena_(arena),
      panels_(num_panels_) {
    if (arithmetic != kInInt8) return;
    scales_ = arena.take<float>(static_cast<size_t>(num_panels_) * kLanes);
    for (Panel& panel : panels_) panel.data = arena.take<int8_t>(static_cast<size_t>(round_up(depth, 2)) * kLanes);
}

void Matrix::pack(Pool& pool, Source source, int num_rows, int first_column, int panel_step, int panel_offset) {
    const Source::Type type = arithmetic_ == kInBFloat16 ? Source::kBFloat16 : source.type;
    const int first = first_column / kLanes, count = (first_column + num_rows - 1) / kLanes - first + 1;
    const auto place = [&](int tile) { return (first + tile) * panel_step + panel_offset; };
    const auto columns_of = [&](int tile) {
        const int begin = (first + tile) * kLanes;
        return std::pair(std::max(begin, first_column), std::min(begin + kLanes, first_column + num_rows));
    };
    for (int tile = 0; tile < count && arithmetic_ != kInInt8; ++tile) {
        Panel& panel = panels_[place(tile)];
        if (panel.data) continue;
        const auto [begin, end] = columns_of(tile);
        const bool is_alone = begin % kLanes == 0 && (end % kLanes == 0 || place(tile) + panel_step >= num_panels_);
        panel.storage = &Storage::of(is_alone || arithmetic_ == kInBFloat16 ? type : Source::kFloat32);
        panel.data = arena_.take<char>(panel.storage->size(depth_));
    }
    // A tile is one panel, so that no two threads write to the same cache line.
    pool.run(count, [&](int tile, int) {
        const auto [begin, end] = columns_of(tile);
        Panel& panel = panels_[place(tile)];
        if (panel.storage == &Storage::of(source.type)) {
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

void Matrix::set_column(int column, const float* weights) {
    const Panel& panel = panels_[column / kLanes];
    const int lane = column % kLanes;
    if (arithmetic_ == kInFloat32) {
        return panel.storage->set_column(panel.data, lane, {weights, Source::kFloat32}, 0, depth_);
    }
    if (arithmetic_ == kInBFloat16) {
        Array<uint16_t> rounded(depth_);
        round_to_bfloats(weights, depth_, rounded.data());
        return panel.storage->set_column(panel.data, lane, {rounded.data(), Source::kBFloat16}, 0, depth_);
    }
    const float greatest = greatest_magnitude(weights, depth_);
    const float inverse = greatest > 0 ? 127 / greatest : 0;
    scales_[column] = greatest / 127;
    int8_t* to = static_cast<int8_t*>(panel.data) + lane * 2;
    for (int k = 0; k < depth_; ++k) {
        to[k / 2 * 2 * kLanes + k % 2] = static_cast<int8_t>(round_to_int(weights[k] * inverse));
    }
}

void Matrix::read_column(int column, float* to) const {
    const Panel& panel = panels_[column / kLanes];
    const int lane = column % kLanes;
    if (arithmetic_ != kInInt8) {
        float weights[kSlice * kLanes];
        for (int begin = 0; begin < depth_; begin += kSlice) {
            const int end = std::min(begin + kSlice, depth_);
            panel.storage->unpack(panel.data, begin, end, weights);
            for (int k = begin; k < end; ++k) to[k] = weights[(k - begin) * kLanes + lane];
        }
        return;
    }
    const int8_t* from = static_cast<const int8_t*>(panel.data) + lane * 2;
    const float scale = scales_[column];
    for (int k = 0; k < depth_; ++k) to[k] = static_cast<float>(from[k / 2 * 2 * kLanes + k % 2]) * scale;
}

int Matrix::panels_together(int first, int end, int num_rows) const {
    int count = panels_at_once(std::min(num_rows, kMaxRows));
    const auto fits = [&] {
        for (int p = 1; p < count; ++p) {
            if (first + p >= end || panels_[first + p].storage != panels_[first].storage) return false;
        }
        return true;
    };
    while (!fits()) count /= 2;
    return count;
}

void Matrix::multiply_panels(const float* x, ptrdiff_t stride, int num_rows, int first, int count, Vec* sums) const {
    const Storage& storage = *panels_[first].storage;
    const auto multiply = [&](const Storage& form, const void* const* panels, int begin, int end) {
        for (int row = 0; row < num_rows; row += kMaxRows) {
            const auto tile = form.find_tile(std::min(kMaxRows, num_rows - row), count);
            tile(x + row * stride + begin, stride, panels, end - begin, sums + row * count);
        }
    };
    const void* panels[kMaxPanels];
    for (int p = 0; p < count; ++p) panels[p] = panels_[first + p].data;
    for (int i = 0; i < num_rows * count; ++i) sums[i] = FloatFormat::zero();
    if (num_rows <= storage.most_rows) return multiply(storage, panels, 0, depth_);
    float unpacked[kMaxPanels][kSlice * kLanes];
    const void* slices[kMaxPanels] = {unpacked[0], unpacked[1], unpacked[2], unpacked[3]};
    for (int begin = 0; begin < depth_; begin += kSlice) {
        const int end = std::min(begin + kSlice, depth_);
        for (int p = 0; p < count; ++p) storage.unpack(panels[p], begin, end, unpacked[p]);
        multiply(Storage::of(Source::kFloat32), slices, begin, end);
    }
}

void Matrix::multiply_panels(const uint16_t* x, ptrdiff_t stride, int num_rows, int first, int count, Vec* sums) const {
    multiply_plain<BFloatProductFormat>(x, stride, num_rows, first, count, sums);
}

void Matrix::multiply_panels(const int16_t* x, ptrdiff_t stride, int num_rows, int first, int count, Ints* sums) const {
    multiply_plain<Int8Format>(x, stride, num_rows, first, count, sums);
}

template <class Format>
void Matrix::multiply_plain(const typename Format::Input* x, ptrdiff_t stride, int num_rows, int first, int count,
                            typename Format::Sum* sums) const {
    const void* panels[kMaxPanels];
    for (int p = 0; p < count; ++p) panels[p] = panels_[first + p].data;
    for (int i = 0; i < num_rows * count; ++i) sums[i] = Format::zero();
    for (int row = 0; row < num_rows; row += kMaxRows) {
        const auto tile = find_tile<Format>(std::min(kMaxRows, num_rows - row), count);
        tile(x + row * stride, stride, panels, depth_, sums + row * count);
    }
}

}  // namespace shoal
