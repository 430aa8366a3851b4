// The two products of latent attention: rows of queries with rows of the cache, and rows of weights with them.
//
// All heads read the same row of the cache, so that arithmetic and not memory limits these products: with 16 heads there
// are 30 multiply-adds for each element.  Sums stay in registers, and a register is a part of a vector.
#pragma once

#include <utility>

#include "matmul.h"

namespace shoal {

#if defined(__AVX512F__)
constexpr int kScoreRows = 4, kWeighRows = 8, kWeighParts = 2;
#elif defined(__AVX2__)
constexpr int kScoreRows = 3, kWeighRows = 6, kWeighParts = 2;
#else
constexpr int kScoreRows = 1, kWeighRows = 2, kWeighParts = 2;
#endif
// Rows of the cache in a tile of scores.
constexpr int kScoreKeys = 4;

// For runs of kRun lanes in a and b: the sums of the lanes that are kRun / 2 apart; a run of a, then one of b.
template <int kRun, size_t... kLane>
SHOAL_INLINE FloatPart fold(FloatPart a, FloatPart b, std::index_sequence<kLane...>) {
    const auto shuffle = [&](auto shift) {
        constexpr auto source = [](int lane) {
            const int is_of_b = lane % kRun >= kRun / 2;
            return lane + is_of_b * (kPartLanes - kRun / 2) + decltype(shift)::value;
        };
#if defined(__clang__)
        return __builtin_shufflevector(a, b, source(kLane)...);
#else
        return __builtin_shuffle(a, b, IntPart{source(kLane)...});
#endif
    };
    return shuffle(std::integral_constant<int, 0>{}) + shuffle(std::integral_constant<int, kRun / 2>{});
}

// Folds `count` parts, a multiple of kRun, until lane i of part p is the sum of the lanes of the former part
// p * kPartLanes + i.
template <int kRun = kPartLanes>
SHOAL_INLINE void fold_all(FloatPart* parts, int count) {
    if constexpr (kRun > 1) {
        FloatPart* to = parts;
#pragma GCC unroll 4
        for (int run = 0; run < count; run += kRun) {
#pragma GCC unroll 8
            for (int i = run; i < run + kRun / 2; ++i) {
                *to++ = fold<kRun>(parts[i], parts[i + kRun / 2], std::make_index_sequence<kPartLanes>{});
            }
        }
        fold_all<kRun / 2>(parts, count / 2);
    }
}

// Writes the sums of the lanes of at most 16 vectors, each with the bits of sum_lanes.
template <int kCount>
SHOAL_INLINE void sum_each(const Vec (&vectors)[kCount], float* to) {
    FloatPart parts[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        parts[i] = splat(0.0F);
        if (i >= kCount) continue;
        FloatPart sums[kParts];
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) sums[p] = vectors[i].part[p];
#pragma GCC unroll 2
        for (int half = kParts / 2; half > 0; half /= 2) {
#pragma GCC unroll 2
            for (int p = 0; p < half; ++p) sums[p] = sums[p] + sums[p + half];
        }
        parts[i] = sums[0];
    }
    fold_all(parts, kLanes);
    float lanes[kLanes];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) store_part(lanes + p * kPartLanes, parts[p]);
    std::memcpy(to, lanes, kCount * sizeof(float));
}

// scores[r][k] = row r of queries times row k of keys, both `stride` long, a multiple of 16.  Fetches as many bytes as a
// row of float32 has from `ahead` on.
template <int kRows>
__attribute__((noinline)) void score_tile(const float* queries, const float* keys, ptrdiff_t stride, const char* ahead,
                                          float* scores, ptrdiff_t score_stride) {
    Vec sums[kRows * kScoreKeys];
    for (int part = 0; part < kParts; ++part) {
        FloatPart tile[kRows][kScoreKeys];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int k = 0; k < kScoreKeys; ++k) tile[r][k] = splat(0.0F);
        }
        for (ptrdiff_t i = part * kPartLanes; i < stride; i += kLanes) {
            FloatPart key[kScoreKeys];
#pragma GCC unroll 4
            for (int k = 0; k < kScoreKeys; ++k) key[k] = load_part(keys + k * stride + i);
            __builtin_prefetch(ahead + i * sizeof(float), 0, 2);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const FloatPart query = load_part(queries + r * stride + i);
#pragma GCC unroll 4
                for (int k = 0; k < kScoreKeys; ++k) tile[r][k] = fma(query, key[k], tile[r][k]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int k = 0; k < kScoreKeys; ++k) sums[r * kScoreKeys + k].part[part] = tile[r][k];
        }
    }
    float products[kRows * kScoreKeys];
    sum_each(sums, products);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
        std::memcpy(scores + r * score_stride, products + r * kScoreKeys, kScoreKeys * sizeof(float));
    }
}

