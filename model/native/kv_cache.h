// The paged KV cache, laid out so that attention uses the same products as a linear layer.
#pragma once

#include "matrix.h"

namespace shoal {

// Slots are grouped by 16; the block size is a multiple of 16.  For each layer, group of slots and KV head:
//   keys    [head_dim][16 slots]                   a panel whose columns are the positions
//   values  [head_dim / 16][16 slots][16]          panels whose columns are the dimensions, padded with zeroes
class KVCache {
public:
    KVCache(int num_layers, int num_kv_heads, int head_dim, int64_t num_slots, bool half)
        : num_kv_heads_(num_kv_heads),
          head_dim_(head_dim),
          half_(half),
          head_size_(static_cast<size_t>(head_dim + round_up(head_dim, kLanes)) * kLanes),
          layer_size_(num_slots / kLanes * num_kv_heads * head_size_) {
        if (half) {
            halves_ = Array<uint16_t>(num_layers * layer_size_);
        } else {
            floats_ = Array<float>(num_layers * layer_size_);
        }
    }

    bool is_half() const { return half_; }

    // The keys of 16 slots, tile = slot / 16; Element is float, or uint16_t for float16.
    template <class Element>
    const Element* keys(int layer, int64_t tile, int head) const {
        return elements<Element>() + offset(layer, tile, head);
    }
    template <class Element>
    const Element* values(int layer, int64_t tile, int head) const {
        return keys<Element>(layer, tile, head) + static_cast<size_t>(head_dim_) * kLanes;
    }

    // Writes the key and the value of one position and head, [head_dim] each.
    void write(int layer, int64_t slot, int head, const float* key, const float* value) {
        const size_t at = offset(layer, slot / kLanes, head);
        const int lane = static_cast<int>(slot % kLanes);
        if (half_) {
            write_to(halves_.data() + at, lane, key, value, [](float x) { return float_to_half(x); });
        } else {
            write_to(floats_.data() + at, lane, key, value, [](float x) { return x; });
        }
    }

private:
    size_t offset(int layer, int64_t tile, int head) const {
        return layer * layer_size_ + (tile * num_kv_heads_ + head) * head_size_;
    }
    template <class Element>
    const Element* elements() const {
        if constexpr (sizeof(Element) == sizeof(float)) {
            return floats_.data();
        } else {
            return halves_.data();
        }
    }
    template <class Element, class Convert>
    void write_to(Element* to, int lane, const float* key, const float* value, const Convert& convert) {
        for (int i = 0; i < head_dim_; ++i) to[i * kLanes + lane] = convert(key[i]);
        to += static_cast<size_t>(head_dim_) * kLanes;
        for (int i = 0; i < head_dim_; ++i) {
            to[(i / kLanes * kLanes + lane) * kLanes + i % kLanes] = convert(value[i]);
        }
    }

    int num_kv_heads_;
    int head_dim_;
    bool half_;
    size_t head_size_;
    size_t layer_size_;
    Array<float> floats_;
    Array<uint16_t> halves_;
};

}  // namespace shoal
