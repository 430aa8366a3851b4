#include "bytes.h"

#include "rounding.h"

namespace shoal {

namespace {

// Of eight bytes those at even places, then the others.
uint64_t evens_first(uint64_t bytes) {
    const auto evens = [](uint64_t x) {
        x &= 0x00ff00ff00ff00ff;
        x = (x | x >> 8) & 0x0000ffff0000ffff;
        return (x | x >> 16) & 0xffffffff;
    };
    return evens(bytes) | evens(bytes >> 8) << 32;
}

void round_group(const float* values, ByteGroup& to) {
    int8_t codes[kByteGroup];
    to.scale = round_to_codes(values, kByteGroup, codes);
    int32_t sum = 0;
    for (const int8_t code : codes) sum += code;
    to.sum_of_codes = sum;
    to.sum = to.scale * static_cast<float>(sum);
    uint64_t words[kByteGroup / 8];
    std::memcpy(words, codes, sizeof words);
    for (uint64_t& word : words) word = evens_first(word);
    std::memcpy(to.codes, words, sizeof words);
}

void round_to_nibbles(const float* weights, uint8_t* block) {
    float least = weights[0], greatest = weights[0];
    for (int k = 1; k < kByteGroup; ++k) {
        least = std::fmin(least, weights[k]);
        greatest = std::fmax(greatest, weights[k]);
    }
    const float range = greatest - least + greatest_magnitude(weights, kByteGroup) * 0;  // NaN as there
    const uint16_t halves[] = {float_to_half(range / 15), float_to_half(least)};
    const float scale = half_to_float(halves[0]), min = half_to_float(halves[1]);
    const float inverse = scale > 0 ? 1 / scale : 0;
    const auto code = [&](int k) { return round_to_int(std::fmin(std::fmax((weights[k] - min) * inverse, 0), 15)); };
    std::memcpy(block, halves, sizeof halves);
    for (int k = 0; k < kByteGroup / 2; ++k) {
        block[sizeof halves + k] = static_cast<uint8_t>(code(k) | code(k + kByteGroup / 2) << 4);
    }
}

void round_to_int8(const float* weights, uint8_t* block) {
    const uint16_t half = float_to_half(greatest_magnitude(weights, kByteGroup) / 127);
    const float scale = half_to_float(half);
    const float inverse = scale > 0 ? 1 / scale : 0;
    std::memcpy(block, &half, sizeof half);
    for (int k = 0; k < kByteGroup; ++k) {
        const float code = std::fmin(std::fmax(weights[k] * inverse, -127), 127);
        block[sizeof half + k] = static_cast<uint8_t>(round_to_int(code));
    }
}

// Calls body(values, index) for each group of 32 values, of which zeroes fill the last.
template <class Body>
void for_groups(const float* values, int count, const Body& body) {
    int first = 0;
    for (; first + kByteGroup <= count; first += kByteGroup) body(values + first, first / kByteGroup);
    if (first == count) return;
    float last[kByteGroup] = {};
    std::memcpy(last, values + first, (count - first) * sizeof(float));
    body(last, first / kByteGroup);
}

}  // namespace

void round_to_bytes(const float* values, int count, ByteGroup* to) {
    for_groups(values, count, [&](const float* group, int index) { round_group(group, to[index]); });
}

void round_to_q4_1(const float* weights, int count, uint8_t* blocks) {
    for_groups(weights, count, [&](const float* group, int index) {
        round_to_nibbles(group, blocks + index * ptrdiff_t{Blocks<4, true>::kBytes});
    });
}

void round_to_q8_0(const float* weights, int count, uint8_t* blocks) {
    for_groups(weights, count, [&](const float* group, int index) {
        round_to_int8(group, blocks + index * ptrdiff_t{Blocks<8, false>::kBytes});
    });
}

}  // namespace shoal
