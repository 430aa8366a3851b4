// Vectors of 16 lanes, the same on every instruction set.
//
// A result has the same bits on each of them: operations on lanes are those of IEEE 754, multiply-add is rounded once
// everywhere, and sums over lanes have one order.  Intrinsics are used in this file only, where the compiler's own
// vectors cannot express an operation or give slow code.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define SHOAL_INLINE inline __attribute__((always_inline))

namespace shoal {

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kPartBytes = 64;
#elif defined(__AVX2__)
constexpr int kPartBytes = 32;
#else
constexpr int kPartBytes = 16;
#endif
constexpr int kParts = 64 / kPartBytes;
constexpr int kPartLanes = kLanes / kParts;

typedef float FloatPart __attribute__((vector_size(kPartBytes)));
typedef int32_t IntPart __attribute__((vector_size(kPartBytes)));

// 16 float32.
struct Vec {
    FloatPart part[kParts];
};

// 16 int32, or 32 int16 in pairs.
struct Ints {
    IntPart part[kParts];
};

template <class Result, class F>
SHOAL_INLINE Result each_part(const F& f) {
    Result result;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) result.part[i] = f(i);
    return result;
}

SHOAL_INLINE FloatPart splat(float value) { return value - FloatPart{}; }
SHOAL_INLINE IntPart splat(int32_t value) { return value - IntPart{}; }
SHOAL_INLINE FloatPart as_floats(IntPart bits) { return reinterpret_cast<FloatPart>(bits); }
SHOAL_INLINE IntPart as_ints(FloatPart values) { return reinterpret_cast<IntPart>(values); }

// The bits of a where the mask has them, or those of b, which has none there.
SHOAL_INLINE IntPart merge(IntPart a, int32_t mask, IntPart b) {
#if defined(__AVX512F__)
    return reinterpret_cast<IntPart>(_mm512_ternarylogic_epi32(
        reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(splat(mask)), reinterpret_cast<__m512i>(b), 0xea));
#else
    return (a & splat(mask)) | b;
#endif
}

SHOAL_INLINE Vec broadcast(float value) {
    return each_part<Vec>([&](int) { return splat(value); });
}

SHOAL_INLINE Ints broadcast(int32_t value) {
    return each_part<Ints>([&](int) { return splat(value); });
}

// Two numbers of 16 bits, in each lane.
SHOAL_INLINE Ints broadcast_pair(const void* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return broadcast(pair);
}

SHOAL_INLINE FloatPart load_part(const float* from) {
    FloatPart part;
    std::memcpy(&part, from, sizeof part);
    return part;
}
SHOAL_INLINE void store_part(float* to, FloatPart part) { std::memcpy(to, &part, sizeof part); }

// Copies part by part: the compiler keeps a structure that is copied as a whole in memory, and not in registers.
SHOAL_INLINE Vec load(const float* from) {
    return each_part<Vec>([&](int i) { return load_part(from + i * kPartLanes); });
}

SHOAL_INLINE void store(float* to, const Vec& value) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) store_part(to + i * kPartLanes, value.part[i]);
}

SHOAL_INLINE Vec operator+(const Vec& a, const Vec& b) {
    return each_part<Vec>([&](int i) { return a.part[i] + b.part[i]; });
}
SHOAL_INLINE Vec operator-(const Vec& a, const Vec& b) {
    return each_part<Vec>([&](int i) { return a.part[i] - b.part[i]; });
}
SHOAL_INLINE Vec operator*(const Vec& a, const Vec& b) {
    return each_part<Vec>([&](int i) { return a.part[i] * b.part[i]; });
}
SHOAL_INLINE Vec operator/(const Vec& a, const Vec& b) {
    return each_part<Vec>([&](int i) { return a.part[i] / b.part[i]; });
}

