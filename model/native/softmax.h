// Softmax over a stretch of scores.
#pragma once

#include <algorithm>
#include <limits>

#include "matrix.h"

namespace shoal {

// Replaces the scores from begin to end by weights e**(score - greatest); gives the greatest score and the sum of the
// weights.
inline void exponentiate(float* scores, int begin, int end, float* greatest, float* sum) {
    const int first = round_up(begin, kLanes), full = end / kLanes * kLanes;
    float most = -std::numeric_limits<float>::infinity();
    for (int i = begin; i < std::min(first, end); ++i) most = scores[i] > most ? scores[i] : most;
    Vec greatest_lanes = broadcast(most);
    for (int i = first; i < full; i += kLanes) greatest_lanes = max(load(scores + i), greatest_lanes);
    most = max_lanes(greatest_lanes);
    for (int i = std::max(first, full); i < end; ++i) most = scores[i] > most ? scores[i] : most;
    Vec sums = broadcast(0.0F);
    // The vector at i, of which lanes before begin or from end on get weight zero.
    const auto add_part = [&](int i) {
        store(scores + i, exp(load(scores + i) - broadcast(most)));
        for (int k = i; k < begin; ++k) scores[k] = 0;
        for (int k = end; k < i + kLanes; ++k) scores[k] = 0;
        sums = sums + load(scores + i);
    };
    if (begin < first) add_part(first - kLanes);
    for (int i = first; i < full; i += kLanes) {
        const Vec weights = exp(load(scores + i) - broadcast(most));
        store(scores + i, weights);
        sums = sums + weights;
    }
    if (first <= full && full < end) add_part(full);
    *greatest = most;
    *sum = sum_lanes(sums);
}

// Joins the next stretch of a row to the ones before it: its greatest score, its sum of weights, and its weighted sum of
// values, [width].
inline void join_row(float& greatest, float& sum, float* values, float next_greatest, float next_sum,
                     const float* next_values, int width) {
    const float most = std::max(greatest, next_greatest);
    float lanes[kLanes] = {greatest - most, next_greatest - most};
    store(lanes, exp(load(lanes)));
    const float kept = lanes[0], share = lanes[1];
    greatest = most;
    sum = sum * kept + next_sum * share;
    for (int i = 0; i < width; ++i) values[i] = values[i] * kept + next_values[i] * share;
}

// What the weights' sum is divided into if a sink takes a share of it too: e**greatest / (sum * e**greatest + e**sink).
inline float with_sink(float greatest, float sum, float sink) {
    const float most = std::max(greatest, sink);
    float lanes[kLanes] = {greatest - most, sink - most};
    store(lanes, exp(load(lanes)));
    return lanes[0] / (sum * lanes[0] + lanes[1]);
}

}  // namespace shoal
