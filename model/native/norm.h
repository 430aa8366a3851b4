// Norms: RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016).
#pragma once

#include "array.h"
#include "shoal.h"
#include "vectors.h"

namespace shoal {

// A norm that has no gain is absent.
struct Norm {
    ShoalNorm kind;
    float eps;
    Array<float> gain{};
    Array<float> bias{};  // of LayerNorm; may be absent

    bool exists() const { return gain.size() > 0; }

    // Normalises `width` elements of x with the gain and the bias from element `first` on; `to` may be x itself.
    void apply(const float* x, int width, float* to, int first = 0) const {
        const float* bias_at = bias.size() > 0 ? bias.data() + first : nullptr;
        if (kind == kRmsNorm) {
            rms_norm(x, gain.data() + first, width, to);
        } else {
            layer_norm(x, gain.data() + first, bias_at, width, to);
        }
    }

private:
    // x / rms(x) * gain.
    void rms_norm(const float* x, const float* gain_at, int width, float* to) const {
        Vec squares = broadcast(0.0F);
        for_vectors(width, [&](int i, auto count) {
            const Vec values = load_first(x + i, count);
            squares = fma(values, values, squares);
        });
        const float mean = sum_lanes(squares) / static_cast<float>(width);
        const Vec factor = broadcast(1.0F / std::sqrt(mean + eps));
        for_vectors(width, [&](int i, auto count) {
            store_first(to + i, load_first(x + i, count) * factor * load_first(gain_at + i, count), count);
        });
    }

    // (x - mean) / standard deviation * gain + bias.
    void layer_norm(const float* x, const float* gain_at, const float* bias_at, int width, float* to) const {
        Vec sums = broadcast(0.0F);
        for_vectors(width, [&](int i, auto count) { sums = sums + load_first(x + i, count); });
        const Vec mean = broadcast(sum_lanes(sums) / static_cast<float>(width));
        Vec squares = broadcast(0.0F);
        for_vectors(width, [&](int i, auto count) {
            const Vec values = keep_first(load_first(x + i, count) - mean, count);
            squares = fma(values, values, squares);
        });
        const float variance = sum_lanes(squares) / static_cast<float>(width);
        const Vec factor = broadcast(1.0F / std::sqrt(variance + eps));
        for_vectors(width, [&](int i, auto count) {
            const Vec scaled = (load_first(x + i, count) - mean) * factor * load_first(gain_at + i, count);
            store_first(to + i, bias_at ? scaled + load_first(bias_at + i, count) : scaled, count);
        });
    }
};

}  // namespace shoal