// The greater of the two; b where either is NaN.
SHOAL_INLINE Vec max(const Vec& a, const Vec& b) {
    return each_part<Vec>([&](int i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
}

SHOAL_INLINE Vec to_floats(const Ints& a) {
    return each_part<Vec>([&](int i) { return __builtin_convertvector(a.part[i], FloatPart); });
}

// |a|.
SHOAL_INLINE Vec abs(const Vec& a) {
    return each_part<Vec>([&](int i) { return as_floats(as_ints(a.part[i]) & splat(int32_t{0x7fffffff})); });
}

#if !defined(__FMA__) && !defined(__aarch64__)
// a * b + c rounded once, without hardware for it: the product is exact in float64, the sum is rounded to odd, and
// rounding that to float32 is then exact (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums").
SHOAL_INLINE FloatPart fused_multiply_add(FloatPart a, FloatPart b, FloatPart c) {
    typedef double Wide __attribute__((vector_size(2 * kPartBytes)));
    typedef int64_t Bits __attribute__((vector_size(2 * kPartBytes)));
    const Wide product = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
    const Wide addend = __builtin_convertvector(c, Wide);
    const Wide sum = product + addend;
    const Wide rest = sum - product;
    const Wide error = (product - (sum - rest)) + (addend - rest);
    const Bits is_inexact = (error > 0) | (error < 0);
    const Bits bits = reinterpret_cast<Bits>(sum);
    const Bits is_even = (bits & 1) - 1;
    const Bits away_from_zero = ~((error > 0) ^ (sum > 0));
    const Bits step = -2 * away_from_zero - 1;
    return __builtin_convertvector(reinterpret_cast<Wide>(bits + (step & is_inexact & is_even)), FloatPart);
}
#endif

// a * b + c, rounded once.
SHOAL_INLINE FloatPart fma(FloatPart a, FloatPart b, FloatPart c) {
#if defined(__AVX512F__)
    return static_cast<FloatPart>(_mm512_fmadd_ps(a, b, c));
#elif defined(__FMA__)
    return static_cast<FloatPart>(_mm256_fmadd_ps(a, b, c));
#elif defined(__aarch64__)
    return static_cast<FloatPart>(vfmaq_f32(c, a, b));
#else
    return fused_multiply_add(a, b, c);
#endif
}
SHOAL_INLINE Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    return each_part<Vec>([&](int i) { return fma(a.part[i], b.part[i], c.part[i]); });
}

// Sum of the lanes, always in the order of a binary tree.
SHOAL_INLINE float sum_lanes(const Vec& a) {
    float lanes[kLanes];
    store(lanes, a);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

// The greatest lane; unspecified if a lane is NaN.
SHOAL_INLINE float max_lanes(const Vec& a) {
    float lanes[kLanes];
    store(lanes, a);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    }
    return lanes[0];
}

// e to the power of a, within 2 units in the last place; e**-87.3 below that, e**88 above, NaN for NaN, 1 for 0.
SHOAL_INLINE Vec exp(const Vec& a) {
    constexpr float kLog2E = 1.44269504F, kLn2High = 0.693359375F, kLn2Low = -2.12194440e-4F;
    constexpr float kRound = 12582912.0F;  // 1.5 * 2**23: adding it leaves the nearest integer in the low bits
    auto clamp = [&](int i) {
        const FloatPart low = splat(-87.3F), high = splat(88.0F);
        const FloatPart raised = a.part[i] < low ? low : a.part[i];
        return raised > high ? high : raised;
    };
    const Vec x = each_part<Vec>(clamp);
    const Vec shifted = fma(x, broadcast(kLog2E), broadcast(kRound));
    const Vec n = shifted - broadcast(kRound);
    const Vec r = fma(n, broadcast(-kLn2Low), fma(n, broadcast(-kLn2High), x));
    Vec power = broadcast(1.0F / 5040);
    for (float coefficient : {1.0F / 720, 1.0F / 120, 1.0F / 24, 1.0F / 6, 0.5F, 1.0F, 1.0F}) {
        power = fma(power, r, broadcast(coefficient));
    }
    return each_part<Vec>([&](int i) {
        const IntPart exponent = as_ints(shifted.part[i]) - as_ints(splat(kRound)) + splat(int32_t{127});
        return power.part[i] * as_floats(exponent << 23);
    });
}

// x / (1 + e**-x) (Hendrycks and Gimpel 2016).
SHOAL_INLINE Vec silu(const Vec& x) { return x / (broadcast(1.0F) + exp(broadcast(0.0F) - x)); }

// Bits of a float16 to float32, exactly.
SHOAL_INLINE float half_to_float(uint16_t half) {
    uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value *= 0x1p112F;
    std::memcpy(&bits, &value, sizeof value);
    if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    bits |= static_cast<uint32_t>(half & 0x8000) << 16;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A float32 to the nearest float16, ties to even; values that are too large become the largest finite float16.
SHOAL_INLINE uint16_t float_to_half(float value) {
    constexpr float kMax = 65504.0F;
    if (value > kMax) value = kMax;
    if (value < -kMax) value = -kMax;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits < 0x38800000) {  // below the normal float16s: let the addition of 0.5 shift and round
        float magnitude;
        std::memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += 0.5F;
        std::memcpy(&bits, &magnitude, sizeof bits);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000));
    }
    bits += 0xc8000fff + (bits >> 13 & 1);  // the exponent's bias from 127 to 15, and half a unit less a bit
    return static_cast<uint16_t>(sign | bits >> 13);
}

SHOAL_INLINE float bfloat_to_float(uint16_t bfloat) {
    const uint32_t bits = static_cast<uint32_t>(bfloat) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// 16 float16.
SHOAL_INLINE Vec load(const uint16_t* from) {
#if defined(__AVX512F__)
    // The masked form: with the other one, g++ 12 warns about its own header.
    return {{static_cast<FloatPart>(
        _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))))}};
#elif defined(__F16C__)
    auto eight = [&](int i) {
        return static_cast<FloatPart>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i)));
    };
    return each_part<Vec>(eight);
#else
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = half_to_float(from[i]);
    return load(lanes);
#endif
}

