#include "matrix.h"

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

}  // namespace

void Rows::quantize(int row) {
    const float* values = (*this)[row];
    int16_t* integers = integers_.data() + row * stride_;
    const float greatest = greatest_magnitude(values, width_);
    const float inverse = greatest > 0 ? limit_ / greatest : 0;
    scales_[row] = greatest / limit_;
    for (int i = 0; i < width_; ++i) integers[i] = static_cast<int16_t>(round_to_int(values[i] * inverse));
    for (int i = width_; i < round_up(width_, 2); ++i) integers[i] = 0;
}

Matrix::Matrix(int width, int depth, bool quantized, Arena& arena)
    : width_(width),
      depth_(depth),
      num_panels_(round_up(width, kLanes) / kLanes),
      panel_size_(static_cast<size_t>(quantized ? round_up(depth, 2) : depth) * kLanes),
      quantized_(quantized) {
    const size_t size = num_panels_ * panel_size_;
    if (quantized) {
        integers_ = arena.take<int8_t>(size);
        scales_ = arena.take<float>(static_cast<size_t>(num_panels_) * kLanes);
    } else {
        weights_ = arena.take<float>(size);
    }
}

void Matrix::pack(Pool& pool, Source source, int num_rows, int first_column, int panel_step, int panel_offset) {
    // A tile is one panel, so that no two threads write to the same cache line.
    const int first_panel = first_column / kLanes, last_panel = (first_column + num_rows - 1) / kLanes;
    pool.run(last_panel - first_panel + 1, [&](int tile, int) {
        const int panel = first_panel + tile;
        const int begin = std::max(panel * kLanes, first_column);
        const int end = std::min((panel + 1) * kLanes, first_column + num_rows);
        Array<float> weights(depth_);
        for (int column = begin; column < end; ++column) {
            source.read(static_cast<size_t>(column - first_column) * depth_, depth_, weights.data());
            set_column(panel * panel_step + panel_offset, column % kLanes, weights.data());
        }
    });
}

void Matrix::add_bias(Source source, int num_rows, int first_column, Arena& arena, int panel_step, int panel_offset) {
    if (!bias_) bias_ = arena.take<float>(static_cast<size_t>(num_panels_) * kLanes);
    for (int row = 0; row < num_rows; ++row) {
        const int column = first_column + row, panel = column / kLanes * panel_step + panel_offset;
        bias_[panel * kLanes + column % kLanes] = source[row];
    }
}

void Matrix::set_column(int panel, int lane, const float* weights) {
    if (!quantized_) {
        float* to = weights_ + panel * panel_size_ + lane;
        for (int k = 0; k < depth_; ++k) to[k * kLanes] = weights[k];
        return;
    }
    const float greatest = greatest_magnitude(weights, depth_);
    const float inverse = greatest > 0 ? 127 / greatest : 0;
    scales_[panel * kLanes + lane] = greatest / 127;
    int8_t* to = integers_ + panel * panel_size_ + lane * 2;
    for (int k = 0; k < depth_; ++k) {
        to[k / 2 * Int8Format::kStep + k % 2] = static_cast<int8_t>(round_to_int(weights[k] * inverse));
    }
}

void Matrix::read_column(int column, float* to) const {
    const int panel = column / kLanes, lane = column % kLanes;
    if (!quantized_) {
        const float* from = weights_ + panel * panel_size_ + lane;
        for (int k = 0; k < depth_; ++k) to[k] = from[k * kLanes];
        return;
    }
    const int8_t* from = integers_ + panel * panel_size_ + lane * 2;
    const float scale = scales_[column];
    for (int k = 0; k < depth_; ++k) to[k] = static_cast<float>(from[k / 2 * Int8Format::kStep + k % 2]) * scale;
}

}  // namespace shoal
