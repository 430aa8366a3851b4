#include "weights.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "simd.h"

namespace shoal {

namespace {

typedef double DoublePart __attribute__((vector_size(kPartBytes)));
typedef int64_t LongPart __attribute__((vector_size(kPartBytes)));

// Sums are kept in 16 lanes, so that their order is the same on every instruction set.
constexpr int kDoubleParts = 2 * kParts;
constexpr int kDoublePartLanes = kPartLanes / 2;
constexpr int kLength = 4 * kLanes;

SHOAL_INLINE DoublePart splat(double value) { return value - DoublePart{}; }

// c0 + c1 x + c2 x**2 ...
SHOAL_INLINE DoublePart polynomial(DoublePart, double c0) { return splat(c0); }
template <class... Rest>
SHOAL_INLINE DoublePart polynomial(DoublePart x, double c0, Rest... rest) {
    return c0 + x * polynomial(x, rest...);
}

// e to the power of x, for x of at most 0, within a unit in the last place; e**-708 for x below -708, 1 for 0.
SHOAL_INLINE DoublePart exp(DoublePart x) {
    constexpr double kLog2E = 0x1.71547652b82fep0, kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
    constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
    x = x < splat(-708.0) ? splat(-708.0) : x;
    const DoublePart shifted = x * kLog2E + kRound;
    const DoublePart n = shifted - kRound;
    const DoublePart r = (x - n * kLn2High) - n * kLn2Low;
    const DoublePart r2 = r * r;
    // Taylor's series up to r**13, in two chains that the processor computes side by side.
    const DoublePart even = polynomial(r2, 1.0 / 2, 1.0 / 24, 1.0 / 720, 1.0 / 40320, 1.0 / 3628800, 1.0 / 479001600);
    const DoublePart odd =
        polynomial(r2, 1.0 / 6, 1.0 / 120, 1.0 / 5040, 1.0 / 362880, 1.0 / 39916800, 1.0 / 6227020800);
    const DoublePart power = 1.0 + (r + r2 * (even + r * odd));
    const LongPart exponent = reinterpret_cast<LongPart>(shifted) + 1023;
    return power * reinterpret_cast<DoublePart>(exponent << 52);
}

}  // namespace

double sum_of_weights(const float* logits, int size, double temperature, double x_max) {
    DoublePart sums[kDoubleParts] = {};
    double x[kLength];
    const auto add = [&] {
        for (int begin = 0; begin < kLength; begin += kLanes) {
            for (int i = 0; i < kDoubleParts; ++i) {
                DoublePart part;
                std::memcpy(&part, x + begin + i * kDoublePartLanes, sizeof part);
                sums[i] += exp(part);
            }
        }
    };
    int begin = 0;
    for (; begin + kLength <= size; begin += kLength) {
        for (int i = 0; i < kLength; ++i) x[i] = static_cast<double>(logits[begin + i]) / temperature - x_max;
        add();
    }
    if (begin < size) {
        std::fill(x, x + kLength, -std::numeric_limits<double>::infinity());
        for (int i = 0; begin + i < size; ++i) x[i] = static_cast<double>(logits[begin + i]) / temperature - x_max;
        add();
    }
    double lanes[kLanes];
    std::memcpy(lanes, sums, sizeof lanes);
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum;
}

}  // namespace shoal
