// The feed-forward block of a layer: down(activation(gate(x)) * up(x)) (Shazeer 2020), or down(activation(up(x))).
#pragma once

#include "matrix.h"
#include "shoal.h"

namespace shoal {

struct FeedForward {
    int width;
    ShoalActivation activation;
    bool gated;
    Matrix gate_up;  // panels of gate and up in turns; of up alone where there is no gate
    Matrix down;

    FeedForward(const ShoalShape& shape, int width, ShoalArithmetic arithmetic, Arena& arena)
        : width(width),
          activation(shape.activation),
          gated(shape.gated != 0),
          gate_up((gated ? 2 : 1) * round_up(width, kLanes), shape.hidden_size, arithmetic, arena),
          down(shape.hidden_size, width, arithmetic, arena) {}

    // Writes what `down` reads to the same rows of `to`, for num_rows rows of x from `first` on, and for a range of the
    // panels of gate_up that begins and ends with an even one.
    void activate(const Rows& x, int first, int num_rows, const PanelRange& range, Rows& to) const;
};

}  // namespace shoal