// scores[r][k] = row r of queries times key k, for 16 keys, one after the other.  Meanwhile fetches the 16 rows of
// ahead_bytes each from `ahead` on, as far as there are tiles to do it beside.
inline void score(const float* queries, int num_rows, const float* keys, ptrdiff_t stride, const char* ahead,
                  ptrdiff_t ahead_bytes, float* scores, ptrdiff_t score_stride) {
    constexpr int kTiles = kLanes / kScoreKeys;
    for (int key = 0; key < kLanes; key += kScoreKeys) {
        for (int row = 0; row < num_rows; row += kScoreRows) {
            const int fetched = key / kScoreKeys + std::min(row / kScoreRows, kTiles - 1) * kTiles;
            with_constant<kScoreRows>(std::min(kScoreRows, num_rows - row), [&](auto rows) {
                score_tile<decltype(rows)::value>(queries + row * stride, keys + key * stride, stride,
                                                  ahead + fetched * ahead_bytes, scores + row * score_stride + key,
                                                  score_stride);
            });
        }
    }
}

// to[r] += weights[r][k] * groups[k / 16] row k % 16, for k from begin to end, kRows rows, and kColumns registers of
// columns from `column` on.
template <int kRows, int kColumns>
__attribute__((noinline)) void weigh_tile(const float* weights, ptrdiff_t weight_stride, const float* const* groups,
                                          ptrdiff_t stride, int column, int begin, int end, float* to,
                                          ptrdiff_t to_stride) {
    FloatPart sums[kRows][kColumns];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) sums[r][c] = load_part(to + r * to_stride + column + c * kPartLanes);
    }
    for (int at = begin; at < end; at += kLanes) {
        const float* row = groups[at / kLanes] + column;
        for (int k = at; k < std::min(at + kLanes, end); ++k, row += stride) {
            FloatPart values[kColumns];
#pragma GCC unroll 4
            for (int c = 0; c < kColumns; ++c) values[c] = load_part(row + c * kPartLanes);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const FloatPart weight = splat(weights[r * weight_stride + k]);
#pragma GCC unroll 4
                for (int c = 0; c < kColumns; ++c) sums[r][c] = fma(weight, values[c], sums[r][c]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) store_part(to + r * to_stride + column + c * kPartLanes, sums[r][c]);
    }
}

// The same for all rows and `width` columns, a multiple of 16; `begin` is a multiple of 16.
inline void weigh(const float* weights, ptrdiff_t weight_stride, int num_rows, const float* const* groups,
                  ptrdiff_t stride, int width, int begin, int end, float* to, ptrdiff_t to_stride) {
    if (begin >= end) return;
    constexpr int kStep = kWeighParts * kPartLanes;
    for (int column = 0; column < width; column += kStep) {
        for (int row = 0; row < num_rows; row += kWeighRows) {
            with_constant<kWeighRows>(std::min(kWeighRows, num_rows - row), [&](auto rows) {
                const auto tile = column + kStep <= width ? weigh_tile<decltype(rows)::value, kWeighParts>
                                                          : weigh_tile<decltype(rows)::value, 1>;
                tile(weights + row * weight_stride, weight_stride, groups, stride, column, begin, end,
                     to + row * to_stride, to_stride);
            });
        }
    }
}

}  // namespace shoal
