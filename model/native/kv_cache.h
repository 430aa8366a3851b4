// The paged KV cache, laid out so that attention uses the same products as a linear layer.
#pragma once

#include "matrix.h"

namespace shoal {

// Slots are grouped by 16; the block size is a multiple of 16.  For each layer, group of slots and KV head:
//   keys    [head_dim][16 slots]                   a panel whose columns are the positions
//   values  [head_dim / 16][16 slots][16]          panels whose columns are the dimensions, padded with zeroes
// In bytes each key and each value has a scale of its own, which lies between them, beside what is read with it:
//   scales  [keys, values][16 slots]               in float32, which any magnitude fits
class KVCache {
public:
    KVCache(int num_layers, int num_kv_heads, int head_dim, int64_t num_slots, ShoalKVCache kind)
        : num_kv_heads_(num_kv_heads),
          head_dim_(head_dim),
          kind_(kind),
          values_at_(size_t{kLanes} * head_dim + (kind == kCacheInInt8 ? 2 * kLanes * sizeof(float) : 0)),
          head_size_(values_at_ + size_t{kLanes} * round_up(head_dim, kLanes)),
          layer_size_(num_slots / kLanes * num_kv_heads * head_size_) {
        if (kind == kCacheInFloat32) floats_ = Array<float>(num_layers * layer_size_);
        if (kind == kCacheInFloat16) halves_ = Array<uint16_t>(num_layers * layer_size_);
        if (kind == kCacheInInt8) bytes_ = Array<int8_t>(num_layers * layer_size_);
    }

    ShoalKVCache kind() const { return kind_; }

    // The keys of 16 slots, tile = slot / 16; Element is float, uint16_t for float16, or int8_t.
    template <class Element>
    const Element* keys(int layer, int64_t tile, int head) const {
        return elements<Element>() + offset(layer, tile, head);
    }
    template <class Element>
    const Element* values(int layer, int64_t tile, int head) const {
        return keys<Element>(layer, tile, head) + values_at_;
    }
    // Of keys in bytes: their scales, and kLanes after these the scales of their values.
    const float* scales(const int8_t* keys) const {
        return reinterpret_cast<const float*>(keys + size_t{kLanes} * head_dim_);
    }

    // Writes the key and the value of one position and head, [head_dim] each.
    void write(int layer, int64_t slot, int head, const float* key, const float* value) {
        const size_t at = offset(layer, slot / kLanes, head);
        const int lane = static_cast<int>(slot % kLanes);
        if (kind_ == kCacheInFloat32) {
            write_to(floats_.data() + at, lane, key, value, [](float x) { return x; });
        } else if (kind_ == kCacheInFloat16) {
            write_to(halves_.data() + at, lane, key, value, [](float x) { return float_to_half(x); });
        } else {
            int8_t key_codes[kMaxHeadDim], value_codes[kMaxHeadDim];
            const float scales[] = {round_to_codes(key, head_dim_, key_codes),
                                    round_to_codes(value, head_dim_, value_codes)};
            for (int i = 0; i < 2; ++i) {
                std::memcpy(bytes_.data() + at + size_t{kLanes} * head_dim_ + (i * kLanes + lane) * sizeof(float),
                            scales + i, sizeof(float));
            }
            write_to(bytes_.data() + at, lane, key_codes, value_codes, [](int8_t x) { return x; });
        }
    }

private:
    size_t offset(int layer, int64_t tile, int head) const {
        return layer * layer_size_ + (tile * num_kv_heads_ + head) * head_size_;
    }
    template <class Element>
    const Element* elements() const {
        if constexpr (std::is_same_v<Element, float>) {
            return floats_.data();
        } else if constexpr (std::is_same_v<Element, uint16_t>) {
            return halves_.data();
        } else {
            return bytes_.data();
        }
    }
    template <class Element, class From, class Convert>
    void write_to(Element* to, int lane, const From* key, const From* value, const Convert& convert) {
        for (int i = 0; i < head_dim_; ++i) to[i * kLanes + lane] = convert(key[i]);
        to += values_at_;
        for (int i = 0; i < head_dim_; ++i) {
            to[(i / kLanes * kLanes + lane) * kLanes + i % kLanes] = convert(value[i]);
        }
    }

    int num_kv_heads_;
    int head_dim_;
    ShoalKVCache kind_;
    size_t values_at_;  // within 16 slots of one head
    size_t head_size_;
    size_t layer_size_;
    Array<float> floats_;
    Array<uint16_t> halves_;
    Array<int8_t> bytes_;
};

}  // namespace shoal
