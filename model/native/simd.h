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

// 16 int32, or as many groups of smaller numbers.
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

// The same 32 bits, which may be several numbers, in each lane.
SHOAL_INLINE Ints broadcast_word(const void* from) {
    int32_t word;
    std::memcpy(&word, from, sizeof word);
    return broadcast(word);
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

// The numbers that the low four bits of each lane are; the other bits are ignored.
SHOAL_INLINE FloatPart nibbles_to_floats(IntPart a) {
#if defined(__AVX512F__)
    const FloatPart numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return static_cast<FloatPart>(_mm512_maskz_permutexvar_ps(0xffff, reinterpret_cast<__m512i>(a), numbers));
#else
    return __builtin_convertvector(a & splat(int32_t{15}), FloatPart);
#endif
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

// The low four bits of each byte, and the high ones.
SHOAL_INLINE Ints low_halves(const Ints& a) {
    return each_part<Ints>([&](int i) { return a.part[i] & splat(int32_t{0x0f0f0f0f}); });
}
SHOAL_INLINE Ints high_halves(const Ints& a) {
    return each_part<Ints>([&](int i) { return a.part[i] >> 4 & splat(int32_t{0x0f0f0f0f}); });
}

#if !defined(__AVX2__)
// sum + a[2i] * b[2i] + a[2i + 1] * b[2i + 1] in each lane i, for int16.
SHOAL_INLINE IntPart add_products_of_pairs(IntPart a, IntPart b, IntPart sum) {
#if defined(__SSE2__)
    return sum + reinterpret_cast<IntPart>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}
#endif

// sum + the four products of bytes in each lane.  Those of b have a sign and are not -128; those of a have a sign, or are
// at most 15.  A sum of products with a sign begins with begin_products(the sum of all bytes of a lane of b).
template <bool kSigned>
SHOAL_INLINE Ints add_products_of_bytes(const Ints& a, const Ints& b, const Ints& sum) {
#if defined(__AVX512VNNI__)
    const IntPart weights = kSigned ? a.part[0] ^ splat(int32_t{-0x7f7f7f80}) : a.part[0];  // with a sign: 128 more
    return {{reinterpret_cast<IntPart>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum.part[0]),
                                                           reinterpret_cast<__m512i>(weights),
                                                           reinterpret_cast<__m512i>(b.part[0])))}};
#elif defined(__AVX2__)
    return each_part<Ints>([&](int i) {
        __m256i x = reinterpret_cast<__m256i>(a.part[i]), y = reinterpret_cast<__m256i>(b.part[i]);
        if (kSigned) y = _mm256_sign_epi8(y, x), x = _mm256_abs_epi8(x);
        const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1));
        return sum.part[i] + reinterpret_cast<IntPart>(pairs);
    });
#else
    typedef int16_t Shorts __attribute__((vector_size(kPartBytes)));
    return each_part<Ints>([&](int i) {
        const Shorts x = reinterpret_cast<Shorts>(a.part[i]), y = reinterpret_cast<Shorts>(b.part[i]);
        const IntPart evens = add_products_of_pairs(reinterpret_cast<IntPart>(x << 8 >> 8),
                                                    reinterpret_cast<IntPart>(y << 8 >> 8), sum.part[i]);
        return add_products_of_pairs(reinterpret_cast<IntPart>(x >> 8), reinterpret_cast<IntPart>(y >> 8), evens);
    });
#endif
}
template <bool kSigned>
SHOAL_INLINE Ints begin_products([[maybe_unused]] int32_t sum_of_bytes) {
#if defined(__AVX512VNNI__)
    if (kSigned) return broadcast(-128 * sum_of_bytes);
#endif
    return broadcast(int32_t{0});
}

}  // namespace shoal
