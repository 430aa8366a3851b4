// The feed-forward block of a layer: SwiGLU (Shazeer 2020), dense or as a mixture of experts (Jiang et al. 2024).
#pragma once

#include <vector>

#include "matrix.h"

namespace shoal {

// down(silu(gate(x)) * up(x)).
struct FeedForward {
    Matrix gate_up;  // panels of gate and up in turns
    Matrix down;

    FeedForward(int hidden_size, int intermediate_size, bool quantized, Arena& arena)
        : gate_up(2 * round_up(intermediate_size, kLanes), hidden_size, quantized, arena),
          down(hidden_size, intermediate_size, quantized, arena) {}

    // Writes silu(gate(x)) * up(x) to the same rows of `to`, for num_rows rows of x from `first` on, and for the panels
    // from begin to end (both even).
    void activate(const Rows& x, int first, int num_rows, int begin, int end, Rows& to) const {
        gate_up.multiply(x, first, num_rows, begin, end, [&](int row, int panel, const Vec& values) {
            float* at = to[first + row] + panel / 2 * kLanes;
            store(at, panel % 2 == 0 ? values : silu(load(at)) * values);
        });
    }
};

// Assigns each row to the experts with the best scores of the router, and groups the rows by expert.
class Routing {
public:
    Routing(int num_experts, int num_experts_per_tok) : num_experts_(num_experts), num_chosen_(num_experts_per_tok) {}

    void reserve(int num_rows) {
        const size_t size = static_cast<size_t>(num_rows) * num_chosen_;
        experts_.reserve(size);
        shares_.reserve(size);
        places_.reserve(size);
    }

    // Chooses the experts of a row by its scores [num_experts].  Their shares are the softmax over the chosen scores,
    // which equals a softmax over all scores that is then normalized over the chosen ones.
    void choose(int row, const float* scores);

    // Gives a place to each chosen expert of each row; the places of an expert form one range.
    void gather(int num_rows);

    struct Range {
        int expert;
        int begin;
        int end;
    };
    const std::vector<Range>& ranges() const { return ranges_; }
    int place(int row, int choice) const { return places_[row * num_chosen_ + choice]; }
    float share(int row, int choice) const { return shares_[row * num_chosen_ + choice]; }
    int num_chosen() const { return num_chosen_; }

private:
    int num_experts_;
    int num_chosen_;
    Array<int> experts_;    // [rows][num_chosen], best first
    Array<float> shares_;   // the same
    Array<int> places_;     // the same
    std::vector<Range> ranges_;
};

}  // namespace shoal
