// The paged cache of latent attention: one row for each token, which all heads share.
#pragma once

#include "matrix.h"

namespace shoal {

// A row is the latent, then the key part with RoPE; padded with zeroes to whole vectors, as in DeepSeek's shapes it is.
class LatentCache {
public:
    LatentCache(int num_layers, int width, int64_t num_slots, bool half)
        : width_(width), stride_(round_up(width, kLanes)), half_(half), layer_size_(num_slots * stride_) {
        if (half) {
            halves_ = Array<uint16_t>(num_layers * layer_size_);
        } else {
            floats_ = Array<float>(num_layers * layer_size_);
        }
    }

    bool is_half() const { return half_; }
    int64_t element_size() const { return half_ ? sizeof(uint16_t) : sizeof(float); }
    // From row to row.
    int stride() const { return stride_; }

    // The rows from a slot on; which of the two there is depends on is_half().
    const float* floats(int layer, int64_t slot) const { return floats_.data() + layer * layer_size_ + slot * stride_; }
    const uint16_t* halves(int layer, int64_t slot) const {
        return halves_.data() + layer * layer_size_ + slot * stride_;
    }

    // Writes the row of a slot, [width].
    void write(int layer, int64_t slot, const float* row) {
        const size_t at = layer * layer_size_ + slot * stride_;
        if (half_) {
            for (int i = 0; i < width_; ++i) halves_[at + i] = float_to_half(row[i]);
        } else {
            std::memcpy(floats_.data() + at, row, width_ * sizeof(float));
        }
    }

private:
    int width_;
    int stride_;
    bool half_;
    size_t layer_size_;
    Array<float> floats_;
    Array<uint16_t> halves_;
};

}  // namespace shoal
