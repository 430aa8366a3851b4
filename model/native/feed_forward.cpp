#include "feed_forward.h"

#include "activations.h"

namespace shoal {

void FeedForward::activate(const Rows& x, int first, int num_rows, const PanelRange& range, Rows& to) const {
    with_activation(activation, [&](const auto& function, const auto& factor) {
        if (!gated) {
            gate_up.multiply(x, first, num_rows, range, [&](int row, int panel, const Vec& values) {
                store(to[first + row] + panel * kLanes, function(values));
            });
            return;
        }
        gate_up.multiply(x, first, num_rows, range, [&](int row, int panel, const Vec& values) {
            float* at = to[first + row] + panel / 2 * kLanes;
            store(at, panel % 2 == 0 ? values : function(load(at)) * factor(values));
        });
    });
}

}  // namespace shoal
