// The functions of feed-forward blocks and of soft caps, made of the same operations on every instruction set.
#pragma once

#include "shoal.h"
#include "simd.h"

namespace shoal {

SHOAL_INLINE Vec clamp(const Vec& x, float low, float high) {
    return each_part<Vec>([&](int i) {  // NaN stays
        const FloatPart raised = x.part[i] < splat(low) ? splat(low) : x.part[i];
        return raised > splat(high) ? splat(high) : raised;
    });
}

// x * (n0 + n1 x**2 + n2 x**4 ...) / (d0 + d1 x**2 ...), highest coefficients first.
SHOAL_INLINE Vec odd_fraction(const Vec& x, std::initializer_list<float> numerator,
                              std::initializer_list<float> denominator) {
    const Vec square = x * x;
    const auto polynomial = [&](std::initializer_list<float> coefficients) {
        Vec sum = broadcast(0.0F);
        for (float coefficient : coefficients) sum = fma(sum, square, broadcast(coefficient));
        return sum;
    };
    return x * polynomial(numerator) / polynomial(denominator);
}

// Within 5e-7.
SHOAL_INLINE Vec erf(const Vec& x) {
    return odd_fraction(clamp(x, -4.0F, 4.0F),
                        {-2.72614225801306e-10F, 2.77068142495902e-08F, -2.10102402082508e-06F, -5.69250639462346e-05F,
                         -7.34990630326855e-04F, -2.95459980854025e-03F, -1.60960333262415e-02F},
                        {-1.45660718464996e-05F, -2.13374055278905e-04F, -1.68282697438203e-03F, -7.37332916720468e-03F,
                         -1.42647390514189e-02F});
}

// Within 5e-7.
SHOAL_INLINE Vec tanh(const Vec& x) {
    return odd_fraction(clamp(x, -7.90531110763549805F, 7.90531110763549805F),
                        {-2.76076847742355e-16F, 2.00018790482477e-13F, -8.60467152213735e-11F, 5.12229709037114e-08F,
                         1.48572235717979e-05F, 6.37261928875436e-04F, 4.89352455891786e-03F},
                        {1.19825839466702e-06F, 1.18534705686654e-04F, 2.26843463243900e-03F, 4.89352518554385e-03F});
}

// cap * tanh(x / cap) (Gemma 2).
SHOAL_INLINE Vec soft_cap(const Vec& x, float cap) { return broadcast(cap) * tanh(x / broadcast(cap)); }

SHOAL_INLINE Vec sigmoid(const Vec& x) { return broadcast(1.0F) / (broadcast(1.0F) + exp(broadcast(0.0F) - x)); }

SHOAL_INLINE Vec relu(const Vec& x) { return max(broadcast(0.0F), x); }

// x times the normal distribution's share below x (Hendrycks and Gimpel 2016).
SHOAL_INLINE Vec gelu(const Vec& x) {
    return broadcast(0.5F) * x * (broadcast(1.0F) + erf(x * broadcast(0.70710678F)));
}

// x * (1 + tanh(y)) / 2 with y = sqrt(2 / pi) * (x + 0.044715 x**3), which is x * sigmoid(2 y).
SHOAL_INLINE Vec gelu_tanh(const Vec& x) {
    const Vec inner = x * fma(broadcast(0.044715F) * x, x, broadcast(1.0F));
    return x / (broadcast(1.0F) + exp(broadcast(-1.59576912F) * inner));
}

// Those of GPT-OSS, which adds 1 to the other factor, and clamps both.
constexpr float kClamp = 7.0F;
SHOAL_INLINE Vec clamped_silu(const Vec& gate) {
    const Vec x = clamp(gate, -INFINITY, kClamp);
    return x / (broadcast(1.0F) + exp(broadcast(-1.702F) * x));
}
SHOAL_INLINE Vec clamped_factor(const Vec& up) { return clamp(up, -kClamp, kClamp) + broadcast(1.0F); }

// Calls f(function, factor) with functions of a Vec: a gated block is function(gate) * factor(up).
template <class F>
SHOAL_INLINE void with_activation(ShoalActivation activation, const F& f) {
    const auto itself = [](const Vec& x) { return x; };
    switch (activation) {
        case kSilu: return f([](const Vec& x) { return silu(x); }, itself);
        case kGelu: return f([](const Vec& x) { return gelu(x); }, itself);
        case kGeluTanh: return f([](const Vec& x) { return gelu_tanh(x); }, itself);
        case kRelu: return f([](const Vec& x) { return relu(x); }, itself);
        case kRelu2: return f([](const Vec& x) { return relu(x) * relu(x); }, itself);
        case kClampedSilu:
            return f([](const Vec& x) { return clamped_silu(x); }, [](const Vec& x) { return clamped_factor(x); });
    }
}

}  // namespace shoal