// 32 bfloat16 in pairs: the first of each pair, and the second.  A bfloat16 is the upper half of a float32.
SHOAL_INLINE Vec first_bfloats(const Ints& pairs) {
    return each_part<Vec>([&](int i) { return as_floats(pairs.part[i] << 16); });
}
SHOAL_INLINE Vec second_bfloats(const Ints& pairs) {
    return each_part<Vec>([&](int i) { return as_floats(pairs.part[i] & splat(int32_t{-0x10000})); });
}

// A float32 to the nearest bfloat16, ties to even.
SHOAL_INLINE uint16_t float_to_bfloat(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    const uint32_t rounded = is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
    return static_cast<uint16_t>(rounded >> 16);
}

// sum + a[2i + 1] * b[2i + 1] + a[2i] * b[2i] in each lane i, for 32 bfloat16 each; each sum is rounded once.  The
// instruction takes numbers and sums of less than 2**-126 for zero.
SHOAL_INLINE Vec add_products(const Ints& a, const Ints& b, const Vec& sum) {
#if defined(__AVX512F__)
    FloatPart result = sum.part[0];  // the intrinsic would need the flag of an instruction set of its own
    asm("vdpbf16ps %2, %1, %0" : "+v"(result) : "v"(a.part[0]), "v"(b.part[0]));
    return {{result}};
#else
    return fma(first_bfloats(a), first_bfloats(b), fma(second_bfloats(a), second_bfloats(b), sum));
#endif
}

// 16 words of 32 bits.
SHOAL_INLINE Ints load_words(const void* from) {
    return each_part<Ints>([&](int i) {
        IntPart part;
        std::memcpy(&part, static_cast<const char*>(from) + i * kPartBytes, sizeof part);
        return part;
    });
}

// 16 integers of fewer bits, as int32.
template <class Int>
SHOAL_INLINE Ints load_each(const Int* from) {
    int32_t lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = from[i];
    return load_words(lanes);
}
SHOAL_INLINE Ints load_ints(const int8_t* from) {
#if defined(__AVX512F__)
    return {{reinterpret_cast<IntPart>(
        _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))}};
#elif defined(__AVX2__)
    return each_part<Ints>([&](int i) {
        return reinterpret_cast<IntPart>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i * 8))));
    });
#else
    return load_each(from);
#endif
}
SHOAL_INLINE Ints load_ints(const uint8_t* from) {
#if defined(__AVX512F__)
    return {{reinterpret_cast<IntPart>(
        _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))}};
#elif defined(__AVX2__)
    return each_part<Ints>([&](int i) {
        return reinterpret_cast<IntPart>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i * 8))));
    });
#else
    return load_each(from);
#endif
}
SHOAL_INLINE Ints load_ints(const uint16_t* from) {
#if defined(__AVX512F__)
    return {{reinterpret_cast<IntPart>(
        _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))))}};
#elif defined(__AVX2__)
    return each_part<Ints>([&](int i) {
        return reinterpret_cast<IntPart>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i)));
    });
#else
    return load_each(from);
#endif
}

// 32 int8 as 32 int16.
SHOAL_INLINE Ints load_pairs(const int8_t* from) {
#if defined(__AVX512BW__)
    return {{reinterpret_cast<IntPart>(
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))))}};
#elif defined(__AVX2__)
    return each_part<Ints>([&](int i) {
        return reinterpret_cast<IntPart>(
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i)));
    });
#else
    int16_t pairs[2 * kLanes];
    for (int i = 0; i < 2 * kLanes; ++i) pairs[i] = from[i];
    Ints result;
    std::memcpy(&result, pairs, sizeof result);
    return result;
#endif
}

// sum + a[2i] * b[2i] + a[2i + 1] * b[2i + 1] in each lane i, for 32 int16 each.  The caller makes sure that no sum
// overflows.
SHOAL_INLINE Ints add_products(const Ints& a, const Ints& b, const Ints& sum) {
    return each_part<Ints>([&](int i) {
#if defined(__AVX512VNNI__)
        return reinterpret_cast<IntPart>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum.part[i]),
                                                             reinterpret_cast<__m512i>(a.part[i]),
                                                             reinterpret_cast<__m512i>(b.part[i])));
#elif defined(__AVX2__)
        return sum.part[i] + reinterpret_cast<IntPart>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a.part[i]),
                                                                         reinterpret_cast<__m256i>(b.part[i])));
#elif defined(__SSE2__)
        return sum.part[i] + reinterpret_cast<IntPart>(_mm_madd_epi16(reinterpret_cast<__m128i>(a.part[i]),
                                                                      reinterpret_cast<__m128i>(b.part[i])));
#else
        IntPart result = sum.part[i];
        for (int lane = 0; lane < kPartLanes; ++lane) {
            int16_t x[2], y[2];
            const int32_t x_bits = a.part[i][lane], y_bits = b.part[i][lane];
            std::memcpy(x, &x_bits, sizeof x);
            std::memcpy(y, &y_bits, sizeof y);
            result[lane] += x[0] * y[0] + x[1] * y[1];
        }
        return result;
#endif
    });
}

}  // namespace shoal
